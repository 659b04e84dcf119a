"""From a configuration to the objects that evaluation and training work on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hsft.config import Config
from hsft.data.blocks import texts_in_blocks
from hsft.data.cache import ItemCache, ids_fingerprint, open_cache
from hsft.data.column_checks import find_twins, spelling_problem
from hsft.data.dataset import CachedEmbeddingEvalDataset, CachedEmbeddingTrainDataset
from hsft.data.files import cache_path, find_cache, user_llm_folder
from hsft.data.interactions import PAD, Interactions, drop_items, load_interactions
from hsft.data.negatives import NegativeSampler
from hsft.data.split import NEEDED, Split, make_split, train_item_counts
from hsft.data.time_fields import item_times
from hsft.evaluator.evaluator import EvalProtocol, Evaluator
from hsft.evaluator.list_metrics import ItemStatistics, count_item_users
from hsft.inputs.cache_items import cache_warnings, read_item_cache
from hsft.inputs.load_tower import load_item_tower, read_catalogue, refuse_other_item_llm
from hsft.model.attention import VARLEN, varlen_obstacle
from hsft.model.backbone import (
    LoraSettings,
    add_lora,
    computes_in_bfloat16,
    enable_checkpointing,
    linear_layers,
    load_decoder,
    load_model_config,
    make_decoder,
    model_kind,
)
from hsft.model.hstu import build_hstu
from hsft.model.id_model import IdTable, id_loss_settings
from hsft.model.item_adapter import adapter_shape, check_width, load_adapter, user_extra
from hsft.model.item_ids import load_id_vectors, read_id_vectors
from hsft.model.item_table import ItemTable, fit_transform, sample_cosines, table_from_cache
from hsft.model.meta import read_kind
from hsft.model.norms import fuse_norms
from hsft.model.parameter_names import freeze_prefixed
from hsft.model.proposal import Proposal
from hsft.model.recommender import LossSettings, Recommender, Similarity
from hsft.model.residual import make_residual
from hsft.model.sasrec import build_sasrec
from hsft.model.structure import DecoderSource
from hsft.model.time_embedding import TimeEmbedding
from hsft.model.user_llm import UserLLM
from hsft.model.weights import ITEM_ORDER, ITEM_SET
from hsft.trainer.fabric import (
    attention_kernel,
    choose_device,
    choose_precision,
    compute_dtype,
)
from hsft.trainer.item_training import ItemTraining
from hsft.trainer.masked_negatives import HIGH_MASKED_SHARE
from hsft.utils.distributed import global_rank, is_rank_zero, world_size
from hsft.utils.errors import InputError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

# Positions of a packed row of a model on item ids, if no history is longer.
_LONGEST_NARROW_ROW = 256

# Cosine above which float32 tells two items apart by its rounding alone.
SAME_DIRECTION = 1 - 1e-6


@dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        split: interactions, split as the configuration says.
        cache: item embeddings; None for models that need none.
        own_items: the run's own items are numbers 1..own_items; later ones were added to a
            finished run and no fixed map is fitted on them. None: all are the run's own.
    """

    split: Split
    cache: ItemCache | None
    own_items: int | None = None

    @property
    def num_own_items(self) -> int:
        """Number of the run's own items, those that were added to it not counted."""
        return self.interactions.num_items if self.own_items is None else self.own_items

    @property
    def interactions(self) -> Interactions:
        """All users' histories."""
        return self.split.interactions

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the interactions and a sample of the cache's rows.

        A run is continued on the same data only.
        """
        data, digest = self.interactions, hashlib.sha256()
        for ids in (data.user_ids, data.item_ids):
            for number, block in enumerate(texts_in_blocks(ids)):
                digest.update(("\0" * (number > 0) + "\0".join(map(str, block))).encode())
        for array in (data.items, data.offsets):
            digest.update(np.ascontiguousarray(array).data)
        if self.split.time is not None:
            digest.update(self.split.identity.encode())
        if self.cache is not None:
            rows = torch.linspace(0, len(self.cache) - 1, min(len(self.cache), 1024)).long()
            # Sorted, since safetensors gives the metadata in any order.
            settings = sorted(self.cache.settings.items())
            digest.update(str((tuple(self.cache.embeddings.shape), settings)).encode())
            digest.update(self.cache.embeddings[rows].float().numpy().tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return the data's size for `result.json`."""
        data = self.interactions
        return {
            "users": data.num_users,
            "items": data.num_items,
            "interactions": len(data),
            "dropped_interactions": data.dropped,
            "users_too_short": self.split.too_short,
            **({} if self.split.time is None else {"split": self.split.time.summary()}),
        }


