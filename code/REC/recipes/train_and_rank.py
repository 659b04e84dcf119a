"""One run of `main.py`: evaluate a model, or fine-tune the UserLLM and compare it with its baseline."""

from __future__ import annotations

import gc
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from REC.config import Config
from REC.data.dataset import CachedEmbeddingTrainDataset, TrainCollate
from REC.data.negatives import NegativeSampler
from REC.evaluator.evaluator import Evaluation, Evaluator, Scorer
from REC.model.recommender import Recommender
from REC.model.reference import build_reference
from REC.model.sasrec import build_sasrec
from REC.recipes.run_dir import choose_run_dir, drop_empty_run, start_run_dir
from REC.recipes.setup import (
    Data,
    attention_kernel,
    build_user_llm,
    check_training,
    eval_protocol,
    load_data,
    make_evaluator,
)
from REC.report.result import plain, write_result
from REC.report.table import gain_table
from REC.trainer.fabric import choose_precision, make_fabric, peers_of, sum_over_processes
from REC.trainer.optim import build_optimizer, build_schedule, steps_per_epoch
from REC.trainer.sampler import SequenceBatches
from REC.trainer.trainer import Trainer, TrainState, count_trainable
from REC.utils import environment
from REC.utils.processes import Processes
from REC.utils.progress import format_seconds, meter

log = logging.getLogger(__name__)

RESULT_FORMAT = 1


class Clock:
    """Wall time of a run's stages, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last lap under a stage."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 3)
        self._last = now


def run(config: Config) -> Path:
    """Do what the configuration says and leave a run folder.

    Returns:
        The run's folder, holding `result.json`, `ranks.safetensors`, `config.yaml`, `run.log` and,
        after training, `best/`.

    Raises:
        InputError: something in the configuration or its files has to be changed.
    """
    fabric = make_fabric(config)
    # Workers' seeds, dropout and LoRA's initial values follow from it.
    fabric.seed_everything(config.seed, workers=True, verbose=False)
    clock = Clock()
    if fabric.device.type == "cpu" and config.device == "auto":
        log.info(
            "no CUDA device found: running on the CPU with %d threads.", torch.get_num_threads()
        )
    data = load_data(config, need_cache=config.model in ("HLLM", "item_knn"))
    final = make_evaluator(config, data.split, config.eval_phase, fabric)
    clock.lap("data")
    folder = Processes.here().on_first(lambda: _make_run_dir(config))
    try:
        rows, training = _rows(config, data, final, fabric, folder, clock)
        if fabric.is_global_zero:
            _finish(config, data, final, rows, training, clock, folder, fabric)
    except BaseException:
        if fabric.is_global_zero:
            drop_empty_run(folder)
        raise
    return folder


def _make_run_dir(config: Config) -> Path:
    folder = choose_run_dir(config)
    start_run_dir(config, folder)
    return folder


def _rows(
    config: Config,
    data: Data,
    final: Evaluator,
    fabric: Fabric,
    folder: Path,
    clock: Clock,
) -> tuple[dict[str, Evaluation], dict[str, Any] | None]:
    """Evaluate, train where asked, and return the table's rows and what is known of the training."""
    if config.model in ("pop", "random", "item_knn"):
        scorer = build_reference(config, data.split, data.cache, fabric.device)
        evaluation = evaluate(config, scorer, final, fabric)
        clock.lap("evaluation")
        return {config.model: evaluation}, None
    if config.model == "sasrec":
        return _train_and_evaluate(config, data, final, fabric, folder, clock)
    if config.val_only:
        model = build_user_llm(config, data, fabric, train=False)
        clock.lap("model")
        evaluation = evaluate(config, _for_evaluation(model, fabric), final, fabric)
        clock.lap("evaluation")
        return {"untrained": evaluation}, None
    rows: dict[str, Evaluation] = {}
    if config.eval_baseline:
        baseline = build_user_llm(config, data, fabric, train=False)
        rows["untrained"] = evaluate(config, _for_evaluation(baseline, fabric), final, fabric)
        del baseline
        _free_memory(fabric)
        clock.lap("baseline")
    tuned, training = _train_and_evaluate(config, data, final, fabric, folder, clock)
    return rows | tuned, training


def _train_and_evaluate(
    config: Config, data: Data, final: Evaluator, fabric: Fabric, folder: Path, clock: Clock
) -> tuple[dict[str, Evaluation], dict[str, Any]]:
    if config.model == "sasrec":
        name = "sasrec"
        model = build_sasrec(config, data.interactions.num_items, peers_of(fabric))
        model.to(fabric.device)
    else:
        name = "fine-tuned"
        model = build_user_llm(config, data, fabric, train=True)
    clock.lap("model")
    state, training = _train(config, data, model, fabric, folder)
    clock.lap("training")
    found = evaluate(config, model, final, fabric)
    clock.lap("evaluation")
    return {name: found}, {**training, **state.to_dict()}


def _for_evaluation(model: Recommender, fabric: Fabric) -> Recommender:
    return model.eval().to(fabric.device)


