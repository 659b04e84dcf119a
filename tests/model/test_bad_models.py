"""Item caches and model folders: damaged, foreign and hostile ones."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hsft.data.cache import encode_ids, open_cache, save_cache
from item_caching import main as cache_main
from tests.bad_input import CACHE, Canary, expect_refusal, to_device, to_folder, to_pipe
from tests.conftest import Project
from tests.helpers import make_llama

IDS = [f"i{n}" for n in range(20)]
KNN = ("--model", "item_knn")


def vectors(dim: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(20, dim, generator=torch.Generator().manual_seed(0)).to(dtype)


def with_value(value: float, row: int = 7) -> torch.Tensor:
    changed = vectors()
    changed[row, 3] = value
    return changed


def native(path: Path, embeddings: Any = None, ids: Any = None, **more: torch.Tensor) -> None:
    """Write a safetensors file whose parts may be wrong."""
    encoded = ids if isinstance(ids, torch.Tensor) else encode_ids(IDS if ids is None else ids)
    save_file(
        {
            "embeddings": vectors() if embeddings is None else embeddings,
            "item_ids": encoded,
            **more,
        },
        path,
    )


def bytes_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def edit(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return apply


def header_edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        change(header)
        encoded = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])

    return apply


def _overlap(header: dict[str, Any]) -> None:
    header["item_ids"]["data_offsets"] = header["embeddings"]["data_offsets"]


def _beyond(header: dict[str, Any]) -> None:
    header["embeddings"]["data_offsets"][1] += 1 << 40


def _huge_shape(header: dict[str, Any]) -> None:
    header["embeddings"]["shape"] = [1 << 40, 64]


def _no_such_dtype(header: dict[str, Any]) -> None:
    header["embeddings"]["dtype"] = "F7"


def pt(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content() if callable(content) else content, path)


def per_item(**changes: Any) -> dict[Any, Any]:
    return {**dict(zip(IDS, vectors(), strict=True)), **changes}


def raw_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"i0": Canary()}))


def compressed(path: Path) -> None:
    torch.save(per_item(), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


BAD_CACHES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "empty": (edit(lambda b: b""), ["damaged or no cache at all"]),
    "seven bytes": (edit(lambda b: b[:7]), ["damaged or no cache at all"]),
    "cut in the header": (edit(lambda b: b[:40]), ["is damaged", "item_caching.py"]),
    "cut in the numbers": (edit(lambda b: b[: len(b) // 2]), ["is damaged"]),
    "one byte short": (edit(lambda b: b[:-1]), ["is damaged"]),
    "one byte more": (edit(lambda b: b + b"x"), ["is damaged"]),
    "zeros": (edit(lambda b: bytes(len(b))), ["damaged or no cache at all"]),
    "header of 2**62 bytes": (edit(lambda b: struct.pack("<Q", 1 << 62) + b[8:]), ["damaged"]),
    "header longer than the file": (
        edit(lambda b: struct.pack("<Q", 1 << 24) + b[8:]),
        ["damaged"],
    ),
    "header of no bytes": (edit(lambda b: bytes(8) + b[8:]), ["damaged"]),
    "header not JSON": (edit(lambda b: b[:9] + b"\xff" + b[10:]), ["damaged"]),
    "deep header": (
        edit(lambda b: struct.pack("<Q", 200_000) + b'{"a":' * 40_000),
        ["damaged"],
    ),
    "overlapping parts": (header_edit(_overlap), ["damaged"]),
    "parts beyond the end": (header_edit(_beyond), ["damaged"]),
    "shape beyond the end": (header_edit(_huge_shape), ["damaged"]),
    "no such number type": (header_edit(_no_such_dtype), ["damaged"]),
    "other tensors": (lambda p: save_file({"weight": vectors()}, p), ["no item cache", "weight"]),
    "ids missing": (lambda p: save_file({"embeddings": vectors()}, p), ["no item cache"]),
    "no tensors": (lambda p: save_file({}, p), ["no item cache", "nothing"]),
    "integers": (lambda p: native(p, vectors().to(torch.int64)), ["torch.int64"]),
    "double": (lambda p: native(p, vectors().double()), ["torch.float64"]),
    "8-bit floats": (lambda p: native(p, vectors().to(torch.float8_e4m3fn)), ["float8"]),
    "vector": (lambda p: native(p, vectors().reshape(-1)), ["shape (1280,)"]),
    "three dimensions": (lambda p: native(p, vectors().reshape(20, 8, 8)), ["shape (20, 8, 8)"]),
    "no columns": (lambda p: native(p, vectors()[:, :0]), ["shape (20, 0)"]),
    "no rows": (lambda p: native(p, vectors()[:0], []), ["no items"]),
    "fewer rows than ids": (lambda p: native(p, vectors()[:19]), ["20 ids", "shape (19, 64)"]),
    "NaN": (lambda p: native(p, with_value(float("nan"))), ["'i7'", "NaN or infinity"]),
    "infinity": (lambda p: native(p, with_value(float("inf"))), ["'i7'", "NaN or infinity"]),
    "minus infinity": (lambda p: native(p, with_value(-float("inf"), 19)), ["'i19'"]),
    "half overflow": (lambda p: native(p, with_value(1e9).half()), ["'i7'", "float32"]),
    "other dimension": (lambda p: native(p, vectors(48)), ["48 dimensions", "hidden size 64"]),
    "foreign ids": (lambda p: native(p, ids=[f"x{n}" for n in range(20)]), ["20 of 20 items", "i"]),
    "01 for 1": (lambda p: native(p, ids=[f"i0{n}" for n in range(20)]), ["20 of 20 items"]),
    "one item missing": (lambda p: native(p, ids=[*IDS[:19], "z"]), ["1 of 20 items", "i19"]),
    "id twice": (lambda p: native(p, ids=[*IDS[:19], "i3"]), ["'i3' twice"]),
    "ids not JSON": (lambda p: native(p, ids=bytes_tensor(b"[i1")), ["unreadable id list"]),
    "ids not UTF-8": (lambda p: native(p, ids=bytes_tensor(b'["\xff"]')), ["unreadable id list"]),
    "ids half a character": (
        lambda p: native(p, ids=bytes_tensor(json.dumps([*IDS[:19], "\ud800"]).encode())),
        ["unreadable id list"],
    ),
    "ids a mapping": (lambda p: native(p, ids=bytes_tensor(b"{}")), ["not a list of texts"]),
    "ids numbers": (lambda p: native(p, ids=bytes_tensor(b"[1, 2]")), ["not a list of texts"]),
    "ids nested": (lambda p: native(p, ids=bytes_tensor(b"[" * 100_000)), ["unreadable id list"]),
    "ids as floats": (lambda p: native(p, ids=vectors().bfloat16()), ["unreadable id list"]),
    "pipe": (to_pipe, ["a pipe or device"]),
    "folder": (to_folder, ["a folder, not a file"]),
    "device": (to_device, ["a pipe or device"]),
    "hostile pickle": (pt({"i0": Canary()}), ["holds more than tensors", "can run code"]),
    "hostile raw pickle": (raw_pickle, ["item cache"]),
    "cut .pt": (lambda p: (pt(per_item())(p), edit(lambda b: b[: len(b) // 2])(p)), ["damaged"]),
    "compressed .pt": (compressed, ["compressed archive"]),
    "zip of something": (lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"), ["no cache at all"]),
    "TorchScript": (script, ["item cache"]),
    "tensor": (pt(vectors()), ["dictionary of item id -> tensor", "Tensor"]),
    "list": (pt([vectors()]), ["dictionary", "list"]),
    "nothing": (pt(None), ["dictionary", "nothing"]),
    "empty dictionary": (pt({}), ["dictionary", "nothing"]),
    "model weights": (
        pt(lambda: torch.nn.Linear(3, 2).state_dict()),
        ["'bias' has 2 dimensions, others have 6"],
    ),
    "numbers": (pt({"i0": 1.5}), ["'i0' is not a tensor of numbers"]),
    "texts": (pt({"i0": "vector"}), ["'i0' is not a tensor of numbers"]),
    "lists": (pt({"i0": [1.0, 2.0]}), ["'i0' is not a tensor of numbers"]),
    "integers in .pt": (pt({"i0": torch.ones(64, dtype=torch.int64)}), ["'i0' is not a tensor"]),
    "mixed lengths": (pt(per_item(i3=torch.ones(32))), ["'i3' has 32 dimensions, others have 64"]),
    "mixed types": (pt(per_item(i3=torch.ones(64).half())), ["'i3' is torch.float16", "float32"]),
    "sparse": (pt({"i0": torch.ones(64).to_sparse()}), ["'i0'", "dense"]),
    "on no device": (pt({"i0": torch.ones(64, device="meta")}), ["'i0'"]),
    "one number repeated": (pt({"i0": torch.ones(1).expand(1 << 40)}), ["claims more numbers"]),
    "one vector repeated": (
        pt(dict.fromkeys(map(str, range(9999)), torch.ones(9999))),
        ["claims more numbers"],
    ),
    "empty vectors": (pt({"i0": torch.ones(0)}), ["shape (1, 0)"]),
    "odd keys": (pt({(1, 2): torch.ones(64)}), ["key (1, 2) is no item id"]),
    "true as a key": (pt({True: torch.ones(64)}), ["key True is no item id"]),
    "1 and '1'": (pt({1: torch.ones(64), "1": torch.ones(64)}), ["'1' twice"]),
    "NaN in .pt": (pt(per_item(i3=torch.full((64,), torch.nan))), ["'i3'", "NaN or infinity"]),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_bad_caches_are_one_line(project: Project, case: str) -> None:
    spoil, words = BAD_CACHES[case]
    spoil(project.root / CACHE)
    user = () if case == "other dimension" else KNN
    expect_refusal(project, lambda: project.run("--val_only", "True", *user), words)


GOOD_CACHES: dict[str, tuple[Callable[[Path], Any], torch.Tensor]] = {
    "half": (lambda p: native(p, vectors(dtype=torch.float16)), vectors(dtype=torch.float16)),
    "bfloat16": (lambda p: native(p, vectors(dtype=torch.bfloat16)), vectors(dtype=torch.bfloat16)),
    "more tensors": (lambda p: native(p, extra=torch.ones(3)), vectors()),
    "a row of zeros": (lambda p: native(p, vectors() * 0), vectors() * 0),
    ".pt": (pt(per_item()), vectors()),
    ".pt in order": (pt(OrderedDict(per_item())), vectors()),
    ".pt of rows": (pt({k: v[None, None] for k, v in per_item().items()}), vectors()),
    ".pt of doubles": (pt({k: v.double() for k, v in per_item().items()}), vectors()),
    ".pt of parameters": (
        pt({k: torch.nn.Parameter(v) for k, v in per_item().items()}),
        vectors(),
    ),
    ".pt of the old format": (
        lambda p: torch.save(per_item(), p, _use_new_zipfile_serialization=False),
        vectors(),
    ),
}


@pytest.mark.parametrize("case", GOOD_CACHES)
def test_good_caches_are_read(project: Project, case: str) -> None:
    write, expected = GOOD_CACHES[case]
    write(project.root / CACHE)
    cache = open_cache(project.root / CACHE)
    assert cache.item_ids == IDS
    assert torch.equal(cache.embeddings, expected)
    assert project.run(*KNN)[0] == 0


def test_whole_numbers_as_keys_of_a_pt_cache_are_ids(tmp_path: Path) -> None:
    torch.save({7: torch.ones(4), 8: torch.zeros(4)}, tmp_path / "c.pt")
    assert open_cache(tmp_path / "c.pt").item_ids == ["7", "8"]


# --- model folders


def copy_of(llama: Path, target: Path) -> Path:
    shutil.copytree(llama, target)
    return target


def set_config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return apply


def write(name: str, content: str | bytes) -> Callable[[Path], Any]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def index(shards: Any) -> Callable[[Path], Any]:
    return write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": shards}))


def sharded(placed: str) -> Callable[[Path], None]:
    """Replace the single file by an index that places every weight in `placed`."""

    def apply(folder: Path) -> None:
        names = list(load_file(folder / "model.safetensors"))
        target = folder / "shards" / "whole.safetensors"
        target.parent.mkdir()
        (folder / "model.safetensors").rename(target)
        index(dict.fromkeys(names, placed))(folder)

    return apply


def hostile_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Canary()}, folder / "pytorch_model.bin")


def bin_index(shard: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model-00001-of-00001.bin")
        write(
            "pytorch_model.bin.index.json",
            json.dumps({"weight_map": {"model.norm.weight": shard}}),
        )(folder)

    return apply


def without(*names: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = load_file(path)
        save_file({k: v for k, v in content.items() if k not in names}, path, {"format": "pt"})

    return apply


def link_to_no_weights(folder: Path) -> None:
    sharded("s.safetensors")(folder)
    (folder / "s.safetensors").symlink_to("/etc/passwd")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def foreign_code(folder: Path) -> None:
    write("odd.py", "open('canary', 'w')\n")(folder)
    set_config(
        model_type="odd",
        auto_map={"AutoConfig": "odd.OddConfig", "AutoModel": "odd.OddModel"},
    )(folder)


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "config missing": (lambda f: (f / "config.json").unlink(), ["has no config.json"]),
    "config a pipe": (
        lambda f: to_pipe(f / "config.json"),
        ["has no config.json"],
    ),
    "config empty": (write("config.json", ""), ["config.json is not"]),
    "config damaged": (write("config.json", '{"model_type": "llama"'), ["config.json is not"]),
    "config a list": (write("config.json", "[]"), ["config.json is not"]),
    "config not UTF-8": (write("config.json", b"\xff\xfe"), ["config.json is not"]),
    "config deep": (write("config.json", '{"a":' * 100_000), ["config.json is not"]),
    "no model type": (set_config(model_type=None), ["config.json is not"]),
    "unknown model type": (set_config(model_type="odd"), ["config.json is not"]),
    "hidden size a text": (set_config(hidden_size="64"), ["config.json"]),
    "hidden size negative": (set_config(hidden_size=-64), ["config.json"]),
    "code in the folder": (foreign_code, ["config.json", "trust_remote_code"]),
    "encoder": (set_config(model_type="bert"), ["type bert, an encoder"]),
    "another encoder": (set_config(model_type="roberta"), ["encoder"]),
    "encoder and decoder": (set_config(model_type="t5"), ["encoder"]),
    "pictures": (set_config(model_type="vit"), ["type vit", "inputs_embeds"]),
    "looks ahead": (
        set_config(model_type="gemma3_text", use_bidirectional_attention=True),
        ["positions see later ones"],
    ),
    "more layers than weights": (
        set_config(num_hidden_layers=3),
        ["weights of 2 layers", "says 3"],
    ),
    "a billion layers": (set_config(num_hidden_layers=10**9), ["weights of 2 layers"]),
    "feed-forward of others": (set_config(intermediate_size=256), ["does not have the shape"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["holds no weights"]),
    "weights empty": (write("model.safetensors", b""), ["model.safetensors is damaged"]),
    "weights cut": (
        lambda f: edit(lambda b: b[:-100])(f / "model.safetensors"),
        ["model.safetensors is damaged"],
    ),
    "weights garbage": (
        write("model.safetensors", b"\xff" * 999),
        ["model.safetensors is damaged"],
    ),
    "weights a pipe": (
        lambda f: to_pipe(f / "model.safetensors"),
        ["model.safetensors, a pipe or device"],
    ),
    "weights of something": (
        lambda f: save_file({"a": torch.ones(3)}, f / "model.safetensors", {"format": "pt"}),
        ["lacks the weight"],
    ),
    "a weight missing": (without("model.norm.weight"), ["lacks the weight norm.weight"]),
    "layer missing": (
        without(*[f"model.layers.1.{n}_layernorm.weight" for n in ("input", "post_attention")]),
        ["lacks the weight"],
    ),
    "index damaged": (write("model.safetensors.index.json", "{"), ["index.json is not a readable"]),
    "index a list": (write("model.safetensors.index.json", "[]"), ["has no weight_map"]),
    "index without a map": (index([]), ["has no weight_map"]),
    "shard missing": (index({"a": "model-2.safetensors"}), ["lacks the shard model-2.safetensors"]),
    "shard above": (sharded("../evil.safetensors"), ["points outside its folder"]),
    "shard absolute": (sharded("/etc/passwd"), ["points outside its folder", "/etc/passwd"]),
    "shard below": (sharded("shards/whole.safetensors"), ["points outside its folder"]),
    "shard with a backslash": (sharded("..\\evil.safetensors"), ["points outside its folder"]),
    "shard's name nothing": (sharded(""), ["lacks the shard"]),
    "shard a link to no weights": (
        link_to_no_weights,
        ["s.safetensors is damaged"],
    ),
    "weight not in its shard": (
        lambda f: (
            (f / "model.safetensors").rename(f / "s.safetensors"),
            index({"model.odd": "s.safetensors"})(f),
        ),
        ["places the weight model.odd"],
    ),
    "bin shard above": (bin_index("../evil.bin"), ["points outside its folder"]),
    "bin shard missing": (bin_index("evil.bin"), ["lacks the shard evil.bin"]),
    "hostile pickle": (hostile_bin, ["pickle with more than tensors", "can run code"]),
    "adapter": (
        write("adapter_config.json", '{"base_model_name_or_path": "somebody/evil"}'),
        ["holds an adapter"],
    ),
    "extra damaged": (write("hllm_extra.safetensors", b"\xff" * 99), ["hllm_extra", "damaged"]),
    "extra NaN": (
        lambda f: save_file({"logit_scale": torch.tensor(torch.nan)}, f / "hllm_extra.safetensors"),
        ["logit_scale holds NaN"],
    ),
    "extra of two scales": (
        lambda f: save_file({"logit_scale": torch.ones(2)}, f / "hllm_extra.safetensors"),
        ["logit_scale has 2 numbers"],
    ),
}


def expect_refusal_in_any_case(
    project: Project,
    run: Callable[[], tuple[int, str, str]],
    words: list[str],
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Expect the same line with what is kept of the folder before it was spoilt, and without."""
    line = expect_refusal(project, run, words)
    monkeypatch.setenv(
        "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(records)
    )
    assert expect_refusal(project, run, words) == line


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model_folders_are_one_line(
    project: Project,
    case: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil, words = BAD_MODELS[case]
    folder = copy_of(project.llama, project.root / "model")
    more = ("--val_only", "True", "--user_pretrain_dir", "model", "--check", "True")
    assert project.run(*more)[0] == 0
    spoil(folder)
    records = tmp_path_factory.mktemp("records")
    expect_refusal_in_any_case(
        project, lambda: project.run(*more[:-2]), words, records, monkeypatch
    )


BAD_ITEM_MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "hidden size of others": (set_config(hidden_size=128, head_dim=16), ["hidden size"]),
    "no tokenizer": (
        without_tokenizer,
        ["no usable tokenizer"],
    ),
    "tokenizer damaged": (write("tokenizer.json", "{"), ["no usable tokenizer"]),
    "tokenizer of something": (write("tokenizer.json", "{}"), ["no usable tokenizer"]),
    "tokenizer config damaged": (write("tokenizer_config.json", "["), ["no usable tokenizer"]),
    "emb token of others": (
        lambda f: save_file(
            {"item_emb_tokens": torch.ones(1, 1, 32)}, f / "hllm_extra.safetensors"
        ),
        ["item_emb_tokens has 32 dimensions, the model 64"],
    ),
    "emb token infinite": (
        lambda f: save_file(
            {"item_emb_tokens": torch.full((1, 1, 64), torch.inf)}, f / "hllm_extra.safetensors"
        ),
        ["item_emb_tokens holds NaN"],
    ),
    "no token embedding": (without("model.embed_tokens.weight"), ["lacks the weight embed_tokens"]),
    "encoder": (set_config(model_type="bert"), ["type bert, an encoder"]),
}


