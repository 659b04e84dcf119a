"""Sentence encoders as ItemLLMs: sentence-transformers' folders, and plain encoders such as BERT.

A folder in sentence-transformers' layout lists its steps in `modules.json`: a transformer, a pooling
of its token states (`1_Pooling/config.json`), dense layers, normalisation. They are read here without
that package. A folder without `modules.json` is mean-pooled, as sentence-transformers does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hsft.encoding.item_llm import ItemEncoder, Pooling, load_tokenizer, to_device, widened
from hsft.model.backbone import LoraSettings, add_lora, load_model_config
from hsft.model.folder import check_files
from hsft.utils.errors import InputError, brief, one_line
from hsft.utils.files import is_file, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hsft.encoding.prefix import Prefix

MODULES = "modules.json"
# In the order in which sentence-transformers puts several of them side by side.
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
# Names under which models list the prompt for what is searched, not for the query.
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "GELU": nn.GELU, "ReLU": nn.ReLU}


@dataclass(frozen=True)
class SentenceFolder:
    """What a sentence encoder's configuration files say.

    Attributes:
        transformer: folder of the transformer.
        poolings: how token states become one vector, several side by side.
        dense: folders of dense layers after the pooling.
        normalize: scale to unit length at the end.
        max_tokens: longest text that it was made for, special tokens included; None: not said.
        lower_case: whether texts are lower-cased first.
        prompt: what texts of items begin with.
    """

    transformer: Path
    poolings: tuple[str, ...] = ("mean",)
    dense: tuple[Path, ...] = ()
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    prompt: str = ""


def is_sentence_encoder(folder: str | Path, trust_remote_code: bool = False) -> bool:
    """Say whether a model folder is a sentence encoder: by its `modules.json` or its kind of model.

    Raises:
        InputError: it has no readable config.json.
    """
    if is_file(Path(folder) / MODULES):
        return True
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = load_model_config(folder, trust_remote_code)
    kind = getattr(config, "model_type", None)
    return (
        kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "is_encoder_decoder", False)
    )


def read_sentence_folder(folder: str | Path) -> SentenceFolder:
    """Read a sentence encoder's configuration files.

    Raises:
        InputError: a file is damaged, or lists a step that is not known here.
    """
    folder = Path(folder)
    if not is_file(folder / MODULES):
        return SentenceFolder(folder)
    settings: dict[str, Any] = {"transformer": folder}
    dense: list[Path] = []
    for module in _listed(folder):
        kind = str(module.get("type", "")).rpartition(".")[2]
        path = folder / _inside(folder, module.get("path", ""))
        if kind == "Transformer":
            settings["transformer"] = path
            settings |= _text_settings(path)
        elif kind == "Pooling":
            settings["poolings"] = _read_poolings(path / "config.json")
        elif kind == "Dense":
            dense.append(path)
        elif kind == "Normalize":
            settings["normalize"] = True
        elif kind != "Dropout":
            raise InputError(
                f"{folder / MODULES} lists a step of the kind '{one_line(kind, 40)}', which is not "
                f"supported; name an encoder of Transformer, Pooling, Dense and Normalize."
            )
    prompt = _document_prompt(folder)
    return SentenceFolder(**settings, dense=tuple(dense), prompt=prompt)


def _listed(folder: Path) -> list[dict[str, Any]]:
    modules = _read(folder / MODULES)
    if not isinstance(modules, list) or not all(isinstance(entry, dict) for entry in modules):
        raise InputError(f"{folder / MODULES} is no list of modules; fetch the model again.")
    return modules


def _inside(folder: Path, name: Any) -> str:
    # A name such as ../other would lead out of the folder.
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{folder / MODULES} names a path outside of it; fetch the model again.")
    return name


def _read(path: Path) -> Any:
    if not is_file(path):
        raise InputError(f"{path} does not exist; fetch the model again.")
    return read_json(path)


def _text_settings(path: Path) -> dict[str, Any]:
    if not is_file(path / "sentence_bert_config.json"):
        return {}
    stated = _read(path / "sentence_bert_config.json")
    if not isinstance(stated, dict):
        raise InputError(f"{path / 'sentence_bert_config.json'} is no JSON object; fetch it again.")
    longest = stated.get("max_seq_length")
    return {
        "max_tokens": longest if isinstance(longest, int) and longest > 0 else None,
        "lower_case": bool(stated.get("do_lower_case", False)),
    }


def _read_poolings(path: Path) -> tuple[str, ...]:
    stated = _read(path)
    chosen = (
        tuple(name for key, name in _POOLINGS.items() if stated.get(key))
        if isinstance(stated, dict)
        else ()
    )
    if not chosen and isinstance(stated, dict) and isinstance(stated.get("pooling_mode"), str):
        named = stated["pooling_mode"].removesuffix("token")
        chosen = tuple(name for name in _POOLINGS.values() if name == named)
    if not chosen:
        raise InputError(f"{path} names no pooling that is known here; name another encoder.")
    if stated.get("include_prompt") is False:
        raise InputError(
            f"{path} leaves the prompt's tokens out of the pooling (include_prompt: false), which "
            f"is not supported; name another encoder."
        )
    return chosen


def _document_prompt(folder: Path) -> str:
    path = folder / "config_sentence_transformers.json"
    stated = _read(path) if is_file(path) else {}
    prompts = stated.get("prompts") if isinstance(stated, dict) else None
    if not isinstance(prompts, dict):
        return ""
    for name in (*_DOCUMENT_PROMPTS, stated.get("default_prompt_name")):
        if isinstance(prompts.get(name), str):
            return str(prompts[name])
    return ""


class SentenceEncoder(ItemEncoder):
    """Encodes texts with a sentence encoder; has what an `ItemEncoder` has.

    Args:
        model: a transformers encoder.
        tokenizer: its tokenizer.
        settings: of its folder.
        dense: layers after the pooling.
        max_text_length: longest text in tokens, special tokens included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        settings: SentenceFolder,
        dense: nn.Sequential,
        max_text_length: int,
    ) -> None:
        longest = (settings.max_tokens, max_text_length, tokenizer.model_max_length)
        super().__init__(model, tokenizer, None, min(most for most in longest if most))
        self.settings = settings
        self.dense = dense
        linear = [layer for layer in dense if isinstance(layer, nn.Linear)]
        pooled = self.dim * len(settings.poolings)
        self.dim = linear[-1].out_features if linear else pooled

    @property
    def pooling(self) -> Pooling:
        """How token states become one embedding: as the folder says."""
        return "sentence"

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return each text's token ids, special tokens included: int64; none for an empty text."""
        lower = self.settings.lower_case
        kept = [text.lower() if lower else text for text in texts if text]
        if not kept:
            return [np.empty(0, dtype=np.int64) for _ in texts]
        encoded = iter(
            self.tokenizer(kept, truncation=True, max_length=self.max_text_length)["input_ids"]
        )
        return [np.asarray(next(encoded) if text else [], dtype=np.int64) for text in texts]

    def share_prefix(self, tokens: np.ndarray) -> None:
        """Do nothing: where positions see later ones, no prefix can be encoded once for all texts."""

    def embed(
        self, padded: np.ndarray, lengths: np.ndarray, prefix: Prefix | None = None
    ) -> Tensor:
        """Encode one batch on the model's device, with gradients where they are enabled.

        Args:
            padded: int64 [B, T] token ids, each row a text, padded on the right.
            lengths: int64 [B], tokens of each text; an empty one gets zeros.
            prefix: None.

        Returns:
            [B, dim], float32 or float64 as the model's states.
        """
        width = max(int(lengths.max(initial=0)), 1)
        padded = np.pad(padded, ((0, 0), (0, max(0, width - padded.shape[1]))))
        filled = np.arange(width) < lengths[:, None]
        device = self.model.device
        mask = to_device(filled, device)
        # A row without any token would be a row without anything to attend to.
        seen = mask | (torch.arange(width, device=device) == 0)
        states = widened(
            self._forward(
                input_ids=to_device(
                    np.where(filled, padded, self.tokenizer.pad_token_id or 0), device
                ),
                attention_mask=seen.long(),
            ).last_hidden_state
        )
        pooled = torch.cat([_pool(states, mask, name) for name in self.settings.poolings], dim=-1)
        vectors = self.dense(pooled)
        if self.settings.normalize:
            vectors = F.normalize(vectors, dim=-1)
        return vectors.masked_fill(~mask.any(dim=1, keepdim=True), 0.0)