def evaluate(
    config: Config, scorer: Scorer, evaluator: Evaluator, fabric: Fabric, task: str = "evaluation"
) -> Evaluation:
    """Score the evaluator's users under the run's precision, with progress."""
    if isinstance(scorer, torch.nn.Module):
        scorer.eval()
    shown = config.show_progress and fabric.is_global_zero
    with meter(task, evaluator.own_users, "users", shown) as bar:
        return evaluator.run(
            scorer,
            fabric.device,
            gather=sum_over_processes(fabric),
            on_batch=bar.advance,
            autocast=fabric.autocast,
        )


def _train(
    config: Config, data: Data, model: Recommender, fabric: Fabric, folder: Path
) -> tuple[TrainState, dict[str, Any]]:
    dataset = CachedEmbeddingTrainDataset(data.split, config.MAX_ITEM_LIST_LENGTH)
    check_training(config, data.split, dataset)
    loader = make_train_loader(config, dataset, data, fabric)
    optimizer = build_optimizer(model, config, fabric.device)
    total = config.epochs * steps_per_epoch(len(loader), config.gradient_accumulation_steps)
    schedule = build_schedule(optimizer, config, total)
    # Before ZeRO stage 3 takes the parameters apart.
    trainable = count_trainable(model)
    log.info(
        "training %s of %s weights on %d sequences with %d transitions.",
        f"{trainable:,}",
        f"{sum(p.numel() for p in model.parameters()):,}",
        len(dataset),
        dataset.num_transitions,
    )
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    valid = make_evaluator(config, data.split, "valid", fabric)
    trainer = Trainer(
        fabric=fabric,
        config=config,
        model=model,
        wrapped=wrapped,
        optimizer=wrapped_optimizer,
        schedule=schedule,
        loader=loader,
        validate=lambda: evaluate(config, model, valid, fabric, "validation"),
        run_dir=folder,
    )
    state = trainer.fit()
    return state, {
        "trainable_weights": trainable,
        "sequences": len(dataset),
        "transitions_per_epoch": dataset.num_transitions,
    }


def make_train_loader(
    config: Config, dataset: CachedEmbeddingTrainDataset, data: Data, fabric: Fabric
) -> DataLoader[Any]:
    """Make the loader of training batches for this process."""
    drawn = config.effective_negatives == "sampled"
    rows = config.train_batch_size * fabric.world_size
    collate = TrainCollate(
        dataset,
        sampler=NegativeSampler(data.interactions, held_out=2) if drawn else None,
        num_negatives=-(-(config.num_negatives or 0) // rows),
        random_split=config.train_positions == "random_split",
        seed=config.seed,
        row_length=packed_row_length(config, fabric.device),
    )
    batches = SequenceBatches(
        dataset.lengths,
        config.train_batch_size,
        config.seed,
        group_by_length=config.group_by_length,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=config.num_workers,
        pin_memory=fabric.device.type == "cuda",
    )


def packed_row_length(config: Config, device: torch.device) -> int | None:
    """Return the positions of a packed row, None where rows hold one sequence each.

    The variable-length flash kernel takes one row whatever its length. Elsewhere attention computes
    the whole square of a row, masked, so rows are only as long as packs them well.
    """
    if not config.pack_sequences or config.model != "HLLM":
        return None
    kernel = attention_kernel(config, device)
    if kernel == "flash_attention_2":
        return config.train_batch_size * config.MAX_ITEM_LIST_LENGTH
    return 4 * config.MAX_ITEM_LIST_LENGTH


def _free_memory(fabric: Fabric) -> None:
    gc.collect()
    if fabric.device.type == "cuda":
        torch.cuda.empty_cache()


def _finish(
    config: Config,
    data: Data,
    final: Evaluator,
    rows: dict[str, Evaluation],
    training: dict[str, Any] | None,
    clock: Clock,
    folder: Path,
    fabric: Fabric,
) -> None:
    protocol = eval_protocol(config)
    users = len(final.dataset)
    result = {
        "format": RESULT_FORMAT,
        "run": folder.name,
        "dataset": config.dataset,
        "model": config.model,
        "phase": config.eval_phase,
        "protocol": protocol.describe(),
        "rows": [
            {"name": name, "users": users, "metrics": found.metrics, "seconds": found.seconds}
            for name, found in rows.items()
        ],
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "data": data.summary(),
        "cache": data.cache.metadata if data.cache else None,
        "training": training,
        "timings_s": clock.seconds,
        "peak_memory": environment.peak_memory(fabric.device),
        "environment": {
            **environment.describe(fabric.device),
            "precision": choose_precision(config),
            "processes": fabric.world_size,
        },
    }
    write_result(folder, plain(result), rows)
    sys.stdout.write(
        f"\n{config.dataset}, {config.eval_phase}, {users} users, {protocol.describe()}\n\n"
        + gain_table([(name, found.metrics) for name, found in rows.items()])
        + f"\nresult: {folder / 'result.json'} ({format_seconds(sum(clock.seconds.values()))})\n"
    )
