"""Validation before work: what would end a run later is said at its start, all of it at once.

`quick_problems` opens no large file and comes first in every command. `--check True` goes on to read
the interactions, the item texts and the cache, and stops before any LLM weight is loaded.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from hsft.config import Config
from hsft.data.cache import DTYPES, ItemCache, is_native, open_cache, read_header
from hsft.data.dataset import CachedEmbeddingEvalDataset, CachedEmbeddingTrainDataset
from hsft.data.files import (
    cache_path,
    dataset_file,
    find_cache,
    has_cache_path,
    has_interactions,
    information_file,
    interaction_file,
    item_llm_folder,
    user_llm_folder,
)
from hsft.data.interactions import Interactions, load_interactions
from hsft.data.item_text import ItemTexts, read_item_texts, unfit_texts
from hsft.data.split import Phase, Split, make_split
from hsft.data.time_fields import item_times
from hsft.encoding.item_llm import check_tokenizer, emb_token, no_emb_token
from hsft.encoding.item_tower import check_frozen_layers
from hsft.evaluator.evaluator import Evaluator
from hsft.hub.manifest import pretraining_overlap
from hsft.inputs.cache_items import cache_warnings, sentence_source, with_encoder
from hsft.inputs.load_tower import refuse_other_item_llm
from hsft.model.backbone import (
    check_lora_targets,
    check_quantization,
    check_weights,
)
from hsft.model.folder import (
    Weights,
    check_decoder,
    check_embeddings,
    check_files,
    check_positions,
    check_shapes,
)
from hsft.model.item_adapter import adapter_shape, check_width, user_extra
from hsft.model.item_ids import read_id_vectors
from hsft.model.meta import read_kind, read_structure
from hsft.model.residual import residual_items
from hsft.model.structure import DecoderSource
from hsft.report.batch_size import SMALLEST
from hsft.report.memory import GIB, estimate
from hsft.run.batch_size import resolve_batch_size
from hsft.run.dry_run import with_batch_size
from hsft.run.run_dir import choose_run_dir
from hsft.run.saved_model import member_runs, refuse_unlike_members
from hsft.run.setup import (
    check_cosines,
    check_training,
    eval_protocol,
    match_cache,
    user_attention,
)
from hsft.trainer.fabric import attention_kernel, check_device, choose_device, compute_dtype
from hsft.trainer.mlflow_log import load_mlflow
from hsft.trainer.optim import check_optimizer
from hsft.trainer.wandb_log import load_wandb
from hsft.utils.distributed import is_rank_zero
from hsft.utils.errors import InputError, one_line, problems_of, refuse
from hsft.utils.files import free_bytes

log = logging.getLogger(__name__)

# Beside what a run's own files need: logs, tensorboard, result, an adapter.
_SPARE_BYTES = 64 << 20


class Findings:
    """Problems and warnings, one sentence each, and what is worth knowing of a good input.

    A warning is what the run would say and go on.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Book an `InputError` of the block as problems and go on after the block."""
        try:
            yield
        except InputError as error:
            self.problems += [text for text in problems_of(error) if text not in self.problems]

    def warn(self, sentence: str | None) -> None:
        """Book a warning, if there is one."""
        if sentence:
            self.warnings.append(sentence)

    def finish(self) -> None:
        """Print the summary of a good input.

        Raises:
            InputError: there are problems.
        """
        if self.problems:
            for warning in self.warnings:
                log.warning("%s", warning)
        refuse(self.problems)
        if is_rank_zero():
            count = len(self.warnings)
            end = f"; {count} warning{'s' * (count > 1)} above" if count else ""
            warnings = [f"warning: {one_line(warning)}" for warning in self.warnings]
            lines = [*self.notes, *warnings, f"no problem found{end}"]
            sys.stdout.write("".join(f"{line}\n" for line in lines))


def quick_problems(config: Config) -> list[str]:
    """Return what is wrong with a run of main.py as far as small files and headers tell."""
    findings = Findings()
    _quick_run(config, findings)
    return findings.problems


def quick_caching_problems(config: Config) -> list[str]:
    """Return what is wrong with a run of item_caching.py as far as small files and headers tell."""
    findings = Findings()
    _quick_caching(config, findings)
    return findings.problems


def check_run(config: Config) -> None:
    """Check everything that a run of main.py reads and print a short summary.

    Raises:
        InputError: something has to be changed; `InputErrors` with all of it.
    """
    config = _with_pretrained(config)
    findings = Findings()
    _quick_run(config, findings)
    interactions = _interactions(config, findings)
    cache = split = None
    if config.model == "tfidf":
        texts = _item_texts(config, findings)
        if texts is not None and interactions is not None:
            _texts_suffice(config, texts, interactions, findings)
    if config.reads_embeddings:
        if config.trains_items or not config.use_item_cache:
            texts = _item_texts(config, findings)
            if texts is not None and interactions is not None:
                _texts_suffice(config, texts, interactions, findings)
        if config.use_item_cache and has_cache_path(config):
            with findings.collect():
                cache = open_cache(cache_path(config))
                findings.notes.append(
                    f"item cache {cache.path}: {len(cache)} items of {cache.dim} dimensions"
                )
    if interactions is not None:
        if cache is not None:
            for warning in cache_warnings(config, cache, interactions.item_ids[1:]):
                findings.warn(warning)
            with findings.collect():
                if config.trains_items:
                    refuse_other_item_llm(config, cache)
                interactions = match_cache(interactions, cache, config)
        with findings.collect():
            split = make_split(config, interactions)
            config = _with_batch_size(config, split, findings)
            _split(config, split, findings)
            interactions = split.interactions
        if split is not None and config.model == "ensemble" and not findings.problems:
            with findings.collect():
                refuse_unlike_members(member_runs(config), config, split)
        trains_nce = config.model == "HLLM" and config.trains and config.loss == "nce"
        # Pretraining changes the vectors.
        if (
            trains_nce
            and not config.item_pretrain_epochs
            and cache is not None
            and not findings.problems
        ):
            with findings.collect():
                note, high = check_cosines(config, cache, interactions)
                findings.notes.append(note)
                findings.warn(high)
    _memory(config, findings, split, cache)
    findings.finish()


def check_caching(config: Config) -> None:
    """Check everything that a run of item_caching.py reads and print a short summary.

    Raises:
        InputError: something has to be changed; `InputErrors` with all of it.
    """
    config = _with_pretrained(config)
    findings = Findings()
    _quick_caching(config, findings)
    texts = _item_texts(config, findings)
    interactions = None
    if has_interactions(config):
        interactions = _interactions(config, findings)
    if texts is not None:
        known = set(texts.item_ids)
        bare = 0
        if interactions is not None:
            bare = sum(1 for item in interactions.item_ids[1:] if item not in known)
            findings.notes.append(f"{bare} items of the interactions have no information")
        _texts_suffice(config, texts, interactions, findings)
        _caching_space(config, len(texts) + bare, findings)
    findings.finish()


def _quick_run(config: Config, findings: Findings) -> None:
    with findings.collect():
        check_device(config)
    with findings.collect():
        dataset_file(config.data_path, config.dataset)
    if config.item_data is not None:
        with findings.collect():
            dataset_file(config.data_path, config.item_data, "item_data")
    with findings.collect():
        _writable(choose_run_dir(config).path, "run folder", "--checkpoint_dir")
    if config.trains and config.log_wandb:
        with findings.collect():
            load_wandb()
    if config.trains and config.log_mlflow:
        with findings.collect():
            load_mlflow()
    if config.trains:
        with findings.collect():
            device = choose_device(config)
            check_optimizer(config, device)
            if config.use_qlora:
                check_quantization(config.qlora_quant_type, device)
            if config.trains_items:
                check_quantization(config.item_quant_type, device, "ItemLLM")
    if config.model == "ensemble":
        with findings.collect():
            member_runs(config)
    if config.model == "tfidf":
        with findings.collect():
            information_file(config.text_path, config.dataset)
    with findings.collect():
        _check_pretrained(config)
    hidden = None
    if config.has_user_llm:
        hidden = check_user_model(config, findings)
    if config.trains_items:
        with findings.collect():
            information_file(config.text_path, config.dataset)
    if config.trains_items or (config.reads_embeddings and not config.use_item_cache):
        check_item_model(config, findings)
    if config.reads_embeddings and config.use_item_cache and has_cache_path(config):
        with findings.collect():
            _cache_header(config, hidden)


def _quick_caching(config: Config, findings: Findings) -> None:
    with findings.collect():
        check_device(config)
    with findings.collect():
        information_file(config.text_path, config.dataset)
    with findings.collect():
        _writable(cache_path(config), "item cache", "--item_cache_path")
    with findings.collect():
        _check_pretrained(config)
    check_item_model(config, findings)


def _with_pretrained(config: Config) -> Config:
    if config.load_pretrain is None:
        return config
    # Imported here, so that other checks do not wait for the hub's client.
    from hsft.inputs.import_hllm import with_pretrained

    return with_pretrained(config)


def _check_pretrained(config: Config) -> None:
    if config.load_pretrain is not None:
        from hsft.inputs.import_hllm import check_pretrained

        check_pretrained(config)


def _writable(target: Path, name: str, key: str) -> None:
    """Refuse a target whose folder cannot be made or written."""
    parent = target.absolute().parent
    try:
        while not parent.exists():
            parent = parent.parent
        wrong = "is no folder" if not parent.is_dir() else "is not writable"
        usable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    except OSError as error:
        wrong, usable = f"cannot be used ({error.strerror})", False
    if not usable:
        raise InputError(f"the {name} {target} cannot be written: {parent} {wrong}; change {key}.")
    # Windows has no pathconf; its file systems allow as many characters.
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    # Temporary names and the numbers of runs are longer than the name itself.
    if len(os.fsencode(target.name)) + 32 > longest:
        raise InputError(
            f"the {name} {target} cannot be made: the name is too long; shorten it with --run_name, "
            f"--dataset or {key}."
        )
    free = free_bytes(parent)
    if free < _SPARE_BYTES:
        raise InputError(
            f"the {name} {target} needs more than the {free >> 20} MiB that are free on its disk; "
            f"free some space or change {key}."
        )


def check_user_model(config: Config, findings: Findings) -> int | None:
    """Check the UserLLM's folder and return its hidden size, None when that is not known.

    Args:
        config: the configuration.
        findings: where problems are booked.
    """
    folder = hidden = None
    with findings.collect():
        folder = user_llm_folder(config)
    if folder is None:
        return None
    source = DecoderSource(
        folder, config.user_llm_layers, trust_remote_code=config.trust_remote_code
    )
    with findings.collect():
        kind = read_kind(source)
        check_decoder(kind, folder, source.layers)
        hidden = kind.hidden_size
        weights = None
        if config.loads_user_llm:
            weights = check_files(folder)
            check_shapes(kind, weights, folder)
        decoder = read_structure(source)
        check_embeddings(decoder.embedding_width, decoder.hidden_size, folder)
        check_positions(decoder, config.longest_list_length, folder, "MAX_ITEM_LIST_LENGTH")
        if config.use_qlora and not config.val_only:
            check_lora_targets(decoder.linear, config.qlora_target_modules)
        if weights is not None:
            check_weights(
                folder, layers=config.user_llm_layers, trust_remote_code=config.trust_remote_code
            )
        _training_space(
            config, sum(decoder.sizes) if weights is None else _trained(config, weights)
        )
    with findings.collect():
        extra = user_extra(config)
        if hidden is not None and config.model == "HLLM":
            train = not config.val_only
            adapter_shape(config, extra, folder, train=train, rectangular=False)
            residual_items(config, extra, folder, hidden, train=train)
            if config.loads_user_llm:
                read_id_vectors(folder, hidden)
    with findings.collect():
        user_attention(config, torch.device(choose_device(config)))
    if config.loads_user_llm:
        with findings.collect():
            findings.warn(pretraining_overlap(folder, config.dataset))
    return hidden


def check_item_model(config: Config, findings: Findings) -> None:
    """Check the folder of the ItemLLM, or of the sentence encoder in its place.

    Args:
        config: the configuration.
        findings: where problems are booked.
    """
    if config.encoder is not None:
        with findings.collect():
            source = sentence_source(config.encoder, config.trust_remote_code)
            read_kind(source)
            check_files(source.folder)
            check_tokenizer(source.folder, config.trust_remote_code)
            _item_training(config, source)
        return
    folder = None
    with findings.collect():
        folder = item_llm_folder(config)
    if folder is None:
        return
    source = DecoderSource(
        folder, keep_token_embedding=True, trust_remote_code=config.trust_remote_code
    )
    with findings.collect():
        kind = read_kind(source)
        check_decoder(kind, folder)
        if config.loads_item_llm:
            check_shapes(kind, check_files(folder), folder)
        check_tokenizer(folder, config.trust_remote_code)
        has_token = config.item_emb_token_n > 0
        if has_token and config.loads_item_llm:
            has_token = emb_token(folder, 1, kind.hidden_size or 0) is not None
            if not has_token:
                findings.notes.append(no_emb_token(folder))
        _item_training(config, source)
        decoder = read_structure(source)
        check_embeddings(decoder.embedding_width, decoder.hidden_size, folder)
        # The emb token comes after the longest text.
        longest = config.MAX_TEXT_LENGTH + has_token
        check_positions(decoder, longest, folder, "MAX_TEXT_LENGTH")
        if config.loads_item_llm:
            check_weights(
                folder, keep_token_embedding=True, trust_remote_code=config.trust_remote_code
            )
    with findings.collect():
        device = torch.device(choose_device(config))
        attention_kernel(config, device, read_kind(source), rows=False)


def _item_training(config: Config, source: DecoderSource) -> None:
    """Check that what `train_item_llm` asks for fits an ItemLLM's configuration."""
    if not config.trains_items:
        return
    decoder = read_structure(source)
    if config.trains_item_lora:
        check_lora_targets(decoder.linear, config.item_lora_target_modules, "ItemLLM")
    check_frozen_layers(decoder.linear, config.item_freeze_layers)
    if not config.trains_item_lora:
        # As in `_training_space`.
        needed = 2 * 4 * sum(decoder.sizes)
        _enough(Path(config.checkpoint_dir), needed, "the ItemLLM's weights", "--checkpoint_dir")


