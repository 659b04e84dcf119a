"""A small mutation fuzzer: seeded, without dependencies, bounded by time and by number of inputs.

    python -m tests.fuzz.harness --seconds 60            every target, a minute each
    python -m tests.fuzz.harness --target yaml --seed 7  one target

`HSFT_FUZZ_SECONDS` makes the test suite fuzz longer. An input that ends in anything but success or
`InputError` is written to `.fuzz/<target>-<digest>` and reported.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from hsft.utils.errors import InputError, one_line, problems_of

ROOT = Path(__file__).resolve().parents[2]
# Values at which parsers go wrong more often than at others.
ODD = [
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\r",
        b"\n",
        b"\t",
        b'"',
        b",",
    ),
    *(b"-1", b"0", b"1e999", b"NaN", b"9" * 30, b"null", b"true", b"{", b"}", b"[" * 30, b"]"),
    *(b"../", b"/etc/passwd", b"\\u0000", b"\\ud800", b": ", b"- ", b"&a ", b"*a", b"!!python/x "),
    *(b"--", b".", b"=", b"<<", b"%", b"#", b"\xe2\x80\xa8", b"\x80\x04", b"cos\nsystem\n", b"PK"),
]


@dataclass(frozen=True)
class Target:
    """A reader to be fuzzed.

    Attributes:
        name: for the command line.
        seeds: inputs to start from, good ones mostly.
        read: given a folder to write in and an input, runs the reader on it.
        words: further pieces to insert, the format's own.
    """

    name: str
    seeds: Sequence[bytes]
    read: Callable[[Path, bytes], object]
    words: Sequence[bytes] = ()


@dataclass
class Outcome:
    """What fuzzing a target came to: inputs tried, read and refused."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0


class FuzzFailure(AssertionError):
    """An input ended in something else than success or `InputError`."""


def mutate(rng: random.Random, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """Make a new input of one of the seeds by one to eight small changes."""
    data = bytearray(rng.choice(seeds))
    pieces = [*ODD, *words]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 40)))
        change = rng.randrange(8)
        if change == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif change == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif change == 2:
            del data[at:end]
        elif change == 3:
            data[at:at] = rng.choice(pieces)
        elif change == 4:
            data[at:end] = rng.choice(pieces)
        elif change == 5:
            data[at:at] = data[at:end] * rng.choice((1, 2, 9))
        elif change == 6:
            other = rng.choice(seeds)
            begin = rng.randrange(len(other) + 1)
            data[at:] = other[begin:]
        else:
            del data[at:]
    return bytes(data)


def fuzz(
    target: Target, folder: Path, *, seconds: float, seed: int = 0, most: int | None = None
) -> Outcome:
    """Fuzz a target until the time or the number of inputs is used up; seeds themselves come first.

    Raises:
        FuzzFailure: an input ended in another exception than `InputError`, or its message does not
            fit in one line.
    """
    rng = random.Random(f"{target.name} {seed}")
    outcome = Outcome()
    end = time.monotonic() + seconds
    while time.monotonic() < end and (most is None or outcome.inputs < most):
        fresh = outcome.inputs >= len(target.seeds)
        data = mutate(rng, target.seeds, target.words) if fresh else target.seeds[outcome.inputs]
        outcome.inputs += 1
        try:
            target.read(folder, data)
            outcome.accepted += 1
        except InputError as error:
            outcome.refused += 1
            if not all(one_line(text).strip() for text in problems_of(error)):
                raise FuzzFailure(
                    f"{target.name}: empty message for {_keep(target, data)}"
                ) from error
        except Exception as error:
            raise FuzzFailure(
                f"{target.name}: {type(error).__name__}: {error} for {_keep(target, data)}"
            ) from error
    return outcome


def _keep(target: Target, data: bytes) -> str:
    folder = ROOT / ".fuzz"
    folder.mkdir(exist_ok=True)
    path = folder / f"{target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return f"{path} ({len(data)} bytes)"


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz from the command line."""
    import tempfile

    from tests.fuzz.targets import targets

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", help="one target's name (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each target")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [t for t in targets(folder) if args.target in (None, t.name)]
        if not chosen:
            parser.error(f"no target is called {args.target}")
        for target in chosen:
            actual = fuzz(target, folder, seconds=args.seconds, seed=args.seed)
            sys.stdout.write(
                f"{target.name}: {actual.inputs} inputs, {actual.accepted} read, "
                f"{actual.refused} refused\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
