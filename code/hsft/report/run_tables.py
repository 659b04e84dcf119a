"""The report's sections on the runs themselves: configuration and environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsft.config.loader import flat_values
from hsft.config.schema import (
    ID_MODELS,
    READS_EMBEDDINGS,
    TIME_MODELS,
    TRAINED_MODELS,
    USER_LLM_MODELS,
    Config,
)
from hsft.report.page import Cell, Section, Table
from hsft.utils.progress import format_seconds

NOT_RECORDED, NOT_APPLICABLE = "not recorded", "does not apply"
_NONE = "none"
# Keys of a configuration that say where a run goes, not what it is.
_PLACES = frozenset({"run_name", "overwrite", "auto_resume", "show_progress"})
# Rows of the environment that a run has only where it used the thing or did the work.
_WORK = ("time: ", "peak memory: ")
_OPTIONAL = ("item cache: ", "UserLLM: ", "users too short for ", *_WORK)
_GROUP_OF_KEY = {
    name: str(info.json_schema_extra["group"])  # type: ignore[index]
    for name, info in Config.model_fields.items()
}
_TRAINING_KEYS = frozenset(
    {
        *("checkpoint_every", "checkpoint_minutes", "keep_last", "log_wandb", "wandb_project"),
        *("log_mlflow", "mlflow_experiment"),
        *("valid_metric", "eval_step", "stopping_step"),
    }
)
_READING_KEYS = frozenset({"missing_items", "text_path", "text_keys", "MAX_TEXT_LENGTH"})
_SCORING_KEYS = frozenset({"precision", "similarity", "logits_budget_mb"})

# (run's name, its folder, result.json)
Results = Sequence[tuple[str, Path, Mapping[str, Any]]]


def applies(key: str, config: Mapping[str, Any]) -> bool:
    """Say whether a key decides anything in a run, given its configuration.

    Args:
        key: a key, `section.key` in a section.
        config: the run's configuration, as in `result.json`.
    """
    model, name = config.get("model"), key.partition(".")[0]
    trains = model in TRAINED_MODELS and not config.get("val_only")
    group = _GROUP_OF_KEY.get(name)
    if name.startswith("split_"):
        return config.get("split") == "global_time"
    if name == "data_split":
        return trains
    if name in ID_MODELS:
        return model == name
    if name == "runs":
        return model == "ensemble"
    if name in ("knn_history", "knn_decay"):
        return model in ("item_knn", "tfidf")
    if name.startswith("MAX_ITEM_LIST_LENGTH"):
        return model not in ("pop", "random")
    if name == "eval_baseline":
        return model == "HLLM" and trains
    if name == "eval_neg_sample_num":
        return config.get("eval_protocol") == "sampled"
    if name == "stage":
        return trains and config.get("strategy") == "deepspeed"
    if name in _SCORING_KEYS:
        scored = model in TRAINED_MODELS or (model, name) == ("ensemble", "precision")
        return name == "logits_budget_mb" or scored
    if name in ("valid_metric", "valid_users"):
        return trains or model == "ensemble"
    if group == "training" or name in _TRAINING_KEYS:
        return trains
    if name == "item_dropout":
        return model in USER_LLM_MODELS and trains
    if group == "item cache" or name in _READING_KEYS:
        return model in READS_EMBEDDINGS
    if name == "use_timestamps":
        return model in TIME_MODELS and trains
    if name == "predict_at":
        return bool(config.get("use_timestamps"))
    if group == "UserLLM":
        return model in USER_LLM_MODELS and _user_llm_key_applies(name, config, trains)
    return True


def _user_llm_key_applies(name: str, config: Mapping[str, Any], trains: bool) -> bool:
    if name in ("use_qlora", "gradient_checkpointing"):
        return trains
    if name == "residual_items":
        return trains and config.get("model") == "HLLM"
    return not name.startswith("qlora_") or (trains and bool(config.get("use_qlora")))


def config_section(results: Results) -> Section:
    """Where the runs' configurations differ, and all keys that apply to one of them."""
    flat = [flat_values(result["config"]) for _, _, result in results]
    keys = [
        key
        for key in dict.fromkeys(key for config in flat for key in config)
        if any(applies(key, config) for config in flat)
    ]
    rows = {key: [_shown(config, key) for config in flat] for key in keys}
    different = [key for key in keys if key not in _PLACES and _agreed(key, rows[key]) is None]
    text = []
    if len(results) < 2:
        text = ["There is one run, so there is nothing to compare its configuration with."]
    elif not different:
        text = ["The runs' configurations do not differ."]
    else:
        text = ["none: the key is empty, as null in YAML."]
    return Section("Configuration", text, tables=_tables("keys", rows, results, True, _PLACES))