@pytest.mark.parametrize("case", BAD_ITEM_MODELS)
def test_bad_item_models_are_one_line(
    project: Project,
    case: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil, words = BAD_ITEM_MODELS[case]
    folder = copy_of(project.llama, project.root / "model")
    more = ["--item_pretrain_dir", "model", "--item_cache_path", "new.safetensors"]
    argv = [*project.arguments, *more]
    assert project.call(cache_main, [*argv, "--check"])[0] == 0
    spoil(folder)
    records = tmp_path_factory.mktemp("records")
    expect_refusal_in_any_case(
        project, lambda: project.call(cache_main, argv), words, records, monkeypatch
    )


def test_a_known_model_with_code_beside_it_does_not_run_the_code(project: Project) -> None:
    folder = copy_of(project.llama, project.root / "model")
    write("odd.py", "open('canary', 'w')\n")(folder)
    set_config(auto_map={"AutoModel": "odd.OddModel", "AutoConfig": "odd.OddConfig"})(folder)
    code, _, err = project.run("--val_only", "True", "--user_pretrain_dir", "model")
    assert code == 0, err
    assert not (project.root / "canary").exists()


def test_links_to_a_store_elsewhere_are_followed(project: Project) -> None:
    # The hub's own cache is made of such links.
    folder = project.root / "model"
    folder.mkdir()
    for path in project.llama.iterdir():
        (folder / path.name).symlink_to(path)
    assert project.run("--val_only", "True", "--user_pretrain_dir", "model")[0] == 0


def test_shards_named_by_an_index_are_read(project: Project) -> None:
    folder = make_llama(project.root / "model")
    (folder / "model.safetensors").rename(folder / "s.safetensors")
    index(dict.fromkeys(load_file(folder / "s.safetensors"), "s.safetensors"))(folder)
    code, _, err = project.run("--val_only", "True", "--user_pretrain_dir", "model")
    assert code == 0, err


def test_saved_caches_come_back(tmp_path: Path) -> None:
    save_cache(tmp_path / "c.safetensors", ["", "é", "\n"], torch.ones(3, 2), {"model": "x"})
    cache = open_cache(tmp_path / "c.safetensors")
    assert cache.item_ids == ["", "é", "\n"]
    assert cache.metadata["model"] == "x"
