"""Multiply-adds of a training step of one 3x3 (k x k) layer, by formula."""

from __future__ import annotations

from typing import NamedTuple

from lipfast.nn import METHODS

# Complex products as four real ones; 12 matrix products forward, 11 backward: docs/math/polar.md
_POLAR_PRODUCTS = 12 + 11
_SOC_TERMS = 5
_CPL_PATCH = 32
_FORWARD_AND_BACKWARD = 3  # of a product: itself, and the gradients of its two factors


class Cost(NamedTuple):
    """Multiply-adds of one training step, forward and backward: on the maps, and on the weights."""

    maps: float
    weights: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.maps + self.weights


def training_cost(method: str, channels: int, side: int, batch: int, kernel_size: int = 3) -> Cost:
    """Return the multiply-adds of a layer's training step, to leading order.

    Real multiply-adds of the default forms of lipfast, forward and backward; Fourier transforms,
    which are of lower order, and sums over entries are left out.

    Args:
        method: key of `lipfast.nn.METHODS`, or "conv" for `torch.nn.Conv2d`.
        channels: c of input and output.
        side: height and width of the maps.
        batch: number of maps.
        kernel_size: k, odd.

    Raises:
        ValueError: unknown method, or a number below 1.
    """
    if method != "conv" and method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)} or conv, got {method!r}")
    numbers = {"channels": channels, "side": side, "batch": batch, "kernel_size": kernel_size}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value!r}")
    c, k = channels, kernel_size
    convolution = _FORWARD_AND_BACKWARD * batch * side**2 * c**2 * k**2
    spectral = _FORWARD_AND_BACKWARD * 4 * batch * c**2  # for each frequency of the half plane
    gram = _FORWARD_AND_BACKWARD * (k**4 + k**2) / 2 * c**3
    if method == "conv":
        return Cost(convolution, 0)
    if method == "aol":
        return Cost(convolution, gram)
    if method == "sll":
        return Cost(2 * convolution, gram)
    if method == "bcop":
        polar = (2 * k - 1) * _POLAR_PRODUCTS * c**3
        return Cost(convolution, polar + _FORWARD_AND_BACKWARD * _block_taps(k) * c**3)
    if method == "cpl":
        patch = min(side, _CPL_PATCH) ** 2
        return Cost(2 * convolution, _FORWARD_AND_BACKWARD * patch * c**2 * k**2)
    if method == "soc":
        estimate = 2 * k**2 * _half_plane(max(1, 8 * (k - 1))) * c**2
        series = Cost(_SOC_TERMS * convolution, estimate)
        if k > 1:
            return series
        powers = _FORWARD_AND_BACKWARD * (_SOC_TERMS - 1) * c**3  # the polynomial as one matrix
        return min(series, Cost(convolution, estimate + powers), key=lambda cost: cost.total)
    if k == 1:  # one real matrix serves every frequency
        return Cost(convolution, (_POLAR_PRODUCTS if method == "lot" else 3) * c**3)
    if method == "lot":
        frequencies = _half_plane(side + 2 * (k // 2))
        return Cost(frequencies * spectral, 4 * _POLAR_PRODUCTS * frequencies * c**3)
    frequencies = _half_plane(side)
    return Cost(frequencies * spectral, 4 * 3 * frequencies * c**3)


def _half_plane(side: int) -> int:
    return side * (side // 2 + 1)


def _block_taps(kernel_size: int) -> int:
    """Taps of the kernel before each of the 2 (k - 1) projectors that widen it in turns."""
    height = width = 1
    taps = 0
    for step in range(2 * (kernel_size - 1)):
        taps += height * width
        height, width = (height + 1, width) if step % 2 == 0 else (height, width + 1)
    return taps