def load_data(
    config: Config, *, need_cache: bool, again: bool = False, trained: ItemCache | None = None
) -> Data:
    """Read the interactions and, when needed, the item embeddings.

    Args:
        config: the configuration.
        need_cache: read or make the item embeddings.
        again: this program has read the same interactions before and has said how many they are.
        trained: embeddings of an ItemLLM that was trained, in place of the configuration's.

    Raises:
        InputError: a file is missing or bad, or the cache is of another dataset.
    """
    interactions = load_interactions(config)
    encodes = need_cache and not config.use_item_cache and trained is None
    # Encoding reads the file too and says it then.
    if not (again or encodes):
        for warning in interactions.warnings:
            warn(warning)
    cache = None
    if need_cache:
        cache = read_item_cache(config) if trained is None else trained
        if not encodes and trained is None and is_rank_zero():
            for warning in cache_warnings(config, cache, interactions.item_ids[1:]):
                warn(warning)
        interactions = match_cache(interactions, cache, config)
    split = make_split(config, interactions)
    level = logging.DEBUG if again else logging.INFO
    if split.time is not None:
        too_short, sentences = "", split.time.sentences()
    else:
        train, valid, test = (f"{split.too_short[phase]}" for phase in NEEDED)
        too_short, sentences = (
            f"; {train} users are too short to train (which needs {NEEDED['train']} items), {valid} to "
            f"validate ({NEEDED['valid']}), {test} to test ({NEEDED['test']})",
            [],
        )
    log.log(
        level,
        "%s: %d users, %d items, %d interactions%s.",
        config.dataset,
        interactions.num_users,
        interactions.num_items,
        len(interactions),
        too_short,
    )
    for sentence in sentences:
        log.log(level, "%s", sentence)
    return Data(split, cache)


def warn(sentence: str | None) -> None:
    """Log a warning, if there is one."""
    if sentence:
        log.warning(sentence)


def match_cache(interactions: Interactions, cache: ItemCache, config: Config) -> Interactions:
    """Check that the cache has every item; drop the others when the configuration says so.

    Raises:
        InputError: items are lacking and `missing_items` is `error`, or nothing would be left.
    """
    have = cache.rows_of(interactions.item_ids) >= 0
    lacking = [str(item) for item in interactions.item_ids[1:][~have[1:]]]
    if not lacking:
        return interactions
    where = cache.path or config.text_path
    twins = find_twins(interactions.item_ids[1:], cache.item_ids)
    spelling = spelling_problem(twins, interactions.num_items, config.dataset, where)
    if spelling:
        raise InputError(spelling)
    if config.missing_items == "error":
        raise InputError(
            f"{len(lacking)} of {interactions.num_items} items in {config.dataset} are not in the "
            f"item cache {where}, for example {', '.join(lacking[:5])}; make the cache for this "
            f"dataset with item_caching.py, or set --missing_items drop."
        )
    thinned = drop_items(interactions, have)
    log.warning(
        "dropped %d interactions with %d items that are not in the item cache %s.",
        thinned.dropped,
        len(lacking),
        where,
    )
    return thinned


def check_training(config: Config, split: Split, sequences: CachedEmbeddingTrainDataset) -> None:
    """Refuse data that cannot be trained on.

    Raises:
        InputError: there is no sequence or only one item, a batch is always a single position
            without a negative, or a user has interacted with every item, so that no negative can
            be drawn.
    """
    if not len(sequences):
        needed = "4 are needed: two are held out" if split.time is None else split.needs("train")
        raise InputError(
            f"no user of {config.dataset} has enough items to train on ({needed}); use --val_only True."
        )
    if split.interactions.num_items < 2:
        raise InputError(
            f"{config.dataset} has a single item, so that there is nothing to learn; use "
            f"--val_only True."
        )
    if config.model == "HLLM" and config.effective_negatives == "in_batch":
        longest = 1 if config.train_positions == "random_split" else int(sequences.lengths.max())
        if config.train_batch_size * world_size() * longest == 1:
            raise InputError(
                "negatives: in_batch needs a second position in a batch, but every batch is a "
                "single one; raise --train_batch_size, or use --negatives catalogue."
            )
    if config.effective_negatives != "sampled":
        return
    sampler = negative_sampler(config, split)
    trained = np.zeros(split.interactions.num_users, dtype=bool)
    trained[sequences.segments.users] = True
    full = np.flatnonzero(trained & (sampler.available < 1))
    if len(full):
        user = split.interactions.user_ids[full[0]]
        raise InputError(
            f"negatives: {len(full)} users, for example '{user}', have all "
            f"{sampler.num_items} items of the catalogue in their history, so none can "
            f"be drawn for them; use negatives_exclude: none, or negatives: in_batch or catalogue "
            f"with num_negatives: null."
        )