def _cache_header(config: Config, hidden: int | None) -> None:
    path = find_cache(cache_path(config))
    if hidden is None or not is_native(path):
        return
    _, dim, _ = read_header(path)
    check_width(config, user_extra(config), path, dim, hidden)


def _interactions(config: Config, findings: Findings) -> Interactions | None:
    interactions = None
    with findings.collect():
        path = dataset_file(config.data_path, config.dataset)
        interactions = load_interactions(config)
        findings.notes.append(
            f"{path}: {interactions.num_users} users, {interactions.num_items} items, "
            f"{len(interactions)} interactions"
        )
        if interactions.ties is not None and interactions.ties.interactions:
            findings.notes.append(f"ties: {interactions.ties.summary()}")
        for warning in interactions.warnings:
            findings.warn(warning)
    return interactions


def _item_texts(config: Config, findings: Findings) -> ItemTexts | None:
    texts = None
    with findings.collect():
        path = information_file(config.text_path, config.dataset)
        config = with_encoder(config)
        texts = read_item_texts(path, config.text_keys, config.item_prompt, config.text_format)
        bare = texts.has_text().count(False)
        findings.notes.append(f"{path}: {len(texts)} items, {bare} of them without text")
        for warning in texts.warnings:
            findings.warn(warning)
    return texts


