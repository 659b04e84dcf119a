"""Load an LLM's decoder from a model folder: whole or first layers, plain or quantised, with LoRA.

Transformers takes seconds to import; the functions that need it do so.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hsft.data.files import require_model_folder
from hsft.model.attention import VARLEN, varlen_peculiarity
from hsft.model.folder import (
    EMBEDDING_KEYS,
    EXTRA_FILE,
    HEAD_KEYS,
    check_decoder,
    check_embeddings,
    check_files,
    check_shapes,
    config_digest,
    layer_number,
    weights_digest,
)
from hsft.model.plain_decoder import read_plain
from hsft.model.structure import DecoderSource, ModelKind
from hsft.utils.errors import InputError, brief, one_line
from hsft.utils.files import is_file, is_folder
from hsft.utils.records import remember

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

log = logging.getLogger(__name__)

LlmPart = Literal["UserLLM", "ItemLLM"]
# What the keys of either LLM's LoRA begin with.
_LORA_KEYS = {"UserLLM": "qlora", "ItemLLM": "item_lora"}

# How to repair `hllm_extra.safetensors`, which both programs write.
_MAKE_AGAIN = "import the checkpoint again with --force, or export the run again"
_CPU_KERNEL_SWITCH = "support_avx512bf16_for_cpu"


@dataclass(frozen=True)
class LoraSettings:
    """LoRA and quantisation of the frozen weights (QLoRA, arXiv 2305.14314).

    Attributes:
        rank, alpha, dropout, target_modules: as peft's LoraConfig.
        quant_type: `nf4`, `fp4`, `int8`, or `none` for plain LoRA.
        compute_dtype: number type of the quantised layers' products.
        double_quant: quantise the quantisation constants too.
        dequantize: multiply by dequantised 4-bit weights whatever the number of positions; False
            leaves bitsandbytes the choice of its fused kernel.
        plain: load what is to be quantised as plain weights of the values that quantising leaves, as
            merging the LoRA matrices into them needs.
        part: `UserLLM` or `ItemLLM`, for messages.
    """

    rank: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]
    quant_type: str = "nf4"
    compute_dtype: torch.dtype = torch.bfloat16
    double_quant: bool = True
    dequantize: bool = True
    plain: bool = False
    part: LlmPart = "UserLLM"

    @property
    def quantises(self) -> bool:
        """Whether the frozen weights are held quantised."""
        return self.quant_type != "none" and not self.plain


def load_model_config(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """Read a model folder's `config.json`.

    Raises:
        InputError: the folder or its config.json is missing or is not a transformers config.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    require_model_folder(folder)
    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder / 'config.json'} is not a model configuration that transformers can read: "
            f"{brief(error)}."
        ) from error
    except Exception as error:  # configs are validated by libraries that raise their own kinds
        raise InputError(
            f"{folder / 'config.json'} is not a valid model configuration: {brief(error)}."
        ) from error