def negative_sampler(config: Config, split: Split) -> NegativeSampler:
    """Return what draws the negatives of training."""
    return NegativeSampler(
        split.interactions,
        held_out=split.held_out,
        exclude=config.negatives_exclude,
        items=split.train_items,
    )


def negative_proposal(config: Config, sequences: CachedEmbeddingTrainDataset) -> Proposal:
    """Return how often training meets each item as a negative, for `negatives_logq`."""
    targets = sequences.target_shares(config.train_positions == "random_split")
    drawn = np.zeros_like(targets)
    if config.effective_negatives == "sampled":
        sampler = negative_sampler(config, sequences.split)
        drawn = sampler.shares(sequences.segments.users)
    return Proposal(targets, drawn)


def check_cosines(
    config: Config, cache: ItemCache, interactions: Interactions
) -> tuple[str, str | None]:
    """Sample cosines between items, which say how many negatives `nce_thres` will mask.

    Args:
        config: of a run that trains the UserLLM with `loss: nce`.
        cache: has every item of the interactions.
        interactions: whose items are compared.

    Returns:
        A sentence with the figures, and a warning where the share above `nce_thres` is high.

    Raises:
        InputError: every negative would be masked, or all items have the same direction, so that
            nothing can be learnt.
    """
    cosines = sample_cosines(cache, interactions.item_ids, config.item_embedding_transform)
    where = cache.path or "made now"
    remedy = "use an ItemLLM that was trained to embed"
    if config.has_random_item_llm:
        remedy = "a random ItemLLM makes items alike: set --nce_thres 1.01, which masks nothing"
    elif config.item_embedding_transform == "none":
        remedy += ", or set --item_embedding_transform standardize"
    summary = (
        f"item cache {where}: cosine {cosines.mean():.3f} on average over {len(cosines):,} pairs "
        f"of items"
    )
    if config.effective_negatives == "catalogue":
        if (cosines > SAME_DIRECTION).all() and not config.item_id_embedding:
            raise InputError(
                f"item cache {where}: all items have the same direction (cosine "
                f"{cosines.mean():.6f}), so that nothing can be learnt; {remedy}."
            )
        return f"{summary}.", None
    share = (cosines > config.nce_thres).mean()
    summary = f"{summary}, {share:.1%} of them above nce_thres {config.nce_thres:g}"
    if share == 1:
        other = "--item_pretrain_epochs 1" if config.trains_items_along else "--negatives catalogue"
        raise InputError(
            f"{summary}, so that every negative would be masked and nothing learnt; {remedy}, or "
            f"{other}."
        )
    if share > HIGH_MASKED_SHARE:
        return f"{summary}.", f"{summary}: these are masked as negatives; {remedy}."
    return f"{summary}.", None


def warn_of_plain_items(config: Config, cache: ItemCache | None) -> None:
    """Warn before a UserLLM is trained on embeddings of an LLM that was not trained to embed."""
    if cache is None or cache.metadata.get("pooling") != "mean" or config.item_adapter != "none":
        return
    log.warning(
        "the item cache is mean-pooled, from an LLM that was not trained to embed items; trained on "
        "as it is, the UserLLM learns little. Add code/HLLM/plain_llm.yaml to --config_file, or set "
        "--item_embedding_transform standardize --item_adapter linear."
    )


