"""Ways to compute HSTU's attention over histories of different lengths, by time and memory of a step.

    python benchmarks/hstu.py                   # on a GPU where there is one, else on the CPU
    python benchmarks/hstu.py --flex True       # on a GPU, with flex_attention too

HSTU weighs values by silu(Q K + bias), which is negative at times and does not sum to 1, so neither
scaled_dot_product_attention nor torch's variable-length kernel computes it: both end in a softmax, as
flex_attention does after any modification of its scores. What is compared on the same sequences and
negatives, one whole training step each:

- packed rows of 4L positions and a mask, as HSFT trains on short histories, and the same in rows of L;
- every history a row, padded to the batch's longest: the plain way;
- grouped: a batch's histories sorted by length and divided into four groups, each padded to its own
  longest; all that is no attention runs over the groups' positions in one row;
- these with the layers compiled by torch.compile, of the groups the attention alone;
- flex_attention, by a difference of two softmaxes: with s the scores, silu(s) V is
  exp(l+) softmax(log silu(s), s > 0) V - exp(l-) softmax(log -silu(s), s < 0) V, where l+ and l- are
  the softmaxes' logarithmic sums. Twice the work, on a GPU alone, and inexact where s is near 0.

Every way's loss and gradients are compared with those of the plain way in float64. Rows are printed
and written to `hstu.json` as soon as they are there, the most telling first; a way that would begin
after `--limit` seconds is left out. `--tiny True` runs the same code in small: a test of the script.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.data.dataset import CachedEmbeddingTrainDataset, TrainBatch, TrainCollate
from hsft.data.interactions import Interactions
from hsft.data.split import leave_one_out
from hsft.data.time_fields import ItemTimes
from hsft.model.hstu import HSTU, HstuLayer, time_buckets
from hsft.model.id_model import position_vectors
from hsft.model.recommender import LossSettings, Recommender
from hsft.utils.errors import one_line
from hsft.utils.files import write_json
from hsft.utils.logs import set_up_logging

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
# Training positions of a user on Amazon Beauty (5-core, 2014): shares of users and lengths.
_BEAUTY = (
    (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0),
    (2, 2, 3, 4, 5, 6, 7, 9, 11, 18, 45, 50),
)
# Long histories, of which most are cut at L, as MovieLens-1M's.
_LONG = ((0.0, 0.2, 0.4, 0.5, 1.0), (18, 50, 100, 200, 200))
_ITEMS, _NEGATIVES = 12_101, 512
# How a batch's sorted histories are divided, in eighths: half of them are about equally short.
_GROUPS = (4, 2, 1, 1)
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A model on data.

    Attributes:
        name: what it is called.
        lengths: shares of users, and their lengths, as `_BEAUTY`.
        longest: L.
        batch: sequences.
        dim, heads, layers: shape.
        times: with the bias for gaps in time.
    """

    name: str
    lengths: tuple[Sequence[float], Sequence[int]]
    longest: int
    batch: int
    dim: int
    heads: int
    layers: int
    times: bool = False


CASES = (
    Case("beauty, width 64", _BEAUTY, 50, 128, 64, 2, 2),
    Case("beauty, width 512 (hstu.yaml)", _BEAUTY, 50, 128, 512, 4, 2),
    Case("long, width 64, 16 layers (hstu_large.yaml)", _LONG, 200, 128, 64, 8, 16),
    Case("beauty, width 64, times", _BEAUTY, 50, 128, 64, 2, 2, times=True),
)
TINY = (
    Case("tiny", _BEAUTY, 50, 16, 32, 2, 2),
    Case("tiny, times", _BEAUTY, 50, 16, 32, 2, 1, times=True),
)


