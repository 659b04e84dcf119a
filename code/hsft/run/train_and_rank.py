"""One run of `main.py`: evaluate a model, or fine-tune the UserLLM and compare it with its baseline."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from hsft.config import Config
from hsft.config.schema import ID_MODELS, REFERENCES
from hsft.data.dataset import CachedEmbeddingTrainDataset, TrainCollate
from hsft.data.dataset.packing import Buckets
from hsft.data.time_fields import ItemTimes, item_times
from hsft.evaluator.evaluator import Evaluation, Evaluator, Scorer
from hsft.evaluator.fingerprint import evaluation_fingerprint
from hsft.evaluator.metrics import per_user
from hsft.hub.manifest import exported_from, pretraining_overlap, user_llm_origin
from hsft.inputs.import_hllm import import_pretrained
from hsft.model.accelerate import StepGraphs, choose_acceleration, compile_layers
from hsft.model.attention import VARLEN
from hsft.model.ensemble import weight_grid
from hsft.model.parameter_names import check_prefixes
from hsft.model.recommender import Recommender
from hsft.model.reference import build_reference
from hsft.model.user_llm import UserLLM
from hsft.model.weights import describe_trainable
from hsft.report.result import (
    RESULT_FORMAT,
    TUNED,
    UNTRAINED,
    pack_evaluation,
    plain,
    unpack_evaluation,
    write_result,
)
from hsft.report.table import gain_table
from hsft.run.batch_size import resolve_batch_size
from hsft.run.quant_type import resolve_quant_type
from hsft.run.run_dir import (
    RunDir,
    choose_run_dir,
    drop_empty_run,
    has_checkpoint,
    start_run_dir,
)
from hsft.run.saved_model import build_ensemble, member_runs, user_llm_fingerprint
from hsft.run.setup import (
    Data,
    build_id_model,
    build_item_training,
    build_pretraining,
    build_user_llm,
    check_cosines,
    check_training,
    eval_protocol,
    graph_obstacle,
    item_statistics,
    load_data,
    make_evaluator,
    negative_proposal,
    negative_sampler,
    packed_row_length,
    report_costly_catalogue,
    user_attention,
    warn,
    warn_of_plain_items,
)
from hsft.trainer.checkpoint import CHECKPOINTS_DIR, Checkpoints, restore_rng, rng_state
from hsft.trainer.context import KeepGoing, RunContext
from hsft.trainer.fabric import (
    choose_precision,
    make_fabric,
)
from hsft.trainer.item_pretraining import pretrain_items
from hsft.trainer.item_training import ItemTraining
from hsft.trainer.loop import train
from hsft.trainer.mlflow_log import MlflowLog
from hsft.trainer.optim import steps_per_epoch
from hsft.trainer.resume import TrainState, refuse_other_user_llm
from hsft.trainer.sampler import SequenceBatches
from hsft.trainer.session import Session
from hsft.trainer.step import make_learner
from hsft.trainer.tracker import Tracker
from hsft.trainer.wandb_log import WandbLog
from hsft.utils import environment
from hsft.utils.distributed import (
    all_gather,
    all_reduce_array,
    broadcast,
    global_rank,
    is_rank_zero,
    run_on_rank_zero,
    world_size,
)
from hsft.utils.errors import InputError, Interrupted, counted, one_line
from hsft.utils.gpu_memory import out_of_memory, release_unused_memory
from hsft.utils.lock import locked
from hsft.utils.progress import Meter, format_seconds
from hsft.utils.signals import StopSignals

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)


def train_and_rank(config: Config, keep_going: KeepGoing | None = None) -> Path:
    """Do what the configuration says and leave a run folder.

    While it works it holds the lock of `checkpoint_dir`. SIGINT and SIGTERM end it in order: in
    training after the step at hand, with a checkpoint; elsewhere at once.

    Args:
        config: the configuration.
        keep_going: called after each validation with the epoch and the metrics; False ends training,
            and the best epoch so far is evaluated.

    Returns:
        The run's folder, holding `result.json`, `ranks.safetensors`, `config.yaml`, `run.log` and,
        after training, `best/`.

    Raises:
        InputError: something in the configuration or its files has to be changed.
        Interrupted: SIGINT or SIGTERM came; it says how to continue.
    """
    if config.model == "ensemble":
        longest = max(member.config.eval_list_length for member in member_runs(config))
        lengths = {"MAX_ITEM_LIST_LENGTH": longest, "MAX_ITEM_LIST_LENGTH_TEST": None}
        config = config.model_copy(update=lengths)
    with StopSignals() as stop:
        fabric = make_fabric(config)
        # Workers' seeds, dropout and LoRA's initial values follow from it.
        fabric.seed_everything(config.seed, workers=True, verbose=False)
        session = Session(fabric.device)
        given = config
        config = run_on_rank_zero(lambda: import_pretrained(given))
        with ExitStack() as held:
            chosen = run_on_rank_zero(lambda: _lock_and_choose(config, held))
            run = RunContext(
                config=config,
                fabric=fabric,
                folder=chosen.path,
                resume=chosen.resume,
                checkpoints=Checkpoints(chosen.path / CHECKPOINTS_DIR, config.keep_last),
                stop=stop,
                session=session,
                trackers=_trackers(config),
                keep_going=keep_going,
            )
            try:
                _run(run)
            except Interrupted as ending:
                how = _how_to_continue(run.folder)
                raise Interrupted(f"{ending}; {how}", ending.exit_code) from None
    return chosen.path


def _lock_and_choose(config: Config, held: ExitStack) -> RunDir:
    # Under torchrun the first process holds the lock for all of them.
    held.enter_context(locked(config.checkpoint_dir))
    return choose_run_dir(config)


def _run(run: RunContext) -> None:
    config, fabric = run.config, run.fabric
    if fabric.device.type == "cpu" and config.device == "auto":
        threads = counted(torch.get_num_threads(), "thread")
        log.info("no CUDA device found: running on the CPU with %s.", threads)
    if fabric.device.type in ("xpu", "mps"):
        log.warning("device %s: HSFT has not been tried on it yet.", fabric.device.type)
    if fabric.device.type == "cuda":
        log.info(
            "precision %s; float32 products, as of losses and scores, are not rounded to TF32%s.",
            choose_precision(config),
            ""
            if config.ranking_precision == "float32"
            else ", but for a first pass of full ranking",
        )
    elif config.ranking_precision == "tensor_cores":
        log.info("ranking_precision: tensor_cores needs a CUDA device; scores are float32.")
    data = load_data(config, need_cache=config.reads_embeddings)
    run = replace(run, user_llm_fingerprint=user_llm_fingerprint(config))
    warn(_overlap(config))
    final = make_evaluator(
        config,
        data.split,
        config.eval_phase,
        fabric,
        statistics=item_statistics(config, data),
    )
    continued = run.folder if run.resume else None
    config, batch = resolve_batch_size(config, data.split, fabric.device, continued)
    config, quantisation = resolve_quant_type(config, data.split, fabric.device, continued)
    run = replace(run, config=config)
    run.session.lap("data")
    try:
        run_on_rank_zero(lambda: start_run_dir(config, run.folder, resume=run.resume))
        log.info("run folder: %s", run.folder)
        for sentence in filter(None, (batch, quantisation)):
            log.info("%s", sentence)
        with ExitStack() as opened:
            for tracker in run.trackers:
                opened.enter_context(tracker)
                run_on_rank_zero(partial(tracker.open, config, run.folder))
            evaluations, more = _evaluate_models(run, data, final)
            if is_rank_zero():
                _write_result(run, data, final, evaluations, more)
    except BaseException as error:
        saved = isinstance(error, Interrupted) and has_checkpoint(run.folder)
        if is_rank_zero() and not run.resume and not saved:
            drop_empty_run(run.folder)
        raise


def _trackers(config: Config) -> list[Tracker]:
    if not config.trains:
        return []
    wandb = [WandbLog()] if config.log_wandb else []
    mlflow = [MlflowLog()] if config.log_mlflow else []
    return [*wandb, *mlflow]


def _how_to_continue(folder: Path) -> str:
    if not has_checkpoint(folder):
        return "nothing was saved yet; start the same command again"
    return f"to continue, add --run_name {folder.name} --auto_resume True to the same command"


def _evaluate_models(
    run: RunContext, data: Data, final: Evaluator
) -> tuple[dict[str, Evaluation], dict[str, Any]]:
    """Evaluate the models of the run, after training where it trains.

    Returns:
        Name -> evaluation, the table's rows, and what `result.json` says beside them: `training`, or
        the weights of an `ensemble`.
    """
    config, fabric, session = run.config, run.fabric, run.session
    if config.model in REFERENCES:
        scorer = build_reference(config, data.split, data.cache, fabric.device)
        evaluation = evaluate(config, scorer, final, fabric)
        session.lap("evaluation")
        return {config.model: evaluation}, {}
    if config.model == "ensemble":
        return _weigh_and_evaluate_ensemble(run, data, final)
    if config.model in ID_MODELS:
        evaluations, training = _train_and_evaluate_model(run, data, final)
        return evaluations, {"training": training}
    if config.val_only:
        source = exported_from(config.user_pretrain_dir or "")
        if source is not None:
            log.info("evaluating the fine-tuned UserLLM exported from %s.", one_line(source, 80))
        model = build_user_llm(config, data, fabric, train=False)
        session.lap("model")
        evaluation = evaluate(config, _for_evaluation(model, fabric), final, fabric)
        session.lap("evaluation")
        return {UNTRAINED: evaluation}, {}
    if config.loss == "nce" and data.cache is not None and not config.item_pretrain_epochs:
        warn(check_cosines(config, data.cache, data.interactions)[1])
    evaluations = {}
    if config.eval_baseline:
        evaluations[UNTRAINED] = _baseline(run, data, final)
    tuned, training = _train_and_evaluate_model(run, data, final)
    return evaluations | tuned, {"training": training}


def _overlap(config: Config) -> str | None:
    """Return the warning of a UserLLM that may have been trained on the held-out items."""
    if not (config.loads_user_llm and config.user_pretrain_dir):
        return None
    return pretraining_overlap(config.user_pretrain_dir, config.dataset)


def _origin(config: Config) -> dict[str, Any] | None:
    return user_llm_origin(config.user_pretrain_dir or "") if config.loads_user_llm else None


def _baseline(run: RunContext, data: Data, final: Evaluator) -> Evaluation:
    """Evaluate the untrained UserLLM, once in all sessions of the run."""
    config, fabric, store = run.config, run.fabric, run.checkpoints
    saved = None
    if run.resume and is_rank_zero():
        saved = store.load_extra(UNTRAINED)
    saved = broadcast(saved)
    if saved:
        recorded = saved.get("user_llm_fingerprint")
        refuse_other_user_llm(run, recorded, store.folder / UNTRAINED)
    if saved and saved["fingerprint"] == data.fingerprint and len(saved["rng"]) == world_size():
        log.info("the untrained UserLLM was evaluated before the interruption.")
        # Building and evaluating it drew from the generators.
        restore_rng(saved["rng"][global_rank()], fabric.device)
        run.session.continue_from(saved["record"])
        return unpack_evaluation(saved["evaluation"])
    model = build_user_llm(config, data, fabric, train=False)
    evaluation = evaluate(config, _for_evaluation(model, fabric), final, fabric)
    del model
    release_unused_memory()
    run.session.lap("baseline")
    generators = all_gather(rng_state(fabric.device))
    if is_rank_zero():
        content = {
            "fingerprint": data.fingerprint,
            "user_llm_fingerprint": run.user_llm_fingerprint,
            "rng": generators,
            "record": run.session.record(),
            "evaluation": pack_evaluation(evaluation),
        }
        store.save_extra(UNTRAINED, content)
    return evaluation


def _train_and_evaluate_model(
    run: RunContext, data: Data, final: Evaluator
) -> tuple[dict[str, Evaluation], dict[str, Any]]:
    config, fabric = run.config, run.fabric
    items = pretrained = None
    fingerprint = data.fingerprint
    times = item_times(config, data.interactions)
    if times is not None:
        fingerprint = f"{fingerprint} {times.fingerprint}"
    name = TUNED if config.model == "HLLM" else config.model
    if config.model in ID_MODELS:
        model = build_id_model(config, data, fabric)
    else:
        if config.item_pretrain_epochs:
            data, pretrained = _pretrain(run, data)
        else:
            warn_of_plain_items(config, data.cache)
        model = build_user_llm(config, data, fabric, train=True)
        if config.trains_items:
            items = build_item_training(config, data, fabric, model.encoder.items, pretrained)
            fingerprint = f"{fingerprint} {items.fingerprint}"
    run.session.lap("model")
    state, training = _train(run, data, model, items, times, fingerprint)
    run.session.lap("training")
    evaluation = evaluate(config, model, final, fabric)
    run.session.lap("evaluation")
    return {name: evaluation}, {**training, **state.summary()}


def _pretrain(run: RunContext, data: Data) -> tuple[Data, ItemTraining]:
    """Train the ItemLLM alone and encode the catalogue with it.

    Returns:
        The data with these vectors as the cache, and the ItemLLM.
    """
    config = run.config
    items = build_pretraining(config, data, run.fabric)
    items.agree()
    run.session.lap("model")
    pretrain_items(run, items, data.split, f"{data.fingerprint} {items.fingerprint}")
    items.encode_catalogue()
    run.session.lap("item pretraining")
    assert items.cache is not None
    if config.loss == "nce":
        warn(check_cosines(config, items.cache, data.interactions)[1])
    return replace(data, cache=items.cache), items


def _weigh_and_evaluate_ensemble(
    run: RunContext, data: Data, final: Evaluator
) -> tuple[dict[str, Evaluation], dict[str, Any]]:
    """Choose the weights of an ensemble by `valid_metric` and evaluate it with them, once."""
    config, fabric = run.config, run.fabric
    members = member_runs(config)
    ensemble = build_ensemble(members, config, data, fabric)
    run.session.lap("model")
    valid = make_evaluator(config, data.split, "valid", fabric, config.valid_users)
    grid = weight_grid(len(members))
    with _scoring(config, valid, fabric, "validation") as given:
        ranks = valid.ranks_by_weights(ensemble, grid, fabric.device, **given)
    metric, _, k = config.valid_metric.partition("@")
    values = [float(per_user(metric, row, int(k)).mean()) for row in ranks]
    best = int(np.argmax(values))
    ensemble.weights = grid[best].tolist()
    run.session.lap("validation")
    log.info(
        "of %d weightings, %s has the highest validation %s, %.4f.",
        len(grid),
        ", ".join(
            f"{weight:g} {member.folder} ({member.model})"
            for weight, member in zip(ensemble.weights, members, strict=True)
        ),
        config.valid_metric,
        values[best],
    )
    evaluation = evaluate(config, ensemble, final, fabric)
    run.session.lap("evaluation")
    chosen = {
        "runs": [str(member.folder) for member in members],
        "models": [member.model for member in members],
        "weights": ensemble.weights,
        "valid_metric": config.valid_metric,
        "tried": [
            {"weights": row.tolist(), "value": value}
            for row, value in zip(grid, values, strict=True)
        ],
    }
    return {config.model: evaluation}, {"ensemble": chosen}


def _for_evaluation(model: Recommender, fabric: Fabric) -> Recommender:
    return model.eval().to(fabric.device)


def evaluate(
    config: Config, scorer: Scorer, evaluator: Evaluator, fabric: Fabric, task: str = "evaluation"
) -> Evaluation:
    """Score the evaluator's users under the run's precision, with progress."""
    if isinstance(scorer, torch.nn.Module):
        scorer.eval()
    with _scoring(config, evaluator, fabric, task) as given:
        return evaluator.run(scorer, fabric.device, **given)


@contextmanager
def _scoring(
    config: Config, evaluator: Evaluator, fabric: Fabric, task: str
) -> Iterator[dict[str, Any]]:
    """Show progress and word a lack of memory; yields the evaluator's arguments but the model."""
    shown = config.show_progress and is_rank_zero()
    share = " (share of process 0)" if world_size() > 1 else ""
    with Meter(f"{task}{share}", evaluator.own_users, "users", shown, device=fabric.device) as bar:
        try:
            yield {
                "all_reduce": partial(all_reduce_array, device=fabric.device),
                "on_batch": bar.advance,
                "autocast": fabric.autocast,
            }
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{out_of_memory(fabric.device)} in the {task}; lower --eval_batch_size or "
                f"--logits_budget_mb."
            ) from error