def catalogue_cost(config: Config, model: Recommender, lengths: np.ndarray) -> tuple[float, float]:
    """Count a training step's floating-point operations for the catalogue and for the UserLLM.

    Products alone: 2 a weight and position forward, as many for the inputs' gradients, and as many
    again for the gradients of weights that are trained.

    Args:
        config: the configuration.
        model: the recommender.
        lengths: int64 [S], positions of the training sequences.

    Returns:
        (catalogue's, UserLLM's); the catalogue's is 0 unless `negatives` is `catalogue`.
    """
    table = model.encoder.items
    positions = float(lengths.mean()) * min(config.train_batch_size, len(lengths))
    encoder: Any = model.encoder
    weights = sum(
        part.weight.numel()
        if not hasattr(part.weight, "quant_state")
        else part.in_features * part.out_features
        for part in linear_layers(encoder.decoder).values()
        if isinstance(part, nn.Linear)
    )
    passes = 4 if config.use_qlora else 6
    if config.effective_negatives != "catalogue":
        return 0.0, passes * weights * positions
    adapter = sum(weight.numel() for weight in table.parameters() if weight.ndim == 2)
    scores = 6 * positions * table.dim
    return table.num_items * (scores + 6 * adapter), passes * weights * positions


def report_costly_catalogue(config: Config, model: Recommender, lengths: np.ndarray) -> None:
    """Say so where the catalogue, not the UserLLM, costs most of a training step."""
    catalogue, llm = catalogue_cost(config, model, lengths)
    if catalogue > llm:
        log.info(
            "the softmax over all %d items takes about %.0f%% of a training step's arithmetic; a "
            "larger train_batch_size spreads the items' vectors over more positions, and "
            "num_negatives replaces the softmax.",
            model.encoder.items.num_items,
            100 * catalogue / (catalogue + llm),
        )


def eval_protocol(config: Config) -> EvalProtocol:
    """Return how users are scored."""
    return EvalProtocol(
        kind=config.eval_protocol,
        topk=tuple(config.topk),
        metrics=tuple(config.metrics),
        candidates=config.eval_neg_sample_num,
        seed=config.seed,
        budget_bytes=config.logits_budget_mb << 20,
        tensor_cores=config.ranking_precision == "tensor_cores" and choose_device(config) == "cuda",
    )


def make_evaluator(
    config: Config,
    split: Split,
    phase: Any,
    fabric: Fabric,
    sample: int | None = None,
    statistics: ItemStatistics | None = None,
) -> Evaluator:
    """Make the evaluator of one phase for this process.

    Args:
        config: the configuration.
        split: the data.
        phase: `valid` or `test`.
        fabric: the processes.
        sample: score so many users, drawn by the configuration's seed; None: all.
        statistics: what recommended lists are measured by; None: they are not.

    Raises:
        InputError: there is nobody to score.
    """
    times = item_times(config, split.interactions)
    dataset = CachedEmbeddingEvalDataset(split, phase, config.eval_list_length, times)
    if sample is not None and sample < len(dataset):
        log.info("%s: a sample of %d of %d users is scored.", phase, sample, len(dataset))
        rng = np.random.default_rng([config.seed, sample])
        dataset = dataset.keep(np.sort(rng.permutation(len(dataset))[:sample]))
    again = dataset.count_seen_targets()
    if again and config.eval_protocol == "full":
        log.info(
            "%s: %d of %d users' targets are already in their history; full ranking masks seen "
            "items, so they count as misses.",
            phase,
            again,
            len(dataset),
        )
    return Evaluator(
        dataset,
        eval_protocol(config),
        batch_size=config.eval_batch_size,
        num_workers=config.num_workers,
        rank=global_rank(),
        world_size=world_size(),
        statistics=statistics,
    )


def item_statistics(config: Config, data: Data) -> ItemStatistics | None:
    """Return what recommended lists are measured by; None without `list_metrics`.

    Vectors are those of the item cache, for models that do not read it too, so that lists of
    different models are measured alike. A line in the log says so where there are none.

    Raises:
        InputError: the item cache is damaged.
    """
    if not config.list_metrics:
        return None
    interactions = data.interactions
    train_ends = data.split.train_ends
    statistics = ItemStatistics(
        train_item_counts(data.split),
        count_item_users(interactions, train_ends),
        int((train_ends > interactions.offsets[:-1]).sum()),
    )
    cache = _list_embeddings(config, data)
    if cache is None:
        return statistics
    rows = cache.rows_of(interactions.item_ids)
    rows[PAD] = 0
    return replace(
        statistics,
        vectors=lambda items: cache.embeddings[torch.from_numpy(rows[items])],
        vectors_origin=cache.settings,
    )


