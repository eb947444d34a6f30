"""What every launch of a Triton kernel needs."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_its_gpu(launcher: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let the GPU of the first argument be the current one: Triton launches kernels there."""

    @functools.wraps(launcher)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.cuda.device_of(args[0]):
            return launcher(*args, **kwargs)

    return guarded