def _texts_suffice(
    config: Config, texts: ItemTexts, interactions: Interactions | None, findings: Findings
) -> None:
    path = information_file(config.text_path, config.dataset)
    catalogue: Sequence[str] | np.ndarray = []
    if interactions is not None:
        catalogue = interactions.item_ids[1:]
    source = interaction_file(config)
    findings.problems += unfit_texts(texts, path, config.text_keys, catalogue, source)


def _with_batch_size(config: Config, split: Split, findings: Findings) -> Config:
    if findings.problems:
        # The model's shape may not be known.
        return with_batch_size(config, SMALLEST) if config.chooses_batch_size else config
    config, chosen = resolve_batch_size(config, split, torch.device(choose_device(config)))
    findings.notes += [chosen] if chosen else []
    return config


def _split(config: Config, split: Split, findings: Findings) -> None:
    validates = config.trains or config.model == "ensemble"
    findings.notes += [] if split.time is None else split.time.sentences()
    phases: set[Phase] = {config.eval_phase} | ({"valid"} if validates else set())
    for phase in sorted(phases):
        with findings.collect():
            dataset = CachedEmbeddingEvalDataset(split, phase, config.eval_list_length)
            Evaluator(dataset, eval_protocol(config), batch_size=config.eval_batch_size)
            findings.notes.append(f"{phase}: {len(dataset)} users are scored")
    if not config.trains:
        return
    with findings.collect():
        item_times(config, split.interactions)
    sequences = CachedEmbeddingTrainDataset(split, config.MAX_ITEM_LIST_LENGTH)
    findings.notes.append(
        f"training: {len(sequences)} sequences, {sequences.num_transitions} transitions a pass"
    )
    with findings.collect():
        check_training(config, split, sequences)


