"""Fast, sound 1-Lipschitz layers for certified-robust neural networks."""

__version__ = "0.1.0"
