"""Export a fine-tuned UserLLM: merged into a plain model folder, or its adapter, with a model card."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hsft.config import Config
from hsft.config.help import dump_config
from hsft.config.options import LOCATION_KEYS
from hsft.config.schema import ITEM_TRAINING_KEYS
from hsft.data.cache import DTYPES
from hsft.evaluator.evaluator import Evaluation, Scorer
from hsft.finished.export_items import ITEM_LLM_DIR, export_items, refuse_overflow
from hsft.finished.export_onnx import OnnxGraphs, OnnxScorer, require_onnx, write_graphs
from hsft.finished.open_run import OpenRun, open_run, refuse_changed_data
from hsft.hub.manifest import EXPORT_FILE, origin
from hsft.hub.repository import output_folder, run_name
from hsft.model.backbone import (
    add_lora,
    load_decoder,
    load_model_config,
    make_decoder,
    quantization_obstacle,
)
from hsft.model.folder import EMBEDDING_KEYS, EXTRA_FILE, ID_FILE, Weights, check_files
from hsft.model.item_adapter import (
    PREFIX,
    adapter_shape,
    adapter_tensors,
    adapter_width,
    load_adapter,
    user_extra,
)
from hsft.model.item_ids import load_id_vectors, read_id_vectors, save_id_vectors
from hsft.model.item_table import ItemTable, table_from_cache
from hsft.model.meta import read_structure
from hsft.model.parameter_names import freeze_prefixed
from hsft.model.recommender import Recommender
from hsft.model.residual import make_residual, residual_items, residual_tensors
from hsft.model.structure import DecoderSource
from hsft.model.user_llm import UserLLM
from hsft.model.weights import (
    ADAPTER_DIR,
    REST_FILE,
    load_trained,
    read_rest,
    refuse_other_catalogue,
)
from hsft.report.compare import Comparison, Row, load_comparison
from hsft.report.model_card import EXPORTED, Exported, Format, model_card
from hsft.report.result import TUNED, read_ranks, read_result
from hsft.run.run_dir import CONFIG_FILE
from hsft.run.saved_model import refuse_other_user_llm, run_config
from hsft.run.setup import (
    build_user_llm,
    fitted_to,
    initial_logit_scale,
    load_data,
    lora_settings,
    loss_settings,
    make_evaluator,
)
from hsft.run.train_and_rank import evaluate
from hsft.trainer.checkpoint import BEST_DIR
from hsft.utils.environment import versions
from hsft.utils.errors import InputError, Interrupted
from hsft.utils.files import atomic_path, free_bytes, is_file, is_folder, read_json
from hsft.utils.signals import StopSignals

log = logging.getLogger(__name__)

# Keys that belong to the run's machine and not to its model.
_LOCAL_KEYS = (
    *LOCATION_KEYS,
    "checkpoint_dir",
    "run_name",
    "overwrite",
    "auto_resume",
    "show_progress",
)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Names in `trained.safetensors`.
ADAPTER, ID_VECTORS = "encoder.items.adapter", "encoder.items.id_vectors"
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        run: the run's folder.
        out: the folder to write.
        format: `merged`, `adapter` or `onnx`.
        dtype: number type of merged weights, a name of `DTYPES`; `onnx` is float32.
        evaluate: score what was merged, on the run's phase and protocol.
        overwrite: replace an earlier export at `out`.
        overrides: keys of the run's configuration with other values, for what has moved.
    """

    run: Path
    out: Path
    format: Format = "merged"
    dtype: str = "bfloat16"
    evaluate: bool = False
    overwrite: bool = False
    overrides: Mapping[str, Any] | None = None


def default_folder(run: Path, format: str) -> Path:
    """Return where an export goes unless another folder is named."""
    return output_folder(run) / ("export" if format == "merged" else f"export-{format}")


