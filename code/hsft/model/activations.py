"""Count what autograd saves for the backward pass of a decoder, with fake tensors.

One and two layers of the model run in torch's FakeTensorMode, which has shapes and no numbers, and every
tensor that autograd saves is added up; further layers save the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from hsft.model.backbone import keep_layers, linear_layers
from hsft.model.fake_tensors import SavedBytes, give_fake_storage
from hsft.model.meta import load_source
from hsft.model.structure import DecoderSource, DecoderTraining

# Rows of the fake batch: enough that what is saved once a layer hardly counts.
_ROWS = 256
_NO_MASK = "sdpa_without_mask"

AttentionInterface.register(_NO_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(_NO_MASK, lambda *_, **__: None)


def count_saved_bytes(source: DecoderSource, training: DecoderTraining) -> tuple[float, float]:
    """Return (bytes per position and layer, bytes per position outside the layers)."""
    one, two = (_saved(source, training, layers) for layers in (1, 2))
    positions = _ROWS * training.row_length
    return (two - one) / positions, (2 * one - two) / positions


class _Quantised(nn.Linear):
    """Saves what bitsandbytes' layers save: inputs in the compute type, outputs in the input's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class _QuantisedConv1D(Conv1D):
    """The same for GPT-2's layers, whose weight is the transpose of a linear layer's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight.T, self.bias).to(x.dtype)


class _NormSaves(torch.autograd.Function):
    """Saves what torch's RMS norm saves on a GPU: its input, and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("only what is saved is counted")


class _Norm(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _NormSaves.apply(x, self.weight)
        return result


def _with_fused_norms(model: nn.Module) -> nn.Module:
    """Replace the norms of the kinds that `norms.fuse_norms` replaces in a model with weights."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            weight: Any = getattr(module, "weight", None)
            plain = hasattr(module, "variance_epsilon") and "RMSNorm" in type(module).__name__
            if plain and weight is not None:
                setattr(parent, name, _Norm(weight))
    return model


def _saved(source: DecoderSource, training: DecoderTraining, layers: int) -> int:
    """Count the bytes that autograd saves in a fake model's forward pass over `_ROWS` rows.

    With a mask, transformers' sdpa repeats keys and values for grouped queries; without one, as in
    the flash kernels, it does not. For eager attention transformers always makes one itself.
    """
    config = load_source(source)
    keep_layers(config, layers)
    eager = training.attention == "eager"
    masked = training.masked and not eager
    dtype = getattr(torch, training.residual_dtype)
    with torch.device("meta"):
        plain = AutoModel.from_config(
            config,
            attn_implementation=training.attention if masked or eager else _NO_MASK,
            dtype=dtype,
            trust_remote_code=source.trust_remote_code,
        )
        model = _adapted(_with_fused_norms(plain), training).train()
    with FakeTensorMode():
        give_fake_storage(model)
        length = training.row_length
        vectors = torch.zeros(_ROWS, length, config.hidden_size, dtype=dtype, requires_grad=True)
        # Positions too: some models would count them from a mask of another shape.
        given = {
            "attention_mask": torch.zeros(_ROWS, 1, length, length, dtype=torch.bool),
            "position_ids": torch.arange(length).expand(_ROWS, length),
        }
        saved = SavedBytes(model, smallest_ndim=2)
        # The autocast type of the GPU is what counts; fake tensors are on the CPU, which has no
        # float16 mode, and both types have two bytes.
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=training.autocast)
        with saved.hooks(), mixed:
            model(inputs_embeds=vectors, use_cache=False, **(given if masked else {}))
    return saved.total


def _adapted(model: nn.Module, training: DecoderTraining) -> nn.Module:
    """Give a decoder the number types and the LoRA matrices that training has."""
    dtype = getattr(torch, training.dtype)
    half = torch.bfloat16 if dtype == torch.float16 else dtype
    for module in linear_layers(model).values() if training.quantised else ():
        weight: Any = module.weight
        module.weight = nn.Parameter(weight.detach().to(half), requires_grad=False)
        module.__class__ = _QuantisedConv1D if isinstance(module, Conv1D) else _Quantised
    if training.lora_rank is None:
        return model
    from peft import LoraConfig, get_peft_model

    from hsft.model.fast_layers import use_fast_lora_layers

    names = list(training.lora_targets)
    chosen: Any = "all-linear" if names == ["all-linear"] else names
    settings = LoraConfig(r=training.lora_rank, lora_dropout=0.05, target_modules=chosen)
    if training.quant_type != "int8":
        use_fast_lora_layers(settings)
    adapted: nn.Module = get_peft_model(model, settings)
    return adapted
