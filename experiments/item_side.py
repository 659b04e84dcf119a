"""Trials of the item side and of the id models it is held against, several at a time on one GPU.

    python experiments/item_side.py pack --folder .exp --encoder ENCODER --llm SmolLM2   # on a CPU
    python experiments/item_side.py prepare --folder .exp                                # on the GPU
    python experiments/item_side.py run --folder .exp --out OUT --seconds 240
    python experiments/item_side.py test --folder .exp --out OUT
    python experiments/item_side.py table --folder .exp --out OUT                        # Markdown
    python experiments/item_side.py lists --folder .exp --out OUT                        # Markdown

`pack` shrinks what has to be carried to a machine without network: the item texts' tokens, the encoder
with the words that occur, and the LLM's first layers, in 8 bits a weight. `prepare` unpacks it and
makes the item caches. `run` goes through `TRIALS` in their order, each a run of `code/main.py` scored on
validation users; a trial of a family starts from the best one of its family and data set so far. Every
outcome is a line of `trials.jsonl` at once. `test` reads the test users once, for the best trial of every
family and data set; `table` writes what they scored, with 95 % intervals over users and paired tests
against the best id model. `lists` measures what the same trials recommend to validation users. `--tiny
True` runs all of it on a CPU with a few users: a test of this file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "code")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from experiments.text_vectors import beside, tfidf_vectors  # noqa: E402
from hsft.data.cache import ItemCache, save_cache  # noqa: E402
from hsft.data.item_text import read_plain_texts  # noqa: E402
from hsft.utils.errors import EXIT_OK  # noqa: E402

AMAZON = ("beauty", "clothing")
DATASETS = (*AMAZON, "ml-100k")
# Models on item ids, against the best of which the tables compare.
ID_FAMILIES = ("sasrec", "hstu")
TEXT_KEYS = ("title", "tag", "description")
MAX_TOKENS = 128
ENCODER_FILES = (
    *("config.json", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    *("config_sentence_transformers.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "vocab.txt"),
)
WORD_DIM = 512
_WORDS = "embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        data: a name of `DATASETS`.
        family: a key of `START`: id models (`sasrec`, `hstu`), `text` (frozen cache, UserLLM only),
            `loss` (the same, to compare losses), `ids` (with id embeddings), `item_llm` and
            `item_llm_ids` (with a trained ItemLLM), or a reference model.
        changes: configuration keys that differ from the family's start.
        fresh: begin at the family's start, not at its best trial so far.
    """

    data: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False


# Where each family starts; `cache` stands for `item_cache_path`.
_HSFT = {
    "config_file": ["overall/LLM_ddp", "HLLM/HLLM", "HLLM/plain_llm"],
    "cache": "both",
    "item_embedding_transform": "none",
    "item_adapter": "linear",
    "use_qlora": False,
    "optim_args.learning_rate": 5e-4,
    "optim_args.weight_decay": 0.05,
    "train_batch_size": 128,
    "MAX_ITEM_LIST_LENGTH": 20,
    "user_llm_layers": 2,
    "item_dropout": 0.2,
    "epochs": 8,
    "stopping_step": 3,
    "eval_baseline": False,
}
_IDS = {"item_id_embedding": True, "item_id_dropout": 0.1}
# `encoder` stands for the folder that `prepare` makes.
_ITEM_LLM = {
    "cache": None,
    "encoder": True,
    "train_item_llm": "full",
    "item_freeze_embeddings": True,
    "item_lr_mult": 0.02,
    "item_chunk_tokens": 65536,
    "use_item_cache": False,
    "negatives": "sampled",
    "num_negatives": 1024,
    "negatives_logq": True,
}
START: dict[str, dict[str, Any]] = {
    "sasrec": {
        "config_file": ["overall/LLM_ddp", "baselines/sasrec"],
        "sasrec.hidden_size": 128,
        "sasrec.dropout": 0.5,
        "train_batch_size": 256,
        "MAX_ITEM_LIST_LENGTH": 20,
        "epochs": 60,
        "eval_step": 3,
        "stopping_step": 4,
    },
    "hstu": {
        "config_file": ["overall/LLM_ddp", "IDNet/hstu"],
        "negatives": "catalogue",
        "hstu.hidden_size": 64,
        "hstu.heads": 2,
        "hstu.dropout": 0.5,
        "hstu.input_dropout": 0.3,
        "optim_args.learning_rate": 1e-3,
        "train_batch_size": 128,
        "MAX_ITEM_LIST_LENGTH": 20,
        "epochs": 60,
        "eval_step": 3,
        "stopping_step": 2,
    },
    "text": _HSFT,
    "loss": _HSFT,
    "ids": {**_HSFT, **_IDS},
    "item_llm": {**_HSFT, **_ITEM_LLM},
    "item_llm_ids": {**_HSFT, **_ITEM_LLM, **_IDS},
    "pop": {"config_file": ["overall/LLM_ddp", "baselines/pop"]},
    "tfidf": {"config_file": ["overall/LLM_ddp", "baselines/tfidf"]},
    "item_knn": {
        "config_file": ["overall/LLM_ddp", "baselines/item_knn"],
        "cache": "minilm",
        "knn_history": "mean",
        "knn_decay": 0.8,
    },
}
QLORA = {"use_qlora": True, "optim_args.learning_rate": 2e-3, "optimizer": "adamw"}