def export(options: ExportOptions) -> Path:
    """Export a run that trained the UserLLM.

    The folder appears whole at the end or not at all. `merged` holds safetensors and `config.json`
    of a plain transformers decoder and `hllm_extra.safetensors`, and is a `user_pretrain_dir`;
    `adapter` holds peft's two files and `trained.safetensors`; `onnx` two graphs, see
    `export_onnx.write_graphs`. All have the run's settings in
    `config.yaml`, the card `README.md`, and `export.json`. Of a run that trained the ItemLLM they also
    hold the catalogue's vectors, and `merged` the ItemLLM as a model folder (see `export_items.py`).

    Returns:
        The folder.

    Raises:
        InputError: the run has trained no UserLLM or is not finished, a file is missing or damaged,
            the disk is too small, or `out` must not be replaced.
        Interrupted: SIGINT or SIGTERM came; nothing half-written is left.
    """
    with whole_or_nothing():
        return _export(options)


@contextmanager
def whole_or_nothing() -> Iterator[None]:
    """Stop at SIGINT and SIGTERM, and add to what is said then that nothing was exported.

    Raises:
        Interrupted: such a signal came.
    """
    try:
        with StopSignals():
            yield
    except Interrupted as ending:
        raise Interrupted(f"{ending}; nothing was exported", ending.exit_code) from None


def _export(options: ExportOptions) -> Path:
    refuse_out(options.out, options.overwrite)
    run = _TrainedRun(options.run, run_config(options.run, options.overrides), options)
    run.refuse()
    with atomic_path(options.out) as folder:
        folder.mkdir()
        if options.format == "merged":
            item_adapter = _write_merged(run, folder)
            evaluation = _score(run, folder) if options.evaluate else None
        elif options.format == "onnx":
            item_adapter = _write_onnx(run, folder)
            evaluation = _score_onnx(run, folder) if options.evaluate else None
        else:
            item_adapter, evaluation = _write_adapter(run, folder), None
        if run.config.trains_items:
            export_items(run.folder, run.config, folder, DTYPES[options.dtype], options.format)
        _write_about(run, folder, item_adapter, evaluation)
    log.info("wrote %s.", options.out)
    return options.out