def _train(
    run: RunContext,
    data: Data,
    model: Recommender,
    items: ItemTraining | None,
    times: ItemTimes | None,
    fingerprint: str,
) -> tuple[TrainState, dict[str, Any]]:
    config, fabric = run.config, run.fabric
    dataset = CachedEmbeddingTrainDataset(data.split, config.MAX_ITEM_LIST_LENGTH, times)
    check_training(config, data.split, dataset)
    if config.negatives_logq:
        model.proposal = negative_proposal(config, dataset).to(fabric.device)
    loader = make_train_loader(
        config,
        dataset,
        fabric,
        pack=_packs(config, model, fabric),
        list_items=model.encoder.items.adapter is not None,
    )
    steps = config.epochs * steps_per_epoch(len(loader), config.gradient_accumulation_steps)
    if items is not None and items.along:
        model.item_llm = items.tower
    check_prefixes(model, config)
    # Before ZeRO stage 3 takes the parameters apart.
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        "training %s on %d sequences with %d transitions.",
        describe_trainable(model),
        len(dataset),
        dataset.num_transitions,
    )
    if config.model == "HLLM":
        report_costly_catalogue(config, model, dataset.lengths)
    learner = make_learner(config, fabric, model, steps, items)
    graphs = accelerate(config, model, learner.wrapped, loader, steps, fabric)
    valid = make_evaluator(config, data.split, "valid", fabric, config.valid_users)

    def validate() -> Evaluation:
        if items is not None and items.along:
            items.encode_catalogue()
        try:
            return evaluate(config, model, valid, fabric, "validation")
        except InputError as error:
            if graphs is None or not isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
        # Captured steps keep their activations' memory, which the validation may need.
        log.warning("the validation does not fit beside the CUDA graphs, so these are given up.")
        graphs.release()
        return evaluate(config, model, valid, fabric, "validation")

    state = train(run, replace(learner, graphs=graphs), loader, validate, fingerprint)
    return state, {
        "item_cache": None if items is None or items.cache is None else items.cache.metadata,
        "trainable_weights": trainable,
        "sequences": len(dataset),
        "transitions_per_epoch": dataset.num_transitions,
    }