def model_kind(config: Any) -> ModelKind:
    """Return what a configuration tells, as `load_model_config` gives it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    name = str(getattr(config, "model_type", "unknown"))
    encoder = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    built = _model_class(config)
    flags = {
        "sdpa": "_supports_sdpa",
        "flash_attention_2": "_supports_flash_attn",
        VARLEN: "_supports_attention_backend",
    }
    return ModelKind(
        model_type=name,
        hidden_size=_count(config, "hidden_size"),
        num_hidden_layers=_count(config, "num_hidden_layers"),
        quantization=_quantization_saved(config),
        looks_ahead=bool(
            encoder
            or getattr(config, "is_encoder_decoder", False)
            or getattr(config, "use_bidirectional_attention", False)
            or getattr(config, "is_causal", True) is False
        ),
        takes_vectors=built is None
        or "inputs_embeds" in inspect.signature(built.forward).parameters,
        lacking_kernels=tuple(
            kernel for kernel, flag in flags.items() if built and not getattr(built, flag, True)
        ),
        varlen_obstacle=varlen_peculiarity(config),
    )


def _count(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _quantization_saved(config: Any) -> dict[str, Any] | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        settings = getattr(settings, "to_dict", dict)()
    method = settings.get("quant_method")
    return {
        "quant_method": None if method is None else str(getattr(method, "value", method)),
        "load_in_8bit": bool(settings.get("load_in_8bit")),
    }


def _model_class(config: Any) -> Any | None:
    """Return the class that transformers builds for a configuration, None where it knows none."""
    from transformers import AutoModel

    model = AutoModel._model_mapping.get(type(config), None)
    return model if isinstance(model, type) else None


def cut_decoder(config: Any, layers: int | None, keep_token_embedding: bool = False) -> None:
    """Cut a model configuration to the first `layers` layers and, unless it is kept, to a vocabulary
    of one token."""
    if layers is not None:
        keep_layers(config, layers)
    if not keep_token_embedding:
        config.vocab_size = 1
        config.pad_token_id = None


def load_decoder(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    attention: str,
    layers: int | None = None,
    keep_token_embedding: bool = False,
    lora: LoraSettings | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the decoder stack of an LLM, without its output head.

    Args:
        folder: a transformers model folder.
        dtype: number type of the weights that are not quantised.
        attention: transformers' `attn_implementation`.
        layers: keep the first N decoder layers; None keeps all.
        keep_token_embedding: load the token embedding; the UserLLM reads vectors and needs none.
        lora: used for its quantisation only; see `add_lora`.
        device: where quantised weights are placed.
        trust_remote_code: let transformers run code from the folder.

    Returns:
        A transformers model whose call takes `inputs_embeds` [B, T, hidden_size].

    Raises:
        InputError: the folder is not a readable model or is quantised already, a weight is missing,
            misshapen or unknown to the model, or it has fewer layers than asked for.
    """
    folder = Path(folder)
    kwargs: dict[str, Any] = {}
    if attention == VARLEN:
        # Its import makes the kernel known to transformers.
        importlib.import_module("hsft.model.varlen")
    if lora is not None and lora.quantises:
        kwargs["quantization_config"] = _quantization(lora)
        kwargs["device_map"] = {"": device if device is not None else torch.device("cpu")}
    model = _read_decoder(
        folder,
        layers,
        keep_token_embedding,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        **kwargs,
    )
    check_embeddings(embedding_width(model), model.config.hidden_size, folder)
    if lora is not None and lora.plain and lora.quant_type != "none":
        rounded = load_decoder(
            folder,
            dtype=lora.compute_dtype,
            attention=attention,
            layers=layers,
            lora=replace(lora, plain=False),
            trust_remote_code=trust_remote_code,
        )
        _copy_rounded(rounded, model)
    model.config.use_cache = False
    if not keep_token_embedding:
        # One unused row is left of it: DDP waits for a gradient of everything that is trainable.
        model.get_input_embeddings().requires_grad_(False)
    return model


def _copy_rounded(quantised: nn.Module, plain: nn.Module) -> None:
    """Give a decoder's linear layers the values that a quantised one of the same folder computes with."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D

    for name, layer in quantised.named_modules():
        weight = getattr(layer, "weight", None)
        if type(weight).__name__ not in ("Params4bit", "Int8Params"):
            continue
        values: Tensor = dequantize_bnb_weight(weight, getattr(layer, "state", None))
        target: Any = plain.get_submodule(name)
        with torch.no_grad():
            # GPT-2's holds the transpose of the linear layer's that takes its place.
            target.weight.copy_(values.t() if isinstance(target, Conv1D) else values)


def make_decoder(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    attention: str,
    seed: int,
    layers: int | None = None,
    keep_token_embedding: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build a decoder with random weights, of the shape in a model folder's `config.json`.

    The weights are those that its kind of model begins its training with in transformers, for most
    kinds normally distributed with the standard deviation `initializer_range` of `config.json`.

    Args:
        folder, dtype, attention, layers, keep_token_embedding, trust_remote_code: as for
            `load_decoder`.
        seed: of the weights, which nothing else decides: torch's generator is left as it is.

    Returns:
        As `load_decoder`.

    Raises:
        InputError: the folder's configuration is not one of a decoder that reads vectors, or has
            fewer layers than asked for.
    """
    from transformers import AutoModel

    folder = Path(folder)
    if attention == VARLEN:
        importlib.import_module("hsft.model.varlen")
    config = load_model_config(folder, trust_remote_code)
    check_decoder(model_kind(config), folder, layers)
    cut_decoder(config, layers, keep_token_embedding)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Drawn in float32, so that weights of another number type are the same ones, rounded.
            model: PreTrainedModel = AutoModel.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            ).to(dtype)
    except Exception as error:  # models raise many kinds for sizes that do not fit
        raise _unreadable(folder, error, attention) from error
    check_embeddings(embedding_width(model), config.hidden_size, folder)
    model.config.use_cache = False
    if not keep_token_embedding:
        model.get_input_embeddings().requires_grad_(False)
    return model


