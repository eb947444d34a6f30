"""One training step of a sharded model: build the own share, exchange weights and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lipfast.nn.base import LipschitzModule, Prebuilt

from .shard_group import Control, all_gather_single, answers_expected
from .shard_plan import Bucket, Entry, Layout, Plan


class _Sent(NamedTuple):
    """A collective on its way: `buffer` holds every rank's part once `work` is done."""

    work: dist.Work
    buffer: Tensor


class _Summand(NamedTuple):
    bucket: int
    dtype: torch.dtype
    sent: _Sent


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
    """

    def __init__(
        self,
        layers: Sequence[LipschitzModule],
        plan: Plan,
        parameters: Sequence[Tensor],
        control: Control,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.layers, self.plan, self.control, self.group = layers, plan, control, group
        self.parameters = list(parameters)
        self.rank = dist.get_rank(group)
        self.device = layers[0].weight.device
        self._built: dict[int, tuple[Tensor, ...]] | None = {}
        self._error: Exception | None = None
        self._sent: dict[int, _Sent] = {}
        self._bucket_of: dict[LipschitzModule, int] = {}
        self._summands: list[_Summand] = []
        self._tokens: tuple[Tensor, ...] = ()

    # Forward -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Build the own share and send it; returns before the others' shares are here."""
        if not self.plan.buckets:
            for entry in self.plan.entries:
                self._build(entry)
            self.plan.set_layouts(self._agree_on_layouts())
        for number, bucket in enumerate(self.plan.buckets):
            for entry in bucket.entries:
                self._bucket_of[self.layers[entry.layer]] = number
                self._build(entry)
            self._sent[number] = self._send_weights(bucket)
        self._tokens = tuple(torch.zeros(1, device=self.device) for _ in self.plan.buckets)
        if self.parameters:
            self._tokens = _Build.apply(self, *self._tokens, *self.parameters)

    def finish(self, layer: Any) -> None:
        """Wait for the weights of the layer's bucket, where they are still on their way."""
        number = self._bucket_of.get(layer)
        if number in self._sent:
            self._receive(number)

    def _receive(self, number: int) -> None:
        """Give a bucket's weights and buffers to its layers."""
        bucket, sent = self.plan.buckets[number], self._sent.pop(number)
        with answers_expected(self.group):
            sent.work.wait()
        segments = sent.buffer.view(self.control.ranks, -1)
        if self.device.type == "cpu" and bool(segments[:, 0].any()):
            self.raise_together()
        offsets, _ = bucket.offsets(self.control.ranks)
        received: list[list[Tensor]] = []
        for owner, layout, places in zip(bucket.owners, bucket.layouts, offsets, strict=True):
            items = (*layout.weights, *layout.buffers)
            received.append(
                [
                    segments[owner, place : place + item.n_bytes].view(item.dtype).view(item.shape)
                    for item, place in zip(items, places, strict=True)
                ]
            )
        weights = iter(_Gather.apply(self, number, self._tokens[number], received))
        for entry, layout, tensors in zip(bucket.entries, bucket.layouts, received, strict=True):
            layer = self.layers[entry.layer]
            own = tuple(next(weights) for _ in layout.weights)
            layer.prebuilt = Prebuilt(entry.map_size, own)
            with torch.no_grad():
                new = tensors[len(layout.weights) :]
                for buffer, value in zip(layer.buffers(), new, strict=True):
                    buffer.copy_(value)

    def end(self) -> None:
        """Take the weights from the layers, whether all of them were called or not."""
        for number in list(self._sent):
            self._receive(number)
        for entry in self.plan.entries:
            self.layers[entry.layer].prebuilt = None

    def _build(self, entry: Entry) -> None:
        assert self._built is not None
        owned = self.plan.owner(entry) == self.rank
        if not owned or entry.layer in self._built or self._error is not None:
            return
        try:
            with torch.enable_grad():
                weights = self.layers[entry.layer].training_weights(entry.map_size)
        except Exception as error:  # the others would wait for this rank: they are told instead
            if self.device.type != "cpu":
                raise
            self._error = error
            return
        self._built[entry.layer] = weights

    def _agree_on_layouts(self) -> dict[int, Layout]:
        own = {
            number: Layout.of(weights, self.layers[number].buffers())
            for number, weights in (self._built or {}).items()
        }
        every = self.control.tell_object(None if self._error is not None else own)
        if any(layouts is None for layouts in every):
            self.raise_together()
        return {number: layout for layouts in every for number, layout in layouts.items()}

    def raise_together(self) -> None:
        """Raise the error of the rank that could not build its share, on every rank."""
        error = self._error
        own = None if error is None else (isinstance(error, ValueError), str(error))
        messages = self.control.tell_object(own)
        if error is not None:
            raise error
        rank, (is_value_error, text) = next((r, m) for r, m in enumerate(messages) if m is not None)
        kind = ValueError if is_value_error else RuntimeError
        raise kind(f"rank {rank} could not build the weights of its share: {text}")

    def _send_weights(self, bucket: Bucket) -> _Sent:
        assert self._built is not None
        offsets, n_bytes = bucket.offsets(self.control.ranks)
        segment = torch.empty(n_bytes, dtype=torch.uint8, device=self.device)
        segment[:1].fill_(self._error is not None)
        for entry, places in zip(bucket.entries, offsets, strict=True):
            weights = self._built.get(entry.layer)
            if weights is None:
                continue
            tensors = [*weights, *self.layers[entry.layer].buffers()]
            for tensor, place in zip(tensors, places, strict=True):
                n = tensor.numel() * tensor.element_size()
                part = segment[place : place + n].view(tensor.dtype).view(tensor.shape)
                part.copy_(tensor.detach())
        buffer = segment.new_empty(self.control.ranks * n_bytes)
        with answers_expected(self.group):
            work = all_gather_single(buffer, segment, group=self.group, async_op=True)
        return _Sent(work, buffer)

    # Backward ------------------------------------------------------------------------------------

    def send_gradients(self, number: int, gradients: Sequence[Tensor | None]) -> None:
        """Send the gradients of a bucket's weights to their owners."""
        bucket = self.plan.buckets[number]
        items = [item for layout in bucket.layouts for item in layout.weights]
        owners = [
            owner
            for owner, layout in zip(bucket.owners, bucket.layouts, strict=True)
            for _ in layout.weights
        ]
        for dtype in bucket.dtypes():
            sizes, parts = [0] * self.control.ranks, []
            for owner in range(self.control.ranks):
                for item, gradient, its_owner in zip(items, gradients, owners, strict=True):
                    if its_owner == owner and item.differentiable and item.dtype == dtype:
                        sizes[owner] += item.numel
                        parts.append((item, gradient))
            outgoing = torch.empty(sum(sizes), dtype=dtype, device=self.device)
            for (item, gradient), part in zip(
                parts, outgoing.split([item.numel for item, _ in parts]), strict=True
            ):
                if gradient is None:
                    part.zero_()
                else:
                    part.view(item.shape).copy_(gradient)
            own = sizes[self.rank]
            incoming = outgoing.new_empty(self.control.ranks * own)
            with answers_expected(self.group):
                work = dist.all_to_all_single(
                    incoming,
                    outgoing,
                    [own] * self.control.ranks,
                    sizes,
                    group=self.group,
                    async_op=True,
                )
            self._summands.append(_Summand(number, dtype, _Sent(work, incoming)))

    def parameter_gradients(self) -> list[Tensor | None]:
        """Return the gradients of `parameters`: of the own layers summed over ranks, else zero."""
        if self._built is None:
            raise RuntimeError(
                "the weights of a sharded model were differentiated before and their graph is "
                "freed: pass retain_graph=True to the first backward pass"
            )
        outputs: list[Tensor] = []
        sums: list[Tensor] = []
        for summand in self._summands:
            with answers_expected(self.group):
                summand.sent.work.wait()
            weights = self._own_weights(summand.bucket, summand.dtype)
            total = summand.sent.buffer.view(self.control.ranks, -1).sum(0)
            sizes = [weight.numel() for weight in weights]
            outputs += weights
            sums += [
                part.view(weight.shape)
                for part, weight in zip(total.split(sizes), weights, strict=True)
            ]
        self._summands = []
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
        return (None, None, ctx.step._tokens[ctx.number].new_zeros(1), None)
