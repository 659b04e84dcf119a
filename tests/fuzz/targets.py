"""The readers that take files from strangers, one fuzz target each."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from hsft.config.help import dump_config
from hsft.config.loader import load_config, parse_command_line
from hsft.config.schema import Config
from hsft.data.cache import encode_ids, open_cache
from hsft.data.interactions import read_interactions
from hsft.data.item_text import read_item_texts
from hsft.model.backbone import load_model_config, model_kind, read_extra
from hsft.model.folder import check_decoder, check_files, check_shapes
from hsft.report.compare import load_comparison
from hsft.report.comparison_files import markdown
from hsft.report.result import RANKS_FILE, RESULT_FILE
from tests.fuzz.harness import Target
from tests.helpers import make_llama


def _interactions() -> Target:
    def read(folder: Path, data: bytes) -> None:
        path = folder / "interactions.csv"
        path.write_bytes(data)
        actual = read_interactions(path)
        assert actual.offsets[-1] == len(actual.items) == len(actual.timestamps)
        assert actual.items.min() >= 1
        assert actual.items.max() <= actual.num_items
        assert len(set(actual.user_ids)) == actual.num_users

    head = b"item_id,user_id,timestamp\n"
    seeds = [
        head + b"i1,u1,1\ni2,u1,2\ni1,u2,5\n",
        b"\xef\xbb\xbf" + head + b'"i,1","u""1",-3\r\n\r\n01,1,1600000000\r\n',
        b"timestamp,x,user_id,item_id\n1.0,a,u,i\n1600000000000,,u,j\n",
    ]
    return Target(
        "interactions", seeds, read, (b"item_id", b"user_id", b"timestamp", b"1.5", b"\n\n")
    )


def _information() -> Target:
    def read(folder: Path, data: bytes) -> None:
        path = folder / "information.csv"
        path.write_bytes(data)
        actual = read_item_texts(path, ["title", "tag"], "P ")
        assert len(actual.item_ids) == len(actual.texts) == len(set(actual.item_ids))

    seeds = [
        b"item_id,title,tag\ni1,A title,drama\ni2,,\n",
        b'tag,item_id,title,more\r\nx,i1,"two\nlines",\r\ny,i2,"a ""b""",c\r\n',
    ]
    return Target("information", seeds, read, (b"item_id", b"title", b"i1", b'""'))


def _yaml() -> Target:
    def read(folder: Path, data: bytes) -> None:
        path = folder / "config.yaml"
        path.write_bytes(data)
        config, _ = load_config([path])
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config([path])[0] == config

    seeds = [
        dump_config(Config()).encode(),
        b"epochs: 3\noptim_args: {learning_rate: 1e-4}\ntopk: [5, 10]\ndataset: '010'\n",
        b"loss: bce\nnum_negatives: null\ntext_keys:\n  - title\n  - tag\nstate: INFO\n",
    ]
    words = [name.encode() for name in Config.model_fields]
    return Target("yaml", seeds, read, words)


def _command_line() -> Target:
    def read(folder: Path, data: bytes) -> None:
        line = parse_command_line(data.decode("utf-8", "surrogateescape").split("\n"))
        config, _ = load_config([folder / path.name for path in line.config_files], line.overrides)
        dump_config(config).encode("utf-8")

    seeds = [
        b"--epochs\n3\n--optim_args.learning_rate\n1e-4\n--use_qlora\nTrue",
        b"--topk\n[5, 10]\n--text_keys\ntitle\ntag\n--dataset=010\n-h",
        b"--config_file\na.yaml\nb.yaml\n--sasrec.heads\n2\n--print_config\nTrue",
    ]
    words = [b"--" + name.encode() + b"\n" for name in Config.model_fields]
    return Target("command-line", seeds, read, words)


def _read_cache(folder: Path, data: bytes, name: str) -> None:
    path = folder / name
    path.write_bytes(data)
    cache = open_cache(path)
    assert cache.embeddings.shape[0] == len(cache.item_ids) == len(set(cache.item_ids))
    assert cache.embeddings.isfinite().all()