def _list_embeddings(config: Config, data: Data) -> ItemCache | None:
    """Return a cache with embeddings of all items; None where there is none."""
    cache = data.cache
    if cache is None:
        try:
            path = find_cache(cache_path(config))
        except InputError as error:
            log.info("list_metrics: no intra-list similarity: %s", error)
            return None
        cache = open_cache(path)
    lacking = int((cache.rows_of(data.interactions.item_ids[1:]) < 0).sum())
    if lacking:
        log.info(
            "list_metrics: no intra-list similarity, since %d items are not in the item cache %s.",
            lacking,
            cache.path,
        )
        return None
    return cache


def lora_settings(config: Config) -> LoraSettings:
    """Return the LoRA and quantisation settings of a configuration."""
    dtype = config.qlora_compute_dtype
    assert config.qlora_quant_type != "auto", "resolved at the start of a run"
    return LoraSettings(
        rank=config.qlora_r,
        alpha=config.qlora_alpha,
        dropout=config.qlora_dropout,
        target_modules=tuple(config.qlora_target_modules),
        quant_type=config.qlora_quant_type,
        compute_dtype=compute_dtype(config) if dtype == "auto" else getattr(torch, dtype),
        double_quant=config.qlora_double_quant,
    )


def packed_row_length(config: Config, kernel: str) -> int | None:
    """Return the positions of a packed row, None where rows hold one sequence each.

    The variable-length kernels take one row whatever its length. Elsewhere attention computes the
    whole square of a row, masked, so rows are only as long as packs them well.

    Args:
        config: the configuration.
        kernel: as `attention_kernel` returns.
    """
    if not config.pack_sequences:
        return None
    if config.has_user_llm and kernel in (VARLEN, "flash_attention_2"):
        return config.train_batch_size * config.MAX_ITEM_LIST_LENGTH
    longest = config.MAX_ITEM_LIST_LENGTH
    if config.has_user_llm:
        return 4 * longest
    # In narrow layers the square soon takes longer than all else, and HSTU keeps it: see
    # docs/performance-training.md.
    return max(longest, min(4 * longest, _LONGEST_NARROW_ROW))


def graph_obstacle(config: Config, precision: str) -> str:
    """Say what in a configuration keeps its training steps from CUDA graphs; empty: nothing.

    Args:
        config: the configuration.
        precision: its `precision`, `auto` resolved.
    """
    if config.trains_items_along:
        return "CUDA graphs need train_item_llm: none"
    if config.gradient_checkpointing:
        return "CUDA graphs need gradient_checkpointing: False"
    if config.strategy == "deepspeed" or precision == "16-mixed":
        return "CUDA graphs need strategy: ddp and precision: bf16-mixed"
    return ""


def user_attention(config: Config, device: torch.device) -> str:
    """Return the attention kernel of the configuration's UserLLM.

    Raises:
        InputError: as `attention_kernel`, or the model folder is unusable.
    """
    folder = Path(config.user_pretrain_dir or "")
    source = DecoderSource(folder, trust_remote_code=config.trust_remote_code)
    return attention_kernel(config, device, read_kind(source))


def build_user_llm(config: Config, data: Data, fabric: Fabric, *, train: bool) -> Recommender:
    """Load the UserLLM with the item table and its loss, on the device.

    Args:
        config: the configuration.
        data: the data, with a cache.
        fabric: says where.
        train: with the trainable parts of the configuration; else as loaded, frozen.

    Raises:
        InputError: the model folder is unusable or does not fit the cache.
    """
    folder = str(user_llm_folder(config))
    assert data.cache is not None
    hidden = int(load_model_config(folder, config.trust_remote_code).hidden_size)
    extra = user_extra(config)
    cache = data.cache
    check_width(config, extra, cache.path or "made now", cache.dim, hidden)
    device = fabric.device
    decoder = _user_decoder(config, folder, device, train=train)
    item_ids = data.interactions.item_ids
    stored = read_id_vectors(folder, hidden) if config.loads_user_llm else None
    has_ids = stored is not None or (train and config.item_id_embedding)
    table = ItemTable(
        table_from_cache(cache, item_ids, config.item_embedding_transform, data.own_items),
        *adapter_shape(config, extra, folder, train=train, rectangular=cache.dim != hidden),
        dim=hidden,
        id_items=data.num_own_items if has_ids else None,
        id_dropout=config.item_id_dropout,
    )
    if train:
        table.fitted_to = fitted_to(
            data,
            by_item=config.item_id_embedding,
            by_catalogue=config.item_embedding_transform != "none",
        )
    load_adapter(table, extra, trained=train and config.item_adapter != "none")
    if stored is not None:
        load_id_vectors(table, stored, item_ids, trained=train and config.item_id_embedding)
    time_embedding = None
    if train and config.use_timestamps:
        time_embedding = _time_embedding(config, hidden)
    settings = loss_settings(config, scored_by="cosine" if not train else None)
    model = Recommender(
        UserLLM(
            decoder,
            table,
            max_length=config.longest_list_length,
            autocast=not computes_in_bfloat16(decoder),
            item_dropout=config.item_dropout,
            times=time_embedding,
            residual=make_residual(config, extra, folder, hidden, train=train),
        ),
        settings,
        logit_scale=initial_logit_scale(config, extra),
        fix_scale=config.fix_temp,
    )
    if train:
        freeze_prefixed(model, config)
    return model.to(device)