def _trained(config: Config, weights: Weights) -> int:
    """Return the number of the UserLLM's weights, 0 where the files have no headers."""
    if not weights.shapes:
        return 0
    return weights.count(config.user_llm_layers, vocabulary=False)


def _training_space(config: Config, weights: int) -> None:
    """Refuse a disk that does not hold so many trained weights."""
    if config.val_only or config.use_qlora or not weights:
        return
    # `best/` holds every trained weight in float32; its successor is written before it is removed.
    needed = 2 * 4 * weights
    _enough(Path(config.checkpoint_dir), needed, "the trained weights", "--checkpoint_dir")


def _caching_space(config: Config, items: int, findings: Findings) -> None:
    with findings.collect():
        trusted = config.trust_remote_code
        source = DecoderSource(Path(config.item_pretrain_dir or ""), trust_remote_code=trusted)
        if config.encoder is not None:
            source = sentence_source(config.encoder, trusted)
        dim = read_kind(source).hidden_size or 0
        # The finished parts stay until the cache itself is written.
        needed = 2 * items * dim * DTYPES[config.item_cache_dtype].itemsize
        findings.notes.append(
            f"cache to write: {items} items of {dim} dimensions, {needed / 2**20:.1f} MiB of disk "
            f"with its parts"
        )
        _enough(cache_path(config), needed, "the item cache and its parts", "--item_cache_path")