def _trials() -> list[Trial]:
    """List the trials, the most telling first."""
    listed: list[Trial] = []
    # What the text is, and what carries the UserLLM: the widest differences.
    for data in AMAZON:
        listed += [
            Trial(data, "text", fresh=True),
            Trial(data, "sasrec", fresh=True),
            Trial(data, "text", {"cache": "minilm"}, fresh=True),
            Trial(data, "text", {"cache": "tfidf"}, fresh=True),
            Trial(data, "ids", fresh=True),
        ]
    for data in AMAZON:
        listed += [
            Trial(data, "text", QLORA, fresh=True),
            Trial(data, "text", {"item_embedding_transform": "standardize"}),
            Trial(data, "sasrec", {"sasrec.hidden_size": 256}),
            Trial(data, "sasrec", {"similarity": "cosine", "temperature": 0.07}),
        ]
    for data in AMAZON:
        listed += [
            Trial(data, "ids", {"item_dropout": 0.4, "item_id_dropout": 0.3}),
            Trial(data, "text", {"temperature": 0.05, "fix_temp": True}),
            Trial(data, "sasrec", {"sasrec.block": "ligr"}),
            Trial(data, "text", {"item_adapter": "mlp"}),
            Trial(data, "ids", {"optim_args.weight_decay": 0.3}),
            Trial(data, "sasrec", {"sasrec.dropout": 0.3}),
        ]
    for data in AMAZON:
        listed += [
            Trial(data, "text", {"item_dropout": 0.0}),
            Trial(data, "text", {"optim_args.learning_rate": 1.5e-3}),
            Trial(data, "ids", {"temperature": 0.05, "fix_temp": True}),
            Trial(data, "sasrec", {"MAX_ITEM_LIST_LENGTH": 50}),
            Trial(data, "text", {"MAX_ITEM_LIST_LENGTH": 50}),
            Trial(data, "text", {"user_llm_layers": 1}),
            Trial(data, "sasrec", {"sasrec.dropout": 0.7}),
            Trial(data, "sasrec", {"optim_args.weight_decay": 0.1}),
        ]
    references = ("tfidf", "item_knn", "pop")
    return listed + [Trial(data, family) for data in AMAZON for family in references]


TRIALS = _trials()


# --- pack and prepare


