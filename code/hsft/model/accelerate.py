"""Fewer launches: compiled decoder layers, and whole training steps as CUDA graphs.

A training step of a decoder launches thousands of small kernels, and on a fast GPU their launching
takes longer than their work. `torch.compile` fuses many of a layer's; a CUDA graph
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) launches all of a step's at once,
at the price of shapes and addresses that stay the same: batches are padded up to a few buckets, and
each has its graph.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hsft.data.dataset import TrainBatch
from hsft.utils.errors import one_line
from hsft.utils.gpu_memory import release_unused_memory

log = logging.getLogger(__name__)

# Batches of a bucket that are computed one kernel after the other before it is captured: libraries
# choose their kernels, and compiled layers are compiled, outside of a capture.
_WARM_UP = 2
# More buckets than this are not captured: a graph costs memory for its launch list.
_MOST_GRAPHS = 16
# Optimizer steps below which captures do not earn back what they take.
SHORTEST_GRAPH = 50


@dataclass(frozen=True)
class Acceleration:
    """What is done about launches.

    Attributes:
        layers: decoder layers go through torch.compile.
        graph: training steps are captured as CUDA graphs.
    """

    layers: bool = False
    graph: bool = False


def choose_acceleration(
    asked: str, device: torch.device, *, single_row: bool, processes: int, steps: int, obstacle: str
) -> tuple[Acceleration, str]:
    """Resolve `compile`.

    Args:
        asked: `auto`, `off`, `layers`, `graph` or `layers_graph`.
        device: where the model is trained.
        single_row: whether a batch is one row, whose shapes can be fixed.
        processes: number of processes; a graph holds no exchange of gradients.
        steps: optimizer steps of the run.
        obstacle: what keeps the configuration from CUDA graphs, or empty.

    Returns:
        What is done, and why it is not all that was asked for: a sentence, or empty.
    """
    if asked == "off":
        return Acceleration(), ""
    layers = asked in ("layers", "layers_graph")
    if asked == "layers":
        return Acceleration(layers=True), ""
    if device.type != "cuda":
        reason = "CUDA graphs need a CUDA device"
    elif not single_row:
        reason = "CUDA graphs need batches of one row (attn_implementation: varlen)"
    elif processes > 1:
        reason = "CUDA graphs need a single process"
    else:
        reason = obstacle
    if not reason and asked == "auto" and steps < SHORTEST_GRAPH:
        reason = f"a run of {steps} steps is too short to earn a capture back"
    if reason:
        return Acceleration(layers), f"compile: {reason}; kernels are launched one by one."
    return Acceleration(layers, graph=True), ""


def compile_layers(decoder: nn.Module) -> int:
    """Compile a decoder's layers in place, once for all of them and for any number of positions.

    A layer whose compilation fails computes as it would have without; the log says so once.

    Args:
        decoder: a transformers decoder, or a peft model around one.

    Returns:
        The number of layers, 0 where the model has no list of them.
    """
    peft_model: Any = decoder
    base = peft_model.get_base_model() if hasattr(decoder, "get_base_model") else decoder
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return 0
    fallback = _Fallback()
    for layer in layers:
        plain = layer.forward
        compiled = torch.compile(plain, dynamic=True)
        # On the instance: names of weights, and what is saved, stay the same.
        layer.forward = fallback.either(compiled, plain)
    return len(layers)


class _Fallback:
    """Calls a compiled function until one fails, then the plain ones."""

    def __init__(self) -> None:
        self.failed = False

    def either(self, compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.failed:
                try:
                    return compiled(*args, **kwargs)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # Dynamo, Inductor and the C compiler raise many kinds
                    self.failed = True
                    log.warning(
                        "compile: torch.compile failed (%s); layers run as they are.",
                        one_line(error, 160),
                    )
            return plain(*args, **kwargs)

        return forward


_Shapes = tuple[torch.Size, ...]


@dataclass
class _Captured:
    """A captured step: its inputs' fixed places, the weight's, the loss's."""

    graph: Any
    batch: TrainBatch
    weight: Tensor
    loss: Tensor


