"""Encode a dataset's items through the ItemLLM, to a cache file or in memory."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from hsft.config import Config
from hsft.data.cache import ItemCache, open_cache
from hsft.data.column_checks import find_spellings
from hsft.data.files import (
    cache_path,
    has_interactions,
    information_file,
    interaction_file,
    item_llm_folder,
)
from hsft.data.interactions import load_interactions
from hsft.data.item_text import ItemTexts, read_item_texts, unfit_texts, with_items
from hsft.encoding.build_cache import CacheBuilder, EncodingJob, encode_items
from hsft.encoding.item_llm import ItemEncoder, load_item_encoder, model_fingerprint
from hsft.encoding.sentence_encoder import (
    is_sentence_encoder,
    load_sentence_encoder,
    read_sentence_folder,
)
from hsft.hub.manifest import origin
from hsft.model.attention import varlen_obstacle
from hsft.model.backbone import LoraSettings
from hsft.model.meta import read_kind
from hsft.model.structure import DecoderSource
from hsft.trainer.fabric import attention_kernel, choose_device, compute_dtype
from hsft.utils.distributed import init_process_group, is_rank_zero, local_rank, run_on_rank_zero
from hsft.utils.errors import InputError, Interrupted, one_line, refuse
from hsft.utils.files import is_folder, remove
from hsft.utils.signals import StopSignals

log = logging.getLogger(__name__)

# Shares end at different times on unlike machines; torchrun ends the run when one of them fails.
_PATIENCE = timedelta(days=7)
# A GPU wants large batches; on a CPU small ones are less padding and stay in the caches.
BATCH_TOKENS = {"gpu": 8192, "cpu": 2048}
# Bytes of item information that are read in about a second.
_QUICKLY_READ = 64 << 20


def with_encoder(config: Config) -> Config:
    """Return a configuration with `encoder` in the place of `item_pretrain_dir`, where it is set.

    Its texts are sentences with the folder's own prompt.

    Raises:
        InputError: the folder is missing or damaged.
    """
    if config.encoder is None:
        return config
    read_kind(sentence_source(config.encoder, config.trust_remote_code))
    changes = {
        "item_pretrain_dir": config.encoder,
        "encoder": None,
        "item_prompt": read_sentence_folder(config.encoder).prompt,
        "text_format": "sentences",
        "item_emb_token_n": 0,
    }
    return config.model_copy(update=changes)


def sentence_source(encoder: str, trust_remote_code: bool) -> DecoderSource:
    """Return where the configuration of a sentence encoder's transformer is.

    Raises:
        InputError: the folder's configuration files are damaged.
    """
    transformer = read_sentence_folder(encoder).transformer
    return DecoderSource(transformer, trust_remote_code=trust_remote_code)


def read_item_cache(config: Config) -> ItemCache:
    """Open the configuration's item cache, or encode the items in memory (`use_item_cache: False`).

    Raises:
        InputError: as `open_cache`, or as `encode_in_memory`.
    """
    return open_cache(cache_path(config)) if config.use_item_cache else encode_in_memory(config)


def write_item_cache(config: Config) -> Path:
    """Encode every item and write the cache file; an interrupted run is continued.

    Under torchrun the items are shared out. A `.pt` path in `item_cache_path` stands for the native
    file beside it, since pickles are not written; `open_cache` finds it under either name.

    Returns:
        The file written; a file that is there already and is what would be written is left.

    Raises:
        InputError: a file or model folder is missing or unusable.
        Interrupted: SIGINT or SIGTERM came; what is encoded is kept.
    """
    config = with_encoder(config)
    target = cache_path(config).with_suffix(".safetensors")
    # Imported here, so that checks, which import this module, do not wait for the hub's client.
    from hsft.inputs.import_hllm import import_pretrained

    with StopSignals() as stop:
        init_process_group(_PATIENCE)
        given = config
        config = run_on_rank_zero(lambda: import_pretrained(given))
        builder = CacheBuilder(
            target,
            target.with_name(f"{target.name}.parts"),
            config.show_progress,
            stop.held_back,
        )
        try:
            _write_item_cache(config, builder)
        except Interrupted as stopped:
            if not stop.received:
                raise
            kept = "" if builder.kept is None else f" ({builder.kept:,} of {builder.items:,} items)"
            done = f"; what is encoded is kept{kept}, and the same command goes on from there"
            raise stop.interruption(done=done) from stopped
    return target


def _write_item_cache(config: Config, builder: CacheBuilder) -> None:
    target = builder.target
    # In process 0 alone: ids, texts and fingerprint.
    catalogue: list[ItemTexts] = []

    def read() -> tuple[str, int, str]:
        catalogue.append(_catalogue(config))
        source = information_file(config.text_path, config.dataset)
        return catalogue[0].fingerprint, len(catalogue[0]), str(source)

    fingerprint, count, source = run_on_rank_zero(read)
    item_ids = catalogue[0].item_ids if catalogue else []
    encoder, job = _encoder(config, fingerprint, count, source)
    if run_on_rank_zero(lambda: _is_current(target, job, item_ids)):
        log.info(
            "%s holds these items encoded by this model already and is left as it is; remove it to "
            "encode them again.",
            target,
        )
    else:
        builder.build(encoder, job, item_ids, lambda: catalogue.pop().texts)
        log.info(
            "wrote %s: %d items of %d dimensions in %s.", target, count, encoder.dim, job.dtype
        )
    if is_rank_zero():
        remove(builder.parts_dir)


def _is_current(target: Path, job: EncodingJob, item_ids: list[str]) -> bool:
    if not target.is_file():
        return False
    try:
        cache = open_cache(target)
    except InputError:
        return False
    expected = {**job.metadata(), "dtype": job.dtype}
    # Caches of before there were text formats have plain texts.
    stated = {"text_format": "plain", **cache.metadata}
    return cache.item_ids == item_ids and expected.items() <= stated.items()


def encode_in_memory(config: Config) -> ItemCache:
    """Encode every item now, through the code that writes cache files (`use_item_cache: False`)."""
    config = with_encoder(config)
    return encode_texts(config, _catalogue(config))


def encode_texts(config: Config, items: ItemTexts, encoder: ItemEncoder | None = None) -> ItemCache:
    """Encode texts with the configuration's ItemLLM, into memory.

    Args:
        config: the configuration.
        items: ids and texts.
        encoder: the ItemLLM, as `load_text_encoder` returns it; None loads it.

    Raises:
        InputError: the model folder is unusable, or an embedding does not fit in the dtype.
    """
    encoder, job = _encoder(config, items.fingerprint, len(items), encoder=encoder)
    embeddings = encode_items(encoder, items, job, show_progress=config.show_progress)
    return ItemCache(items.item_ids, embeddings, job.metadata())


def cache_warnings(config: Config, cache: ItemCache, item_ids: np.ndarray) -> list[str]:
    """Return a sentence for each thing that may be wrong with the cache that a run reads.

    Args:
        config: the run's configuration.
        cache: the cache.
        item_ids: str, ids of the interactions.
    """
    sentences = [_other_cache(config, cache, item_ids)]
    if len(cache) > len(item_ids):
        twice = find_spellings(item_ids, cache.item_ids)
        shown = ", ".join(f"'{one_line(a, 40)}' and '{one_line(b, 40)}'" for a, b in twice[:3])
        if twice:
            sentences.append(
                f"the item cache {cache.path} has {len(twice):,} items of {config.dataset} in two "
                f"spellings, {shown}: if an export changed the leading zeros or the type of the ids "
                f"of the item information, these items are without text; write the ids alike and "
                f"make the cache again with item_caching.py."
            )
    return [sentence for sentence in sentences if sentence]


def _other_cache(config: Config, cache: ItemCache, item_ids: np.ndarray) -> str | None:
    """Return a sentence where a cache was made with other settings, another model or other texts.

    Texts are compared when the item information is small enough to be read in about a second.

    Args:
        config: the run's configuration.
        cache: the cache that the run reads.
        item_ids: str, ids of the interactions.
    """
    stated = dict(cache.metadata)
    if stated.get("pooling") == "sentence" and not config.encoder:
        # A sentence encoder decides these by itself.
        for name in ("prompt", "text_format", "pooling"):
            stated.pop(name, None)
    config = with_encoder(config) if config.encoder and is_folder(config.encoder) else config
    if "prompt" in stated:
        # Caches of before there were text formats have plain texts.
        stated.setdefault("text_format", "plain")
    expected = {
        "text_keys": ("text_keys", json.dumps(config.text_keys, ensure_ascii=False)),
        "prompt": ("item_prompt", config.item_prompt),
        "text_format": ("text_format", config.text_format),
        "max_text_length": ("MAX_TEXT_LENGTH", str(config.MAX_TEXT_LENGTH)),
    }
    if config.item_emb_token_n == 0 and stated.get("pooling") != "sentence":
        expected["pooling"] = ("item_emb_token_n", "mean")
    if config.item_pretrain_dir and is_folder(config.item_pretrain_dir):
        # Nothing but this comparison reads the ItemLLM: it may belong to somebody else.
        with suppress(InputError):
            mark = model_fingerprint(config.item_pretrain_dir, config.random_item_seed)
            expected["model_fingerprint"] = ("item_pretrain_dir", mark)
    other = [
        key for name, (key, value) in expected.items() if stated.get(name) not in (None, value)
    ]
    if not other and "fingerprint" in stated and _texts_differ(config, cache, item_ids):
        other = ["text_path"]
    if not other:
        return None
    source = stated.get("information")
    made = f" it was made from {one_line(source, 200)};" if source else ""
    return (
        f"the item cache {cache.path} was not made with this configuration's {' and '.join(other)};"
        f"{made} make it again with item_caching.py if that is not intended."
    )


def _texts_differ(config: Config, cache: ItemCache, item_ids: np.ndarray) -> bool:
    try:
        path = information_file(config.text_path, config.dataset)
        if path.stat().st_size > _QUICKLY_READ:
            return False
        prompt, text_format = config.item_prompt, config.text_format
        if cache.metadata.get("pooling") == "sentence":
            prompt, text_format = cache.metadata.get("prompt", ""), "sentences"
        items = read_item_texts(path, config.text_keys, prompt, text_format)
    except InputError:
        # The run does not need the file.
        return False
    items = with_items(items, item_ids)
    # A cache of more items, as of a data set that this one was cut from, says nothing of these.
    if len(items) < len(cache) and set(items.item_ids) < set(cache.item_ids):
        return False
    return items.fingerprint != cache.metadata["fingerprint"]


def _catalogue(config: Config) -> ItemTexts:
    """Read the item texts, and add items that only the interactions name, without text.

    Raises:
        InputError: a file is bad, or no item has text.
    """
    path = information_file(config.text_path, config.dataset)
    items = read_item_texts(path, config.text_keys, config.item_prompt, config.text_format)
    source = interaction_file(config)
    warnings = list(items.warnings)
    item_ids = np.empty(0, dtype=object)
    if has_interactions(config):
        interactions = load_interactions(config)
        warnings += interactions.warnings
        item_ids = interactions.item_ids[1:]
    refuse(unfit_texts(items, path, config.text_keys, item_ids, source))
    for warning in warnings:
        log.warning("%s", warning)
    return with_items(items, item_ids)


def load_text_encoder(config: Config) -> ItemEncoder:
    """Load the configuration's ItemLLM onto the device.

    Raises:
        InputError: the model folder is unusable.
    """
    device = torch.device(choose_device(config))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank() % torch.cuda.device_count())
    return load_encoder(config, str(item_llm_folder(config)), device, compute_dtype(config))


def _encoder(
    config: Config,
    fingerprint: str,
    count: int,
    information: str = "",
    encoder: ItemEncoder | None = None,
) -> tuple[ItemEncoder, EncodingJob]:
    """Load the configuration's ItemLLM, and describe the encoding of `count` items with it."""
    encoder = encoder or load_text_encoder(config)
    job = encoding_job(config, encoder, fingerprint, information)
    log.info(
        "encoding %d items with %s on %s in %s, %s pooling.",
        count,
        job.model_folder,
        encoder.model.device,
        job.compute_dtype,
        job.pooling,
    )
    return encoder, job