@dataclass(frozen=True)
class _TrainedRun:
    folder: Path
    config: Config
    options: ExportOptions

    @cached_property
    def result(self) -> dict[str, Any]:
        return read_result(self.folder)

    @property
    def best(self) -> Path:
        return self.folder / BEST_DIR

    @property
    def base(self) -> Path:
        return Path(self.config.user_pretrain_dir or "")

    @cached_property
    def hidden_size(self) -> int:
        return int(load_model_config(self.base, self.config.trust_remote_code).hidden_size)

    @cached_property
    def weights(self) -> Weights:
        """Weights of the base model's files, of which there are none where it began with random ones."""
        return check_files(self.base) if self.config.loads_user_llm else Weights({})

    def count_weights(self) -> int:
        """Return the number of weights of the decoder to export."""
        config = self.config
        if config.loads_user_llm:
            return self.weights.count(config.user_llm_layers)
        layers, trusted = config.user_llm_layers, config.trust_remote_code
        return sum(
            read_structure(DecoderSource(self.base, layers, trust_remote_code=trusted)).sizes
        )

    @cached_property
    def item_width(self) -> int:
        """Dimensions of the embeddings that its item adapter reads, or else the UserLLM's."""
        trained = read_rest(self.best)
        stored = {**user_extra(self.config), **trained}
        for prefix in (f"{ADAPTER}.", PREFIX):
            width = adapter_width(
                {
                    name.removeprefix(prefix): value
                    for name, value in stored.items()
                    if name.startswith(prefix)
                }
            )
            if width is not None:
                return width
        return self.hidden_size

    @cached_property
    def id_items(self) -> int | None:
        """Number of items with trained id vectors, None when it has trained none."""
        vectors = read_rest(self.best).get(ID_VECTORS)
        return None if vectors is None else len(vectors) - 1

    @property
    def has_stored_ids(self) -> bool:
        """Whether the UserLLM that it began with came with id vectors."""
        return self.config.loads_user_llm and is_file(self.base / ID_FILE)

    @property
    def item_adapter(self) -> str:
        """Kind of its item adapter, trained or as the base model came with it."""
        return adapter_shape(
            self.config,
            user_extra(self.config),
            self.base,
            train=True,
            rectangular=self.item_width != self.hidden_size,
        )[0]

    @cached_property
    def residual_items(self) -> int:
        """N of its residual, trained or as the base model came with it; 0: it has none."""
        extra = user_extra(self.config)
        return residual_items(self.config, extra, self.base, self.hidden_size, train=True)

    def refuse(self) -> None:
        """Refuse a run that there is nothing to export of, before anything large is read."""
        config, options = self.config, self.options
        if config.model != "HLLM" or config.val_only:
            what = "evaluated only" if config.model == "HLLM" else f"a run of model: {config.model}"
            raise InputError(
                f"{self.folder} is {what}, so it has no trained UserLLM to export; name a run that "
                f"fine-tuned one."
            )
        if options.format == "adapter" and not config.use_qlora:
            raise InputError(
                f"{self.folder} trained all weights and has no adapter; use --format merged."
            )
        if options.format == "adapter" and options.evaluate:
            raise InputError(
                f"the table of {self.folder} was measured with its adapter as it is; leave out "
                f"--evaluate, which scores what --format merged writes."
            )
        if config.use_timestamps:
            raise InputError(
                f"{self.folder} was trained with use_timestamps, for which a model folder has no "
                f"place; recommend with the run itself, or export a run without."
            )
        if not any(row["name"] == TUNED for row in self.result["rows"]):
            raise InputError(f"{self.folder}/result.json has no row '{TUNED}'; run it again.")
        refuse_other_user_llm(self.folder, config)
        if options.format == "onnx":
            self.refuse_onnx()
        if options.format != "adapter":
            self.refuse_quantised()
            # atomic_path would take a missing folder's error for one of writing.
            load_model_config(self.base, config.trust_remote_code)
            self.count_weights()

    def refuse_quantised(self) -> None:
        """Refuse to merge into quantised weights where nothing can quantise as the run did."""
        config = self.config
        types = [config.qlora_quant_type] if config.use_qlora else []
        types += [config.item_quant_type] if config.trains_item_lora else []
        rounded = [quant_type for quant_type in types if quant_type != "none"]
        obstacle = quantization_obstacle("cpu")
        if rounded and obstacle:
            raise InputError(
                f"{self.folder} was trained on weights rounded to {rounded[0]}, into which LoRA is merged, "
                f"and {obstacle}; export on a machine that has it, or use --format adapter."
            )

    def refuse_onnx(self) -> None:
        """Refuse to write ONNX graphs where their packages are missing or another type is asked for."""
        require_onnx()
        if self.options.dtype != "float32":
            raise InputError(
                f"--format onnx writes float32 and not {self.options.dtype}; leave --dtype out."
            )


def refuse_out(out: Path, overwrite: bool) -> None:
    """Refuse to write an export where something else is, or an export that is to be kept.

    Raises:
        InputError: `out` is in the way.
    """
    if not out.exists() or (is_folder(out) and not any(out.iterdir())):
        return
    if not is_file(out / EXPORT_FILE):
        raise InputError(
            f"{out} exists and is no export (it has no {EXPORT_FILE}); give another --out."
        )
    if not overwrite:
        raise InputError(f"{out} exists; give another --out or set --overwrite True.")


def _write_merged(run: _TrainedRun, folder: Path) -> str:
    """Write the decoder and what belongs to it; return the kind of item adapter."""
    config, dtype = run.config, DTYPES[run.options.dtype]
    refuse_full_disk(run.options.out, run.count_weights() * dtype.itemsize)
    # UserLLMs read vectors; one that came without a token embedding is exported without.
    names = run.weights.shapes
    whole = config.loads_user_llm and (
        not names or any(part in name for name in names for part in EMBEDDING_KEYS)
    )
    model = _load_trained(run, keep_token_embedding=whole)
    encoder: Any = model.encoder
    decoder = encoder.decoder
    if config.use_qlora:
        log.info("merging the adapter.")
        decoder = decoder.merge_and_unload()
    # Turned off for training alone.
    base_config = load_model_config(run.base, config.trust_remote_code)
    decoder.config.use_cache = getattr(base_config, "use_cache", True)
    log.info("writing %s in %s.", run.options.out, run.options.dtype)
    decoder.to(dtype)
    refuse_overflow(decoder, run.options.dtype)
    decoder.save_pretrained(folder)
    items = encoder.items
    extra = {
        **user_extra(config),
        **adapter_tensors(items),
        **residual_tensors(encoder.residual),
        "logit_scale": model.logit_scale.detach().reshape(()).contiguous(),
    }
    save_file(extra, folder / EXTRA_FILE, metadata={"format": "pt"})
    _write_id_vectors(run, items, folder)
    return run.item_adapter


