"""Llama, Mistral and Qwen2 decoders, read off `config.json` in milliseconds.

Transformers takes seconds to import and to build a model. In these families, which differ in biases
only, the structure follows from a few sizes. A decoder is plain where every key of its `config.json`
is listed here and has a value that changes nothing else; of all others transformers is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from hsft.model.attention import varlen_peculiarity
from hsft.model.structure import DecoderSource, DecoderStructure, DecoderTraining, ModelKind
from hsft.utils.errors import InputError
from hsft.utils.files import read_json

# Larger ones are left to transformers to refuse.
_LARGEST_SIZE, _MOST_LAYERS = 1 << 20, 1 << 10

_NEEDED_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
_SIZES = (*_NEEDED_SIZES, "head_dim", "max_position_embeddings", "max_window_layers")
_RATES = ("attention_dropout", "initializer_range", "rms_norm_eps")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "dtype": (None, "float32", "bfloat16", "float16"),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "model_type": ("llama", "mistral", "qwen2"),
    "pretraining_tp": (1,),
    "tie_word_embeddings": (False, True),
    "torch_dtype": (None, "float32", "bfloat16", "float16"),
    "use_cache": (False, True),
    "use_sliding_window": (False,),
}
_TEXTS = ("_name_or_path", "transformers_version")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


@dataclass(frozen=True)
class PlainDecoder:
    """A decoder of RMS norms, rotary attention with grouped heads, and gated MLPs.

    Attributes:
        kind: what `meta.read_kind` gives.
        hidden: D.
        inner: width of the MLPs.
        layers: of the whole model.
        heads: of queries.
        query_width, key_width: numbers in a position's queries, and in its keys and in its values.
        vocabulary: tokens.
        biased: whether queries, keys and values have biases.
    """

    kind: ModelKind
    hidden: int
    inner: int
    layers: int
    heads: int
    query_width: int
    key_width: int
    vocabulary: int
    biased: bool

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return name in a layer -> (numbers read, numbers given) of its linear layers."""
        return {
            "self_attn.q_proj": (self.hidden, self.query_width),
            "self_attn.k_proj": (self.hidden, self.key_width),
            "self_attn.v_proj": (self.hidden, self.key_width),
            "self_attn.o_proj": (self.query_width, self.hidden),
            "mlp.gate_proj": (self.hidden, self.inner),
            "mlp.up_proj": (self.hidden, self.inner),
            "mlp.down_proj": (self.inner, self.hidden),
        }

    def vectors(self) -> dict[str, int]:
        """Return name in a layer -> size of its other weights."""
        biases = ("q_proj", "k_proj", "v_proj") if self.biased else ()
        widths = self.matrices()
        return {
            **{f"self_attn.{name}.bias": widths[f"self_attn.{name}"][1] for name in biases},
            "input_layernorm.weight": self.hidden,
            "post_attention_layernorm.weight": self.hidden,
        }

    def structure(self, source: DecoderSource) -> DecoderStructure:
        """Return what `meta.read_structure` gives."""
        layers = self.layers if source.layers is None else source.layers
        vocabulary = self.vocabulary if source.keep_token_embedding else 1
        return DecoderStructure(
            hidden_size=self.hidden,
            layers=layers,
            embedding_width=self.hidden,
            learned_positions=None,
            linear={
                f"layers.{layer}.{name}": widths
                for layer in range(layers)
                for name, widths in self.matrices().items()
            },
            other_sizes=(
                vocabulary * self.hidden,
                *(size for _ in range(layers) for size in self.vectors().values()),
                self.hidden,
            ),
            source=source,
        )

    def fits(self, stored: Mapping[str, tuple[int, ...]], keep_token_embedding: bool) -> bool:
        """Say whether weights are the whole model's, no more and no less.

        False says nothing: transformers may take them, or name what is wrong.

        Args:
            stored: name -> shape, as `check_files` reads them; an output head does not count.
            keep_token_embedding: else the token embedding does not count either.
        """
        weights: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (self.vocabulary, self.hidden),
            "norm.weight": (self.hidden,),
        }
        for layer in range(self.layers):
            for name, (read, given) in self.matrices().items():
                weights[f"layers.{layer}.{name}.weight"] = (given, read)
            for name, size in self.vectors().items():
                weights[f"layers.{layer}.{name}"] = (size,)
        found = {name: shape for name, shape in stored.items() if name != "lm_head.weight"}
        if all(name.startswith("model.") for name in found):
            found = {name.removeprefix("model."): shape for name, shape in found.items()}
        if not keep_token_embedding:
            for shapes in (found, weights):
                shapes.pop("embed_tokens.weight", None)
        return found == weights

    def saved_bytes(self, training: DecoderTraining) -> tuple[float, float] | None:
        """Return what autograd saves, as `activations.count_saved_bytes` counts it.

        LoRA over frozen weights, all in bfloat16, without a mask. Each of a layer's two norms saves
        its input and a float32; attention saves queries, keys, values, its result and a float32 per
        head; the MLP its gate before and after SiLU, and what that is multiplied by; a LoRA layer
        dropout's mask and result, and its low-rank numbers.

        Returns:
            (bytes per position and layer, bytes per position outside the layers); None for training
            of other kinds.
        """
        targets = set(training.lora_targets)
        widths = {name.rpartition(".")[2]: read for name, (read, _) in self.matrices().items()}
        known = targets == {"all-linear"} or targets <= set(widths)
        half = training.dtype == training.residual_dtype == "bfloat16" and not training.autocast
        if training.lora_rank is None or training.quant_type == "int8" or not (known and half):
            return None
        if training.masked or training.attention != "sdpa":
            return None
        adapted = widths if targets == {"all-linear"} else targets
        norm = 2 * self.hidden + 4
        attention = 2 * (2 * self.query_width + 2 * self.key_width) + 4 * self.heads
        low_rank = sum(4 * widths[name] + 2 * training.lora_rank for name in adapted)
        return float(2 * norm + attention + 6 * self.inner + low_rank), float(norm)