def _tables(
    what: str,
    rows: Mapping[str, Sequence[str]],
    results: Results,
    fold_one: bool,
    minor: frozenset[str] = frozenset(),
) -> list[Table]:
    """Show rows on which runs differ, and fold those on which they agree into one column.

    Args:
        what: what the rows are.
        rows: name -> a text for each run.
        results: the runs.
        fold_one: fold the rows where there is one run.
        minor: names whose differences are folded too.
    """
    names = [name for name, _, _ in results]
    if len(names) < 2:
        lines: list[list[str | Cell]] = [[name, *texts] for name, texts in rows.items()]
        return [Table(f"All {what}", [what, *names], lines, numeric=False, folded=fold_one)]
    alike = {name: _agreed(name, texts) for name, texts in rows.items()}
    differ = [name for name, text in alike.items() if text is None]
    same = [[name, text] for name, text in alike.items() if text is not None]

    def table(caption: str, chosen: Sequence[str], folded: bool) -> list[Table]:
        lines: list[list[str | Cell]] = [[name, *rows[name]] for name in chosen]
        return (
            [Table(caption, [what, *names], lines, numeric=False, folded=folded)] if lines else []
        )

    shown = [name for name in differ if name not in minor]
    tables = table(f"Differing {what}", shown, False)
    if same:
        header = [what, f"all {len(names)} runs"]
        tables.append(Table(f"Same in all runs: {len(same)} {what}", header, same, False, True))
    hidden = [name for name in differ if name in minor]
    return [*tables, *table("Differing, where runs go and how they are shown", hidden, True)]


def _agreed(name: str, texts: Sequence[str]) -> str | None:
    """Return what all runs have that have it at all; None where they differ."""
    known = [text for text in texts if text != NOT_APPLICABLE]
    if len(set(known)) > 1 or (len(known) < len(texts) and name.startswith(_WORK)):
        return None
    if len(known) == len(texts):
        return known[0]
    return f"{known[0]} ({len(known)} of {len(texts)} runs; it does not apply to the others)"


def environment_section(results: Results) -> Section:
    """Data, versions, hardware, time and memory of each run."""
    columns = [_environment(result) for _, _, result in results]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = {key: [column.get(key, _absent(key)) for column in columns] for key in keys}
    text = ["Data, software and hardware of the runs, their times and memory."]
    return Section("Environment", text, tables=_tables("facts", rows, results, False))


def _absent(key: str) -> str:
    return NOT_APPLICABLE if key.startswith(_OPTIONAL) else NOT_RECORDED


def _environment(result: Mapping[str, Any]) -> dict[str, str]:
    machine, data = _mapping(result.get("environment")), _mapping(result.get("data"))
    cache, user_llm = _mapping(result.get("cache")), _mapping(result.get("user_llm"))
    short = _mapping(data.get("users_too_short"))
    shown = {
        "finished": as_time(str(result["finished"])) if result.get("finished") else NOT_RECORDED,
        **{name: data.get(name) for name in ("users", "items", "interactions")},
        "interactions dropped": data.get("dropped_interactions"),
        "users too short for " + ", ".join(short): ", ".join(map(str, short.values())),
        **{f"item cache: {key}": value for key, value in sorted(cache.items())},
        **{f"UserLLM: {key}": value for key, value in sorted(user_llm.items())},
        "git revision": machine.get("git_revision"),
        "device": machine.get("device"),
        "processor or GPU": machine.get("device_name"),
        "platform": machine.get("platform"),
        "threads": machine.get("threads"),
        "processes": machine.get("processes"),
        "precision": machine.get("precision"),
        **_mapping(machine.get("versions")),
        **{f"time: {key}": format_seconds(s) for key, s in (result.get("timings_s") or {}).items()},
        **{
            f"peak memory: {key.removesuffix('_bytes')}": f"{size / (1 << 30):.2f} GiB"
            for key, size in (result.get("peak_memory") or {}).items()
        },
    }
    return {key: str(value) for key, value in shown.items() if value not in (None, "")}


def as_time(text: str) -> str:
    """Write an ISO time for people."""
    return text.replace("T", " ").replace("+00:00", " UTC")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shown(config: Mapping[str, Any], key: str) -> str:
    if not applies(key, config):
        return NOT_APPLICABLE
    value = config.get(key, NOT_RECORDED)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return _NONE if value is None else str(value)
