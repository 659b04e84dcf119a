"""A UserLLM and its map of items as ONNX graphs, and a model that scores with them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.model.losses import normalize
from hsft.model.recommender import Recommender
from hsft.model.residual import HistoryResidual
from hsft.utils.errors import InputError, one_line

USER_GRAPH, ITEM_GRAPH = "user_llm.onnx", "items.onnx"
# Names of the graphs' inputs and outputs.
EMBEDDINGS, LENGTHS, ID_VECTORS = "embeddings", "lengths", "id_vectors"
USER_VECTORS, ITEM_VECTORS = "user_vectors", "item_vectors"
# Of the greatest number: what float32 arithmetic in another order may differ by.
_TOLERANCE = 1e-3
_ITEMS_AT_A_TIME = 8192


def require_onnx() -> None:
    """Check that what writes and reads ONNX is installed.

    Raises:
        InputError: it is not.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--format onnx needs the packages onnx, onnxscript and onnxruntime, and {error.name} is "
            f"not installed; install them with pip install 'hsft[onnx]'."
        ) from error


class _UserGraph(nn.Module):
    """Item embeddings of histories to user vectors, as `Recommender.user_vectors`."""

    def __init__(self, model: Recommender) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, embeddings: Tensor, lengths: Tensor, id_vectors: Tensor | None = None
    ) -> Tensor:
        encoder: Any = self.model.encoder
        vectors = encoder.items._adapt(embeddings)
        if id_vectors is not None:
            vectors = vectors + id_vectors
        states = encoder.decoder(inputs_embeds=vectors, use_cache=False).last_hidden_state
        rows, ends = torch.arange(embeddings.shape[0]), lengths - 1
        last = states[rows, ends]
        if encoder.residual is not None:
            last = _add_residual(encoder.residual, last, vectors, rows, ends)
        return normalize(last) if self.model.settings.similarity == "cosine" else last


def _add_residual(
    residual: HistoryResidual, last: Tensor, vectors: Tensor, rows: Tensor, ends: Tensor
) -> Tensor:
    """Compute `HistoryResidual` at one position of each history, whatever the length is.

    Args:
        residual: the residual of the last N items.
        last: float32 [B, D], the UserLLM's output there.
        vectors: float32 [B, T, D], the items' vectors.
        rows, ends: int64 [B], 0..B-1 and the positions.

    Returns:
        float32 [B, D].
    """
    users = normalize(vectors[rows, ends]) + F.linear(normalize(last), residual.weight)
    if residual.lags is None:
        return users
    lags = torch.arange(1, len(residual.lags) + 1)
    earlier = ends.unsqueeze(1) - lags
    units = normalize(vectors[rows.unsqueeze(1), earlier.clamp_min(0)])
    factors = residual.lags * (earlier >= 0)
    return users + (factors.unsqueeze(-1) * units).sum(dim=1)


class _ItemGraph(nn.Module):
    """Item embeddings to the item vectors that users are compared with."""

    def __init__(self, model: Recommender) -> None:
        super().__init__()
        self.items = model.encoder.items
        self.cosine = model.settings.similarity == "cosine"

    def forward(self, embeddings: Tensor, id_vectors: Tensor | None = None) -> Tensor:
        # Not the input itself, which no graph may give back.
        vectors = self.items._adapt(embeddings) + (0.0 if id_vectors is None else id_vectors)
        return normalize(vectors) if self.cosine else vectors