def accelerate(
    config: Config,
    model: Recommender,
    wrapped: Any,
    loader: DataLoader[Any],
    steps: int,
    fabric: Fabric,
) -> StepGraphs | None:
    """Do what `compile` says about a model's training; the log says what that is.

    Args:
        config: the configuration.
        model: the recommender; its layers may be compiled.
        wrapped: the same model as `fabric.setup` returned it.
        loader: training batches; they may be padded to buckets from here on.
        steps: optimizer steps of the run.
        fabric: the processes.

    Returns:
        What computes the training steps, None where they are computed as usual.
    """
    collate = loader.collate_fn
    assert isinstance(collate, TrainCollate)
    if not isinstance(model.encoder, UserLLM):
        return None
    chosen, reason = choose_acceleration(
        config.compile,
        fabric.device,
        single_row=collate.single_row,
        processes=world_size(),
        steps=steps,
        obstacle=graph_obstacle(config, choose_precision(config)),
    )
    if reason and (config.compile != "auto" or fabric.device.type == "cuda"):
        log.info("%s", reason)
    if chosen.layers:
        count = compile_layers(model.encoder.decoder)
        log.info("compile: %d decoder layers through torch.compile; the first step waits.", count)
    if not chosen.graph:
        return None
    lengths = collate.dataset.lengths
    collate.buckets = Buckets.of(lengths, config.train_batch_size, config.MAX_ITEM_LIST_LENGTH)
    log.info(
        "compile: training steps are captured as CUDA graphs, rows padded to multiples of %d "
        "positions; the first steps take longer.",
        collate.buckets.step,
    )
    return StepGraphs(wrapped, fabric.backward, model.parameters(), fabric.device)


