"""Fast, sound 1-Lipschitz layers for certified-robust neural networks."""

import importlib
from typing import TYPE_CHECKING, Any

from lipfast.backends import backend, set_backend

if TYPE_CHECKING:
    from lipfast.export.plain import to_plain
    from lipfast.swap.accelerate import accelerate
    from lipfast.swap.convert import convert
    from lipfast.weights.fuse import fuse
    from lipfast.weights.shard import shard

__all__ = [
    "__version__",
    "accelerate",
    "backend",
    "convert",
    "fuse",
    "set_backend",
    "shard",
    "to_plain",
]

__version__ = "0.1.0"

_HOMES = {
    "accelerate": "lipfast.swap",
    "convert": "lipfast.swap",
    "fuse": "lipfast.weights",
    "shard": "lipfast.weights",
    "to_plain": "lipfast.export",
}


def __getattr__(name: str) -> Any:
    """Import the functions on whole models when they are first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