def write_graphs(
    model: Recommender, folder: Path, width: int, length: int, *, has_ids: bool = False
) -> None:
    """Write a model's two graphs, and check that ONNX Runtime computes what the model does.

    `user_llm.onnx` takes `embeddings`, float32 [batch, length, C], padded on the right, and
    `lengths`, int64 [batch], to `user_vectors`, float32 [batch, D]; `items.onnx` takes `embeddings`,
    float32 [items, C], to `item_vectors`, float32 [items, D]. Their inner products are the scores.
    With id vectors both also take these, `id_vectors`, float32 [batch, length, D] and [items, D],
    zeros for items that have none.

    Args:
        model: in float32, on the CPU, in evaluation mode, without LoRA layers.
        folder: where to write.
        width: C, dimensions of the item embeddings.
        length: most items of a history, which the check reads.
        has_ids: whether its items have id vectors.

    Raises:
        InputError: torch cannot export the decoder, or the graph computes something else.
    """
    generator = torch.Generator().manual_seed(0)
    dim = model.encoder.items.dim

    def draw(*shape: int) -> tuple[Tensor, Tensor | None]:
        ids = torch.randn(*shape, dim, generator=generator) if has_ids else None
        return torch.randn(*shape, width, generator=generator), ids

    users, items = _UserGraph(model).eval(), _ItemGraph(model).eval()
    # Traced on other shapes than are checked; a slice's strides would become part of the graph.
    embeddings, ids = draw(2, length + 1)
    rows = {0: "batch", 1: "length"}
    axes = {EMBEDDINGS: rows, LENGTHS: {0: "batch"}, ID_VECTORS: rows}
    _export(users, folder / USER_GRAPH, axes, (embeddings, torch.tensor([2, 1]), ids), USER_VECTORS)
    axes = {EMBEDDINGS: {0: "items"}, ID_VECTORS: {0: "items"}}
    _export(items, folder / ITEM_GRAPH, axes, draw(2), ITEM_VECTORS)
    scorer = OnnxGraphs(folder)
    embeddings, ids = draw(3, length)
    lengths = torch.tensor([length, 1, (length + 1) // 2])
    with torch.no_grad():
        for size in (3, 1):
            for longest in (length, 1):
                given = (
                    embeddings[:size, :longest],
                    lengths[:size].clamp_max(longest),
                    None if ids is None else ids[:size, :longest],
                )
                _refuse_other(users(*given), scorer.users(*given), USER_GRAPH)
        one = embeddings[0], None if ids is None else ids[0]
        _refuse_other(items(*one), scorer.items(*one), ITEM_GRAPH)


def _export(
    module: nn.Module,
    path: Path,
    inputs: dict[str, dict[int, str]],
    example: tuple[Tensor | None, ...],
    output: str,
) -> None:
    """Export a module; an input whose example is None is no input of the graph."""
    given = [name for name, value in zip(inputs, example, strict=True) if value is not None]
    with _quiet():
        try:
            torch.onnx.export(
                module,
                tuple(value for value in example if value is not None),
                path,
                dynamo=True,
                input_names=given,
                output_names=[output],
                dynamic_shapes=tuple(inputs[name] for name in given),
                verbose=False,
            )
        except OSError:
            raise
        except Exception as error:  # the exporter raises many kinds
            raise InputError(
                f"torch's exporter cannot write {path.name} for this decoder "
                f"({one_line(_root(error), 200)}); use --format merged."
            ) from error


def _root(error: BaseException) -> BaseException:
    """Return the first of a chain of errors, which says what the exporter lacks."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter says of packages and axes that have no part in the graph."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _refuse_other(expected: Tensor, actual: Tensor, name: str) -> None:
    difference = float((expected - actual).abs().max())
    if not difference <= _TOLERANCE * float(expected.abs().max()):
        raise InputError(
            f"{name} as torch exports it gives other numbers than the model (by up to {difference:.2g}); "
            f"use --format merged."
        )


class OnnxGraphs:
    """The two graphs of an export in ONNX Runtime, on the CPU.

    Args:
        folder: where `write_graphs` wrote.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        providers = ["CPUExecutionProvider"]
        self._users = onnxruntime.InferenceSession(folder / USER_GRAPH, providers=providers)
        self._items = onnxruntime.InferenceSession(folder / ITEM_GRAPH, providers=providers)

    def users(self, embeddings: Tensor, lengths: Tensor, ids: Tensor | None = None) -> Tensor:
        """Encode histories: float32 [B, T, C], int64 [B], float32 [B, T, D] -> float32 [B, D]."""
        given = {EMBEDDINGS: embeddings, LENGTHS: lengths, ID_VECTORS: ids}
        return _run(self._users, given, USER_VECTORS)

    def items(self, embeddings: Tensor, ids: Tensor | None = None) -> Tensor:
        """Map items: float32 [n, C] and, with id vectors, [n, D] -> float32 [n, D]."""
        return _run(self._items, {EMBEDDINGS: embeddings, ID_VECTORS: ids}, ITEM_VECTORS)


def _run(session: Any, given: Mapping[str, Tensor | None], output: str) -> Tensor:
    arrays = {name: value.numpy(force=True) for name, value in given.items() if value is not None}
    return torch.from_numpy(session.run([output], arrays)[0])


class OnnxScorer:
    """An exported model that is scored as any other.

    Args:
        graphs: of the export.
        embeddings: [I + 1, C] item embeddings, row 0 the padding item.
        ids: float32 [I + 1, D], id vectors, zeros where there is none; None: the graphs take none.
        device: where the vectors are wanted.
    """

    def __init__(
        self, graphs: OnnxGraphs, embeddings: Tensor, ids: Tensor | None, device: torch.device
    ) -> None:
        self._graphs, self._device = graphs, device
        self._embeddings, self._ids = embeddings.cpu().float(), ids
        parts = [
            graphs.items(self._embeddings[rows], None if ids is None else ids[rows])
            for rows in torch.arange(len(embeddings)).split(_ITEMS_AT_A_TIME)
        ]
        self._items = torch.cat(parts).to(device)

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return len(self._items) - 1

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Int64 [B, T] and [B] -> float32 [B, D]."""
        items = history.cpu()
        ids = None if self._ids is None else self._ids[items]
        return self._graphs.users(self._embeddings[items], lengths.cpu(), ids).to(self._device)

    def item_slice(self, start: int, end: int) -> Tensor:
        """Item numbers start..end-1 -> float32 [end - start, D]."""
        return self._items[start:end]

    def item_vectors(self, items: Tensor) -> Tensor:
        """Int64 [...] -> float32 [..., D]."""
        return self._items[items]