def _packs(config: Config, model: Recommender, fabric: Fabric) -> bool:
    """Say whether rows may hold several sequences: where asked for, and the model keeps them apart."""
    if not config.pack_sequences:
        return False
    with fabric.autocast():
        apart = model.encoder.separates_sequences()
    if not apart and isinstance(model.encoder, UserLLM):
        log.warning(
            "pack_sequences: the UserLLM in %s would mix the sequences of a row, so that every "
            "sequence gets a row of its own.",
            config.user_pretrain_dir,
        )
    return apart


def make_train_loader(
    config: Config,
    dataset: CachedEmbeddingTrainDataset,
    fabric: Fabric,
    *,
    pack: bool = True,
    list_items: bool = False,
) -> DataLoader[Any]:
    """Make the loader of training batches for this process.

    Args:
        config: the configuration.
        dataset: the training sequences.
        fabric: the processes.
        pack: False gives every sequence a row of its own, whatever `pack_sequences` says.
        list_items: see `TrainCollate`; for a model whose items are adapted.
    """
    drawn = config.effective_negatives == "sampled"
    rows = config.train_batch_size * world_size()
    length, single_row = None, False
    if pack and config.pack_sequences:
        kernel = user_attention(config, fabric.device) if config.has_user_llm else "sdpa"
        length, single_row = packed_row_length(config, kernel), kernel == VARLEN
    collate = TrainCollate(
        dataset,
        sampler=negative_sampler(config, dataset.split) if drawn else None,
        num_negatives=config.negatives_per_sequence(rows),
        random_split=config.train_positions == "random_split",
        seed=config.seed,
        row_length=length,
        single_row=single_row,
        list_items=list_items,
    )
    batches = SequenceBatches(
        dataset.lengths,
        config.train_batch_size,
        config.seed,
        group_by_length=config.group_by_length,
        rank=global_rank(),
        world_size=world_size(),
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=config.num_workers,
        pin_memory=fabric.device.type == "cuda",
    )