class GroupedHSTU(HSTU):
    """HSTU over a row of padded groups.

    Attributes:
        shapes: (histories, positions of each) of every group, in order; set before `forward`.
        attend: computes a group's attention, `attend_group` or what that is compiled to.
    """

    shapes: tuple[tuple[int, int], ...] = ()
    attend: Callable[..., Tensor]

    def forward(
        self,
        history: Tensor,
        positions: Tensor | None = None,
        cu_lengths: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """Encode the groups' histories: int64 [1, M] -> [1, M, D]."""
        embedded = position_vectors(self.positions, history.shape[1], positions)
        states = self.input_dropout(self.items(history) + embedded)[0]
        buckets: list[Tensor] = []
        if times is not None:
            sizes = [rows * length for rows, length in self.shapes]
            for (rows, length), part in zip(self.shapes, times[0].split(sizes), strict=True):
                seconds = part.view(rows, length, -1)
                buckets.append(time_buckets(seconds[..., -1], seconds[..., 0]))
        for layer in self.layers:
            states = self._layer(layer, states, buckets)
        return states.unsqueeze(0)

    def _layer(self, layer: nn.Module, states: Tensor, buckets: list[Tensor]) -> Tensor:
        assert isinstance(layer, HstuLayer)
        width = states.shape[1]
        parts = F.silu(layer.read(F.layer_norm(states, (width,), eps=1e-6)))
        gates, *rest = parts.chunk(4, dim=-1)
        attended, start = [], 0
        for number, (rows, length) in enumerate(self.shapes):
            end = start + rows * length
            shape = (rows, length, layer.heads, width // layer.heads)
            v, q, k = (part[start:end].view(shape).transpose(1, 2) for part in rest)
            gaps = buckets[number] if buckets else None
            mixed = self.attend(q, k, v, layer.position_bias, layer.time_bias, gaps)
            attended.append(mixed.transpose(1, 2).reshape(-1, width))
            start = end
        mixed = torch.cat(attended) / layer.max_length
        added: Tensor = layer.write(layer.dropout(gates * F.layer_norm(mixed, (width,), eps=1e-6)))
        return states + added


def attend_group(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    position_bias: Tensor,
    time_bias: Tensor | None,
    buckets: Tensor | None,
) -> Tensor:
    """Compute the weighted sums of `HstuLayer` for padded histories: float [B, H, T, d]."""
    steps = torch.arange(queries.shape[2], device=queries.device)
    distances = steps.unsqueeze(1) - steps
    biases = F.embedding(distances.clamp_min(0), position_bias[:, None])[..., 0]
    scores = queries @ keys.transpose(2, 3) + biases
    if time_bias is not None and buckets is not None:
        scores = scores + F.embedding(buckets, time_bias[:, None])[..., 0].unsqueeze(1)
    return (F.silu(scores) * (distances >= 0)) @ values


class FlexLayer(HstuLayer):
    """`HstuLayer` on padded rows by two calls of flex_attention, without time bias."""

    def forward(self, states: Tensor, reads: Tensor, buckets: Tensor | None = None) -> Tensor:
        """Float [B, T, D] -> [B, T, D]; `reads` is taken to be causal."""
        from torch.nn.attention.flex_attention import create_block_mask

        batch, length, dim = states.shape
        parts = F.silu(self.read(F.layer_norm(states, (dim,), eps=1e-6))).chunk(4, dim=-1)
        gates, *rest = parts
        shape = (batch, length, self.heads, dim // self.heads)
        values, queries, keys = (part.view(shape).transpose(1, 2).contiguous() for part in rest)
        bias = self.position_bias
        assert bias is not None
        mask = create_block_mask(_causal, None, None, length, length, device=states.device.type)
        attend = partial(
            _flex_attention(states.device),
            queries,
            keys,
            values,
            block_mask=mask,
            scale=1.0,
            return_lse=True,
        )
        above, log_above = attend(score_mod=partial(_log_above, bias))
        below, log_below = attend(score_mod=partial(_log_below, bias))
        mixed = above * log_above.exp()[..., None] - below * log_below.exp()[..., None]
        attended = (mixed / self.max_length).transpose(1, 2).reshape(batch, length, dim)
        gated = gates * F.layer_norm(attended, (dim,), eps=1e-6)
        return states + self.write(self.dropout(gated))


def _flex_attention(device: torch.device) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if device.type == "cpu":
        # On a CPU it has no backward pass; its result can be checked.
        return flex_attention
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _biased(score: Tensor, bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score + bias[(query - key).clamp(0, len(bias) - 1)]


def _log_above(
    bias: Tensor, score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor
) -> Tensor:
    biased = _biased(score, bias, query, key)
    safe = torch.where(biased > 0, biased, torch.ones_like(biased))
    return torch.where(biased > 0, F.silu(safe).log(), -math.inf)


def _log_below(
    bias: Tensor, score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor
) -> Tensor:
    biased = _biased(score, bias, query, key)
    safe = torch.where(biased < 0, biased, -torch.ones_like(biased))
    return torch.where(biased < 0, (-F.silu(safe)).log(), -math.inf)


@dataclass(frozen=True)
class Way:
    """A way to compute the steps.

    Attributes:
        name: what it is called.
        layout: `packed`, `rows`, `padded` or `grouped`; `none`: padded, without any layer.
        compiled: the layers are compiled.
        flex: through flex_attention.
    """

    name: str
    layout: str
    compiled: bool = False
    flex: bool = False


WAYS = (
    Way("no layers", "none"),
    Way("packed rows of 4L", "packed"),
    Way("packed rows of L", "rows"),
    Way("padded", "padded"),
    Way("grouped", "grouped"),
    Way("padded, compiled", "padded", compiled=True),
    Way("grouped, compiled", "grouped", compiled=True),
    Way("packed rows of 4L, compiled", "packed", compiled=True),
)
FLEX = Way("padded, flex_attention twice", "padded", flex=True)


def make_data(case: Case, sequences: int) -> CachedEmbeddingTrainDataset:
    """Draw sequences with a case's lengths; the last two items of each user are held out."""
    rng = np.random.default_rng(0)
    shares, lengths = case.lengths
    drawn = np.exp(np.interp(rng.random(sequences), shares, np.log(lengths)))
    # A user's training positions, their first item, and one item each for validation and test.
    sizes = np.rint(drawn).astype(np.int64) + 3
    total = int(sizes.sum())
    data = Interactions(
        user_ids=np.arange(sequences).astype(str),
        item_ids=np.arange(_ITEMS + 1).astype(str),
        items=rng.integers(1, _ITEMS + 1, total).astype(np.int32),
        timestamps=np.sort(rng.integers(1_000_000_000, 1_400_000_000, total)),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
    )
    times = ItemTimes(data.timestamps, of_next=False, raw=True) if case.times else None
    return CachedEmbeddingTrainDataset(leave_one_out(data), case.longest, times)


def make_batches(
    case: Case, dataset: CachedEmbeddingTrainDataset, layout: str, number: int
) -> list[tuple[TrainBatch, tuple[tuple[int, int], ...]]]:
    """Lay out the first batches, each with the shapes of its groups (none in other layouts)."""
    row_length = {"packed": 4 * case.longest, "rows": case.longest}.get(layout)
    collate = TrainCollate(dataset, row_length=row_length, pack_below=1.1)
    made = []
    for start in range(0, number * case.batch, case.batch):
        indices = np.arange(start, start + case.batch)
        batch = collate(indices)
        drawn = np.random.default_rng(start).integers(1, _ITEMS + 1, (1, _NEGATIVES))
        batch = batch._replace(negatives=torch.from_numpy(drawn))
        shapes: tuple[tuple[int, int], ...] = ()
        if layout == "grouped":
            batch, shapes = into_groups(batch, dataset.lengths[indices])
        made.append((batch, shapes))
    return made


def into_groups(
    batch: TrainBatch, lengths: np.ndarray
) -> tuple[TrainBatch, tuple[tuple[int, int], ...]]:
    """Divide a padded batch into groups of like lengths, in one row.

    Args:
        batch: with a history a row.
        lengths: int64 [B].

    Returns:
        The batch, [1, M], and (histories, positions) of each group.
    """
    order = np.argsort(lengths, kind="stable")
    counts = [len(lengths) * share // sum(_GROUPS) for share in _GROUPS]
    groups, start = [], 0
    for count in (*counts[:-1], len(lengths) - sum(counts[:-1])):
        group = order[start : start + count]
        groups.append((torch.from_numpy(group), int(lengths[group].max())))
        start += count

    def flat(padded: Tensor) -> Tensor:
        if not padded.numel():
            return padded
        return torch.cat([padded[group, :most].flatten(0, 1) for group, most in groups])[None]

    history, targets, mask = flat(batch.history), flat(batch.targets), flat(batch.loss_mask)
    steps = torch.arange(batch.history.shape[1]).expand_as(batch.history)
    grouped = batch._replace(
        history=history,
        targets=targets,
        attention_mask=mask,
        loss_mask=mask,
        positions=flat(steps),
        times=flat(batch.times),
        scored=mask.flatten().nonzero()[:, 0],
    )
    return grouped, tuple((len(group), most) for group, most in groups)


def compile_function(function: Callable[..., Tensor], case: Case) -> Callable[..., Tensor]:
    """Compile a function once for sizes of all kinds; the tiny cases are traced alone."""
    backend = "eager" if case in TINY else "inductor"
    compiled: Callable[..., Tensor] = torch.compile(function, dynamic=True, backend=backend)
    return compiled


def make_model(case: Case, way: Way, device: torch.device) -> Recommender:
    """Make the model with the same weights for every way."""
    torch.manual_seed(0)
    kind = GroupedHSTU if way.layout == "grouped" else HSTU
    encoder = kind(
        _ITEMS,
        case.longest,
        dim=case.dim,
        layers=case.layers,
        heads=case.heads,
        dropout=0.1,
        time_bias="own" if case.times else None,
    )
    if way.layout == "none":
        encoder.layers = nn.ModuleList()
    if isinstance(encoder, GroupedHSTU):
        encoder.attend = compile_function(attend_group, case) if way.compiled else attend_group
    for layer in encoder.layers:
        if way.flex:
            layer.__class__ = FlexLayer
        elif way.compiled and way.layout != "grouped":
            layer.forward = compile_function(layer.forward, case)
    settings = LossSettings("nce", "sampled", 0.99, 256 * MIB, "cosine")
    return Recommender(encoder, settings).to(device)


class Steps:
    """Training steps of one way.

    Args:
        case, way: what is computed.
        device: where.
        dataset: the sequences.
        number: batches, taken in turn.
    """

    def __init__(
        self,
        case: Case,
        way: Way,
        device: torch.device,
        dataset: CachedEmbeddingTrainDataset,
        number: int,
    ) -> None:
        self.model = make_model(case, way, device)
        self.device = device
        self.batches = [
            (batch.to(device), shapes)
            for batch, shapes in make_batches(case, dataset, way.layout, number)
        ]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def backward(self, number: int) -> Tensor:
        """Compute the loss of a batch and its gradients."""
        batch, shapes = self.batches[number % len(self.batches)]
        encoder = self.model.encoder
        if isinstance(encoder, GroupedHSTU):
            encoder.shapes = shapes
        loss: Tensor = self.model(batch)
        torch.autograd.backward(loss)
        return loss.detach()

    def step(self, number: int) -> None:
        """Take an optimizer step."""
        self.backward(number)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Return the first batch's loss without dropout, and all gradients but the item table's."""
        self.model.eval()
        loss = float(self.backward(0))
        gradients = [
            parameter.grad.double().flatten().cpu()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and "items" not in name
        ]
        self.optimizer.zero_grad()
        self.model.train()
        return loss, torch.cat(gradients)

    def peak_mib(self) -> float | None:
        """Return how much memory a batch's forward and backward pass takes besides what is held."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.backward(0)
            torch.cuda.synchronize()
            grown = torch.cuda.max_memory_allocated() - before
        else:
            try:
                # Linux: the high-water mark starts again from what is held now.
                Path("/proc/self/clear_refs").write_text("5")
                before = _resident("VmRSS")
                self.backward(0)
                grown = _resident("VmHWM") - before
            except OSError:
                return None
        self.optimizer.zero_grad()
        return grown / MIB


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measure(
    case: Case,
    way: Way,
    device: torch.device,
    dataset: CachedEmbeddingTrainDataset,
    steps: int,
    exact: tuple[float, Tensor],
) -> dict[str, Any]:
    """Measure a way.

    Args:
        case, way: what is computed.
        device: where.
        dataset: the sequences.
        steps: that are timed, three times.
        exact: loss and gradients in float64.

    Returns:
        Median milliseconds of a step, memory, and how far loss and gradients are from the exact ones.
    """
    began = time.perf_counter()
    ran = Steps(case, way, device, dataset, min(steps, 8))
    row: dict[str, Any] = {}
    if way.layout != "none":
        loss, gradient = ran.loss_and_gradient()
        distance = float((gradient - exact[1]).norm() / exact[1].norm())
        row = {"relative_error": max(abs(loss / exact[0] - 1), distance)}
        row["passed"] = row["relative_error"] < _TOLERANCE
    for number in range(len(ran.batches)):
        ran.step(number)
    _wait(device)
    row["ready_s"] = time.perf_counter() - began
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        for number in range(steps):
            ran.step(number)
        _wait(device)
        seconds.append((time.perf_counter() - started) / steps)
    row["ms_per_step"] = 1e3 * statistics.median(seconds)
    row["peak_mib"] = ran.peak_mib()
    batch, shapes = ran.batches[0]
    squares = [rows * length**2 for rows, length in shapes or (tuple(batch.history.shape),)]
    row["positions"] = batch.history.numel()
    row["scores"] = sum(squares)
    row["real_positions"] = int(batch.loss_mask.sum())
    return row


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def exact_gradient(
    case: Case, device: torch.device, dataset: CachedEmbeddingTrainDataset
) -> tuple[float, Tensor]:
    """Return loss and gradients of the plain way in float64."""
    ran = Steps(case, Way("exact", "padded"), device, dataset, 1)
    ran.model.double()
    return ran.loss_and_gradient()


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", choices=["True", "False"], default="False")
    parser.add_argument("--flex", choices=["True", "False"], default="False")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", nargs="+", type=int, help="numbers of the cases to measure")
    parser.add_argument("--limit", type=float, default=34, help="seconds; no way begins later")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    set_up_logging(quiet=True)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if name == "cpu":
        with suppress(OSError, AttributeError):
            # glibc then gives every freed tensor back, so that peaks are of what is held.
            ctypes.CDLL(None).mallopt(-3, 1 << 18)
    # Groups that are equally long in the first batch need not be in the next one.
    import torch.fx.experimental._config as symbols

    symbols.use_duck_shape = False
    tiny = args.tiny == "True"
    cases = TINY if tiny else CASES
    ways = (*WAYS, FLEX) if args.flex == "True" else WAYS
    about = torch.cuda.get_device_name() if name == "cuda" else f"{torch.get_num_threads()} threads"
    result: dict[str, Any] = {"torch": torch.__version__, "device": about, "steps": args.steps}
    result |= {"tiny": tiny, "rows": [], "left_out": []}
    began = time.perf_counter()
    chosen = [cases[number] for number in args.cases or range(len(cases))]
    prepared: dict[str, tuple[CachedEmbeddingTrainDataset, tuple[float, Tensor]]] = {}
    # What compiles comes last, in all cases: it takes seconds.
    todo = [(case, way) for slow in (False, True) for case in chosen for way in ways
            if (way.compiled or way.flex) == slow and not (way.flex and case.times)]  # fmt: skip
    for case, way in todo:
        if time.perf_counter() - began > args.limit:
            result["left_out"].append(f"{case.name}: {way.name}")
            continue
        if case.name not in prepared:
            dataset = make_data(case, case.batch * min(args.steps, 8))
            prepared[case.name] = dataset, exact_gradient(case, device, dataset)
        row: dict[str, Any] = {"case": case.name, "way": way.name}
        try:
            row |= measure(case, way, device, prepared[case.name][0], args.steps,
                           prepared[case.name][1])  # fmt: skip
        except Exception as error:  # one way that fails must not cost the others
            row["error"] = one_line(error, 300)
        result["rows"].append(row)
        write_json(args.out / "hstu.json", result)
        sys.stdout.write(line(row))
        sys.stdout.flush()
    result["seconds"] = time.perf_counter() - began
    write_json(args.out / "hstu.json", result)
    for text in result["left_out"]:
        sys.stdout.write(f"left out after {args.limit:g} s: {text}\n")
    sys.stdout.write(f"{result['seconds']:.0f} s in all: {args.out / 'hstu.json'}\n")
    return 0


def line(row: dict[str, Any]) -> str:
    """Write a row as one line."""
    if "error" in row:
        return f"{row['case']:<45} {row['way']:<30} failed: {row['error']}\n"
    memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
    error = f"{row['relative_error']:.0e}" if "relative_error" in row else "-"
    return (
        f"{row['case']:<45} {row['way']:<30} {row['ms_per_step']:>9.2f} ms {memory:>8} MiB  "
        f"error {error}  {row['positions']:,} positions ({row['real_positions']:,} real), "
        f"{row['scores']:,} scores a head, ready in {row['ready_s']:.1f} s\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