class StepGraphs:
    """Computes losses and adds up gradients, by CUDA graphs where a batch's shape has been captured.

    Batches whose shape comes up for the first time are computed as usual. After a failed capture
    everything is; the log says so once.

    Args:
        loss_of: the model: batch on the device -> scalar loss.
        backward: adds the gradients of a scalar to the parameters'.
        parameters: those that are trained.
        device: a CUDA device.
    """

    def __init__(
        self,
        loss_of: Callable[[TrainBatch], Tensor],
        backward: Callable[[Tensor], None],
        parameters: Iterable[nn.Parameter],
        device: torch.device,
    ) -> None:
        self._device = device
        self._seen: dict[_Shapes, int] = {}
        self._captured: dict[_Shapes, _Captured] = {}
        self._pool: Any = None
        self.enabled = True
        self.seconds = 0.0
        self._loss_of, self._backward = loss_of, backward
        self._parameters = [p for p in parameters if p.requires_grad]
        self._gradients: list[Tensor] = []

    @property
    def graphs(self) -> int:
        """Number of shapes that have been captured."""
        return len(self._captured)

    def step(self, batch: TrainBatch, weight: float = 1.0) -> Tensor:
        """Add `weight` times the gradient of a batch's loss to the parameters' gradients.

        Args:
            batch: on the CPU, pinned for speed.
            weight: share of the batch in the optimizer step's loss.

        Returns:
            The loss, a scalar without gradient. It is overwritten by the next batch of its shape.

        Raises:
            torch.OutOfMemoryError: the batch does not fit; graphs are given up.
        """
        shape = tuple(part.shape for part in batch)
        captured = self._captured.get(shape)
        if captured is None and self._is_due(shape):
            captured = self._try_capture(batch, shape)
        if captured is None:
            return self._plain(batch, weight)
        self._attach_gradients()
        for fixed, given in zip(captured.batch, batch, strict=True):
            fixed.copy_(given, non_blocking=True)
        captured.weight.fill_(weight)
        captured.graph.replay()
        return captured.loss

    def _is_due(self, shape: _Shapes) -> bool:
        """Count a shape, and say whether it is to be captured."""
        self._seen[shape] = self._seen.get(shape, 0) + 1
        # Once a graph is there, kernels are chosen and layers compiled.
        enough = self._seen[shape] > _WARM_UP or self.graphs > 0
        # Padded to a bucket, or it would hardly come again.
        padded = shape[TrainBatch._fields.index("counted")][0] > 0
        return self.enabled and enough and padded and self.graphs < _MOST_GRAPHS

    def _plain(self, batch: TrainBatch, weight: float) -> Tensor:
        try:
            loss = self._loss_of(batch.to(self._device))
            self._backward(loss * weight)
        except torch.OutOfMemoryError:
            self.release()
            raise
        return loss.detach()

    def _attach_gradients(self) -> None:
        """Give every parameter the gradient buffer that graphs add to, zeroed where it had none."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self._parameters]
        missing = []
        for parameter, buffer in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is buffer:
                continue
            if parameter.grad is None:
                missing.append(buffer)
            else:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if missing:
            torch._foreach_zero_(missing)

    def _try_capture(self, batch: TrainBatch, shape: _Shapes) -> _Captured | None:
        began = time.perf_counter()
        before = [p.grad if p.grad is None else p.grad.clone() for p in self._parameters]
        captured, failure = None, ""
        try:
            captured = self._capture(batch)
        except Exception as error:  # CUDA refuses a capture for many reasons, all RuntimeErrors
            failure = one_line(error, 160)
        if captured is None:
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient
            # Out of the except block: its traceback holds on to the activations.
            self.release()
            log.warning(
                "compile: a CUDA graph could not be captured (%s); kernels are launched one by one.",
                failure,
            )
            return None
        self._captured[shape] = captured
        self.seconds += time.perf_counter() - began
        log.debug("captured a CUDA graph for rows of %d positions.", batch.history.shape[1])
        return captured

    def _capture(self, batch: TrainBatch) -> _Captured:
        fixed = TrainBatch(*(part.to(self._device, copy=True) for part in batch))
        weight = torch.ones((), device=self._device)
        self._attach_gradients()

        def compute() -> Tensor:
            loss = self._loss_of(fixed)
            self._backward(loss * weight)
            return loss.detach()

        graph, loss = self._record(compute)
        return _Captured(graph, fixed, weight, loss)

    def _record(self, compute: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        """Capture a computation; return its graph and what it gives."""
        torch.cuda.synchronize(self._device)
        # What plain steps left in the allocator is the graph's to use. `torch.cuda.graph` gives back what
        # later ones leave; the garbage collector takes half a second.
        if not self._captured:
            release_unused_memory()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self._device)
        try:
            # Other threads, such as the data loader's, may go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = compute()
        finally:
            # A capture that CUDA refuses to end would leave its own stream as the current one.
            torch.cuda.set_stream(stream)
        # Graphs run one after the other, so all use the same memory.
        self._pool = graph.pool()
        return graph, result

    def release(self) -> None:
        """Give up all graphs and their memory; from now on all is computed as usual."""
        self.enabled = False
        self._captured.clear()
        self._pool = None
        release_unused_memory()