def _write_onnx(run: _TrainedRun, folder: Path) -> str:
    """Write the ONNX graphs; return the kind of item adapter."""
    refuse_full_disk(run.options.out, run.count_weights() * torch.float32.itemsize)
    model = _load_trained(run, keep_token_embedding=False)
    encoder: Any = model.encoder
    if run.config.use_qlora:
        log.info("merging the adapter.")
        encoder.decoder = encoder.decoder.merge_and_unload()
    log.info("writing %s.", run.options.out)
    _write_id_vectors(run, encoder.items, folder)
    longest, has_ids = run.config.longest_list_length, is_file(folder / ID_FILE)
    write_graphs(model.eval(), folder, run.item_width, longest, has_ids=has_ids)
    return run.item_adapter


def _load_trained(run: _TrainedRun, *, keep_token_embedding: bool) -> Recommender:
    """Load the trained model in float32 on the CPU, without the data.

    Quantised weights are plain ones of the values that the LoRA matrices were trained against.
    """
    config = run.config
    lora = replace(lora_settings(config), plain=True) if config.use_qlora else None
    rounded = "" if lora is None or lora.quant_type == "none" else f", rounded to {lora.quant_type}"
    log.info("loading %s in float32%s.", run.base, rounded)
    given: dict[str, Any] = {
        "dtype": torch.float32,
        "attention": "eager",  # every model has it, and nothing is computed
        "layers": config.user_llm_layers,
        "keep_token_embedding": keep_token_embedding,
        "trust_remote_code": config.trust_remote_code,
    }
    decoder: Any
    if config.loads_user_llm:
        decoder = load_decoder(run.base, lora=lora, **given)
    else:
        decoder = make_decoder(run.base, seed=config.seed, **given)
    # Frozen in training, which has no use for it.
    decoder.get_input_embeddings().requires_grad_(False)
    hidden = int(decoder.config.hidden_size)
    if lora is not None:
        decoder = add_lora(decoder, lora, gradient_checkpointing=False)
    extra = user_extra(config)
    width = run.item_width or hidden
    items = ItemTable(
        torch.zeros(1, width),
        *adapter_shape(config, extra, run.base, train=True, rectangular=width != hidden),
        dim=hidden,
        id_items=run.id_items,
    )
    load_adapter(items, extra, trained=config.item_adapter != "none")
    model = Recommender(
        UserLLM(
            decoder,
            items,
            residual=make_residual(config, extra, run.base, hidden, train=True),
        ),
        loss_settings(config),
        initial_logit_scale(config, extra),
        config.fix_temp,
    )
    freeze_prefixed(model, config)
    load_trained(model, run.best)
    return model.eval()


def _write_id_vectors(run: _TrainedRun, items: ItemTable, folder: Path) -> None:
    """Write the trained id vectors by item id, or copy those that the base model came with."""
    if items.id_vectors is not None:
        data = load_data(run.config, need_cache=True)
        if data.interactions.num_items != run.id_items:
            raise InputError(
                f"the data are not those that {run.folder} was trained on: {run.id_items} items "
                f"have id vectors, {run.config.dataset} has {data.interactions.num_items}; name "
                f"the run's own with --data_path."
            )
        refuse_other_catalogue(run.best, fitted_to(data, by_item=True))
        save_id_vectors(items, data.interactions.item_ids, folder)
    elif run.has_stored_ids:
        shutil.copyfile(run.base / ID_FILE, folder / ID_FILE)


def refuse_full_disk(out: Path, needed: int) -> None:
    """Refuse an export that its disk has no room for.

    Args:
        out: the folder to write.
        needed: bytes of it.

    Raises:
        InputError: less is free.
    """
    free = free_bytes(out.parent)
    if free < needed + _SPARE_BYTES:
        raise InputError(
            f"the export {out} needs {needed / 2**30:.1f} GiB, its disk has {free / 2**30:.1f} GiB "
            f"free; free some space or give another --out."
        )