def check_weights(
    folder: str | Path,
    *,
    layers: int | None = None,
    keep_token_embedding: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Compare the names and shapes of a folder's weights with its decoder, from their headers alone.

    Nothing is compared where the weights are `pytorch_model*.bin`, which have no headers.

    Args:
        folder, layers, keep_token_embedding, trust_remote_code: as for `load_decoder`.

    Raises:
        InputError: as `load_decoder`.
    """
    folder = Path(folder)

    def compare() -> bool:
        _read_decoder(
            folder,
            layers,
            keep_token_embedding,
            device_map="meta",
            attn_implementation="eager",  # every model has it, and nothing is computed
            trust_remote_code=trust_remote_code,
        )
        return True

    stored = check_files(folder).shapes
    plain = read_plain(DecoderSource(folder))
    if stored and not (plain is not None and plain.fits(stored, keep_token_embedding)):
        remember(
            "weights fit",
            _headers(folder, layers, keep_token_embedding, trust_remote_code),
            compare,
        )


def _headers(
    folder: Path, layers: int | None, keep_token_embedding: bool, trust_remote_code: bool
) -> dict[str, Any] | None:
    """Return what `check_weights` depends on, None where nothing may be kept of it."""
    config = None if trust_remote_code else config_digest(folder)
    if config is None:
        return None
    try:
        weights = weights_digest(folder)
    except (OSError, ValueError, struct.error):
        return None
    cut = {"layers": layers, "keep_token_embedding": keep_token_embedding}
    return {"config": config, "weights": weights, **cut}


def _read_decoder(
    folder: Path,
    layers: int | None,
    keep_token_embedding: bool,
    *,
    trust_remote_code: bool,
    **kwargs: Any,
) -> PreTrainedModel:
    """Read a decoder through transformers, refusing weights that lack, misfit or are left over."""
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    config = load_model_config(folder, trust_remote_code)
    check_decoder(model_kind(config), folder, layers)
    stored_layers = config.num_hidden_layers
    cut_decoder(config, layers, keep_token_embedding)
    check_shapes(config, check_files(folder), folder)
    verbosity = transformers_logging.get_verbosity()
    # Weights left out on purpose (head, token embedding, later layers) would be reported at length.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # refused below, in a sentence
            output_loading_info=True,
            **kwargs,
        )
    except Exception as error:  # transformers, safetensors and torch raise many kinds here
        raise _unreadable(folder, error, kwargs["attn_implementation"]) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    _refuse_incomplete(info, folder, keep_token_embedding)
    _refuse_unexpected(info, folder, config, stored_layers, keep_token_embedding)
    return model


def _unreadable(folder: Path, error: Exception, attention: str) -> InputError:
    if "weights only load failed" in str(error).lower():
        return InputError(
            f"model folder {folder} holds a pickle with more than tensors, which was not opened "
            f"since it can run code; fetch the model as safetensors."
        )
    if "attention implementation" in str(error):
        return InputError(
            f"the model in {folder} does not run with attn_implementation {attention}; set "
            f"--attn_implementation eager."
        )
    return InputError(
        f"model folder {folder} cannot be loaded: {brief(error)}; fetch it again or name "
        f"another folder."
    )


def add_lora(model: PreTrainedModel, lora: LoraSettings, gradient_checkpointing: bool) -> nn.Module:
    """Freeze a decoder and add a LoRA adapter (arXiv 2106.09685) through peft.

    A decoder of bfloat16 stays so throughout. peft's `prepare_model_for_kbit_training`, which casts
    norms and with them the residual stream to float32, is left to float16, whose range it widens.

    Returns:
        The peft model; only its LoRA matrices require gradients, in float32.

    Raises:
        InputError: no layer has one of the target names.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from hsft.model.fast_layers import dequantize_in_training, use_fast_lora_layers

    if lora.quantises:
        if any(weight.dtype == torch.float16 for weight in model.parameters()):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        _keep_differentiable(model)
        if lora.dequantize:
            dequantize_in_training(model)
    model.requires_grad_(False)
    targets: Any = list(lora.target_modules)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        bias="none",
    )
    use_fast_lora_layers(settings)
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        problem = _target_problem(targets, linear_layers(model), lora.part)
        raise InputError(problem) from error
    if gradient_checkpointing:
        enable_checkpointing(model)
    return adapted


