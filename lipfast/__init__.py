"""Fast, sound 1-Lipschitz layers for certified-robust neural networks."""

from lipfast.backends import backend, set_backend

__all__ = ["__version__", "backend", "set_backend"]

__version__ = "0.1.0"