def _write_adapter(run: _TrainedRun, folder: Path) -> str:
    """Copy the adapter and what else was trained; return the kind of item adapter."""
    frozen = {
        "an item adapter": run.config.item_adapter == "none" and run.item_adapter != "none",
        "id vectors": run.has_stored_ids and not run.config.item_id_embedding,
        "a residual": run.config.residual_items == 0 and run.residual_items > 0,
    }
    for what in (name for name, there in frozen.items() if there):
        raise InputError(
            f"{run.base} comes with {what}, which {run.folder} used and did not train, so "
            f"the LoRA adapter alone is not its model; use --format merged."
        )
    for source in (
        *(run.best / ADAPTER_DIR / name for name in _ADAPTER_FILES),
        run.best / REST_FILE,
    ):
        if not is_file(source):
            raise InputError(f"{source} does not exist; the run has no trained model there.")
        shutil.copyfile(source, folder / source.name)
    settings = read_json(folder / _ADAPTER_FILES[0])
    if not isinstance(settings, dict):
        raise InputError(
            f"{run.best / ADAPTER_DIR / _ADAPTER_FILES[0]} is not peft's; run it again."
        )
    # It would tell where the base model lay on this machine.
    settings["base_model_name_or_path"] = _base_repo(run) or run.base.name
    write_json_file(folder / _ADAPTER_FILES[0], settings)
    if run.id_items is not None:
        # By item id: in trained.safetensors they are ordered by the run's item numbers.
        items = ItemTable(torch.zeros(1, run.hidden_size), id_items=run.id_items)
        vectors = read_rest(run.best)[ID_VECTORS]
        items.load_state_dict({"id_vectors": vectors})
        _write_id_vectors(run, items, folder)
    return run.config.item_adapter


def _score(run: _TrainedRun, folder: Path) -> Evaluation:
    """Score the folder's model as the run was scored, through what a later run would do with it."""
    opened = open_run(run.folder, {**(run.options.overrides or {}), "show_progress": True})
    changes = {**_merged_changes(run), "user_pretrain_dir": str(folder)}
    config = opened.config.model_copy(update=changes)
    model = build_user_llm(config, opened.data, opened.fabric, train=False)
    return _score_as_run(run, opened, model)


def _score_onnx(run: _TrainedRun, folder: Path) -> Evaluation:
    """Score the folder's graphs in ONNX Runtime as the run was scored."""
    opened = open_run(run.folder, {**(run.options.overrides or {}), "show_progress": True})
    data, config = opened.data, opened.config
    assert data.cache is not None
    table = table_from_cache(
        data.cache, data.interactions.item_ids, config.item_embedding_transform, data.own_items
    )
    ids = None
    stored = read_id_vectors(folder, run.hidden_size)
    if stored is not None:
        of_items = ItemTable(torch.zeros(1, run.hidden_size), id_items=len(table) - 1)
        load_id_vectors(of_items, stored, data.interactions.item_ids, trained=False)
        ids = of_items.id_vectors
    scorer = OnnxScorer(OnnxGraphs(folder), table, ids, opened.fabric.device)
    return _score_as_run(run, opened, scorer)


def _score_as_run(run: _TrainedRun, opened: OpenRun, scorer: Scorer) -> Evaluation:
    config = opened.config
    evaluator = make_evaluator(config, opened.data.split, config.eval_phase, opened.fabric)
    refuse_changed_data(run.folder, evaluator.dataset, evaluator.protocol)
    evaluation = evaluate(config, scorer, evaluator, opened.fabric)
    users, _ = read_ranks(run.folder, TUNED)
    if not np.array_equal(users, evaluation.users):
        raise InputError(
            f"the data are not those that {run.folder} was scored on: other users have a "
            f"{config.eval_phase} target; name the run's own with --data_path."
        )
    return evaluation


def portable_config(config: Config) -> Config:
    """Return a run's configuration without what belongs to its machine."""
    default = {name: Config.model_fields[name].get_default() for name in _LOCAL_KEYS}
    return config.model_copy(update=default)


