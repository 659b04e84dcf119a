"""Layers that launch fewer kernels in training than transformers' and peft's, with the same result.

Under autocast, and with norms in float32, a third of a training step's kernels convert numbers.
Where the decoder's weights are bfloat16 it therefore runs without autocast, its residual stream in
bfloat16; norms, softmax and losses compute in float32 inside.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners import lora as peft_lora
from torch import Tensor, nn

try:
    import bitsandbytes as bnb
except ImportError:  # some systems have no build of it
    bnb = None


# Block size, kind of quantisation, shape and number type of a 4-bit weight.
_Layout = tuple[int, str, tuple[int, int], torch.dtype]


@torch.library.custom_op("hsft::dequantize_4bit", mutates_args=())
def _dequantize(
    packed: Tensor, absmax: Tensor, blocksize: int, kind: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, blocksize, kind, shape, dtype
    )
    return weight


@_dequantize.register_fake
def _(
    packed: Tensor, absmax: Tensor, blocksize: int, kind: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


class _DequantizedLinear(torch.autograd.Function):
    """x W' with a frozen 4-bit W, dequantised in the forward and again in the backward pass.

    bitsandbytes may take its fused kernel instead for up to 1,536 rows of x; in training that is
    slower than dequantising, and the backward pass dequantises anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, absmax: Tensor, layout: _Layout, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(packed, absmax)
        ctx.layout = layout
        weight = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, *layout)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, absmax = ctx.saved_tensors
        # By another name than in the forward pass: torch.compile would take both for one computation
        # and keep every layer's dequantised weights between them, four times what QLoRA saves.
        compiling = torch.compiler.is_compiling()
        again = _dequantize if compiling else torch.ops.bitsandbytes.dequantize_4bit.default
        weight = again(packed, absmax, *ctx.layout)
        return grad @ weight.to(grad.dtype), None, None, None, None


def _lora_forward(layer: Any, x: Tensor) -> Tensor:
    """Add a low-rank update to a linear layer's result, in the number type of x.

    Float32 matrices stay what is trained; their copies in x's type are made for the call.
    """
    result: Tensor = layer.base_layer(x)
    (name,) = layer.active_adapters
    a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    x = layer.lora_dropout[name](x)
    if a.weight.dtype == x.dtype:
        # Through the modules, whose hooks bring their weights together under ZeRO stage 3.
        return torch.add(result, b(a(x)), alpha=scale)
    low = F.linear(x, a.weight.to(x.dtype)).flatten(0, -2)
    rows = result.flatten(0, -2)
    return torch.addmm(rows, low, b.weight.to(x.dtype).t(), alpha=scale).view_as(result)


def _is_plain(layer: Any) -> bool:
    return not (layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1)


class _FewerKernels:
    """The forward pass of a LoRA layer, to be put before one of peft's."""

    keeps_dtype = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute x W' + s (dropout(x) A') B': [..., in] -> [..., out]."""
        if args or kwargs or not _is_plain(self):
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        return _lora_forward(self, x)


class LoraLinear(_FewerKernels, peft_lora.Linear):
    """peft's LoRA on a linear layer, with fewer kernels."""


if bnb is not None:

    class Linear4bit(bnb.nn.Linear4bit):
        """bitsandbytes' 4-bit layer, dequantised for every product; its constants are not nested."""

        def forward(self, x: Tensor) -> Tensor:
            """Compute x W' + b: [..., in] -> [..., out], in x's number type."""
            dtype = self.compute_dtype or x.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            weight: Any = self.weight
            state = weight.quant_state
            layout = (state.blocksize, state.quant_type, tuple(state.shape), state.dtype)
            result: Tensor = _DequantizedLinear.apply(
                x.to(dtype), weight.data, state.absmax, layout, bias
            )
            return result.to(x.dtype)

    class LoraLinear4bit(_FewerKernels, peft_lora.Linear4bit):
        """peft's LoRA on a 4-bit layer, with fewer kernels."""


def use_fast_lora_layers(settings: LoraConfig) -> None:
    """Tell peft to use these LoRA layers for plain and 4-bit linear layers."""
    layers: dict[type[nn.Module], type[nn.Module]] = {}
    if bnb is not None:
        # A linear layer too, so it comes first; that of int8 is left to peft.
        layers |= {bnb.nn.Linear4bit: LoraLinear4bit, bnb.nn.Linear8bitLt: peft_lora.Linear8bitLt}
    settings._register_custom_module({**layers, nn.Linear: LoraLinear})


def dequantize_in_training(model: nn.Module) -> None:
    """Make a model's 4-bit layers dequantise for every product, whatever its size."""
    for module in model.modules():
        if bnb is not None and type(module) is bnb.nn.Linear4bit:
            # The weights stay as they are; only the product differs.
            module.__class__ = Linear4bit
            weight: Any = module.weight
            _flatten_constants(weight.quant_state)


def _flatten_constants(state: Any) -> None:
    """Undo the quantisation of a 4-bit weight's constants, not what it rounded.

    A third of a bit a weight, for two kernels less at each of a step's many dequantisations.
    """
    if state.nested:
        constants = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
        state.absmax = (constants + state.offset).float()
        state.nested, state.state2, state.offset = False, None, None
