"""Time and memory of one training step and of inference."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lipfast.training import margin_cross_entropy

WARMUP = 2
MINIMUM_SECONDS = 0.5
MINIMUM_REPEATS = 5


def inference_seconds(model: nn.Module, x: Tensor) -> float:
    """Return the median time in seconds of one batch in eval mode, cached weights, no gradients.

    Two batches warm up; then at least five are timed, for at least half a second.
    """
    model.eval()
    with torch.no_grad():
        return median_seconds(lambda: model(x), x.device)


def training_step_seconds(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the median time in seconds of forward, loss, backward and SGD step on one batch.

    Repeats as `inference_seconds`. Changes the weights: give it a model of its own.
    """
    return median_seconds(_training_step(model, x, y), x.device)


def training_memory_bytes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return the peak memory of a training step with SGD and momentum, in bytes.

    The peak over a step of what is allocated for tensors: parameters, buffers, gradients,
    momentum, saved activations and temporaries; see `peak_bytes`. Changes the weights: give it a
    model of its own.
    """
    return peak_bytes(model, _training_step(model, x, y), x.device)


def inference_memory_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the peak memory of inference on one batch in eval mode without gradients, in bytes.

    The peak over a batch of what is allocated for tensors: parameters, buffers, cached weights,
    activations and temporaries; see `peak_bytes`.
    """
    # Leaving eval mode drops cached weights, so that those of the measured model are counted.
    model.train()
    model.eval()
    with torch.no_grad():
        return peak_bytes(model, lambda: model(x), x.device)


def peak_bytes(model: nn.Module, function: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes in live tensors while a function runs for the second time.

    On a CPU it is the peak of the storages that torch operations made and nobody has freed; memory
    inside one operation is not seen. On CUDA it is the peak of torch's allocator over what it held
    before. The parameters and buffers of the model are counted in both. The first call fills
    caches and optimizer state, which count as they stay.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - held
        return peak + sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        function()
        live.peak = live.current
        function()
    return live.peak


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that the memory is too small, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages from their creation, or `add`, to their release."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            # The storage of an input was there before, even where nobody counted it.
            if isinstance(output, Tensor) and output.untyped_storage()._cdata not in before:
                self.add(output)
        return outputs


def _training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        margin_cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def median_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the median time in seconds of a call, repeated as `inference_seconds` does."""
    for _ in range(WARMUP):
        function()
    times: list[float] = []
    while len(times) < MINIMUM_REPEATS or sum(times) < MINIMUM_SECONDS:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