def _enough(target: Path, needed: int, what: str, key: str) -> None:
    free = free_bytes(target)
    if free < needed + _SPARE_BYTES:
        raise InputError(
            f"{what} need about {needed / GIB:.1f} GiB of disk at {target}, where {free / GIB:.1f} "
            f"GiB are free; free some space or change {key}."
        )


def _memory(
    config: Config, findings: Findings, split: Split | None, cache: ItemCache | None
) -> None:
    """Estimate memory; refuse only what the weights and the item table alone exceed."""
    if findings.problems or config.model != "HLLM" or split is None or cache is None:
        return
    folder = Path(config.user_pretrain_dir or "")
    device = choose_device(config)
    trusted = config.trust_remote_code
    if config.loads_user_llm:
        weights = check_files(folder).count(config.user_llm_layers, vocabulary=False)
    else:
        source = DecoderSource(folder, config.user_llm_layers, trust_remote_code=trusted)
        weights = sum(read_structure(source).sizes)
    size = 4 if config.item_embedding_transform != "none" else cache.embeddings.element_size()
    table = len(split.interactions.item_ids) * cache.dim * size
    if config.trains_items:
        transformer = sentence_source(str(item_llm_folder(config)), trusted).folder
        source = DecoderSource(transformer, keep_token_embedding=True, trust_remote_code=trusted)
        weights += sum(read_structure(source).sizes)
    least = table + weights * compute_dtype(config).itemsize
    if device in ("cuda", "xpu"):
        total = torch.get_device_module(device).get_device_properties(0).total_memory
    else:
        import psutil

        total = psutil.virtual_memory().total
    findings.notes.append(
        f"memory: {least / GIB:.2f} GiB for the {'LLMs' if config.trains_items else 'UserLLM'} and "
        f"the item table alone, of "
        f"{total / GIB:.1f} GiB ({device})"
    )
    with findings.collect():
        if device == "cuda" and not config.val_only and cache.metadata:
            from hsft.run.dry_run import training_shape
            from hsft.run.quant_type import resolve_quant_type

            config, chosen = resolve_quant_type(config, split, torch.device(device))
            findings.notes += [chosen] if chosen else []
            needed = estimate(training_shape(config, split), config.train_batch_size).total
            findings.notes.append(f"memory: about {needed / GIB:.2f} GiB in a training step")
            if needed > total:
                raise InputError(
                    f"a training step needs about {needed / GIB:.1f} GiB of GPU memory, the card "
                    f"has {total / GIB:.1f}; lower train_batch_size or MAX_ITEM_LIST_LENGTH, or see "
                    f"--dry_run True."
                )
        if least > total and not (config.use_qlora and not config.eval_baseline):
            raise InputError(
                f"the UserLLM and the item table need {least / GIB:.1f} GiB, the machine has "
                f"{total / GIB:.1f} ({device}); lower user_llm_layers or use a smaller model."
            )