def read_plain(source: DecoderSource) -> PlainDecoder | None:
    """Return a folder's decoder where its `config.json` describes a plain one, else None.

    What is wrong with a configuration is left for transformers to say.
    """
    if source.llama is not None:
        config: Any = {"model_type": "llama", **source.llama}
    else:
        try:
            config = read_json(source.folder / "config.json")
        except InputError:
            return None
    if not isinstance(config, dict) or not all(map(_is_plain, config, config.values())):
        return None
    if not _fit_together(config):
        return None
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim", hidden // heads)
    kind = ModelKind(
        model_type=config["model_type"],
        hidden_size=hidden,
        num_hidden_layers=config["num_hidden_layers"],
        quantization=None,
        looks_ahead=False,
        takes_vectors=True,
        lacking_kernels=(),
        varlen_obstacle=varlen_peculiarity(
            SimpleNamespace(
                head_dim=width,
                num_attention_heads=heads,
                attention_dropout=config.get("attention_dropout", 0.0),
            )
        ),
    )
    return PlainDecoder(
        kind=kind,
        hidden=hidden,
        inner=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        query_width=heads * width,
        key_width=config["num_key_value_heads"] * width,
        vocabulary=config["vocab_size"],
        biased=config["model_type"] == "qwen2",
    )


def _is_plain(name: str, value: Any) -> bool:
    """Say whether a key of config.json is known and its value leaves a decoder plain."""
    if name in _SIZES:
        return type(value) is int and 0 < value <= _LARGEST_SIZE
    if name in _RATES:
        return type(value) is float and 0 <= value < 1
    if name in _CHOICES:
        return any(type(value) is type(choice) and value == choice for choice in _CHOICES[name])
    if name in _TOKENS:
        return value is None or type(value) is int
    if name in _TEXTS:
        return isinstance(value, str)
    if name == "architectures":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if name == "layer_types":
        return isinstance(value, list) and all(text == "full_attention" for text in value)
    if name == "rope_theta":
        return type(value) is float and value > 0
    if name == "sliding_window":
        return value is None or type(value) is int
    return name in ("rope_parameters", "rope_scaling") and _is_plain_rope(value)


def _is_plain_rope(value: Any) -> bool:
    """Say whether rotary positions are the usual ones, or Llama 3's with all that these need."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    given = set(value) - {"rope_type", "rope_theta"}
    needed = _LLAMA3_ROPE if value.get("rope_type", "default") == "llama3" else set()
    numbers = [number for name, number in value.items() if name != "rope_type"]
    return (
        value.get("rope_type", "default") in ("default", "llama3")
        and given == needed
        and all(type(number) in (int, float) and number > 0 for number in numbers)
    )


def _fit_together(config: Mapping[str, Any]) -> bool:
    """Say whether the sizes are all there and fit, and attention has no window."""
    if not {"model_type", *_NEEDED_SIZES} <= set(config):
        return False
    heads, padding = config["num_attention_heads"], config.get("pad_token_id")
    types = config.get("layer_types")
    # Mistral has a window unless null is written; Qwen2 only where `use_sliding_window` is.
    windowed = config["model_type"] == "mistral" and "sliding_window" not in config
    if config["model_type"] != "qwen2":
        windowed = windowed or config.get("sliding_window") is not None
    return (
        not windowed
        and config["num_hidden_layers"] <= _MOST_LAYERS
        and config["hidden_size"] % heads == 0
        and heads % config["num_key_value_heads"] == 0
        and config.get("head_dim", config["hidden_size"] // heads) % 2 == 0
        and (padding is None or 0 <= padding < config["vocab_size"])
        and (types is None or len(types) == config["num_hidden_layers"])
    )
