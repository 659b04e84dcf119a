"""Write the requirement files that follow from pyproject.toml.

python tests/requirement_files.py             rewrite requirements.txt and requirements-lowest.txt
python tests/requirement_files.py --check     exit code 1 when one of them is out of date
python tests/requirement_files.py --freeze    rewrite constraints.txt from the packages installed here
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
# What `pip install -r requirements.txt` brings beside the dependencies: LLM_deepspeed.yaml needs it.
USER_EXTRAS = ("deepspeed",)
# Extras that take part in the tests on the lowest versions, and what of `dev` those tests use.
LOWEST_EXTRAS = (
    "completion",
    "deepspeed",
    "demo",
    "index",
    "mlflow",
    "onnx",
    "parquet",
    "serve",
    "sweep",
    "wandb",
)
LOWEST_TOOLS = ("httpx", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "torchmetrics")
_MADE = "# Made by tests/requirement_files.py from pyproject.toml.\n"


def project() -> dict[str, list[str]]:
    """Return the requirements of pyproject.toml: those of a run under the key "", and each extra's."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"": about["dependencies"], **about["optional-dependencies"]}


def lowest(lines: Iterable[str]) -> Iterator[str]:
    """Yield `name==lowest version` for each requirement; torch's is that of constraints.txt.

    Older builds of torch bring gigabytes of CUDA packages.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    for line in lines:
        requirement = Requirement(line)
        bounds = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
        if not bounds:
            raise ValueError(f"'{line}' has no lower bound")
        version = pinned("torch") if requirement.name == "torch" else bounds[0]
        marker = f"; {requirement.marker}" if requirement.marker else ""
        yield f"{requirement.name}=={version}{marker}"


def pinned(name: str) -> str:
    """Return the version that constraints.txt has for a package."""
    text = CONSTRAINTS.read_text(encoding="utf-8")
    actual = re.search(rf"^{re.escape(canonicalize_name(name))}==(\S+)$", text, re.MULTILINE)
    if actual is None:
        raise ValueError(f"constraints.txt has no version of {name}")
    return actual[1]


def files() -> dict[Path, str]:
    """Return the content of the files that are made."""
    parts = project()
    user = [*parts[""], *(line for extra in USER_EXTRAS for line in parts[extra])]
    tools = [line for line in parts["dev"] if Requirement(line).name in LOWEST_TOOLS]
    extras = [line for extra in LOWEST_EXTRAS for line in parts[extra]]
    oldest = lowest([*parts[""], *extras, *tools])
    return {
        ROOT / "requirements.txt": "\n".join(
            [
                f"{_MADE}# With the exact versions of constraints.txt: pip install -r requirements.txt",
                "-c constraints.txt",
                *user,
                "# Optional, CUDA only: pip install flash-attn --no-build-isolation",
                "",
            ]
        ),
        ROOT / "requirements-lowest.txt": "\n".join([_MADE.rstrip(), *oldest, ""]),
    }


def installed(lines: Iterable[str]) -> dict[str, str]:
    """Return name -> version of what is installed for requirements, their own included."""
    versions: dict[str, str] = {}
    left = [Requirement(line) for line in lines]
    seen: set[tuple[str, str]] = set()
    while left:
        requirement = left.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": e}) for e in extras
        ):
            continue
        for extra in extras:
            key = (canonicalize_name(requirement.name), extra)
            if key in seen:
                continue
            seen.add(key)
            try:
                there = distribution(requirement.name)
            except PackageNotFoundError:
                continue
            # A local label such as +cpu names a build, and every build is to be taken.
            versions[key[0]] = there.version.partition("+")[0]
            for line in there.requires or ():
                inner = Requirement(line)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    inner.marker = None
                    left.append(inner)
    return versions


def freeze() -> str:
    """Return constraints.txt for the packages installed here."""
    lines = [line for part in project().values() for line in part if not line.startswith("hsft[")]
    versions = installed(lines)
    return "".join(
        [
            "# The versions that the tests, the demo and the continuous integration use.\n",
            "# Made by tests/requirement_files.py --freeze, in an environment where all tests pass.\n",
            *(f"{name}=={version}\n" for name, version in sorted(versions.items())),
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Write or check the files."""
    if "--freeze" in argv:
        CONSTRAINTS.write_text(freeze(), encoding="utf-8")
    old = [path for path, text in files().items() if not _has(path, text)]
    if "--check" in argv:
        return int(bool(old))
    for path in old:
        path.write_text(files()[path], encoding="utf-8")
    return 0


def _has(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
