"""The models of finished runs, made again from what the runs left, alone or as an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsft.config import Config, load_config
from hsft.config.loader import read_yaml_file
from hsft.config.schema import ID_MODELS, REFERENCES, USER_LLM_MODELS
from hsft.data.cache import ItemCache, open_cache
from hsft.data.dataset import CachedEmbeddingEvalDataset
from hsft.data.split import Phase, Split
from hsft.encoding.item_tower import ITEM_CACHE_FILE
from hsft.evaluator.evaluator import Scorer
from hsft.evaluator.fingerprint import differing_parts, evaluation_fingerprint
from hsft.hub.manifest import is_exported_run
from hsft.inputs.cache_items import read_item_cache
from hsft.model.ensemble import Ensemble, Member
from hsft.model.folder import config_digest, fingerprint
from hsft.model.reference import build_reference
from hsft.model.weights import load_trained
from hsft.report.result import RESULT_FILE, TUNED, UNTRAINED, not_a_run, read_result, unfinished
from hsft.run.run_dir import CONFIG_FILE
from hsft.run.setup import Data, build_id_model, build_user_llm, eval_protocol, match_cache
from hsft.trainer.checkpoint import BEST_DIR
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import is_file, is_folder

if TYPE_CHECKING:
    from lightning.fabric import Fabric

# Where a run that was exported as a whole has its data.
DATA_DIR, INFORMATION_DIR = "dataset", "information"


@dataclass(frozen=True)
class MemberRun:
    """A finished run that is part of an ensemble.

    Attributes:
        folder: the run's folder.
        config: its configuration, with the device and precision of the ensemble.
        result: its `result.json`.
    """

    folder: Path
    config: Config
    result: Mapping[str, Any]

    @property
    def model(self) -> str:
        """Name of the model that takes part: the run's last, the fine-tuned where there is one."""
        return model_names(self.config)[-1]


def model_names(config: Config) -> tuple[str, ...]:
    """Name the models that a finished run has, as the rows of its `result.json` are named."""
    if config.model != "HLLM":
        return (config.model,)
    if config.val_only:
        return (UNTRAINED,)
    # The cache of a trained ItemLLM belongs to the UserLLM that was trained along with it.
    return (TUNED,) if config.trains_items else (UNTRAINED, TUNED)


def with_trained_items(folder: Path, config: Config) -> tuple[Config, ItemCache | None]:
    """Return what a run's model is built from where the run trained the ItemLLM.

    Args:
        folder: the run's folder.
        config: its configuration.

    Returns:
        The configuration without a fixed map, which is in the vectors of the run's own cache, and this
        cache; the configuration as it is and None for other runs.

    Raises:
        InputError: the cache is missing or damaged.
    """
    if not config.trains_items:
        return config, None
    path = folder / BEST_DIR / ITEM_CACHE_FILE
    if not is_file(path) and not is_file(folder / RESULT_FILE):
        raise unfinished(folder)
    return config.model_copy(update={"item_embedding_transform": "none"}), open_cache(path)


def build_model(folder: Path, config: Config, data: Data, fabric: Fabric, name: str) -> Scorer:
    """Build one of a finished run's models, in evaluation mode, on the device.

    Args:
        folder: the run's folder.
        config: its configuration, with what moved since.
        data: its data.
        fabric: Lightning Fabric, launched.
        name: one of `model_names`.

    Raises:
        InputError: the model's files are missing or damaged, or the UserLLM's folder holds another
            model than the run's.
    """
    if config.model in REFERENCES:
        return build_reference(config, data.split, data.cache, fabric.device, data.own_items)
    if config.model == "ensemble":
        ensemble = build_ensemble(member_runs(config), config, data, fabric)
        ensemble.weights = _recorded_weights(folder, len(ensemble.parts))
        return ensemble
    refuse_other_user_llm(folder, config)
    if config.model in ID_MODELS:
        model = build_id_model(config, data, fabric)
    else:
        model = build_user_llm(config, data, fabric, train=name == TUNED)
    if name != UNTRAINED:
        if not is_folder(folder / BEST_DIR) and not is_file(folder / RESULT_FILE):
            raise unfinished(folder)
        load_trained(model, folder / BEST_DIR)
    return model.to(fabric.device).eval()


def member_runs(config: Config) -> list[MemberRun]:
    """Return the runs of an ensemble.

    Raises:
        InputError: a folder is no finished run, or the run is an ensemble itself or of another
            dataset.
    """
    members = []
    for name in config.runs or ():
        folder = Path(name)
        result = read_result(folder)
        given = {
            "device": config.device,
            "precision": config.precision,
            "missing_items": "error",
        }
        member = run_config(folder, given)
        if member.model == "ensemble":
            raise InputError(f"{folder} is an ensemble itself; name its runs in --runs.")
        if member.dataset != config.dataset:
            raise InputError(
                f"{folder} is a run on {member.dataset}, not on {config.dataset}; name runs of one "
                f"dataset in --runs."
            )
        if member.use_timestamps:
            raise InputError(
                f"{folder} reads timestamps, which an ensemble does not hand on; name runs without "
                f"use_timestamps in --runs."
            )
        members.append(MemberRun(folder, member, result))
    return members


