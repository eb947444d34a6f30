"""Several processes, as started by torchrun."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from lipfast.weights.shard import shard, unshard
from lipfast.weights.shard_group import ProcessLost

__all__ = ["ProcessLost", "World", "distributed_from_env", "sharded"]


class World(NamedTuple):
    """This process among all: rank and world_size for `DeviceLoader`, device for `TrainConfig`."""

    rank: int
    world_size: int
    device: str


@contextmanager
def distributed_from_env(device: str = "cpu", *, timeout: float | None = None) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment, and leave it at the end.

    Without torchrun's variables this yields World(0, 1, device) and does nothing. With them, a
    "cpu" device uses gloo; a "cuda" device uses NCCL and becomes "cuda:<LOCAL_RANK>".

    Args:
        device: "cpu" or "cuda".
        timeout: seconds that a process waits for the others before it gives up with an error;
            torch's default, 30 minutes for gloo and 10 for NCCL, where it is None.

    Raises:
        ValueError: only some of torchrun's variables are set, or one of them is no number; the
            device has no backend; or the timeout is not positive.
    """
    if timeout is not None and not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        yield World(0, 1, device)
        return
    if missing:
        raise ValueError(
            f"the environment must have all of {', '.join(names)} (torchrun sets them) or neither "
            f"RANK nor WORLD_SIZE, missing {', '.join(missing)}"
        )
    rank, world_size, local_rank = (_number(name) for name in names[:3])
    kind = torch.device(device).type
    if kind == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    elif kind != "cpu":
        raise ValueError(f'device must be "cpu" or "cuda" for several processes, got {device!r}')
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=None if timeout is None else timedelta(seconds=timeout),
    )
    try:
        yield World(rank, world_size, device)
    finally:
        dist.destroy_process_group()


@contextmanager
def sharded(model: nn.Module) -> Iterator[None]:
    """`lipfast.shard` the model for a while."""
    shard(model)
    try:
        yield
    finally:
        unshard(model)


def _number(name: str) -> int:
    value = os.environ[name]
    if not value.isdigit():
        raise ValueError(f"the environment variable {name} must be a number, got {value!r}")
    return int(value)
