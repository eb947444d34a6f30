"""One training step of a sharded model: build the own share, exchange weights and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lipfast.nn.base import LipschitzModule, Prebuilt

from .plan import build, groups
from .shard_exchange import Exchange, Sent, SentGradients
from .shard_group import Control
from .shard_plan import Entry, Layout, Plan


class Step:
    """A forward pass of the model, and the backward passes through it.

    With W the weights of a layer that rank o owns, p its parameters and L_r the loss of rank r,
    rank o returns sum_r dL_r/dW dW/dp as the gradient of p and the others return 0. Whoever
    averages the gradients over the N ranks, as DistributedDataParallel does, therefore has
    (1/N) sum_r dL_r/dp, what he would have had without sharding.

    Args:
        layers: the model's layers; entries of the plan are numbers of them.
        plan: the shares; gets its layouts where it has none.
        parameters: of the layers, those that want a gradient, each once.
        control: of the process group.
        group: the process group that carries weights and gradients.
        fused: build the own share in batches, as `fuse` does.
    """

    def __init__(
        self,
        layers: Sequence[LipschitzModule],
        plan: Plan,
        parameters: Sequence[Tensor],
        control: Control,
        group: dist.ProcessGroup | None,
        fused: bool,
    ) -> None:
        self.layers, self.plan, self.control, self.fused = layers, plan, control, fused
        self.parameters = list(parameters)
        self.device = layers[0].weight.device
        self.exchange = Exchange(group, self.device)
        self._built: dict[int, tuple[Tensor, ...]] | None = {}
        self._error: Exception | None = None
        self._sent: dict[int, Sent] = {}
        self._bucket_of: dict[LipschitzModule, int] = {}
        self._arrived: dict[int, Sequence[Tensor | None]] = {}  # gradients, to be sent in turn
        self._gradients: list[tuple[int, SentGradients]] = []  # with the number of their bucket
        self._tokens: tuple[Tensor, ...] = ()
        self._turn = -1

    # Forward -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Build the own share and send it; returns before the others' shares are here."""
        if self.fused or not self.plan.buckets:
            self._build(self.plan.entries)
        if not self.plan.buckets:
            self.plan.set_layouts(self._agree_on_layouts())
        for number, bucket in enumerate(self.plan.buckets):
            self._build(bucket.entries)
            failed = self._error is not None
            self._sent[number] = self.exchange.send_weights(bucket, self._own_tensors, failed)
            for entry in bucket.entries:
                layer = self.layers[entry.layer]
                self._bucket_of[layer] = number
                layer.prebuilt = Prebuilt(entry.map_size, ())  # on its way: nobody else builds it
        self._tokens = tuple(torch.zeros(1, device=self.device) for _ in self.plan.buckets)
        self._turn = len(self.plan.buckets) - 1  # the bucket whose gradients are sent next
        if self.parameters:
            self._tokens = _Build.apply(self, *self._tokens, *self.parameters)

    def finish(self, layer: Any) -> None:
        """Wait for the weights of the layer's bucket, where they are still on their way."""
        number = self._bucket_of.get(layer)
        if number not in self._sent:
            return
        try:
            self._receive(number)
        except BaseException:
            self.abandon()
            raise

    def _receive(self, number: int) -> None:
        """Give a bucket's weights and buffers to its layers."""
        bucket = self.plan.buckets[number]
        received = self.exchange.weights(bucket, self._sent.pop(number))
        if received is None:
            self._raise_together()
        weights = iter(_Gather.apply(self, number, self._tokens[number], received))
        for entry, layout, tensors in zip(bucket.entries, bucket.layouts, received, strict=True):
            layer = self.layers[entry.layer]
            own = tuple(next(weights) for _ in layout.weights)
            layer.prebuilt = Prebuilt(entry.map_size, own)
            with torch.no_grad():
                new = tensors[len(layout.weights) :]
                for buffer, value in zip(layer.buffers(), new, strict=True):
                    buffer.copy_(value)

    def abandon(self) -> None:
        """Wait for nothing more."""
        self._sent.clear()

    def end(self) -> None:
        """Take the weights from the layers, whether all of them were called or not."""
        try:
            for number in list(self._sent):
                self._receive(number)
        finally:
            for entry in self.plan.entries:
                self.layers[entry.layer].prebuilt = None
            self._tokens = ()  # their graph holds this step, which would hold its graph

    def _build(self, entries: Sequence[Entry]) -> None:
        assert self._built is not None
        own = [
            e
            for e in entries
            if self.plan.owner(e) == self.exchange.rank and e.layer not in self._built
        ]
        if self._error is not None:
            return
        try:
            with torch.enable_grad():
                self._built.update(self._weights_of(own))
        except Exception as error:  # the others would wait for this rank: they are told instead
            if self.device.type != "cpu":
                raise
            self._error = error

    def _weights_of(self, entries: Sequence[Entry]) -> dict[int, tuple[Tensor, ...]]:
        if not self.fused:
            return {e.layer: self.layers[e.layer].training_weights(e.map_size) for e in entries}
        number_of = {self.layers[e.layer]: e.layer for e in entries}
        built = {}
        for members, sizes in groups(number_of, [e.map_size for e in entries]):
            for layer, weights in zip(members, build(members, sizes), strict=True):
                built[number_of[layer]] = weights
        return built

    def _agree_on_layouts(self) -> dict[int, Layout]:
        own = {
            number: Layout.of(weights, self.layers[number].buffers())
            for number, weights in (self._built or {}).items()
        }
        every = self.control.tell_object(None if self._error is not None else own)
        if any(layouts is None for layouts in every):
            self._raise_together()
        return {number: layout for layouts in every for number, layout in layouts.items()}

    def _raise_together(self) -> NoReturn:
        """Raise the error of the rank that could not build its share, on every rank."""
        error = self._error
        own = None if error is None else (isinstance(error, ValueError), str(error))
        messages = self.control.tell_object(own)
        if error is not None:
            raise error
        rank, (is_value_error, text) = next((r, m) for r, m in enumerate(messages) if m is not None)
        kind = ValueError if is_value_error else RuntimeError
        raise kind(f"rank {rank} could not build the weights of its share: {text}")

    def _own_tensors(self, entry: Entry) -> list[Tensor]:
        assert self._built is not None
        return [*self._built[entry.layer], *self.layers[entry.layer].buffers()]

    # Backward ------------------------------------------------------------------------------------

    def send_gradients(self, number: int, gradients: Sequence[Tensor | None]) -> None:
        """Send the gradients of a bucket's weights to their owners, the last bucket first.

        They wait for those of later buckets: ranks that use different layers, or in another order,
        must send alike.
        """
        self._arrived[number] = gradients
        while self._turn in self._arrived:
            self._send_next()

    def _send_next(self) -> None:
        number = self._turn
        bucket = self.plan.buckets[number]
        unused = [None] * sum(len(layout.weights) for layout in bucket.layouts)
        sent = self.exchange.send_gradients(bucket, self._arrived.pop(number, unused))
        self._gradients += [(number, part) for part in sent]
        self._turn -= 1

    def parameter_gradients(self) -> list[Tensor | None]:
        """Return the gradients of `parameters`: of the own layers summed over ranks, else zero."""
        if self._built is None:
            raise RuntimeError(
                "the weights of a sharded model were differentiated before and their graph is "
                "freed: pass retain_graph=True to the first backward pass"
            )
        while self._turn >= 0:
            self._send_next()
        self._turn = len(self.plan.buckets) - 1
        outputs: list[Tensor] = []
        sums: list[Tensor] = []
        for number, part in self._gradients:
            weights = self._own_weights(number, part.dtype)
            total = self.exchange.sum_over_ranks(part.sent)
            places = total.split([weight.numel() for weight in weights])
            outputs += weights
            sums += [p.view(w.shape) for p, w in zip(places, weights, strict=True)]
        self._gradients = []
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        found: Sequence[Tensor | None] = [None] * len(self.parameters)
        if outputs:
            found = torch.autograd.grad(
                outputs, self.parameters, sums, retain_graph=keep, allow_unused=True
            )
        if not keep:
            self._built = None
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self.parameters, found, strict=True)
        ]

    def _own_weights(self, number: int, dtype: torch.dtype) -> list[Tensor]:
        assert self._built is not None
        return [
            weight
            for entry in self.plan.buckets[number].entries
            for weight in self._built.get(entry.layer, ())
            if weight.requires_grad and weight.dtype == dtype
        ]


class _Build(torch.autograd.Function):
    """From the parameters to a token per bucket, by way of the own share's own graph.

    It is created before the layers' nodes and runs behind all of them in the backward pass, while
    the gradients of the buckets are on their way.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, *tokens_and_parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        n = len(step.plan.buckets)
        return tuple(token.clone() for token in tokens_and_parameters[:n])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tokens: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *[None] * len(tokens), *ctx.step.parameter_gradients())


class _Gather(torch.autograd.Function):
    """From a bucket's token to its weights; the gradients of these go to their owners."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, number: int, token: Tensor, received: list[list[Tensor]]
    ) -> tuple[Tensor, ...]:
        ctx.step, ctx.number = step, number
        ctx.set_materialize_grads(False)
        layouts = step.plan.buckets[number].layouts
        pairs = [
            (tensor, item.differentiable)
            for tensors, layout in zip(received, layouts, strict=True)
            for tensor, item in zip(tensors, layout.weights, strict=False)
        ]
        ctx.mark_non_differentiable(*(tensor for tensor, wanted in pairs if not wanted))
        return tuple(tensor for tensor, _ in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.step.send_gradients(ctx.number, gradients)
        return (None, None, torch.zeros(1, device=ctx.step.device), None)
