"""A process as a container runtime starts it for compose.yaml, without one: by Linux's own tools."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helpers import ROOT

_SETPRIV = (
    *("--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
    *("--ambient-caps=-all",),
)
# Defaults of a container's tmpfs.
_TMPFS = "noexec,nosuid,nodev"


def missing_tool() -> str | None:
    """Return what keeps `start` from working here, None where it works."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "mounting needs root on Linux"
    for tool in ("unshare", "setpriv", "mount", "chroot"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    # A container without CAP_SYS_ADMIN has the programs, and may not use them.
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "sh", "-c", "mount -t tmpfs tmpfs /mnt"],
        capture_output=True,
        text=True,
    )
    return tried.stderr.strip() if tried.returncode else None


def start(
    command: Sequence[str],
    *,
    root: Path,
    volumes: Mapping[str, Path],
    tmpfs: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    user: str,
    log: Path,
) -> subprocess.Popen[bytes]:
    """Start a command on a root of its own that nobody can write to, with this Python and HSFT's code.

    The command is process 1 of its process namespace and the only child of what is returned. The
    network is this machine's.

    Args:
        command: a program and its arguments.
        root: an empty folder, the root of what the command sees.
        volumes: folder there -> folder here, not writable.
        tmpfs: `PATH` or `PATH:OPTIONS`, writable.
        environment: all that the command has.
        folder: the working directory there.
        user: `UID:GID`.
        log: file of both outputs.
    """
    script = ["set -e", "mount --make-rprivate /", f"mount -t tmpfs -o mode=755 tmpfs {root}"]
    given = {**volumes}
    for name in ("/usr", "/etc", "/bin", "/sbin", "/lib", "/lib64"):
        if Path(name).is_symlink():
            script.append(f"ln -s {Path(name).readlink()} {root}{name}")
        elif Path(name).is_dir():
            given[name] = Path(name)
    for path in {sys.base_prefix, sys.prefix, str(ROOT / "code")}:
        given[path] = Path(path)
    # Before what is read, which may lie in a folder of the same name here, such as /tmp.
    for entry in tmpfs:
        path, _, options = entry.partition(":")
        options = ",".join(filter(None, [_TMPFS, options]))
        script += [f"mkdir -p {root}{path}", f"mount -t tmpfs -o {options} tmpfs {root}{path}"]
    # An outer folder first: it would hide an inner one.
    for there in sorted(given):
        here, target = shlex.quote(str(given[there])), shlex.quote(f"{root}{there}")
        script += [f"mkdir -p {target}", f"mount --bind {here} {target}"]
        script.append(f"mount -o remount,ro,bind {target}")
    script += [f"mkdir -p {root}/proc {root}/dev", f"mount -t proc proc {root}/proc"]
    script.append(f"mount --rbind /dev {root}/dev")
    script.append(f"mount -o remount,ro,bind {root}")
    uid, _, gid = user.partition(":")
    words = ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
    words += [str(shutil.which("chroot")), str(root), "setpriv", "--reuid", uid, "--regid", gid]
    words += [*_SETPRIV, "sh", "-c", f'cd {folder} && exec "$@"', "sh", *command]
    script.append(f"exec {shlex.join(words)}")
    with log.open("wb") as stream:
        return subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "sh",
                "-c",
                "\n".join(script),
            ],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
