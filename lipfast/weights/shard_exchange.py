"""Weights to every rank, and their gradients to the ranks that built them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .shard_group import all_gather_single, answers_expected
from .shard_plan import Bucket, Entry


class Sent(NamedTuple):
    """A collective on its way: `buffer` holds every rank's part once `work` is done."""

    work: dist.Work
    buffer: Tensor


class SentGradients(NamedTuple):
    """Gradients of the own weights of one dtype, in the order of the bucket's entries."""

    dtype: torch.dtype
    sent: Sent


class Exchange:
    """Collectives of a process group on one device, asynchronous until their result is asked for.

    Weights and buffers of all dtypes travel as bytes, in segments that are padded to the largest
    one. Gradients are not padded; they are added up in the order of the ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def send_weights(
        self, bucket: Bucket, own: Callable[[Entry], Sequence[Tensor]], failed: bool
    ) -> Sent:
        """Send what `own` returns for the own entries; only the flag counts if they `failed`."""
        offsets, n_bytes = bucket.offsets(self.ranks)
        segment = torch.empty(n_bytes, dtype=torch.uint8, device=self.device)
        segment[:1].fill_(failed)
        for entry, owner, places in zip(bucket.entries, bucket.owners, offsets, strict=True):
            if failed or owner != self.rank:
                continue
            for tensor, place in zip(own(entry), places, strict=True):
                n = tensor.numel() * tensor.element_size()
                part = segment[place : place + n].view(tensor.dtype).view(tensor.shape)
                part.copy_(tensor.detach())
        buffer = segment.new_empty(self.ranks * n_bytes)
        with answers_expected(self.group):
            work = all_gather_single(buffer, segment, group=self.group, async_op=True)
        return Sent(work, buffer)

    def weights(self, bucket: Bucket, sent: Sent) -> list[list[Tensor]] | None:
        """Return the items of every entry, views of one buffer; None where a rank's flag is set.

        The flags are read on a CPU alone.
        """
        with answers_expected(self.group):
            sent.work.wait()
        segments = sent.buffer.view(self.ranks, -1)
        if self.device.type == "cpu" and bool(segments[:, 0].any()):
            return None
        offsets, _ = bucket.offsets(self.ranks)
        return [
            [
                segments[owner, place : place + item.n_bytes].view(item.dtype).view(item.shape)
                for item, place in zip((*layout.weights, *layout.buffers), places, strict=True)
            ]
            for owner, layout, places in zip(bucket.owners, bucket.layouts, offsets, strict=True)
        ]

    def send_gradients(
        self, bucket: Bucket, gradients: Sequence[Tensor | None]
    ) -> list[SentGradients]:
        """Send the gradients of a bucket's weights, None for zero, to the weights' owners."""
        pairs = zip(bucket.owners, bucket.layouts, strict=True)
        items = [(owner, item) for owner, layout in pairs for item in layout.weights]
        sent = []
        for dtype in bucket.dtypes():
            sizes = [0] * self.ranks
            parts = []
            for (owner, item), gradient in zip(items, gradients, strict=True):
                if item.differentiable and item.dtype == dtype:
                    sizes[owner] += item.numel
                    parts.append((owner, item, gradient))
            parts.sort(key=lambda part: part[0])  # stable: the bucket's order in each rank's part
            outgoing = torch.empty(sum(sizes), dtype=dtype, device=self.device)
            places = outgoing.split([item.numel for _, item, _ in parts])
            for (_, item, gradient), place in zip(parts, places, strict=True):
                if gradient is None:
                    place.zero_()
                else:
                    place.view(item.shape).copy_(gradient)
            own = sizes[self.rank]
            incoming = outgoing.new_empty(self.ranks * own)
            with answers_expected(self.group):
                work = dist.all_to_all_single(
                    incoming,
                    outgoing,
                    [own] * self.ranks,
                    sizes,
                    group=self.group,
                    async_op=True,
                )
            sent.append(SentGradients(dtype, Sent(work, incoming)))
        return sent

    def sum_over_ranks(self, sent: Sent) -> Tensor:
        """Return the sum of the parts that the ranks sent to this one, flat."""
        with answers_expected(self.group):
            sent.work.wait()
        return sent.buffer.view(self.ranks, -1).sum(0)
