"""A whole training step as one CUDA graph: one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lipfast.weights.shard import _hooks_of

_ADAM = (torch.optim.Adam, torch.optim.AdamW)


class GraphedStep:
    """Forward pass, loss, backward pass and optimizer step, captured once and replayed.

    The kernels of small networks take less time on a GPU than their launches; a graph has one
    launch. A replayed step computes what the eager one does, the layers' power vectors and the
    optimizer's state included. Capturing runs a few steps on the example batch to warm up, and then
    puts weights, buffers and optimizer state back; it needs memory for a second copy of them.

    The learning rate of each parameter group becomes a tensor on the GPU. Schedulers of torch, and
    `optimizer.param_groups[i]["lr"] = value` between two calls, change what the graph reads; all
    other hyperparameters are those of the capture.

    Args:
        model: in training mode, its parameters on one GPU; of one process.
        optimizer: of the model's parameters: SGD with `fused=True` and no dampening, or Adam or
            AdamW with `capturable=True`, `fused=True` or not.
        loss_fn: takes the scores and the targets, returns a loss without axes.
        example_batch: inputs and targets; all later batches have their shapes and dtypes.
        amp_dtype: torch.bfloat16 runs model and loss under autocast; None does not.
        warmup: steps before the capture, at least 1.
        eager: run the step without a graph, on any device: for a CPU, and to compare.

    Raises:
        TypeError: the optimizer is another one.
        ValueError: an argument does not fit, or there is no GPU and `eager` is False.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        example_batch: tuple[Tensor, Tensor],
        *,
        amp_dtype: torch.dtype | None = None,
        warmup: int = 3,
        eager: bool = False,
    ) -> None:
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.amp_dtype = amp_dtype
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._check(parameters, warmup, eager)
        self._parameters = parameters
        device = parameters[0].device
        self._batch = tuple(self._checked(t).detach().to(device, copy=True) for t in example_batch)
        self._rates: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        if not eager:
            self._rates = [_as_tensor(group["lr"], device) for group in optimizer.param_groups]
            self._capture(warmup)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step on a batch.

        Args:
            x: inputs, shape and dtype of those of the example; on any device.
            y: targets, likewise.

        Returns:
            The loss without axes, without graph.

        Raises:
            ValueError: a batch has another shape or dtype, or the model is not in training mode.
            RuntimeError: a parameter, buffer or state of the optimizer has been replaced, by
                `optimizer.load_state_dict` for one, and the graph would write the old one.
        """
        self._check_training()
        for name, static, given in zip(("x", "y"), self._batch, (x, y), strict=True):
            if given.shape != static.shape or given.dtype != static.dtype:
                raise ValueError(
                    f"{name}: expected shape {tuple(static.shape)} and {static.dtype} as in the "
                    f"example batch, got {tuple(given.shape)} and {given.dtype}; eager_step takes "
                    "a last batch of another size"
                )
            static.copy_(given.detach(), non_blocking=True)
        if self._graph is None:
            return self.eager_step(*self._batch)
        if self._addresses() != self._captured:
            raise RuntimeError(
                "a parameter, buffer or state of the optimizer was replaced or moved after the "
                "capture: make a new GraphedStep"
            )
        self._follow_rates()
        self._graph.replay()
        # the host has not seen these writes, and cached weights depend on the parameters' versions
        torch.autograd.graph.increment_version(self._parameters)
        return self._loss.clone()  # the next replay overwrites it

    def eager_step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take the same step without the graph, on a batch of any size; return the loss.

        Raises:
            ValueError: the model is not in training mode.
        """
        self._check_training()
        self.optimizer.zero_grad(set_to_none=True)
        device = self._parameters[0].device
        return self._step(x.to(device, non_blocking=True), y.to(device, non_blocking=True))

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        # A graph must cast the weights anew in each replay: autocast's cache would hand it those
        # that an autocast around it cast before.
        with torch.autocast(
            x.device.type,
            dtype=self.amp_dtype,
            enabled=self.amp_dtype is not None,
            cache_enabled=False,
        ):
            loss = self.loss_fn(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _capture(self, warmup: int) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        before = _Snapshot(self.model, self.optimizer)
        try:
            self._follow_rates()
            self._record(warmup)
        except BaseException:
            self._forget_gradients()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            raise
        finally:
            before.restore()
        self._captured = self._addresses()

    def _record(self, warmup: int) -> None:
        with torch.cuda.device(self._parameters[0].device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(warmup):
                    self.eager_step(*self._batch)
            torch.cuda.current_stream().wait_stream(stream)
            self._forget_gradients()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._loss = self._step(*self._batch)

    def _forget_gradients(self) -> None:
        """The graph would add to gradients that are there, in memory that others may free."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    def _addresses(self) -> list[int]:
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        tensors = [*self._parameters, *self.model.buffers(), *states]
        return [t.data_ptr() for t in tensors if isinstance(t, Tensor)]

    def _follow_rates(self) -> None:
        """Let the graph's tensors have the learning rates that the groups have now."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate

    def _check_training(self) -> None:
        if not self.model.training:
            raise ValueError("model: GraphedStep trains, expected a model in training mode")

    def _checked(self, tensor: Any) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"example_batch: expected tensors, got {type(tensor).__name__}")
        return tensor

    def _check(self, parameters: list[Tensor], warmup: int, eager: bool) -> None:
        if self.amp_dtype not in (None, torch.bfloat16):
            raise ValueError(
                "amp_dtype: expected torch.bfloat16, whose gradients need no scaler, or None, "
                f"got {self.amp_dtype}"
            )
        if not isinstance(warmup, int) or warmup < 1:
            raise ValueError(f"warmup: expected an integer >= 1, got {warmup!r}")
        self._check_training()
        if not parameters:
            raise ValueError("optimizer: expected one with parameters, got none")
        if eager:
            return
        for module in self.model.modules():
            if isinstance(module, DistributedDataParallel) or _hooks_of(module):
                raise ValueError(
                    "model: a graph holds the steps of one process, expected no "
                    "DistributedDataParallel and no lipfast.shard; eager=True runs them"
                )
        devices = {str(p.device) for p in parameters}
        if len(devices) != 1 or parameters[0].device.type != "cuda":
            raise ValueError(
                "model: a CUDA graph needs all parameters on one GPU, got them on "
                f"{', '.join(sorted(devices))}; eager=True runs the step without a graph"
            )
        _check_optimizer(self.optimizer)


class _Snapshot:
    """Weights, buffers and optimizer state, to be put back in place."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        own = [p for group in optimizer.param_groups for p in group["params"]]  # a loss's too
        tensors = {id(t): t for t in [*model.parameters(), *model.buffers(), *own]}
        self.pairs = [(t, t.detach().clone()) for t in tensors.values()]
        for state in optimizer.state.values():
            self.pairs += [(t, t.clone()) for t in state.values() if isinstance(t, Tensor)]

    @torch.no_grad()
    def restore(self) -> None:
        known = {id(tensor) for tensor, _ in self.pairs}
        for tensor, value in self.pairs:
            tensor.copy_(value)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, Tensor) and id(tensor) not in known:
                    tensor.zero_()  # with which the momenta and counts of the first step start


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, (torch.optim.SGD, *_ADAM)):
        raise TypeError(f"optimizer: expected SGD, Adam or AdamW of torch.optim, got {name}")
    option = "capturable" if isinstance(optimizer, _ADAM) else "fused"
    for group in optimizer.param_groups:
        if not group[option]:
            raise ValueError(
                f"optimizer: a CUDA graph needs {name} with {option}=True, whose steps read the "
                f"learning rate on the GPU, got {option}={group[option]!r}"
            )
        if group.get("dampening"):
            raise ValueError(
                "optimizer: expected SGD without dampening, whose first step differs from the "
                f"others, got dampening={group['dampening']!r}"
            )


def _as_tensor(rate: float | Tensor, device: torch.device) -> Tensor:
    return torch.tensor(float(rate), dtype=torch.float32, device=device)
