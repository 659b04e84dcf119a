"""Import one side of an HLLM checkpoint as a transformers model folder.

An HLLM checkpoint is one torch state dict that holds both LLMs: `item_llm.model.*`,
`user_llm.model.*`, their unused `lm_head.weight`, and `item_emb_tokens` [1, 1, D] and
`logit_scale` []. It has neither configuration nor tokenizer; those come from the base model that
HLLM was trained from.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import logging
import math
import os
import pickle
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from REC.model import hub
from REC.model.backbone import EXTRA_FILE, load_model_config
from REC.utils.environment import versions
from REC.utils.errors import EXIT_OK, EXIT_SIGTERM, InputError, Interrupted
from REC.utils.files import atomic_path, free_bytes, read_json, sha256
from REC.utils.logs import set_up_logging
from REC.utils.progress import Meter, meter

log = logging.getLogger(__name__)

Side = Literal["item", "user"]
Shape = tuple[int, ...]

MANIFEST_FILE = "import.json"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
EMBEDDING = "embed_tokens.weight"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DEFAULT_REPO = "ByteDance/HLLM"
DEFAULT_FILE = "1B_Pixel8M/pytorch_model.bin"
DEFAULT_BASE_REPO = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"

# Room for configuration, tokenizer, index and manifest beside the weights.
_SMALL_FILES_BYTES = 32 << 20
_EXTRAS = ("item_emb_tokens", "logit_scale")
# Computed from the configuration; old transformers versions saved it with the weights.
_DERIVED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class ImportJob:
    """What to import and where to.

    Attributes:
        side: `item` keeps token embedding and tokenizer, `user` drops both.
        out: the model folder to make.
        from_file: a checkpoint on this machine; None fetches `file` of `repo`.
        repo, file: where the hub has the checkpoint.
        base_repo: where the hub has the base model's configuration and tokenizer.
        base_dir: a folder with them instead.
        dtype: number type of the weights written.
        shard_bytes: largest weights file; a larger tensor is a file of its own.
        force: replace an import that is there.
        keep_download: do not remind of the space that the download takes.
    """

    side: Side
    out: Path
    from_file: Path | None = None
    repo: str = DEFAULT_REPO
    file: str = DEFAULT_FILE
    base_repo: str = DEFAULT_BASE_REPO
    base_dir: Path | None = None
    dtype: str = "bfloat16"
    shard_bytes: int = 1024 << 20
    force: bool = False
    keep_download: bool = False

    @property
    def source(self) -> dict[str, str]:
        """Where the checkpoint comes from, as the manifest names it."""
        if self.from_file is not None:
            return {"path": str(self.from_file)}
        return {"repo": self.repo, "file": self.file}


@dataclass(frozen=True)
class Layout:
    """What the base model's configuration says about the weights.

    Attributes:
        config: the configuration to write.
        shapes: name -> shape of every weight to write, in the model's order.
        dim: D, the hidden size.
    """

    config: Any
    shapes: dict[str, Shape]
    dim: int


def run_import(side: Side, argv: Sequence[str], out: str, summary: str) -> int:
    """Run a download program.

    Args:
        side: which LLM of the checkpoint.
        argv: the command line.
        out: default of `--out`.
        summary: one sentence for `--help`.

    Returns:
        The exit code.

    Raises:
        InputError: see `import_checkpoint`.
        Interrupted: SIGTERM came; nothing half-written is left.
    """
    job = _parse(side, argv, out, summary)
    set_up_logging()
    with _sigterm_unwinds():
        import_checkpoint(job)
    return EXIT_OK


def import_checkpoint(job: ImportJob) -> bool:
    """Import one side of a checkpoint; a finished import that is whole is left alone.

    The folder appears whole at the end or not at all. Peak memory is about one shard and the part
    of the checkpoint that it is made from.

    Returns:
        True if the folder was written, False if it was left alone.

    Raises:
        InputError: the checkpoint or base model is missing, damaged or does not fit, the disk is
            too small, or `out` holds something that must not be replaced.
    """
    if _is_done(job):
        return False
    base = _base_files(job)
    layout = read_layout(base[CONFIG_FILE].parent, job.side)
    remote = None if job.from_file is not None else hub.look_up(job.repo, job.file)
    _check_disk(job, layout, remote)
    checkpoint, source = _checkpoint(job, remote)
    with atomic_path(job.out) as folder:
        folder.mkdir()
        _write_small_files(folder, base, layout, job)
        _write_tensors(folder, checkpoint, layout, job)
        _write_manifest(folder, job, source)
    log.info("wrote %s: the %sLLM in %s.", job.out, job.side.capitalize(), job.dtype)
    if remote is not None and not job.keep_download:
        log.info(
            "the download (%s) stays in %s, where the other side's import finds it; "
            "`hf cache rm` removes it.",
            _size(checkpoint.stat().st_size),
            hub.cache_folder(),
        )
    return True


def read_layout(base: Path, side: Side) -> Layout:
    """Derive names and shapes of the weights from the base model's configuration.

    Args:
        base: a folder with the base model's config.json.
        side: `user` is given a token embedding of one row, which nothing reads.

    Raises:
        InputError: the configuration is unreadable or not a Llama's.
    """
    config = copy.deepcopy(load_model_config(base))
    if config.model_type != "llama":
        raise InputError(
            f"{base / CONFIG_FILE} describes a '{config.model_type}' model, but HLLM checkpoints "
            f"are imported as Llama; name HLLM's base model."
        )
    if side == "user":
        config.vocab_size = 1
        config.pad_token_id = None
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers and torch refuse odd values in many ways
        raise InputError(
            f"{base / CONFIG_FILE} does not describe a model that can be built: "
            f"{hub.one_line(error)}."
        ) from error
    config.architectures = [type(model).__name__]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return Layout(config, shapes, int(config.hidden_size))


def open_state(path: Path) -> dict[str, Tensor]:
    """Map a checkpoint into memory without reading its tensors.

    Returns:
        Name -> tensor, freed of an enclosing "state_dict" or "module" and of a "module." prefix.

    Raises:
        InputError: the file is no torch checkpoint of tensors alone, or is cut short.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises weights_only=False, which would run what the file holds.
        raise InputError(
            f"{path} holds something other than tensors, or is damaged; it is not loaded, because "
            f"that could run code from the file. Fetch it again from a source that you trust."
        ) from error
    except Exception as error:  # zip, pickle and torch raise many kinds for damaged files
        raise InputError(
            f"{path} is not a readable torch checkpoint (cut short?): {hub.one_line(error)}; "
            f"fetch it again."
        ) from error
    for name in ("state_dict", "module", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InputError(f"{path} is no state dict (names with tensors); name an HLLM checkpoint.")
    return {key.removeprefix("module."): value for key, value in state.items()}


def select_side(state: Mapping[str, Tensor], side: Side, path: Path) -> dict[str, Tensor]:
    """Return one side's weights under the names of transformers' LlamaModel, and the extras.

    Raises:
        InputError: there is no such side, or a key that HLLM checkpoints do not have.
    """
    own, other = (f"{name}_llm." for name in (side, "user" if side == "item" else "item"))
    if not any(key.startswith(own) for key in state):
        example = f" (it has '{min(state)}')" if state else ""
        raise InputError(f"{path} has no weights {own}*{example}; name an HLLM checkpoint.")
    chosen: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(other) or key.endswith(_DERIVED) or key == f"{own}lm_head.weight":
            continue
        if side == "user" and key == f"{own}model.{EMBEDDING}":
            continue
        if key not in _EXTRAS and not key.startswith(f"{own}model."):
            raise InputError(f"{path}: unexpected key '{key}'; name an HLLM checkpoint.")
        chosen[key.removeprefix(f"{own}model.")] = value
    return chosen


def check_tensors(
    chosen: Mapping[str, Tensor], shapes: Mapping[str, Shape], side: Side, path: Path
) -> None:
    """Compare names, shapes and kinds of tensors with what the configuration implies.

    Args:
        chosen: what `select_side` returned.
        shapes: name -> shape of everything that must be there, and nothing else may.
        side: for the names in messages.
        path: the checkpoint, for messages.

    Raises:
        InputError: a key is missing or unexpected, or a tensor has another shape or no floats.
    """

    def original(name: str) -> str:
        return name if name in _EXTRAS else f"{side}_llm.model.{name}"

    missing = [name for name in shapes if name not in chosen]
    if missing:
        raise InputError(
            f"{path}: missing key '{original(missing[0])}' ({len(missing)} in all), which the base "
            f"model's config.json implies; check the checkpoint and the base model."
        )
    unexpected = [name for name in chosen if name not in shapes]
    if unexpected:
        raise InputError(
            f"{path}: unexpected key '{original(unexpected[0])}' ({len(unexpected)} in all), which "
            f"the base model's config.json does not imply; check the base model."
        )
    for name, value in chosen.items():
        if not isinstance(value, Tensor) or not _is_plain(value):
            raise InputError(f"{path}: '{original(name)}' is no dense tensor of floats.")
        if tuple(value.shape) != shapes[name]:
            raise InputError(
                f"{path}: '{original(name)}' has shape {list(value.shape)}, the base model's "
                f"config.json implies {list(shapes[name])}; check the base model."
            )


def plan_shards(
    shapes: Mapping[str, Shape], dtype: torch.dtype, shard_bytes: int
) -> list[list[str]]:
    """Split weights, in order, into files of at most `shard_bytes` bytes or one tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def find_damage(folder: Path, manifest: Any) -> str | None:
    """Compare a finished import with its manifest.

    Returns:
        What is wrong, None if every file is as it was written.
    """
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        return f"{MANIFEST_FILE} names no files"
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or not isinstance(entry, dict):
            return f"{MANIFEST_FILE} is not as it was written"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("bytes") or sha256(path) != entry.get("sha256"):
            return f"{name} has changed"
    return None


def _parse(side: Side, argv: Sequence[str], out: str, summary: str) -> ImportJob:
    parser = argparse.ArgumentParser(
        prog=f"download_{side}llm.py", description=summary, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", default=out, metavar="FOLDER", help="model folder to make (default %(default)s)")
    add("--from_file", metavar="FILE.bin", help="a checkpoint on this machine; nothing is fetched")
    add("--repo", default=DEFAULT_REPO, help="hub repository (default %(default)s)")
    add("--file", default=DEFAULT_FILE, help="checkpoint in it (default %(default)s)")
    add(
        "--base_repo",
        default=DEFAULT_BASE_REPO,
        help="hub repository of the base model's config and tokenizer (default %(default)s)",
    )
    add("--base_dir", metavar="FOLDER", help="folder with config and tokenizer, not the hub's")
    add("--dtype", choices=DTYPES, default="bfloat16", help="number type (default %(default)s)")
    add("--shard_mb", type=_positive, default=1024, help="largest weights file (default 1024 MB)")
    add("--force", action="store_true", help="replace an import that is there")
    add(
        "--keep_download",
        action="store_true",
        help="no reminder that the download stays in the Hugging Face cache; it always stays",
    )
    args = parser.parse_args(list(argv))
    return ImportJob(
        side=side,
        # A linked folder is replaced where it really is, so that the link stays.
        out=Path(args.out).resolve(),
        from_file=Path(args.from_file).resolve() if args.from_file else None,
        repo=args.repo,
        file=args.file,
        base_repo=args.base_repo,
        base_dir=Path(args.base_dir) if args.base_dir else None,
        dtype=args.dtype,
        shard_bytes=args.shard_mb << 20,
        force=args.force,
        keep_download=args.keep_download,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM leave through the `finally` blocks, so that no temporary folder stays."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Interrupted("nothing was written; run again.", EXIT_SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_done(job: ImportJob) -> bool:
    """Look at what `out` holds: False if it may be written, True if it is to be left alone."""
    out = job.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST_FILE).is_file():
        raise InputError(
            f"{out} exists and is no import of an HLLM checkpoint (it has no {MANIFEST_FILE}); "
            f"move it away or give another --out."
        )
    if job.force:
        _refuse_foreign_files(out)
        log.info("%s is replaced (--force).", out)
        return False
    log.info("%s holds an import; comparing it with its %s.", out, MANIFEST_FILE)
    try:
        manifest = read_json(out / MANIFEST_FILE)
        damage = find_damage(out, manifest)
    except InputError as error:
        damage = str(error).rstrip(".")
    if damage is not None:
        raise InputError(
            f"{out} holds a finished import that is damaged: {damage}; import it again with "
            f"--force."
        )
    _refuse_other_request(job, manifest)
    log.info(
        "%s holds this import, finished and whole (%d files): left alone. --force imports again.",
        out,
        len(manifest["files"]),
    )
    return True


def _refuse_foreign_files(out: Path) -> None:
    """Keep --force from deleting what the import did not write."""
    try:
        manifest = read_json(out / MANIFEST_FILE)
    except InputError:
        return
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        return
    foreign = sorted({path.name for path in out.iterdir()} - {*files, MANIFEST_FILE})
    if foreign:
        raise InputError(
            f"{out} also holds {foreign[0]}, which the import did not write and --force would "
            f"delete; move it away first."
        )


def _refuse_other_request(job: ImportJob, manifest: dict[str, Any]) -> None:
    source = manifest.get("source")
    there = {
        "side": manifest.get("side"),
        "dtype": manifest.get("dtype"),
        "source": {
            name: value
            for name, value in (source if isinstance(source, dict) else {}).items()
            if name in ("path", "repo", "file")
        },
    }
    asked = {"side": job.side, "dtype": job.dtype, "source": job.source}
    for name, value in asked.items():
        if there[name] != value:
            raise InputError(
                f"{job.out} holds another import: its {name} is {there[name]}, you asked for "
                f"{value}; give another --out, or --force to replace it."
            )


def _base_files(job: ImportJob) -> dict[str, Path]:
    """Return the base model's configuration and, for the item side, its tokenizer files."""
    wanted = TOKENIZER_FILES if job.side == "item" else ()
    if job.base_dir is None:
        files = {CONFIG_FILE: hub.fetch(job.base_repo, CONFIG_FILE)}
        tokenizer = {name: hub.fetch_optional(job.base_repo, name) for name in wanted}
    else:
        files = {CONFIG_FILE: job.base_dir / CONFIG_FILE}
        tokenizer = {name: job.base_dir / name for name in wanted}
    files |= {name: path for name, path in tokenizer.items() if path and path.is_file()}
    if wanted and not {"tokenizer.json", "tokenizer.model"} & files.keys():
        raise InputError(
            f"{job.base_dir or job.base_repo} has no tokenizer.json and no tokenizer.model; name "
            f"HLLM's base model."
        )
    return files


def _check_disk(job: ImportJob, layout: Layout, remote: hub.HubFile | None) -> None:
    """State what disk space is needed and refuse when there is too little."""
    weights = sum(map(math.prod, layout.shapes.values())) * DTYPES[job.dtype].itemsize
    needs = [(job.out, weights + _SMALL_FILES_BYTES, "the model folder")]
    if remote is not None and remote.missing_bytes:
        needs.append((hub.cache_folder(), remote.missing_bytes, "the download"))
    disks: dict[int, list[tuple[Path, int, str]]] = {}
    for need in needs:
        disks.setdefault(_disk_of(need[0]), []).append(need)
    for on_disk in disks.values():
        place = on_disk[0][0]
        needed, free = sum(size for _, size, _ in on_disk), free_bytes(place)
        parts = " and ".join(f"{_size(size)} for {what}" for _, size, what in on_disk)
        log.info("disk of %s: %s needed (%s), %s free.", place, _size(needed), parts, _size(free))
        if needed > free:
            raise InputError(
                f"the disk of {place} has {_size(free)} free, but {_size(needed)} are needed "
                f"({parts}); free some space, or set --out or HF_HOME to another disk."
            )


def _disk_of(path: Path) -> int:
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev


def _checkpoint(job: ImportJob, remote: hub.HubFile | None) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint, fetched and checked, and what the manifest says of it."""
    if remote is None:
        path = job.from_file
        if path is None or not path.is_file():
            raise InputError(f"--from_file {path} is not a file; name an HLLM checkpoint.")
    else:
        path = hub.fetch(remote.repo, remote.name)
    size = path.stat().st_size
    log.info("taking the SHA-256 of %s (%s).", path, _size(size))
    try:
        digest = sha256(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    about = {**job.source, "bytes": size, "sha256": digest}
    if remote is None:
        return path, about
    stated = hub.stated_sha256(remote, path)
    if stated is None:
        log.warning("the hub states no SHA-256 for %s; only recorded: %s.", remote.name, digest)
    elif stated != digest:
        raise InputError(
            f"{path.resolve()} is damaged: its SHA-256 is {digest}, the hub states {stated}; "
            f"delete that file and run again."
        )
    return path, {**about, "commit": remote.commit, "sha256_matches_hub": stated is not None}


def _write_small_files(
    folder: Path, base: Mapping[str, Path], layout: Layout, job: ImportJob
) -> None:
    layout.config.dtype = DTYPES[job.dtype]
    layout.config.save_pretrained(folder)
    for name, path in base.items():
        if name != CONFIG_FILE:
            shutil.copyfile(path, folder / name)
    if job.side == "user":
        return
    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for damaged tokenizers
        where = job.base_dir or job.base_repo
        raise InputError(
            f"the tokenizer of {where} cannot be loaded: {hub.one_line(error)}."
        ) from error


def _write_tensors(folder: Path, checkpoint: Path, layout: Layout, job: ImportJob) -> None:
    """Check the checkpoint as a whole, then write weights, index and extras."""
    own = {
        name: shape
        for name, shape in layout.shapes.items()
        if job.side == "item" or name != EMBEDDING
    }
    extras: dict[str, Shape] = {"item_emb_tokens": (1, 1, layout.dim), "logit_scale": ()}
    state = _open_side(checkpoint, job.side)
    check_tensors(state, own | extras, job.side, checkpoint)
    found = {
        name: _cast(state[name], torch.float32, f"{checkpoint}: '{name}'").reshape(shape)
        for name, shape in extras.items()
    }
    _save(found, folder / EXTRA_FILE)
    del state
    dtype = DTYPES[job.dtype]
    shards = plan_shards(layout.shapes, dtype, job.shard_bytes)
    files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    with meter("importing", len(layout.shapes), "tensors") as shown:
        for names, file in zip(shards, files, strict=True):
            _write_shard(folder / file, names, checkpoint, layout, job, shown)
    index = {
        "metadata": {
            "total_size": sum(map(math.prod, layout.shapes.values())) * dtype.itemsize,
        },
        "weight_map": {
            name: file for names, file in zip(shards, files, strict=True) for name in names
        },
    }
    _write_json(folder / INDEX_FILE, index)


def _write_shard(
    target: Path,
    names: Sequence[str],
    checkpoint: Path,
    layout: Layout,
    job: ImportJob,
    shown: Meter,
) -> None:
    # Mapped anew for each shard: pages already read count as this process's memory until the
    # mapping is closed, and would add up to the whole checkpoint.
    state = _open_side(checkpoint, job.side)
    dtype = DTYPES[job.dtype]
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name in state:
            where = f"{checkpoint}: '{job.side}_llm.model.{name}'"
            tensors[name] = _cast(state.pop(name), dtype, where)
        else:
            tensors[name] = torch.zeros(layout.shapes[name], dtype=dtype)
        shown.advance()
    _save(tensors, target)


def _open_side(checkpoint: Path, side: Side) -> dict[str, Tensor]:
    return select_side(open_state(checkpoint), side, checkpoint)


def _cast(value: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Copy a tensor to a number type.

    Raises:
        InputError: it holds NaN or infinity, before or after.
    """
    # Copied even when the type stays, so that nothing written depends on the mapped file.
    result = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if _is_finite(result):
        return result
    if _is_finite(value):
        raise InputError(f"{where} has values too large for --dtype float16; use bfloat16.")
    raise InputError(f"{where} holds NaN or infinity; the checkpoint is damaged, fetch it again.")


def _is_finite(value: Tensor) -> bool:
    # aminmax passes NaN on and, unlike isfinite, needs no memory of the tensor's size.
    low, high = torch.aminmax(value)
    return bool(low.isfinite() and high.isfinite())


def _is_plain(value: Tensor) -> bool:
    return (
        value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and not value.is_nested
    )


def _save(tensors: dict[str, Tensor], target: Path) -> None:
    try:
        save_file(tensors, target, metadata={"format": "pt"})
    except SafetensorError as error:
        raise InputError(
            f"cannot write {target.name}: {hub.one_line(error)}; free some space or give another "
            f"--out."
        ) from error


def _write_manifest(folder: Path, job: ImportJob, source: dict[str, Any]) -> None:
    """Record where the import came from and the SHA-256 of every file written."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        "side": job.side,
        "dtype": job.dtype,
        "source": source,
        "base": {"path": str(job.base_dir)} if job.base_dir else {"repo": job.base_repo},
        "files": files,
        "versions": versions() | {"huggingface_hub": importlib.metadata.version("huggingface_hub")},
    }
    _write_json(folder / MANIFEST_FILE, manifest)


def _write_json(path: Path, value: Any) -> None:
    # Inside the temporary folder a plain write is enough, and the umask decides the file's mode.
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + os.linesep, encoding="utf-8")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
