"""The step of a search as a CUDA graph: recorded once, and then launched as a whole.

A step on a GPU consists of some four hundred kernels for each chunk of triggers. If there are few
triggers, the CPU takes about as long to launch the kernels as the GPU takes to run them. A CUDA
graph holds all launches of a step, with their arguments, and takes one launch itself. Therefore a
step must read everything that changes from step to step from memory of the device, and write its
state in place.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ..errors import one_line

Work: TypeAlias = Callable[[], None]

#: The most chunks of a step that becomes a graph. With more of them, the time of a step is the
#: device's, and a graph only takes memory.
MOST_CHUNKS = 8

# The largest difference between a replayed step and a plain one, relative to the norm of the
# gradients. Kernels of attention add up in no fixed order.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


class Recording(Protocol):
    """The launches of a step."""

    def replay(self) -> None:
        """Launch all of them again, on the same memory."""
        ...


class Recorder(Protocol):
    """What records the launches of a device. Tests have one for the CPU."""

    def warm_up(self, work: Work) -> None:
        """Do the work where it will be recorded: kernels are loaded, and libraries get memory."""
        ...

    def record(self, work: Work) -> Recording:
        """Return the launches of the work. It does not happen now."""
        ...


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for captures on a device: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CudaRecorder:
    """CUDA's stream capture, on a stream beside the current one.

    The tensors that a recording makes lie in a pool of memory of its own, and are freed with it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream_of(device)

    def warm_up(self, work: Work) -> None:
        """Do the work on the other stream, after what is on this one and before what follows."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            current.wait_stream(self._stream)

    def record(self, work: Work) -> Recording:
        """Capture the work; RuntimeError if it does what no graph can hold."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        pool = torch.cuda.graph_pool_handle()
        try:
            with (
                torch.cuda.device(self._device),
                # Other threads of the process may use the GPU meanwhile.
                torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                work()
        except BaseException:
            # Where the end of a capture fails, torch leaves what it began before.
            torch.cuda.set_stream(current)
            _forget_pool(self._device, pool)
            raise
        return graph


@contextmanager
def _refusing_to_wait(device: torch.device) -> Iterator[None]:
    """Make torch raise, on a GPU, where the host would wait for it: no graph can hold that."""
    if device.type != "cuda" or not torch.cuda.is_available():  # there are pretended GPUs
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch says once per process that this mode is a prototype, which no user can act on.
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _forget_pool(device: torch.device, pool: Any) -> None:
    """Take back what a capture that failed has told the allocator.

    Otherwise the allocator believes that a capture is going on, and gives no memory back. After a
    capture that ended in order, the first call raises, and there is nothing to do.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    library: Any = torch._C  # torch has no public name for these
    with suppress(RuntimeError, AttributeError, TypeError):
        library._cuda_endAllocateToPool(index, pool)
        library._cuda_releasePool(index, pool)


def recorder_for(device: torch.device) -> Recorder | None:
    """Return what records steps on a device; None on a CPU, where launches cost nothing."""
    return CudaRecorder(device) if device.type == "cuda" else None


class GraphedStep:
    """Takes steps: the first of a shape plainly, and the others as a graph where this works.

    The shape is everything that a graph fixes: the number of triggers and how they are split. If it
    changes, the next step is taken plainly again, and the one after that is recorded anew.

    Before the first recording of a search is used, a step is taken twice, plainly and as a graph,
    and the gradients are compared. If a step cannot be recorded, or its graph is wrong, all further
    steps are taken plainly, and `description` says why.

    Attributes:
        description: How steps are taken, for a report; empty on a CPU.
        recorded: The number of recordings.
        replayed: The number of steps that were taken as a graph.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        """enabled: Whether steps may become graphs."""
        self.description = ""
        self.recorded = self.replayed = 0
        self._device = device
        self._recorder: Recorder | None = None
        self._recording: Recording | None = None
        self._shape: Any = None
        if enabled:
            try:
                self._recorder = recorder_for(device)
            except (RuntimeError, AssertionError) as error:
                self._give_up(_said(error))

    def run(self, step: Steps) -> None:
        """Take a step."""
        if self._recorder is None:
            step.take_plainly()
            return
        if not step.worth_recording():
            self._recording = self._shape = None
            self.description = f"no CUDA graph: more than {MOST_CHUNKS} chunks a step"
            step.take_plainly()
            return
        if step.shape() != self._shape:
            # The memory of an old recording is free for this step.
            self._recording = None
            self._recorder.warm_up(step.take_plainly)
            self._shape = step.shape()  # afterwards: memory may have run out
            return
        if self._recording is None:
            self._record(step)
            return
        self._recording.replay()
        self.replayed += 1

    def release(self) -> None:
        """Give back the memory of the recording. The device must have done what it was given."""
        self._recording = self._shape = None

    def _record(self, step: Steps) -> None:
        """Record a step and take it."""
        assert self._recorder is not None
        before: list[Tensor] | None = None
        failure = ""
        try:
            expected = None
            if not self.recorded:
                # A plain step, and back. It comes before the recording, because the two need as
                # much memory each; a capture gives back what a plain step has left in the cache.
                before = [tensor.clone() for tensor in step.state()]
                with _refusing_to_wait(self._device):
                    step.take_once()
                expected = [tensor.clone() for tensor in step.gradients()]
                _write(step.state(), before)
            recording = self._recorder.record(step.take_once)
            recording.replay()
            if expected is not None:
                _compare(step.gradients(), expected, _TOLERANCE[step.dtype])
        except Exception as error:  # noqa: BLE001 - whatever a capture throws, plain steps go on
            if before is not None:
                _write(step.state(), before)
            failure = _said(error)
        if failure:
            # Out here the error is gone, and with its traceback the tensors of the failed capture.
            self._give_up(failure)
            step.take_plainly()
            return
        self._recording = recording
        self.recorded += 1
        self.replayed += 1
        self.description = "steps as CUDA graphs"

    def _give_up(self, reason: str) -> None:
        self.description = f"no CUDA graph: {reason}"
        self._recorder = self._recording = None


class Steps(Protocol):
    """What `GraphedStep` needs to know of a search."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which gradients are computed."""
        ...

    def take_plainly(self) -> None:
        """Take a step, with less at once if memory runs out."""
        ...

    def take_once(self) -> None:
        """Take a step as it is; an error if memory runs out."""
        ...

    def shape(self) -> object:
        """Return everything that decides which kernels a step launches, and on which memory."""
        ...

    def worth_recording(self) -> bool:
        """Whether a graph can make steps faster."""
        ...

    def state(self) -> Sequence[Tensor]:
        """Return all tensors that a step changes."""
        ...

    def gradients(self) -> Sequence[Tensor]:
        """Return the tensors that hold a step's gradients after it."""
        ...


def _said(error: BaseException) -> str:
    """Return in one line why a capture failed."""
    # The end of a capture that failed raises an error of its own, which says less.
    error = error.__context__ or error
    said = one_line(str(error).partition("\n")[0])
    return textwrap.shorten(said, 100, placeholder=" ...") or type(error).__name__


def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Raise RuntimeError if a graph's gradients are not those of a plain step."""
    pairs = list(zip(found, expected, strict=True))
    wrong = torch.stack([(one - other).norm() for one, other in pairs])
    allowed = torch.stack([tolerance * other.norm() for _, other in pairs])
    if not bool((wrong <= allowed).all()):  # NaN where one is
        off = float((wrong / allowed).max()) * tolerance
        raise RuntimeError(f"its gradients are off by {off:.1g} in the trial")