def _write_result(
    run: RunContext,
    data: Data,
    final: Evaluator,
    evaluations: dict[str, Evaluation],
    more: dict[str, Any],
) -> None:
    config, fabric, folder = run.config, run.fabric, run.folder
    record = run.session.record()
    protocol = eval_protocol(config)
    users = len(final.dataset)
    result = {
        "format": RESULT_FORMAT,
        "run": folder.name,
        "finished": environment.now(),
        "dataset": config.dataset,
        "model": config.model,
        "phase": config.eval_phase,
        "protocol": protocol.describe(),
        "rows": [
            {"name": name, "users": users, "metrics": each.metrics, "seconds": each.seconds}
            for name, each in evaluations.items()
        ],
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "data": data.summary(),
        "fingerprint": evaluation_fingerprint(final.dataset, protocol),
        "cache": data.cache.metadata if data.cache else None,
        "list_metrics": final.describe_lists(),
        "user_llm": _origin(config),
        "pretraining_overlap": _overlap(config),
        "user_llm_fingerprint": run.user_llm_fingerprint,
        "training": None,
        **more,
        **record,
        "environment": {
            **environment.describe(fabric.device),
            "precision": choose_precision(config),
            "processes": world_size(),
        },
    }
    write_result(folder, plain(result), evaluations)
    *_, last = evaluations.values()
    summary = {f"{config.eval_phase}/{name}": value for name, value in last.metrics.items()}
    for tracker in run.trackers:
        tracker.summarise(summary)
    # With its result written the run is finished; only now is there nothing to come back to.
    run.checkpoints.remove()
    sys.stdout.write(
        f"\n{config.dataset}, {config.eval_phase}, {users} users, {protocol.describe()}\n\n"
        + gain_table(
            [(name, each.metrics) for name, each in evaluations.items()],
            config.metric_decimal_place,
        )
        + f"\nresult: {folder / 'result.json'} ({format_seconds(sum(record['timings_s'].values()))})\n"
    )