def _native_cache() -> Target:
    rows = torch.arange(12.0).reshape(3, 4)
    seeds = [
        save_tensors({"embeddings": rows.to(kind), "item_ids": encode_ids(["a", "b", "é"])})
        for kind in (torch.float16, torch.bfloat16, torch.float32)
    ]
    words = (b'"F16"', b'"F64"', b'"I8"', b"data_offsets", b"[0,0]", b"embeddings", b"item_ids")
    return Target(
        "native-cache",
        seeds,
        lambda folder, data: _read_cache(folder, data, "c.safetensors"),
        words,
    )


def _pt_cache(folder: Path) -> Target:
    seeds = []
    for number, content in enumerate(
        [{"a": torch.ones(2), "b": torch.zeros(2)}, {1: torch.ones(3).half()}]
    ):
        for zipped in (True, False):
            path = folder / f"seed-{number}-{zipped}.pt"
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            seeds.append(path.read_bytes())
    words = (b"ctorch\nload\n", b"cbuiltins\neval\n", b"R.", b"\x85R", b"torch._utils")
    return Target("pt-cache", seeds, lambda base, data: _read_cache(base, data, "c.pt"), words)


def _model_folder(folder: Path) -> list[Target]:
    model = make_llama(folder / "model", hidden=16, layers=1)
    config = (model / "config.json").read_bytes()
    weights = (model / "model.safetensors").read_bytes()
    placed = dict.fromkeys(load_tensors(weights), "model.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": placed}).encode()
    extra = save_tensors(
        {"logit_scale": torch.tensor(2.6), "item_emb_tokens": torch.ones(1, 1, 16)}
    )

    def read(name: str, data: bytes) -> None:
        target = model / name
        kept = target.read_bytes() if target.exists() else None
        target.write_bytes(data)
        try:
            actual = load_model_config(model)
            check_decoder(model_kind(actual), model)
            check_shapes(actual, check_files(model), model)
            read_extra(model)
        finally:
            if kept is None:
                target.unlink()
            else:
                target.write_bytes(kept)

    def target_of(name: str, seeds: list[bytes], words: tuple[bytes, ...], of: str) -> Target:
        return Target(name, seeds, lambda _, data: read(of, data), words)

    return [
        target_of(
            "model-config", [config], (b'"bert"', b'"auto_map"', b'"hidden_size"'), "config.json"
        ),
        target_of(
            "model-index",
            [index, b'{"weight_map": {}}'],
            (b"model.safetensors", b'"weight_map"'),
            "model.safetensors.index.json",
        ),
        target_of("model-weights", [weights], (b'"F16"', b"data_offsets"), "model.safetensors"),
        target_of("model-extra", [extra], (b'"F16"', b"logit_scale"), "hllm_extra.safetensors"),
    ]


def _runs(folder: Path) -> list[Target]:
    run = folder / "run"
    run.mkdir()
    import numpy as np

    ranks = save_arrays(
        {"pop.users": np.arange(4, dtype=np.int64), "pop.ranks": np.array([1, 3, 9, 2])}
    )
    result = json.dumps(
        {
            "dataset": "tiny",
            "phase": "test",
            "protocol": "full",
            "rows": [{"name": "pop"}],
            "config": {"metrics": ["NDCG"], "topk": [5]},
        }
    ).encode()
    (run / RANKS_FILE).write_bytes(ranks)
    (run / RESULT_FILE).write_bytes(result)

    def read(name: str, kept: bytes, data: bytes) -> None:
        (run / name).write_bytes(data)
        try:
            comparison = load_comparison([run])
            if all(k < 1000 for _, k in comparison.columns) and len(comparison.rows) < 3:
                markdown(comparison)
        finally:
            (run / name).write_bytes(kept)

    return [
        Target(
            "result",
            [result],
            lambda _, data: read(RESULT_FILE, result, data),
            (b'"rows"', b'"config"', b'"fine-tuned"', b'"environment"', b'"MRR"'),
        ),
        Target(
            "ranks",
            [ranks],
            lambda _, data: read(RANKS_FILE, ranks, data),
            (b'"I64"', b'"I32"', b"data_offsets", b"[0,0]"),
        ),
    ]


def targets(folder: Path) -> list[Target]:
    """Make every target; `folder` takes the files that its seeds need."""
    return [
        _interactions(),
        _information(),
        _yaml(),
        _command_line(),
        _native_cache(),
        _pt_cache(folder),
        *_model_folder(folder),
        *_runs(folder),
    ]
