"""A UserLLM and its map of items as ONNX graphs, and a model that scores with them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsft.model.losses import normalize
from hsft.model.recommender import Recommender
from hsft.utils.errors import InputError, one_line

USER_GRAPH, ITEM_GRAPH = "user_llm.onnx", "items.onnx"
# Names of the graphs' inputs and outputs.
EMBEDDINGS, LENGTHS = "embeddings", "lengths"
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

    def forward(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        encoder: Any = self.model.encoder
        vectors = encoder.items._adapt(embeddings)
        states = encoder.decoder(inputs_embeds=vectors, use_cache=False).last_hidden_state
        last = states[torch.arange(embeddings.shape[0]), lengths - 1]
        return normalize(last) if self.model.settings.similarity == "cosine" else last


class _ItemGraph(nn.Module):
    """Item embeddings to the item vectors that users are compared with."""

    def __init__(self, model: Recommender) -> None:
        super().__init__()
        self.items = model.encoder.items
        self.cosine = model.settings.similarity == "cosine"

    def forward(self, embeddings: Tensor) -> Tensor:
        # Not the input itself, which no graph may give back.
        vectors = self.items._adapt(embeddings) + 0.0
        return normalize(vectors) if self.cosine else vectors


def write_graphs(model: Recommender, folder: Path, width: int, length: int) -> None:
    """Write a model's two graphs, and check that ONNX Runtime computes what the model does.

    `user_llm.onnx` takes `embeddings`, float32 [batch, length, C], padded on the right, and
    `lengths`, int64 [batch], to `user_vectors`, float32 [batch, D]; `items.onnx` takes `embeddings`,
    float32 [items, C], to `item_vectors`, float32 [items, D]. Their inner products are the scores.

    Args:
        model: in float32, on the CPU, in evaluation mode, without LoRA layers and id vectors.
        folder: where to write.
        width: C, dimensions of the item embeddings.
        length: most items of a history, which the check reads.

    Raises:
        InputError: torch cannot export the decoder, or the graph computes something else.
    """
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(3, length, width, generator=generator)
    lengths = torch.tensor([length, 1, (length + 1) // 2])
    users, items = _UserGraph(model).eval(), _ItemGraph(model).eval()
    batch, history = {0: "batch", 1: "length"}, {0: "batch"}
    # Traced on other shapes than are checked; a slice's strides would become part of the graph.
    traced = (torch.randn(2, length + 1, width, generator=generator), torch.tensor([2, 1]))
    _export(users, folder / USER_GRAPH, {EMBEDDINGS: batch, LENGTHS: history}, traced, USER_VECTORS)
    rows = {EMBEDDINGS: {0: "items"}}
    _export(items, folder / ITEM_GRAPH, rows, (torch.randn(2, width),), ITEM_VECTORS)
    scorer = OnnxGraphs(folder)
    with torch.no_grad():
        for size in (3, 1):
            here, counts = embeddings[:size], lengths[:size]
            _refuse_other(users(here, counts), scorer.users(here, counts), USER_GRAPH)
            short = here[:, :1]
            ones = torch.ones_like(counts)
            _refuse_other(users(short, ones), scorer.users(short, ones), USER_GRAPH)
        _refuse_other(items(embeddings[0]), scorer.items(embeddings[0]), ITEM_GRAPH)


def _export(
    module: nn.Module,
    path: Path,
    inputs: dict[str, dict[int, str]],
    example: tuple[Tensor, ...],
    output: str,
) -> None:
    with _quiet():
        try:
            torch.onnx.export(
                module,
                example,
                path,
                dynamo=True,
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=tuple(inputs.values()),
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

    def users(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """Encode histories: float32 [B, T, C] and int64 [B] -> float32 [B, D]."""
        given = {EMBEDDINGS: embeddings.numpy(force=True), LENGTHS: lengths.numpy(force=True)}
        return torch.from_numpy(self._users.run([USER_VECTORS], given)[0])

    def items(self, embeddings: Tensor) -> Tensor:
        """Map items: float32 [n, C] -> float32 [n, D]."""
        given = {EMBEDDINGS: embeddings.numpy(force=True)}
        return torch.from_numpy(self._items.run([ITEM_VECTORS], given)[0])


class OnnxScorer:
    """An exported model that is scored as any other.

    Args:
        graphs: of the export.
        embeddings: [I + 1, C] item embeddings, row 0 the padding item.
        device: where the vectors are wanted.
    """

    def __init__(self, graphs: OnnxGraphs, embeddings: Tensor, device: torch.device) -> None:
        self._graphs, self._device = graphs, device
        self._embeddings = embeddings.cpu().float()
        parts = [graphs.items(part) for part in self._embeddings.split(_ITEMS_AT_A_TIME)]
        self._items = torch.cat(parts).to(device)

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return len(self._items) - 1

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Int64 [B, T] and [B] -> float32 [B, D]."""
        return self._graphs.users(self._embeddings[history.cpu()], lengths.cpu()).to(self._device)

    def item_slice(self, start: int, end: int) -> Tensor:
        """Item numbers start..end-1 -> float32 [end - start, D]."""
        return self._items[start:end]

    def item_vectors(self, items: Tensor) -> Tensor:
        """Int64 [...] -> float32 [..., D]."""
        return self._items[items]
