"""Several processes, as started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist


class World(NamedTuple):
    """This process among all: rank and world_size for `DeviceLoader`, device for `TrainConfig`."""

    rank: int
    world_size: int
    device: str


@contextmanager
def distributed_from_env(device: str = "cpu") -> Iterator[World]:
    """Join the process group that torchrun describes in the environment, and leave it at the end.

    Without torchrun's variables this yields World(0, 1, device) and does nothing. With them, a
    "cpu" device uses gloo; a "cuda" device uses NCCL and becomes "cuda:<LOCAL_RANK>".

    Raises:
        ValueError: only some of torchrun's variables are set, or one of them is no number, or the
            device has no backend.
    """
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
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", rank=rank, world_size=world_size)
    try:
        yield World(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def _number(name: str) -> int:
    value = os.environ[name]
    if not value.isdigit():
        raise ValueError(f"the environment variable {name} must be a number, got {value!r}")
    return int(value)