def _user_decoder(config: Config, folder: str, device: torch.device, *, train: bool) -> Any:
    """Load or make the decoder that reads histories, with the trainable parts of the configuration.

    Args:
        config: of a model with a UserLLM.
        folder: its `user_pretrain_dir`.
        device: where it will run.
        train: as for `build_user_llm`.
    """
    half = compute_dtype(config)
    lora = lora_settings(config) if train and config.use_qlora else None
    # Weights that are trained whole stay in float32 under mixed precision; frozen ones need not.
    whole = train and lora is None and choose_precision(config) != "bf16-true"
    attention = user_attention(config, device)
    if attention == "eager" and config.attn_implementation == "auto":
        log.info("%s runs with eager attention, since its kind of model has no sdpa.", folder)
    dtype = torch.float32 if whole else half
    decoder: Any
    if config.loads_user_llm:
        decoder = load_decoder(
            folder,
            dtype=dtype,
            attention=attention,
            layers=config.user_llm_layers,
            lora=lora,
            device=device,
            trust_remote_code=config.trust_remote_code,
        )
    else:
        decoder = make_decoder(
            folder,
            dtype=dtype,
            attention=attention,
            seed=config.seed,
            layers=config.user_llm_layers,
            trust_remote_code=config.trust_remote_code,
        )
    fuse_norms(decoder)
    if attention == VARLEN:
        log.info("attention: torch's variable-length kernel, a batch's sequences in one row.")
    elif config.attn_implementation == "auto" and device.type != "cpu":
        obstacle = varlen_obstacle(model_kind(decoder.config), device, half != torch.float32)
        log.info(
            "attention: %s; torch's variable-length kernel needs %s.",
            attention,
            obstacle or "another kind of model",
        )
    if lora is not None:
        decoder = add_lora(decoder, lora, config.gradient_checkpointing)
    elif train and config.gradient_checkpointing:
        enable_checkpointing(decoder)
    elif not train:
        decoder.requires_grad_(False)
    return decoder


def build_id_model(config: Config, data: Data, fabric: Fabric) -> Recommender:
    """Make one of `ID_MODELS`, untrained, on the device.

    Raises:
        InputError: the model folder of `llm_id` is unusable.
    """
    num_items = data.interactions.num_items
    if config.model == "llm_id":
        model = _build_llm_id(config, num_items, fabric.device)
    else:
        model = {"sasrec": build_sasrec, "hstu": build_hstu}[config.model](config, num_items)
    model.encoder.items.fitted_to = fitted_to(data, by_item=True)
    freeze_prefixed(model, config)
    return model.to(fabric.device)


def fitted_to(data: Data, *, by_item: bool, by_catalogue: bool = False) -> dict[str, str]:
    """Return `ItemTable.fitted_to` of a model that is trained.

    Args:
        data: the data.
        by_item: whether single items have trained weights.
        by_catalogue: whether a fixed map was fitted on the items.
    """
    item_ids = data.interactions.item_ids[1 : data.num_own_items + 1]
    fingerprints = {}
    if by_item:
        fingerprints[ITEM_ORDER] = ids_fingerprint(item_ids)
    if by_catalogue:
        fingerprints[ITEM_SET] = ids_fingerprint(np.sort(item_ids))
    return fingerprints


