"""What the ranks of a process group tell each other besides tensors, and how they fail."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_RENAMED = hasattr(dist, "all_gather_single")  # in torch 2.13
all_gather_single: Callable[..., Any] = getattr(
    dist, "all_gather_single" if _RENAMED else "all_gather_into_tensor"
)


class ProcessLost(RuntimeError):
    """Another process of the group ended, or did not answer within the group's time limit."""


@contextmanager
def answers_expected(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Turn the error of a collective that the other ranks did not complete into `ProcessLost`."""
    try:
        yield
    except ProcessLost:
        raise
    except RuntimeError as error:
        if not is_communication_error(error):
            raise
        raise ProcessLost(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} waited for the others in "
            "vain: a process has ended, or did not take part within the time limit of the process "
            f"group (its `timeout`), or took part in something else; {_first_line(error)}"
        ) from error


def is_communication_error(error: BaseException) -> bool:
    """Whether torch.distributed raised the error because of another process."""
    if isinstance(error, dist.DistError):
        return True
    # gloo raises a plain RuntimeError
    signs = ("gloo", "Connection closed", "Connection reset", "Timed out", "timeout", "by peer")
    return type(error) is RuntimeError and any(sign in str(error) for sign in signs)


class Control:
    """Small messages between the ranks of a group, by way of the CPU: no rank's GPU waits."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        if "cpu" not in dist.get_backend_config(group):
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            self.group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self.ranks = dist.get_world_size(group)

    def tell(self, *numbers: int) -> list[list[int]]:
        """Return the numbers of every rank, each of 63 bits."""
        own = torch.tensor(numbers, dtype=torch.int64)
        every = torch.empty(self.ranks * len(numbers), dtype=torch.int64)
        with answers_expected(self.group):
            all_gather_single(every, own, group=self.group)
        return every.view(self.ranks, -1).tolist()

    def tell_object(self, value: Any) -> list[Any]:
        """Return the values of every rank; pickled, between processes that trust each other."""
        every: list[Any] = [None] * self.ranks
        with answers_expected(self.group):
            dist.all_gather_object(every, value, group=self.group)
        return every


def fingerprint(value: object) -> int:
    """63 bits that depend on the text of `value` alone."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little") >> 1


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