def _pool(states: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Pool token states: float32 [B, T, D] and bool [B, T] -> [B, D]."""
    counts = mask.sum(dim=1).clamp_min(1)
    if kind == "cls":
        return states[:, 0]
    if kind == "last":
        return states[torch.arange(len(states), device=states.device), counts - 1]
    if kind == "max":
        return states.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1)
    weights = mask.float()
    if kind == "weighted_mean":
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    summed = (states * weights.unsqueeze(-1)).sum(dim=1)
    if kind == "mean_sqrt_len":
        return summed / counts.sqrt().unsqueeze(-1)
    return summed / weights.sum(dim=1, keepdim=True).clamp_min(1)


def load_sentence_encoder(
    folder: str | Path,
    *,
    max_text_length: int,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    lora: LoraSettings | None = None,
) -> SentenceEncoder:
    """Load a sentence encoder.

    Args:
        folder: in sentence-transformers' layout, or an encoder such as BERT.
        max_text_length: longest text in tokens; the folder's own limit holds too.
        device: where it runs.
        dtype: number type of its weights.
        trust_remote_code: let transformers run code from the folder.
        lora: the adapter that is added; sentence encoders are not quantised.

    Raises:
        InputError: a file is missing, damaged or of a kind that is not supported.
    """
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    if lora is not None and lora.quant_type != "none":
        raise InputError(
            f"{folder} is a sentence encoder, which is not quantised; use item_quant_type: none."
        )
    settings = read_sentence_folder(folder)
    part = settings.transformer
    config = load_model_config(part, trust_remote_code)
    check_files(part)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"the model in {folder} is an encoder with a decoder, which is not supported; name an "
            f"encoder such as BERT."
        )
    transformers_logging.disable_progress_bar()
    try:
        model: Any = AutoModel.from_pretrained(
            part,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        ).to(device)
    except Exception as error:  # transformers, safetensors and torch raise many kinds here
        raise InputError(
            f"model folder {part} cannot be loaded: {brief(error)}; fetch it again."
        ) from error
    tokenizer = load_tokenizer(part, trust_remote_code)
    dense = _load_dense(settings.dense).to(device)
    if lora is not None:
        model = add_lora(model, lora, gradient_checkpointing=False)
    return SentenceEncoder(model, tokenizer, settings, dense, max_text_length)


def _load_dense(folders: Sequence[Path]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for folder in folders:
        stated = _read(folder / "config.json")
        name = str(stated.get("activation_function", "Tanh")).rpartition(".")[2]
        if name not in _ACTIVATIONS:
            raise InputError(
                f"{folder / 'config.json'} names the activation '{one_line(name, 40)}', which is "
                f"not supported; name another encoder."
            )
        try:
            weights = load_file(folder / "model.safetensors")
            given, read = weights["linear.weight"].shape
            layer = nn.Linear(read, given, "linear.bias" in weights)
            named = {key.removeprefix("linear."): value for key, value in weights.items()}
            layer.load_state_dict({key: value.float() for key, value in named.items()})
        except (OSError, SafetensorError, KeyError, RuntimeError, TypeError) as error:
            raise InputError(
                f"{folder} holds no dense layer as safetensors ({brief(error, 120)}); fetch the "
                f"model again."
            ) from error
        layers += [layer, _ACTIVATIONS[name]()]
    return nn.Sequential(*layers).eval().requires_grad_(False)