def _build_llm_id(config: Config, num_items: int, device: torch.device) -> Recommender:
    """Make HLLM's LLMIDRec: the UserLLM, all of it trained, on trained vectors of item ids."""
    folder = str(user_llm_folder(config))
    decoder = _user_decoder(config, folder, device, train=True)
    hidden = int(decoder.config.hidden_size)
    encoder = UserLLM(
        decoder,
        IdTable(num_items, hidden, config.llm_id.item_width),
        max_length=config.MAX_ITEM_LIST_LENGTH,
        autocast=not computes_in_bfloat16(decoder),
        item_dropout=config.item_dropout,
        times=_time_embedding(config, hidden) if config.use_timestamps else None,
    )
    extra = user_extra(config)
    model = Recommender(
        encoder,
        id_loss_settings(config, "cosine"),
        logit_scale=initial_logit_scale(config, extra),
        fix_scale=config.fix_temp,
    )
    return model.to(device)


def _time_embedding(config: Config, hidden: int) -> TimeEmbedding:
    return TimeEmbedding(hidden, config.predict_at == "target")


def build_item_training(
    config: Config,
    data: Data,
    fabric: Fabric,
    table: ItemTable,
    pretrained: ItemTraining | None = None,
) -> ItemTraining:
    """Load the ItemLLM that is trained along with a model, or was before.

    A fixed map of its vectors (`item_embedding_transform`) is fitted on the cache that the run
    starts from, and stays as it is.

    Args:
        config: of a run that trains the ItemLLM.
        data: the data, with a cache.
        fabric: says where.
        table: the item table of the model that is trained.
        pretrained: as `build_pretraining` returned it, trained; `data` has its vectors.

    Raises:
        InputError: the ItemLLM or the item information is unusable, or another ItemLLM made the cache.
    """
    assert data.cache is not None
    items = build_pretraining(config, data, fabric) if pretrained is None else pretrained
    kind = config.item_embedding_transform
    if kind != "none":
        vectors = table_from_cache(data.cache, data.interactions.item_ids)[1:]
        items.tower.transform = fit_transform(kind, vectors.float()).to(fabric.device)
    items.table = table
    if not config.trains_items_along:
        # As the run's own cache will hold them.
        items.use(items.tower.mapped(data.cache))
        items.along = False
        items.tower.cpu()
    return items


def build_pretraining(config: Config, data: Data, fabric: Fabric) -> ItemTraining:
    """Load an ItemLLM to be trained, with a table of its own.

    Args:
        config: of a run that trains the ItemLLM.
        data: the data, with a cache.
        fabric: says where.

    Raises:
        InputError: the ItemLLM or the item information is unusable, or another ItemLLM made the cache.
    """
    assert data.cache is not None
    texts, source = read_catalogue(config, data.interactions.item_ids[1:])
    tower, job = load_item_tower(config, texts, fabric.device, fabric.autocast, information=source)
    refuse_other_item_llm(config, data.cache, tower.dim)
    table = ItemTable(torch.zeros(len(texts) + 1, tower.dim, device=fabric.device))
    shown = config.show_progress and is_rank_zero()
    return ItemTraining(tower, table, job, texts.item_ids, fabric.device, shown)


def initial_logit_scale(config: Config, extra: Mapping[str, torch.Tensor]) -> float | None:
    """Return the log factor on cosines to start from: the configuration's, else the model folder's.

    Args:
        config: the configuration.
        extra: as `read_extra` returns for the UserLLM's folder.

    Returns:
        -log(temperature); None: neither says one.
    """
    if config.initial_logit_scale is not None:
        return config.initial_logit_scale
    return float(extra["logit_scale"]) if "logit_scale" in extra else None


def loss_settings(config: Config, scored_by: Similarity | None = None) -> LossSettings:
    """Return the loss; `scored_by` is the similarity that `auto` stands for."""
    similarity: Similarity
    if config.similarity == "auto":
        similarity = scored_by or ("cosine" if config.loss == "nce" else "dot")
    else:
        similarity = config.similarity
    return LossSettings(
        loss=config.loss,
        negatives=config.effective_negatives,
        nce_thres=config.nce_thres,
        budget_bytes=config.logits_budget_mb << 20,
        similarity=similarity,
        mean=config.loss_mean,
    )
