"""The least time that a GPU needs for some work: its arithmetic, or its memory traffic."""

from __future__ import annotations

from typing import NamedTuple


class Ceiling(NamedTuple):
    """What a GPU reaches: products per second by precision, and memory traffic (read + write).

    FLOP/s and bytes/s.
    """

    bf16: float
    tf32: float
    fp32: float
    memory: float


# H200: bf16 and memory measured (matrix products of random numbers, device copies), tf32 half of
# bf16, fp32 from its data sheet. The others: data sheets, dense, bf16 and memory at 80 %.
_CEILINGS = {
    "H200": Ceiling(785e12, 392e12, 67e12, 4.3e12),
    "H100": Ceiling(791e12, 395e12, 67e12, 2.7e12),
    "A100": Ceiling(250e12, 125e12, 19.5e12, 1.6e12),
}


def ceiling(gpu: str | None) -> Ceiling | None:
    """Return the ceilings of a GPU by its name, as torch reports it; None for an unknown one."""
    return next((c for name, c in _CEILINGS.items() if gpu is not None and name in gpu), None)


def floor_seconds(
    gpu: str | None, *, flops: float = 0.0, moved_bytes: float = 0.0, precision: str = "fp32"
) -> float | None:
    """Return the time in seconds below which a GPU cannot do the work; None for an unknown GPU.

    Args:
        gpu: its name, as torch reports it.
        flops: of products and convolutions; a multiply-add is two.
        moved_bytes: that must be read or written at least once.
        precision: of the products: "bf16", "tf32" or "fp32".
    """
    reached = ceiling(gpu)
    if reached is None:
        return None
    if precision not in ("bf16", "tf32", "fp32"):
        raise ValueError(f"precision: expected bf16, tf32 or fp32, got {precision!r}")
    return max(flops / getattr(reached, precision), moved_bytes / reached.memory)