def computes_in_bfloat16(model: nn.Module) -> bool:
    """Say whether a decoder runs without autocast: bfloat16 throughout, LoRA's matrices aside.

    peft's own LoRA layers, which int8 keeps, compute in the matrices' float32 outside of autocast.
    """
    lora = [module for module in model.modules() if hasattr(module, "lora_A")]
    others = [weight for name, weight in model.named_parameters() if "lora_" not in name]
    return all(getattr(module, "keeps_dtype", False) for module in lora) and all(
        weight.dtype == torch.bfloat16 for weight in others if weight.is_floating_point()
    )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's linear layers by name: quantised ones, and GPT-2's Conv1D, included."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | Conv1D) or "Linear" in type(part).__name__
    }


def layer_widths(layer: nn.Module) -> tuple[int, int]:
    """Return how many numbers a linear layer reads and gives."""
    weight: Any = layer.weight
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    # GPT-2's Conv1D holds the transpose of a linear layer's matrix.
    read, given = weight.shape
    return read, given


def embedding_width(model: Any) -> int:
    """Return how wide the vectors are that a decoder reads."""
    width = getattr(model.get_input_embeddings(), "embedding_dim", model.config.hidden_size)
    return int(width)


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Say whether LoRA goes to the linear layer of this name, as peft decides it."""
    return list(targets) == ["all-linear"] or any(
        name == target or name.endswith(f".{target}") for target in targets
    )


def check_lora_targets(
    layers: Iterable[str], targets: Sequence[str], part: LlmPart = "UserLLM"
) -> None:
    """Refuse target names that no linear layer has.

    Args:
        layers: the linear layers' names.
        targets: as `qlora_target_modules`.
        part: whose they are.

    Raises:
        InputError: says which there are.
    """
    layers = list(layers)
    if not any(is_target(name, targets) for name in layers):
        raise InputError(_target_problem(targets, layers, part))


def _target_problem(targets: Sequence[str], layers: Iterable[str], part: LlmPart) -> str:
    names = sorted({name.rpartition(".")[2] for name in layers})
    return (
        f"{_LORA_KEYS[part]}_target_modules {list(targets)} names no linear layer of the {part}; its "
        f"linear layers are {', '.join(names)}, or write [all-linear]."
    )


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the decoder layers' activations in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def read_extra(folder: str | Path) -> dict[str, Tensor]:
    """Read what is saved beside a model: HLLM's `item_emb_tokens` [1, 1, D] and `logit_scale` [], and
    of an exported run its item adapter (`item_adapter.*`) and its residual (`residual.*`).

    Returns:
        The tensors found, empty for a folder that is neither an imported checkpoint nor an export.

    Raises:
        InputError: the file is damaged, or logit_scale is not one number.
    """
    path = Path(folder) / EXTRA_FILE
    if not is_file(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            extra = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise InputError(f"{path} is damaged ({one_line(error, 120)}); {_MAKE_AGAIN}.") from error
    for name, value in extra.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise InputError(
                f"{path}: {one_line(name, 40)} holds NaN, infinity or no numbers; {_MAKE_AGAIN}."
            )
    if "logit_scale" in extra and extra["logit_scale"].numel() != 1:
        raise InputError(
            f"{path}: logit_scale has {extra['logit_scale'].numel()} numbers, not one; "
            f"{_MAKE_AGAIN}."
        )
    return extra


def keep_layers(config: Any, layers: int) -> None:
    """Cut a model configuration to its first decoder layers."""
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def quantization_obstacle(device: str) -> str | None:
    """Say what keeps weights from being quantised here.

    Args:
        device: kind of device.

    Returns:
        Half a sentence; None where they can be.
    """
    package = importlib.util.find_spec("bitsandbytes")
    if package is None:
        return "bitsandbytes is not installed"
    # Its kernels for a kind of device are a module of this name; looking is not importing.
    folders = package.submodule_search_locations or ()
    if not any(is_folder(Path(folder) / "backends" / device) for folder in folders):
        return f"bitsandbytes has no kernels for {device}"
    return None


def check_quantization(quant_type: str, device: str, part: LlmPart = "UserLLM") -> None:
    """Refuse a quantised LLM where its kernels are missing.

    Args:
        quant_type: as `qlora_quant_type`; `auto` is refused nowhere.
        device: kind of device.
        part: whose quantisation it is.

    Raises:
        InputError: bitsandbytes is not installed (some systems have no build of it), or has no
            kernels for the device.
    """
    if quant_type in ("auto", "none") or quantization_obstacle(device) is None:
        return
    key = "qlora_quant_type" if part == "UserLLM" else "item_quant_type"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"{key}: {quant_type} needs the package bitsandbytes, which is not installed; install it "
            f"with pip install bitsandbytes, or, where there is no build for this system, set --{key} "
            f"none (plain LoRA)."
        )
    raise InputError(
        f"{key}: {quant_type} needs kernels for device {device}, which the installed bitsandbytes "
        f"does not have; set --{key} none (plain LoRA)."
    )


def _quantization(lora: LoraSettings) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    if lora.quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=lora.quant_type,
        bnb_4bit_compute_dtype=lora.compute_dtype,
        bnb_4bit_use_double_quant=lora.double_quant,
    )


def _refuse_incomplete(info: dict[str, Any], folder: Path, keep_token_embedding: bool) -> None:
    def allowed(key: str) -> bool:
        return not keep_token_embedding and any(name in key for name in EMBEDDING_KEYS)

    missing = sorted(key for key in info.get("missing_keys", []) if not allowed(key))
    if missing:
        raise InputError(
            f"model folder {folder} lacks the weight {missing[0]} ({len(missing)} in all); "
            f"fetch it again."
        )
    mismatched = sorted(str(entry[0]) for entry in info.get("mismatched_keys", []))
    mismatched = [key for key in mismatched if not allowed(key)]
    if mismatched:
        raise InputError(
            f"model folder {folder}: weight {mismatched[0]} does not have the shape that its "
            f"config.json says ({len(mismatched)} in all); fetch it again."
        )


def _refuse_unexpected(
    info: dict[str, Any], folder: Path, config: Any, stored_layers: int, keep_token_embedding: bool
) -> None:
    """Refuse weights that the model would run without, other than those left out on purpose."""

    def left_out(key: str) -> bool:
        layer = layer_number(key)
        return (
            not set(HEAD_KEYS).isdisjoint(key.split("."))
            or (not keep_token_embedding and any(name in key for name in EMBEDDING_KEYS))
            or (layer is not None and config.num_hidden_layers <= layer < stored_layers)
            # Causal masks that old versions of transformers saved with GPT-2 and GPT-NeoX.
            or key.endswith("attn.masked_bias")
        )

    unexpected = sorted(key for key in info.get("unexpected_keys", []) if not left_out(key))
    if unexpected:
        kind = one_line(config.model_type, 40)
        raise InputError(
            f"model folder {folder} holds the weight {one_line(unexpected[0], 80)} "
            f"({len(unexpected)} such in all), which a model of type {kind} does not use; correct "
            f"its config.json, or fetch the model again."
        )


def _keep_differentiable(model: nn.Module) -> None:
    # In evaluation mode on CPUs with AVX512-BF16, bitsandbytes rewrites 4-bit weights for a kernel
    # without a backward pass, and keeps using it: training after the first validation would then
    # silently get no gradient through those layers.
    for module in model.modules():
        if hasattr(module, _CPU_KERNEL_SWITCH):
            setattr(module, _CPU_KERNEL_SWITCH, False)
