"""The Python interface: what the programs do, as functions that return objects.

    import hsft

    config = hsft.load_config("overall/LLM_ddp.yaml", "HLLM/HLLM.yaml", dataset="Pixel200K")
    hsft.cache_items(config)
    run = hsft.train(config)
    run.metrics                             # a DataFrame: one row a model, one column a metric
    run.recommend(user="1001", topk=5)      # a DataFrame, best item first

Every function raises `hsft.InputError` for something that the user can change, with the sentence that
the programs print; several problems at once are an `hsft.InputErrors`. Nothing here ends the
interpreter. An interrupted cell (Ctrl-C) raises KeyboardInterrupt, after training has saved a
checkpoint; the same call with `auto_resume=True` in the configuration continues.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from hsft.config import loader
from hsft.config.schema import ID_MODELS, Config
from hsft.utils.errors import InputError, Interrupted, refuse
from hsft.utils.logs import show_log_lines
from hsft.utils.program import install_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hsft.data.cache import ItemCache
    from hsft.finished.open_run import OpenRun

log = logging.getLogger(__name__)


def load_config(*files: str | Path, **overrides: Any) -> Config:
    """Merge configuration files and values, and check the result.

    Args:
        files: YAML files, later ones win key by key. A name of a file that comes with HSFT, such as
            `overall/LLM_ddp.yaml`, `HLLM/HLLM.yaml` or `baselines/sasrec.yaml`, stands for that file
            where there is none of this name in the working directory.
        overrides: keys of the configuration, which win over the files: `dataset="Pixel200K"`. A key
            of a section is given as a mapping, `optim_args={"learning_rate": 1e-3}`, or with a dot,
            `**{"optim_args.learning_rate": 1e-3}`.

    Returns:
        The configuration, immutable. `config.model_copy(update=...)` does not check its values; call
        `load_config` again instead. `config.model_dump()` gives plain data.

    Raises:
        InputError: a file is missing or no YAML, a key is unknown (the nearest known one is named),
            or a value has the wrong type or range.
    """
    config, warnings = loader.load_config(files, overrides, where="the arguments of load_config")
    for warning in warnings:
        log.warning("%s", warning)
    return config


def cache_items(config: Config) -> ItemCache:
    """Encode every item of the data set with the ItemLLM, once, as `hsft cache` does.

    A cache that is there and was made with the same model, texts and settings is left as it is. An
    interrupted call is continued by the next one.

    Args:
        config: `dataset`, `item_pretrain_dir` and the keys of the group "item cache" decide.

    Returns:
        The cache: `item_ids` (list of str), `embeddings` (Tensor [I, D], memory-mapped), `metadata`
        and `path`.

    Raises:
        InputError: a file or model folder is missing or unusable.
    """
    with _call(config):
        from hsft.data.cache import open_cache
        from hsft.inputs.cache_items import write_item_cache
        from hsft.run.check import quick_caching_problems

        refuse(quick_caching_problems(config))
        return open_cache(write_item_cache(config))


def evaluate(config: Config) -> Run:
    """Score a model on the held-out items, without training, as `hsft evaluate` does.

    Args:
        config: `model: HLLM` scores the UserLLM of `user_pretrain_dir` as it is (`val_only` is set);
            `pop`, `random`, `item_knn` and `tfidf` are the reference models, and `ensemble` sums the
            scores of the finished `runs`.

    Returns:
        The finished run; its folder is in `checkpoint_dir`.

    Raises:
        InputError: something in the configuration or its files has to be changed, or the model
            (`sasrec`, `hstu`, `llm_id`) has nothing to evaluate before it is trained.
    """
    if config.model in ID_MODELS:
        raise InputError(f"model: {config.model} has nothing to evaluate untrained; call train().")
    if config.model == "HLLM" and not config.val_only:
        config = config.model_copy(update={"val_only": True})
    return _finish(config)


def train(config: Config) -> Run:
    """Fine-tune the UserLLM, or train a model on item ids, and score it, as `hsft train` does.

    The epoch with the best `valid_metric` is kept and scored on the held-out items of `eval_phase`;
    with `eval_baseline` the UserLLM is scored before training too, for comparison.

    Args:
        config: the configuration.

    Returns:
        The finished run; its folder is in `checkpoint_dir`.

    Raises:
        InputError: something in the configuration or its files has to be changed, or nothing would
            be trained (`val_only: True` or a reference model).
    """
    if not config.trains:
        why = "val_only is True" if config.val_only else f"model: {config.model} is not trained"
        raise InputError(f"nothing would be trained: {why}; call evaluate().")
    return _finish(config)


def open_run(path: str | Path, **overrides: Any) -> Run:
    """Open the folder of a finished run.

    Args:
        path: the folder, which `train`, `evaluate` or the programs made, or `hf://OWNER/NAME`.
        overrides: keys of the run's configuration with other values, for what has moved since:
            `data_path`, `text_path`, `item_cache_path`, `user_pretrain_dir`, `item_pretrain_dir`,
            `device`, `num_threads`.

    Raises:
        InputError: the folder is no finished run.
    """
    from hsft.hub.repository import run_folder
    from hsft.report.result import read_result

    folder = run_folder(path)
    return Run(folder, read_result(folder), overrides)


def compare(*runs: Run | str | Path) -> pd.DataFrame:
    """Compare runs on the same users: values, intervals and paired tests against the first model.

    Args:
        runs: finished runs, their folders, or `hf://OWNER/NAME`.

    Returns:
        One row a model and metric, with the columns `run`, `metric`, `value`, `low`, `high` (95 %
        interval over users), `gain` (relative to the first model, such as `+12.3 %`), `p_value`
        (paired randomisation test against the first model) and `p_holm` (corrected for the number of
        models by Holm's procedure); these three are missing for the first model.
        Metrics of all users together, such as `Coverage@10`, have a value alone.

    Raises:
        InputError: a folder is no finished run, or the runs differ in data, protocol or users.
    """
    from hsft.report.compare import load_comparison
    from hsft.report.comparison_files import csv_lines

    comparison = load_comparison([run.folder if isinstance(run, Run) else run for run in runs])
    columns = ["run", "metric", "value", "low", "high", "gain", "p_value", "p_holm"]
    lines = [line for lines in csv_lines(comparison) for line in lines]
    return pd.DataFrame.from_records(lines, columns=columns)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: its folder, with `result.json`, `ranks.safetensors`, `config.yaml`, `run.log` and,
            after training, `best/`.
        result: the content of `result.json`: configuration, data, timings, environment.
        overrides: keys of its configuration with other values, for what has moved since.
    """

    folder: Path
    result: Mapping[str, Any]
    overrides: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, models={list(self.metrics.index)})"

    @property
    def metrics(self) -> pd.DataFrame:
        """Metrics of the scored models: index `model`, one column each, such as `NDCG@10`."""
        rows = {row["name"]: row.get("metrics", {}) for row in self.result["rows"]}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")

    @cached_property
    def ranks(self) -> pd.DataFrame:
        """Rank of every user's held-out item, 1 the best; 2**63 - 1 for one that was masked as seen.

        Returns:
            int64, one column a model; the index `user` numbers the users as the data does, whose
            ids are `run.data.interactions.user_ids`.

        Raises:
            InputError: `ranks.safetensors` is missing or damaged.
        """
        from hsft.report.result import read_ranks

        columns = {}
        for row in self.result["rows"]:
            users, ranks = read_ranks(self.folder, row["name"])
            columns[row["name"]] = pd.Series(ranks, index=pd.Index(users, name="user"))
        return pd.DataFrame(columns)

    @property
    def history(self) -> pd.DataFrame:
        """Training curves: index `epoch`, the column `loss` and the validation metrics.

        A run that trained nothing has an empty one.
        """
        training = self.result.get("training") or {}
        records = [
            {"epoch": record["epoch"], "loss": record.get("loss"), **(record.get("valid") or {})}
            for record in training.get("history", [])
        ]
        return pd.DataFrame.from_records(records, index="epoch") if records else pd.DataFrame()

    @cached_property
    def config(self) -> Config:
        """The run's configuration, with `overrides`."""
        from hsft.run.saved_model import run_config

        return run_config(self.folder, self.overrides)

    @property
    def data(self) -> Any:
        """Interactions, split and item cache of the run, read when first used.

        Raises:
            InputError: they are missing, or not where the configuration says.
        """
        return self._opened.data

    def recommend(
        self,
        user: str | int | None = None,
        *,
        history: Sequence[str | int] | None = None,
        topk: int = 10,
        exclude_seen: bool = True,
        model: str | None = None,
        predict_at: str | int | None = None,
    ) -> pd.DataFrame:
        """Recommend items to a user of the data, or for a history.

        The model is loaded by the first call and kept.

        Args:
            user: id of a user; all of the user's items are read, those included that were held out.
            history: item ids, oldest first, instead of a user.
            topk: number of items.
            exclude_seen: leave the items of the history out.
            model: a row of `metrics`; by default the last one, the fine-tuned where there is one.
            predict_at: when the recommendations are for, with a run of `predict_at: target`: a date
                in ISO 8601 or a number as in the data's timestamps; None: now.

        Returns:
            Columns `item_id`, `title` and `score` under the index `rank`, from 1.

        Raises:
            InputError: the user, an item or the model is unknown, or both or neither of `user` and
                `history` are given.
        """
        if (user is None) == (history is None):
            raise InputError("give either user or history, and not both.")
        if predict_at is not None and user is None:
            raise InputError("predict_at has no meaning with history, whose items have no times.")
        if topk < 1:
            raise InputError(f"topk is {topk}; give a number of at least 1.")
        from hsft.finished.recommend import recommendations

        with _call(self.config):
            opened = self._opened
            items = (
                opened.history(str(user))
                if history is None
                else opened.item_numbers([str(item) for item in history])
            )
            times = None
            if user is not None:
                at = None if predict_at is None else str(predict_at)
                times = opened.history_times(str(user), at)
            if not len(items):
                raise InputError("history is empty; name at least one item id.")
            name = model or opened.models[-1]
            if name not in self._models:
                self._models[name] = opened.build(name)
            rows = recommendations(opened, self._models[name], items, topk, exclude_seen, times)
        columns = ["rank", "item_id", "title", "score"]
        return pd.DataFrame.from_records(rows, columns=columns).set_index("rank")

    def export(
        self,
        out: str | Path | None = None,
        *,
        format: Literal["merged", "adapter", "onnx"] = "merged",
        dtype: Literal["float16", "bfloat16", "float32"] | None = None,
        evaluate: bool = False,
        overwrite: bool = False,
    ) -> Path:
        """Write the fine-tuned UserLLM as a model folder with a model card, as `hsft export` does.

        Args:
            out: the folder; by default `export`, `export-adapter` or `export-onnx` in the run's folder.
            format: `merged`: one transformers model without quantisation; `adapter`: LoRA in peft's
                format; `onnx`: graphs of the merged UserLLM and of its map of items.
            dtype: number type of merged weights; bfloat16 by default, and always float32 for `onnx`.
            evaluate: score the merged model as the run was scored, for the card's table.
            overwrite: replace an earlier export.

        Returns:
            The folder.

        Raises:
            InputError: the run fine-tuned nothing, a file is missing, or `out` is there already.
        """
        with _call(self.config):
            from hsft.finished.export import ExportOptions, default_folder, export

            return export(
                ExportOptions(
                    run=self.folder,
                    out=Path(out) if out is not None else default_folder(self.folder, format),
                    format=format,
                    dtype=dtype or ("float32" if format == "onnx" else "bfloat16"),
                    evaluate=evaluate,
                    overwrite=overwrite,
                    overrides=dict(self.overrides),
                )
            )

    def push_to_hub(
        self,
        repo: str,
        *,
        out: str | Path | None = None,
        private: bool = True,
        with_data: bool | None = None,
        overwrite: bool = False,
    ) -> str:
        """Export the run as a whole and upload it, as `hsft export --format run --push_to_hub` does.

        `open_run("hf://OWNER/NAME")` opens it again.

        Args:
            repo: `OWNER/NAME`, made where there is none.
            out: the folder that is exported; by default `export-run` in the run's folder.
            private: make a private repository; a public one is refused.
            with_data: include interactions, item information and item cache; by default in private.
            overwrite: replace an earlier export at `out`.

        Returns:
            The repository's address in a browser.

        Raises:
            InputError: a file is missing, `out` is there already, or the hub refuses the upload.
        """
        with _call(self.config):
            from hsft.finished.export import default_folder
            from hsft.finished.export_run import RunOptions, export_run
            from hsft.hub.repository import check_push, push_folder

            check_push(repo)
            folder = export_run(
                RunOptions(
                    run=self.folder,
                    out=Path(out) if out is not None else default_folder(self.folder, "run"),
                    with_data=private if with_data is None else with_data,
                    overwrite=overwrite,
                    overrides=dict(self.overrides),
                )
            )
            return push_folder(folder, repo, private=private)

    def export_embeddings(
        self,
        out: str | Path | None = None,
        *,
        files: Literal["safetensors", "parquet"] = "safetensors",
        dtype: Literal["float16", "float32"] = "float32",
        index: Literal["auto", "flat", "hnsw", "ivf", "none"] = "auto",
        model: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the vectors of all items and users, as `hsft export --format embeddings` does.

        Args:
            out: the folder; by default `export-embeddings` in the run's folder.
            files: `safetensors`, or `parquet`, which needs pyarrow.
            dtype: number type of the vectors.
            index: kind of FAISS index over the items, which needs faiss-cpu; `auto`: by their number.
            model: a row of `metrics`; by default the last one, the fine-tuned where there is one.
            overwrite: replace an earlier export.

        Returns:
            The folder.

        Raises:
            InputError: the run's model has no vectors, a package is missing, or `out` is there
                already.
        """
        with _call(self.config):
            from hsft.finished.export import default_folder
            from hsft.finished.export_embeddings import EmbeddingOptions, export_embeddings

            folder = self.folder
            return export_embeddings(
                EmbeddingOptions(
                    run=folder,
                    out=Path(out) if out is not None else default_folder(folder, "embeddings"),
                    files=files,
                    dtype=dtype,
                    index=index,
                    model=model,
                    overwrite=overwrite,
                    overrides=dict(self.overrides),
                )
            )

    def report(self, out: str | Path | None = None, *, examples: int = 12) -> Path:
        """Write the run's report, one HTML page, as `hsft report` does.

        Args:
            out: the page; by default `report.html` in the run's folder.
            examples: example users with their recommendations; 0 loads no model.

        Returns:
            The page.
        """
        with _call(self.config):
            from hsft.finished.write_report import write_report
            from hsft.hub.repository import output_folder

            return write_report(
                [self.folder],
                Path(out) if out is not None else output_folder(self.folder) / "report.html",
                examples=examples,
                overrides=dict(self.overrides),
            )

    @cached_property
    def _opened(self) -> OpenRun:
        from hsft.finished.open_run import open_run

        return open_run(self.folder, self.overrides)

    @cached_property
    def _models(self) -> dict[str, Any]:
        return {}


def _finish(config: Config) -> Run:
    with _call(config):
        from hsft.run.check import quick_problems
        from hsft.run.train_and_rank import train_and_rank

        refuse(quick_problems(config))
        return open_run(train_and_rank(config))


@contextmanager
def _call(config: Config) -> Iterator[None]:
    """Show the lines of a call, unless the caller has set up logging, and translate its end."""
    from hsft.utils.environment import set_threads

    set_threads(config.num_threads)
    with show_log_lines():
        try:
            yield
        except Interrupted as ending:
            raise KeyboardInterrupt(str(ending)) from None
        except ModuleNotFoundError as error:
            package = (error.name or "hsft").partition(".")[0]
            if package == "hsft":
                raise
            raise InputError(
                f"the package {package} is missing; run {install_command(package)}."
            ) from error
