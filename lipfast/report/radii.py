"""Certification radii as people write them: fractions such as 36/255."""

from __future__ import annotations

import math
from fractions import Fraction


def parse_radius(text: str) -> float:
    """Parse a certification radius: a decimal number or a fraction such as "36/255".

    Returns the radius in the l2 norm of images with pixels in [0, 1]. Raises ValueError when the
    text is neither, or when the radius is negative or not finite.
    """
    expected = "a number or a fraction such as 36/255, at least 0"
    try:
        numerator, slash, denominator = text.partition("/")
        radius = float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"radius: expected {expected}, got {text!r}") from None
    if not math.isfinite(radius) or radius < 0:
        raise ValueError(f"radius: expected {expected}, got {text!r}")
    return radius


def radius_label(radius: float) -> str:
    """Write a radius as "36/255" where it is a multiple of 1/255 below 1, else as a number."""
    steps = Fraction(radius).limit_denominator(255) * 255
    if steps.denominator == 1 and 0 < radius < 1 and radius == steps.numerator / 255:
        return f"{steps.numerator}/255"
    return f"{radius:g}"