def pack(folder: Path, encoder: Path, llm: Path, layers: int, sources: Sequence[str]) -> None:
    """Write what `prepare` reads into `folder/packed`.

    Args:
        folder: with dataset/NAME.csv and information/NAME.csv of `DATASETS`, unless `sources`.
        encoder: a BERT-type sentence encoder that is mean-pooled, such as all-MiniLM-L6-v2.
        llm: folder of the UserLLM's base model.
        layers: how many of its layers are kept.
        sources: folders of interactions.csv.gz and items.csv.gz, for the first of `DATASETS`.
    """
    from transformers import AutoTokenizer

    packed = folder / "packed"
    packed.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
    tokens: dict[str, list[list[int]]] = {}
    for data, source in zip(DATASETS, sources, strict=False):
        for kind, name in (("dataset", "interactions"), ("information", "items")):
            target = packed / f"{kind}-{data}.csv.gz"
            shutil.copyfile(Path(source) / f"{name}.csv.gz", target)
            _unzip(target, folder / kind / f"{data}.csv")
        texts = read_plain_texts(folder / "information" / f"{data}.csv", TEXT_KEYS)
        read = tokenizer(list(texts.values()), truncation=True, max_length=MAX_TOKENS)
        tokens[data] = read["input_ids"]
    used = sorted({token for rows in tokens.values() for row in rows for token in row})
    number = {token: index for index, token in enumerate(used)}
    arrays: dict[str, Tensor] = {}
    # What a trained ItemLLM needs beside the weights; `prepare` puts it together.
    for name in ENCODER_FILES:
        if (encoder / name).is_file():
            target = packed / "encoder" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(encoder / name, target)
    arrays["words"] = torch.tensor(used, dtype=torch.int32)
    for data, rows in tokens.items():
        flat = [number[token] for row in rows for token in row]
        arrays[f"{data}.tokens"] = torch.tensor(flat, dtype=torch.int16)
        arrays[f"{data}.lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int16)
    weights = load_file(encoder / "model.safetensors")
    weights = {k: v for k, v in weights.items() if v.is_floating_point() and "pooler" not in k}
    weights[_WORDS] = weights[_WORDS][torch.tensor(used)]
    save_file({**arrays, **_in_8_bits(weights)}, packed / "encoder.safetensors")
    weights = {
        name: value
        for name, value in load_file(llm / "model.safetensors").items()
        if name.startswith("model.")
        and "embed_tokens" not in name
        and (not (layer := re.search(r"layers\.(\d+)\.", name)) or int(layer[1]) < layers)
    }
    save_file(_in_8_bits(weights), packed / "llm.safetensors")
    config = json.loads((llm / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (packed / "llm.json").write_text(json.dumps(config))


def prepare(folder: Path, tiny: bool) -> None:
    """Unpack data and models, and make the item caches minilm, tfidf and both."""
    packed = folder / "packed"
    datasets = [data for data in DATASETS if (packed / f"dataset-{data}.csv.gz").is_file()]
    for data in datasets:
        for kind in ("dataset", "information"):
            _unzip(packed / f"{kind}-{data}.csv.gz", folder / kind / f"{data}.csv")
    if tiny:
        _keep_users(folder, datasets, 150)
    _put_encoder(folder)
    llm = folder / "llm"
    llm.mkdir(exist_ok=True)
    shutil.copyfile(packed / "llm.json", llm / "config.json")
    weights = _from_8_bits(load_file(packed / "llm.safetensors"))
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (folder / "cache").mkdir(exist_ok=True)
    for data in datasets:
        texts = read_plain_texts(folder / "information" / f"{data}.csv", TEXT_KEYS)
        ids = list(texts)
        dim = 64 if tiny else WORD_DIM
        words = ItemCache(ids, tfidf_vectors(list(texts.values()), dim, device))
        if tiny:
            sentences = ItemCache(ids, torch.randn(len(ids), 24))
        else:
            sentences = ItemCache(ids, _sentence_vectors(packed, data, device))
        for name, vectors in (
            ("minilm", sentences.embeddings),
            ("tfidf", words.embeddings),
            ("both", beside(words, sentences)),
        ):
            made = {"model": name, "pooling": "sentence"}
            save_cache(_cache(folder, data, name), ids, vectors.half(), made)


def _put_encoder(folder: Path) -> None:
    """Make the encoder's folder `folder/encoder`; vectors of words that do not occur are zero."""
    packed = folder / "packed"
    shutil.copytree(packed / "encoder", folder / "encoder", dirs_exist_ok=True)
    stored = load_file(packed / "encoder.safetensors")
    weights, config = _encoder_weights(stored), _encoder_config(packed)
    words = torch.zeros(config["vocab_size"], config["hidden_size"])
    words[stored["words"].to(torch.int64)] = weights[_WORDS]
    save_file(
        {**weights, _WORDS: words},
        folder / "encoder" / "model.safetensors",
        metadata={"format": "pt"},
    )


def _encoder_weights(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's weights of what `pack` stored with the texts' tokens."""
    return _from_8_bits(
        {k: v for k, v in stored.items() if not k.endswith(("tokens", "lengths", "words"))}
    )


def _encoder_config(packed: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((packed / "encoder" / "config.json").read_text())
    return config


def _sentence_vectors(packed: Path, data: str, device: torch.device) -> Tensor:
    """Mean-pool the encoder's states, as all-MiniLM-L6-v2 does: unit vectors, float32 [n, C]."""
    from transformers import AutoConfig, AutoModel

    stored = load_file(packed / "encoder.safetensors")
    tokens = stored[f"{data}.tokens"].to(torch.int64)
    lengths = stored[f"{data}.lengths"].to(torch.int64)
    weights, config = _encoder_weights(stored), _encoder_config(packed)
    config["vocab_size"] = len(weights[_WORDS])
    kind = config.pop("model_type")
    model = AutoModel.from_config(AutoConfig.for_model(kind, **config), attn_implementation="sdpa")
    lacking = model.load_state_dict(weights, strict=False).missing_keys
    assert all("pooler" in name or "position_ids" in name for name in lacking), lacking
    model = model.eval().to(device)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    vectors = torch.zeros(len(lengths), config["hidden_size"])
    order = lengths.argsort(descending=True)
    for rows in order.split(256):
        width = int(lengths[rows].max())
        here = torch.arange(width)
        mask = here < lengths[rows].unsqueeze(1)
        ids = tokens[(starts[rows].unsqueeze(1) + here).clamp_max(len(tokens) - 1)] * mask
        with torch.inference_mode():
            given = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            states = model(**given).last_hidden_state.float()
        summed = (states * given["attention_mask"].unsqueeze(-1)).sum(dim=1)
        vectors[rows] = F.normalize(summed, dim=-1).cpu()
    return vectors


def _cache(folder: Path, data: str, name: str) -> Path:
    return folder / "cache" / f"{data}_{name}.safetensors"


def _unzip(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(source) as stream, target.open("wb") as out:
        shutil.copyfileobj(stream, out)


def _keep_users(folder: Path, datasets: Sequence[str], count: int) -> None:
    """Cut every data set to its first users, for `--tiny`."""
    for data in datasets:
        path = folder / "dataset" / f"{data}.csv"
        header, *lines = path.read_text().splitlines()
        users = set(dict.fromkeys(line.split(",")[1] for line in lines).keys() - set())
        kept = set(sorted(users)[:count])
        lines = [line for line in lines if line.split(",")[1] in kept]
        path.write_text("\n".join([header, *lines]) + "\n")


def _in_8_bits(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Store matrices as int8 with a scale a row, the rest in float16."""
    packed: dict[str, Tensor] = {}
    for name, value in weights.items():
        if value.ndim < 2:
            packed[name] = value.half()
            continue
        scale = value.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / 127
        packed[name] = (value.float() / scale).round().to(torch.int8)
        packed[f"{name}#scale"] = scale
    return packed


def _from_8_bits(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.float() * packed[f"{name}#scale"]
        if value.dtype == torch.int8
        else value.float()
        for name, value in packed.items()
        if not name.endswith("#scale")
    }


# --- run


@dataclass
class Job:
    """A trial under way."""

    trial: Trial
    name: str
    settings: dict[str, Any]
    process: subprocess.Popen[bytes]
    log: Path
    began: float


class Runner:
    """Runs trials, several at a time.

    Args:
        folder: as `prepare` left it.
        out: folder of `trials.jsonl`.
        limit: seconds a trial may take.
        tiny: a few epochs on a CPU.
    """

    def __init__(self, folder: Path, out: Path, limit: float, tiny: bool) -> None:
        self.folder, self.out, self.limit, self.tiny = folder, out, limit, tiny
        self.outcomes = read_outcomes(out)

    def best(self, data: str, family: str) -> dict[str, Any] | None:
        """Return the best outcome of a family on a data set so far."""
        same = [
            outcome
            for outcome in self.outcomes
            if (outcome["data"], outcome["family"]) == (data, family)
            and outcome["valid"] is not None
        ]
        return max(same, key=lambda outcome: outcome["valid"], default=None)

    def start(self, trial: Trial, number: int) -> Job | None:
        """Start a trial's run, None where its settings were tried already."""
        before = None if trial.fresh else self.best(trial.data, trial.family)
        settings = dict(START[trial.family]) if before is None else dict(before["settings"])
        settings |= trial.changes
        if any(
            (done["data"], done["family"], done["settings"]) == (trial.data, trial.family, settings)
            for done in self.outcomes
            if done["valid"] is not None
        ):
            return None
        name = f"{trial.data}-{trial.family}-{number}"
        log = self.folder / "logs" / f"{name}.txt"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                self.command(trial.data, name, settings),
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        return Job(trial, name, settings, process, log, time.monotonic())

    def command(self, data: str, name: str, settings: dict[str, Any]) -> list[str]:
        """Return the command line of a run."""
        folder = self.folder
        given = dict(settings)
        files = [str(ROOT / "code" / f"{file}.yaml") for file in given.pop("config_file")]
        given |= {
            "dataset": data,
            "data_path": folder / "dataset",
            "text_path": folder / "information",
            # One folder a run: it is locked while a run is in it.
            "checkpoint_dir": folder / "runs" / name,
            "run_name": "run",
            "eval_phase": "valid",
            "show_progress": False,
            "checkpoint_minutes": 0.0,
            "num_threads": 1,
            "eval_batch_size": 1024,
        }
        if (cache := given.pop("cache", None)) is not None:
            given["item_cache_path"] = _cache(folder, data, cache)
        if "encoder" in given:
            given["encoder"] = folder / "encoder"
        if "user_llm_layers" in given:
            given["user_pretrain_dir"] = folder / "llm"
        if self.tiny:
            given |= {"epochs": 1, "eval_batch_size": 64}
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        return [sys.executable, str(ROOT / "code" / "main.py"), "--config_file", *files, *words]

    def finish(self, job: Job) -> None:
        """Book what a run that has ended, or was ended, has shown."""
        text = job.log.read_text(errors="replace")
        run = self.folder / "runs" / job.name / "run"
        outcome: dict[str, Any] = {
            "name": job.name,
            "data": job.trial.data,
            "family": job.trial.family,
            "changes": job.trial.changes,
            "settings": job.settings,
            "seconds": round(time.monotonic() - job.began, 1),
            "code": job.process.returncode,
            "valid": None,
        }
        result = run / "result.json"
        if result.is_file():
            content = json.loads(result.read_text())
            outcome["metrics"] = content["rows"][-1]["metrics"]
            outcome["valid"] = outcome["metrics"]["NDCG@10"]
            training = content["training"] or {}
            outcome["best_epoch"] = training.get("best_epoch")
            outcome["history"] = training.get("history")
        else:
            values = [float(value) for value in re.findall(r"NDCG@10[ =:]+([0-9.]+)", text)]
            # Only a run that keeps its best weights can be tested later.
            if values and (run / "best").is_dir():
                outcome["valid"] = max(values)
            outcome["end"] = text[-600:]
        self.outcomes.append(outcome)
        with (self.out / "trials.jsonl").open("a") as stream:
            stream.write(json.dumps(outcome) + "\n")
        shown = {
            k: v for k, v in outcome.items() if k in ("name", "valid", "best_epoch", "seconds")
        }
        say(json.dumps({**shown, "changes": job.trial.changes}))
        if outcome["valid"] is None:
            say(text[-800:])


def say(line: str) -> None:
    """Write a line that is read while the trials go on."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run_trials(runner: Runner, trials: Sequence[Trial], seconds: float, parallel: int) -> None:
    """Run trials in their order until the time is over; what runs then is ended."""
    end = time.monotonic() + seconds
    waiting, number = list(trials), len(runner.outcomes)
    running: list[Job] = []
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < parallel:
            job = runner.start(waiting.pop(0), number)
            number += 1
            if job is not None:
                running.append(job)
        time.sleep(0.2)
        for job in list(running):
            if job.process.poll() is None and time.monotonic() - job.began < runner.limit:
                continue
            stop(job)
            running.remove(job)
            runner.finish(job)
    for job in running:
        job.process.send_signal(signal.SIGTERM)
    for job in running:
        stop(job)
        runner.finish(job)


def stop(job: Job) -> None:
    """End a run if it is still going: in order, then for good."""
    if job.process.poll() is not None:
        return
    job.process.send_signal(signal.SIGTERM)
    try:
        job.process.wait(10)
    except subprocess.TimeoutExpired:
        job.process.kill()
        job.process.wait()


def read_outcomes(out: Path) -> list[dict[str, Any]]:
    """Read the outcomes of earlier calls, empty without any."""
    path = out / "trials.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- test


def test_chosen(runner: Runner, families: Sequence[str], ensembles: bool, parallel: int) -> None:
    """Read the test users for the best trial of each family, and for ensembles of two of them."""
    chosen = [
        best
        for data in DATASETS
        for family in families
        if (best := runner.best(data, family)) is not None
    ]
    members = {outcome["name"]: [outcome["name"]] for outcome in chosen}
    if ensembles:
        for data in DATASETS:
            on_ids = best_id_model(runner, data)
            for family in ("text", "ids"):
                other = runner.best(data, family)
                if on_ids is not None and other is not None:
                    members[f"{data}-ensemble-{family}"] = [on_ids["name"], other["name"]]
    waiting, running = list(members.items()), list[subprocess.Popen[bytes]]()
    while waiting or running:
        while waiting and len(running) < parallel:
            running.append(_score(runner, *waiting.pop(0)))
        time.sleep(0.2)
        running = [process for process in running if process.poll() is None]
    ranks: dict[str, np.ndarray] = {}
    with (runner.out / "test.jsonl").open("a") as stream:
        for name in members:
            path = runner.folder / "tested" / f"{name}.json"
            if not path.is_file():
                log = runner.folder / "logs" / f"test-{name}.txt"
                say(f"{name}: {log.read_text(errors='replace')[-800:]}")
                continue
            content = json.loads(path.read_text())
            ranks[name] = np.array(content.pop("ranks"), dtype=np.int32)
            stream.write(json.dumps({"name": name, **content}) + "\n")
            say(json.dumps({"name": name, **content}))
    np.savez_compressed(runner.out / "ranks.npz", **ranks)  # type: ignore[arg-type]


def best_id_model(runner: Runner, data: str) -> dict[str, Any] | None:
    """Return the best outcome on a data set of all models on item ids."""
    outcomes = [runner.best(data, family) for family in ID_FAMILIES]
    tried = [outcome for outcome in outcomes if outcome is not None]
    return max(tried, key=lambda outcome: outcome["valid"], default=None)


def _score(runner: Runner, name: str, runs: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the scoring of a run, or of several as an ensemble."""
    folders = [str(runner.folder / "runs" / run / "run") for run in runs]
    target = runner.folder / "tested" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__)), "score", "--runs", *folders]
    with (runner.folder / "logs" / f"test-{name}.txt").open("wb") as stream:
        return subprocess.Popen(
            [*command, "--out", str(target)], stdout=stream, stderr=subprocess.STDOUT
        )


def score(runs: Sequence[Path], out: Path) -> None:
    """Score a run's best weights on its test users, or an ensemble of two, weighed on validation."""
    from hsft.evaluator.metrics import per_user
    from hsft.finished.open_run import open_run
    from hsft.model.ensemble import Ensemble, Member, weight_grid
    from hsft.report.result import read_result
    from hsft.run.saved_model import MemberRun, refuse_unlike_members, run_config
    from hsft.run.setup import make_evaluator
    from hsft.run.train_and_rank import evaluate

    longest = max(run_config(run).MAX_ITEM_LIST_LENGTH for run in runs)
    opened = [open_run(run, {"eval_phase": "test"}) for run in runs]
    first = opened[0]
    config = first.config.model_copy(update={"MAX_ITEM_LIST_LENGTH": longest})
    scorers = [run.build(run.models[-1]) for run in opened]
    weight, scorer = None, scorers[0]

    if len(scorers) == 2:
        # Of other test items, one may have been trained on what the other is asked for.
        finished = [MemberRun(run.folder, run.config, read_result(run.folder)) for run in opened]
        refuse_unlike_members(finished, config, first.data.split)
        members = [
            Member(scorer, run.config.MAX_ITEM_LIST_LENGTH)
            for scorer, run in zip(scorers, opened, strict=True)
        ]
        scorer = both = Ensemble(members, [1.0, 1.0])
        valid = make_evaluator(config, first.data.split, "valid", first.fabric)
        grid = weight_grid(2)
        ranks = valid.ranks_by_weights(
            both, grid, first.fabric.device, autocast=first.fabric.autocast
        )
        both.weights = grid[np.argmax([per_user("NDCG", row, 10).mean() for row in ranks])].tolist()
        weight = both.weights[1]
    test = make_evaluator(config, first.data.split, "test", first.fabric)
    evaluation = evaluate(config, scorer, test, first.fabric)
    content = {
        "weight": weight,
        "metrics": evaluation.metrics,
        "users": len(evaluation.ranks),
        "ranks": evaluation.ranks.tolist(),
    }
    out.write_text(json.dumps(content))


# --- table

_TITLES = {
    "pop": "popularity",
    "item_knn": "item kNN, mean of the history, MiniLM",
    "tfidf": "TF-IDF of the texts, cosine to the history",
    "sasrec": "SASRec on ids",
    "text": "HSFT, frozen item cache",
    "hstu": "HSTU on ids",
    "ids": "HSFT, with a vector per item",
    "item_llm": "HSFT, ItemLLM trained",
    "item_llm_ids": "HSFT, ItemLLM trained, with a vector per item",
    "ensemble-text": "the best id model and HSFT, frozen item cache",
    "ensemble-ids": "the best id model and HSFT, with a vector per item",
}


def make_table(runner: Runner) -> str:
    """Write the test figures as Markdown tables, one for each data set.

    Intervals are over users (95 %), p-values of paired tests on NDCG@10 against the best id model.
    """
    from hsft.evaluator.intervals import interval, paired_p_value
    from hsft.evaluator.metrics import per_user

    tested = [json.loads(line) for line in (runner.out / "test.jsonl").read_text().splitlines()]
    ranks = {
        name: values.astype(np.int64) for name, values in np.load(runner.out / "ranks.npz").items()
    }
    lines: list[str] = []
    for data in DATASETS:
        names = {
            family: name
            for family in _TITLES
            for name in [
                row["name"]
                for row in tested
                if f"{data}-{family}" in (row["name"], row["name"].rpartition("-")[0])
            ]
            if name in ranks
        }
        if not names:
            continue
        users = len(next(iter(ranks[name] for name in names.values())))
        on_ids = best_id_model(runner, data)
        base = ranks.get(on_ids["name"]) if on_ids is not None else None
        lines += [f"{data}, {users:,} test users:", ""]
        lines += [
            "| model | trials | valid NDCG@10 | Recall@10 | NDCG@10 | to the best id model | p |"
        ]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for family, name in names.items():
            mine = ranks[name]
            done = [o for o in runner.outcomes if (o["data"], o["family"]) == (data, family)]
            best = runner.best(data, family)
            cells = [_TITLES[family], str(len(done) or ""), f"{best['valid']:.4f}" if best else ""]
            for metric in ("Recall", "NDCG"):
                low, high = interval(metric, mine, 10)
                cells.append(f"{per_user(metric, mine, 10).mean():.4f} [{low:.4f}, {high:.4f}]")
            if base is None or mine is base:
                cells += ["", ""]
            else:
                mean, other = (per_user("NDCG", values, 10).mean() for values in (mine, base))
                cells += [
                    f"{mean / other - 1:+.1%}",
                    f"{paired_p_value('NDCG', mine, base, 10):.4f}",
                ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


# --- lists

_LISTED = ("pop", "tfidf", "sasrec", "text", "ids")
_LIST_COLUMNS = {
    "Recall": ".4f",
    "Coverage": ".3f",
    "GiniIndex": ".3f",
    "AveragePopularity": ".1f",
    "PopularityLift": "+.2f",
    "TailPercentage": ".3f",
    "Novelty": ".2f",
    "IntraListSimilarity": ".3f",
}


def measure_lists(runner: Runner, families: Sequence[str] = _LISTED, k: int = 10) -> str:
    """Measure the lists of each family's best trial on validation users, as Markdown tables.

    Intra-list similarity is by the vectors of the text encoder for all of them, which no model reads
    alone. Values go to `lists.jsonl` too.
    """
    from hsft.finished.open_run import open_run
    from hsft.run.setup import item_statistics, make_evaluator
    from hsft.run.train_and_rank import evaluate

    lines: list[str] = []
    for data in DATASETS:
        # Vectors of the items, and counts of training interactions, are the same for all models.
        given = {"item_cache_path": _cache(runner.folder, data, "minilm"), "list_metrics": True}
        statistics = None
        for family in families:
            best = runner.best(data, family)
            run = runner.folder / "runs" / (best or {"name": ""})["name"] / "run"
            if best is None or not (run / "result.json").is_file():
                continue
            opened = open_run(run, {"eval_phase": "valid"})
            if statistics is None:
                config = opened.config.model_copy(update=given)
                statistics = item_statistics(config, replace(opened.data, cache=None))
            valid = make_evaluator(
                opened.config, opened.data.split, "valid", opened.fabric, statistics=statistics
            )
            scorer = opened.build(opened.models[-1])
            evaluation = evaluate(opened.config, scorer, valid, opened.fabric)
            content = {
                "name": best["name"],
                "users": len(evaluation.ranks),
                "items": opened.data.interactions.num_items,
                "seconds": evaluation.seconds,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
                "metrics": evaluation.metrics,
            }
            say(json.dumps(content))
            with (runner.out / "lists.jsonl").open("a") as stream:
                stream.write(json.dumps(content) + "\n")
            if not lines or not lines[-1].startswith("|"):
                lines += [
                    f"{data}, {content['users']:,} validation users, {content['items']:,} items:",
                    "",
                    f"| model | {' | '.join(f'{name}@{k}' for name in _LIST_COLUMNS)} |",
                    f"| --- |{' ---: |' * len(_LIST_COLUMNS)}",
                ]
            cells = [
                format(evaluation.metrics[f"{name}@{k}"], form)
                for name, form in _LIST_COLUMNS.items()
            ]
            lines.append(f"| {_TITLES[family]} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = argparse.ArgumentParser(prog="item_side.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pack", "prepare", "run", "test", "table", "lists"):
        command = commands.add_parser(name)
        command.add_argument("--folder", type=Path, required=True)
        command.add_argument("--tiny", type=lambda text: text == "True", default=False)
        command.add_argument("--out", type=Path)
        command.add_argument("--encoder", type=Path)
        command.add_argument("--llm", type=Path)
        command.add_argument("--layers", type=int, default=2)
        command.add_argument("--sources", nargs="+", default=[])
        command.add_argument("--seconds", type=float, default=240)
        command.add_argument("--limit", type=float, default=100, help="seconds of a trial")
        command.add_argument("--parallel", type=int, default=10)
        command.add_argument("--trials", type=Path, help="JSON list in place of TRIALS")
        tested = [family for family in START if family != "loss"]
        command.add_argument("--families", nargs="+", choices=list(START), default=tested)
        command.add_argument("--ensembles", type=lambda text: text == "True", default=True)
    command = commands.add_parser("score")
    command.add_argument("--runs", type=Path, nargs="+", required=True)
    command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.command == "score":
        score(args.runs, args.out)
        return EXIT_OK
    if args.command == "pack":
        pack(args.folder, args.encoder, args.llm, args.layers, args.sources)
        return EXIT_OK
    if args.command == "prepare":
        prepare(args.folder, args.tiny)
        return EXIT_OK
    args.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(args.folder, args.out, args.limit, args.tiny)
    if args.command == "run":
        trials = TRIALS
        if args.trials is not None:
            trials = [Trial(**entry) for entry in json.loads(args.trials.read_text())]
        run_trials(runner, trials, args.seconds, args.parallel)
    elif args.command == "test":
        test_chosen(runner, args.families, args.ensembles, args.parallel)
    elif args.command == "lists":
        say(measure_lists(runner))
    else:
        say(make_table(runner))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