def _merged_changes(run: _TrainedRun) -> dict[str, Any]:
    """Return what differs in a configuration that evaluates the merged model."""
    return {
        "val_only": True,
        "use_qlora": False,
        "user_llm_init": None,
        "user_llm_layers": None,
        "item_adapter": "none",
        "item_id_embedding": False,
        "item_id_dropout": 0.0,
        "item_dropout": 0.0,
        "residual_items": 0,
        "similarity": loss_settings(run.config).similarity,
    }


def _without_item_training(config: Config) -> dict[str, Any]:
    """Return what differs in a configuration that reads the vectors of a trained ItemLLM."""
    if not config.trains_items:
        return {}
    keys = [name for name in Config.model_fields if name.startswith(ITEM_TRAINING_KEYS)]
    default = {
        name: Config.model_fields[name].get_default(call_default_factory=True) for name in keys
    }
    # The fixed map is in the vectors.
    return {**default, "item_embedding_transform": "none", "use_item_cache": True}


def _write_about(
    run: _TrainedRun, folder: Path, item_adapter: str, evaluation: Evaluation | None
) -> None:
    options = run.options
    ranks = read_ranks(run.folder, TUNED)[1]
    changed = None if evaluation is None else int((evaluation.ranks != ranks).sum())
    dtype = "float32" if options.format == "adapter" else options.dtype
    card = Exported(
        name=run_name(run.folder),
        format=options.format,
        dtype=dtype,
        config=run.config.model_copy(update=_without_item_training(run.config)),
        result=run.result,
        table=_table(run, evaluation),
        tuned=TUNED,
        base=run.base.resolve().name,
        base_repo=_base_repo(run),
        item_adapter=item_adapter,
        similarity=loss_settings(run.config).similarity,
        other_ranks=changed,
        item_width=None if run.item_width == run.hidden_size else run.item_width,
        residual_items=run.residual_items,
        id_vectors=is_file(folder / ID_FILE),
        item_llm=None if not run.config.trains_items else is_folder(folder / ITEM_LLM_DIR),
    )
    (folder / "README.md").write_text(model_card(card), encoding="utf-8")
    changes = _merged_changes(run) if options.format == "merged" else {}
    changes |= _without_item_training(run.config)
    portable = portable_config(run.config).model_copy(update=changes)
    (folder / CONFIG_FILE).write_text(dump_config(portable), encoding="utf-8")
    manifest = {
        "format": options.format,
        "run": card.name,
        "dtype": dtype,
        "quant_type": run.config.qlora_quant_type if run.config.use_qlora else None,
        "item_adapter": item_adapter,
        "residual_items": run.residual_items,
        "exported": None
        if evaluation is None
        else {"metrics": evaluation.metrics, "other_ranks": changed},
        "versions": versions(),
    }
    write_json_file(folder / EXPORT_FILE, manifest)


def _table(run: _TrainedRun, evaluation: Evaluation | None) -> Comparison:
    """Return the run's own comparison, with the exported model's row when it was scored."""
    table = result_table(run.folder)
    if evaluation is None:
        return table
    return replace(table, rows=[*table.rows, Row(EXPORTED, evaluation.users, evaluation.ranks)])


def result_table(folder: Path) -> Comparison:
    """Return the comparison of the rows of a run's `result.json`, under their names there.

    The settings of the rows name the UserLLM's folder without the path to it: cards are published.
    """
    whole, result = load_comparison([folder]), read_result(folder)
    base = str(result["config"].get("user_pretrain_dir") or "")
    rows = [
        replace(
            row,
            name=entry["name"],
            settings=row.settings.replace(base, Path(base).name) if base else row.settings,
        )
        for row, entry in zip(whole.rows, result["rows"], strict=True)
    ]
    return replace(whole, rows=rows)


def _base_repo(run: _TrainedRun) -> str | None:
    """Return the hub's name of the checkpoint that the base model was imported from."""
    source = (origin(run.base) or {}).get("source")
    repo = source.get("repo") if isinstance(source, dict) else None
    return repo if isinstance(repo, str) else None


def write_json_file(target: Path, value: Any) -> None:
    """Write indented JSON into a folder that is not yet in its place."""
    target.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