def encoding_job(
    config: Config, encoder: ItemEncoder, fingerprint: str, information: str = ""
) -> EncodingJob:
    """Describe the encoding of items with the configuration's ItemLLM.

    Args:
        config: the configuration, `encoder` in the place of `item_pretrain_dir`.
        encoder: the ItemLLM, loaded.
        fingerprint: of the ids and texts.
        information: where the texts were read.
    """
    folder = str(item_llm_folder(config))
    imported = origin(folder)
    return EncodingJob(
        model=Path(folder).name,
        text_keys=tuple(config.text_keys),
        prompt=config.item_prompt,
        text_format=config.text_format,
        max_text_length=config.MAX_TEXT_LENGTH,
        dtype=config.item_cache_dtype,
        pooling=encoder.pooling,
        fingerprint=fingerprint,
        model_folder=folder,
        information=information,
        model_fingerprint=model_fingerprint(folder, config.random_item_seed),
        batch_tokens=config.item_batch_tokens
        or BATCH_TOKENS["cpu" if encoder.model.device.type == "cpu" else "gpu"],
        compute_dtype=str(compute_dtype(config)).removeprefix("torch."),
        source=imported["source"]["sha256"] if imported else "",
    )


def load_encoder(
    config: Config,
    folder: str,
    device: torch.device,
    dtype: torch.dtype,
    lora: LoraSettings | None = None,
) -> ItemEncoder:
    """Load the configuration's ItemLLM or sentence encoder.

    Args:
        config: the configuration.
        folder: of the model.
        device: where it runs.
        dtype: number type of its weights.
        lora: quantise it and add an adapter.

    Raises:
        InputError: the folder is unusable, or LoRA does not fit it.
    """
    if is_sentence_encoder(folder, config.trust_remote_code):
        sentences = load_sentence_encoder(
            folder,
            max_text_length=config.MAX_TEXT_LENGTH,
            device=device,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            lora=lora,
        )
        if config.item_compile and lora is None:
            sentences.compile()
        return sentences
    kind = read_kind(DecoderSource(Path(folder), trust_remote_code=config.trust_remote_code))
    # Elsewhere a row holds one text: rows of alike length have little padding and need no mask.
    half = dtype in (torch.bfloat16, torch.float16)
    packed = lora is None and varlen_obstacle(kind, device, half) is None
    encoder = load_item_encoder(
        folder,
        item_emb_token_n=config.item_emb_token_n,
        max_text_length=config.MAX_TEXT_LENGTH,
        device=device,
        dtype=dtype,
        attention=attention_kernel(config, device, kind, rows=packed),
        trust_remote_code=config.trust_remote_code,
        tokenizer_as_saved=config.text_format == "hllm",
        lora=lora,
        random_seed=config.random_item_seed,
    )
    if config.item_compile and lora is None:
        encoder.compile()
    return encoder