def refuse_unlike_members(members: Sequence[MemberRun], config: Config, split: Split) -> None:
    """Refuse runs that were scored on other things than their ensemble will be.

    A run may have been scored on the validation items (`eval_phase: valid`).

    Args:
        members: its runs.
        config: of the ensemble.
        split: its data.

    Raises:
        InputError: a run's users, held-out items, catalogue, histories or protocol are others, or
            the run has not recorded what they were.
    """
    known: dict[Phase, dict[str, str]] = {}
    for member in members:
        phase: Phase = "valid" if member.result["phase"] == "valid" else "test"
        if phase not in known:
            users = CachedEmbeddingEvalDataset(split, phase, config.eval_list_length)
            known[phase] = evaluation_fingerprint(users, eval_protocol(config))
        recorded = member.result.get("fingerprint", {})
        unlike = differing_parts(known[phase], recorded)
        if not recorded or unlike:
            what = f"other {', '.join(unlike)}" if unlike else "what it did not record"
            raise InputError(
                f"{member.folder} was scored on {what}, so that its scores cannot be added up here; "
                f"name runs of the same data, split, catalogue and protocol in --runs."
            )


def build_ensemble(
    members: Sequence[MemberRun], config: Config, data: Data, fabric: Fabric
) -> Ensemble:
    """Build the models of an ensemble's runs, each with a weight of 1.

    Args:
        members: its runs.
        config: of the ensemble.
        data: its data, which its runs share.
        fabric: Lightning Fabric, launched.

    Raises:
        InputError: a run's model or item cache is missing, or the run was scored on other data.
    """
    refuse_unlike_members(members, config, data.split)
    parts = []
    for member in members:
        member_config, cache = with_trained_items(member.folder, member.config)
        if member_config.reads_embeddings:
            cache = read_item_cache(member_config) if cache is None else cache
            match_cache(data.interactions, cache, member_config)
        member_data = Data(data.split, cache)
        scorer = build_model(member.folder, member_config, member_data, fabric, member.model)
        parts.append(Member(scorer, member.config.eval_list_length))
    return Ensemble(parts, [1.0] * len(parts))


def _recorded_weights(folder: Path, count: int) -> list[float]:
    """Return the weights that an ensemble's run chose."""
    recorded = read_result(folder).get("ensemble")
    weights = recorded.get("weights") if isinstance(recorded, dict) else None
    sound = isinstance(weights, list) and len(weights) == count
    if not sound or not all(isinstance(weight, int | float) for weight in weights or ()):
        raise InputError(
            f"{folder / RESULT_FILE} does not hold the weights of its {count} runs; run the command "
            f"again."
        )
    return [float(weight) for weight in weights or ()]


def user_llm_fingerprint(config: Config) -> str | None:
    """Return what tells a configuration's UserLLM from others: of its weights, if they are read.

    None for a model without one, and for a config.json that does not decide alone what is built.

    Raises:
        InputError: the folder has no readable config.json or weights.
    """
    if not config.has_user_llm or not config.user_pretrain_dir:
        return None
    if config.loads_user_llm:
        return fingerprint(config.user_pretrain_dir)
    return config_digest(Path(config.user_pretrain_dir))


def refuse_other_user_llm(folder: Path, config: Config) -> None:
    """Refuse a UserLLM that is not the one a run was made with.

    A run of an earlier version, and one that was stopped, has not recorded which it was.

    Args:
        folder: the run's folder.
        config: its configuration, with what moved since.

    Raises:
        InputError: the folder's config.json or weights have changed since the run, or there is no such
            folder beside a run that was exported as a whole.
    """
    base = config.user_pretrain_dir
    if config.has_user_llm and base and not is_folder(base) and is_exported_run(folder):
        raise InputError(
            f"{folder} comes without the UserLLM that it was made with, {one_line(base, 80)}; say where "
            f"yours is with --user_pretrain_dir (its README.md has more)."
        )
    if not config.has_user_llm or not base or not is_folder(base):
        return
    if not is_file(folder / RESULT_FILE):
        return
    recorded = read_result(folder).get("user_llm_fingerprint")
    if recorded is not None and recorded != user_llm_fingerprint(config):
        raise InputError(
            f"the UserLLM in {base} is not the one that {folder} was made with: its config.json or "
            f"weights have changed since; put the old ones back, or say where they are with "
            f"--user_pretrain_dir."
        )


def _without_use(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return other values for keys that runs were once started with and had no use of.

    New runs are refused for them.

    Args:
        stored: a run's configuration, as it was written.
    """
    changes: dict[str, Any] = {}
    model = stored.get("model", "HLLM")
    if model not in USER_LLM_MODELS:
        changes |= {"use_qlora": False, "gradient_checkpointing": False}
    by_dot = "auto" if model == "sasrec" else "dot"
    if model in ID_MODELS and stored.get("similarity") in ("dot", by_dot):
        changes |= {"temperature": None, "fix_temp": False}
    metrics = stored.get("metrics")
    if stored.get("eval_protocol") == "sampled" and isinstance(metrics, list):
        changes["metrics"] = [name for name in metrics if name != "Coverage"]
    return changes


def run_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a run's configuration, for use in one process.

    Args:
        folder: the run's folder.
        overrides: configuration keys with other values.

    A run that was exported as a whole finds the data in its own folder, where it has them, and runs
    no code that a model folder brings: somebody else may have written its configuration.

    Raises:
        InputError: the folder is no run, or a value is none that its key takes.
    """
    if not is_file(folder / CONFIG_FILE):
        raise not_a_run(folder, "run", CONFIG_FILE)
    alone = {"strategy": "ddp", "show_progress": False}
    if is_exported_run(folder):
        inside = {"data_path": folder / DATA_DIR, "text_path": folder / INFORMATION_DIR}
        alone |= {key: str(path) for key, path in inside.items() if is_folder(path)}
        alone["trust_remote_code"] = False
    alone |= _without_use(read_yaml_file(folder / CONFIG_FILE))
    config, _ = load_config([folder / CONFIG_FILE], {**alone, **(overrides or {})})
    return config
