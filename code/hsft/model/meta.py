"""Decoders on torch's meta device, which has shapes and no numbers, and the records made of them.

Building one takes transformers, and seconds. A plain decoder (`plain_decoder.py`) need not be built; what
is read off others is kept (`utils/records.py`) by the content of `config.json` and the cut, and nothing
is kept of a folder that may run code of its own.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from hsft.model.backbone import (
    cut_decoder,
    embedding_width,
    layer_widths,
    linear_layers,
    load_model_config,
    model_kind,
)
from hsft.model.folder import config_digest
from hsft.model.plain_decoder import read_plain
from hsft.model.structure import DecoderSource, DecoderStructure, ModelKind
from hsft.utils.errors import InputError, brief, one_line
from hsft.utils.records import remember


def read_kind(source: DecoderSource) -> ModelKind:
    """Return a model's kind; how it is cut does not matter.

    Raises:
        InputError: the folder has no config.json that transformers can read.
    """
    plain = read_plain(source)
    if plain is not None:
        return plain.kind
    record = remember("model kind", _origin(source), lambda: asdict(model_kind(_config(source))))
    return ModelKind(**{**record, "lacking_kernels": tuple(record["lacking_kernels"])})


def read_structure(source: DecoderSource) -> DecoderStructure:
    """Return the structure of a decoder, cut as its source says.

    Raises:
        InputError: as `read_kind`, or no model can be built so.
    """
    plain = read_plain(source)
    if plain is not None:
        return plain.structure(source)
    record = remember("decoder structure", source_key(source), lambda: _read_off(source))
    linear = {name: (read, given) for name, (read, given) in record["linear"].items()}
    others = tuple(record["other_sizes"])
    return DecoderStructure(**{**record, "linear": linear, "other_sizes": others}, source=source)


def source_key(source: DecoderSource) -> dict[str, Any] | None:
    """Return what a record of a cut decoder depends on; None: nothing may be kept of it."""
    origin = _origin(source)
    if origin is None:
        return None
    cut = {"layers": source.layers, "keep_token_embedding": source.keep_token_embedding}
    return {**origin, **cut}


def load_source(source: DecoderSource) -> Any:
    """Return transformers' configuration of a decoder, cut as its source says.

    Raises:
        InputError: as `read_kind`.
    """
    config = _config(source)
    cut_decoder(config, source.layers, source.keep_token_embedding)
    return config


def meta_decoder(model_config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Build a decoder on torch's meta device.

    Args:
        model_config: as `load_source` gives.
        trust_remote_code: let transformers run code from the model's folder.

    Raises:
        InputError: no model can be built so.
    """
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            # Every model has eager attention, and nothing is computed.
            model: nn.Module = AutoModel.from_config(
                model_config, attn_implementation="eager", trust_remote_code=trust_remote_code
            )
    except Exception as error:  # models and layers raise many kinds for sizes that do not fit
        raise InputError(
            f"the config.json of {model_config.name_or_path} describes a model of type "
            f"{one_line(model_config.model_type, 40)} that cannot be built: {brief(error)}."
        ) from error
    return model


def _origin(source: DecoderSource) -> dict[str, Any] | None:
    if source.trust_remote_code:
        return None
    if source.llama is not None:
        return {"llama": dict(source.llama)}
    digest = config_digest(source.folder)
    return None if digest is None else {"config": digest}


def _config(source: DecoderSource) -> Any:
    if source.llama is not None:
        from transformers import LlamaConfig

        arguments: dict[str, Any] = dict(source.llama)
        return LlamaConfig(**arguments)
    return load_model_config(source.folder, source.trust_remote_code)


def _read_off(source: DecoderSource) -> dict[str, Any]:
    """Build a decoder and return the fields of its `DecoderStructure`."""
    config = load_source(source)
    model: Any = meta_decoder(config, source.trust_remote_code)
    linear = linear_layers(model)
    matrices = {id(getattr(part, "weight", None)) for part in linear.values()}
    inputs = model.get_input_embeddings()
    tables = [
        part for part in model.modules() if isinstance(part, nn.Embedding) and part is not inputs
    ]
    most = getattr(config, "max_position_embeddings", None)
    return {
        "hidden_size": int(config.hidden_size),
        "layers": int(config.num_hidden_layers),
        "embedding_width": embedding_width(model),
        # Rotary positions have no end.
        "learned_positions": most if tables and isinstance(most, int) else None,
        "linear": {name: layer_widths(part) for name, part in linear.items()},
        "other_sizes": [
            weight.numel() for weight in model.parameters() if id(weight) not in matrices
        ],
    }
