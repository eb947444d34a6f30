import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipfast.report import parse_radius, radius_label


@pytest.mark.parametrize(
    ("text", "radius"),
    [("36/255", 36 / 255), ("1", 1.0), ("0.5", 0.5), (" 72 / 255 ", 72 / 255), ("0", 0.0)],
)
def test_parses_numbers_and_fractions(text: str, radius: float) -> None:
    assert parse_radius(text) == radius


@pytest.mark.parametrize(
    "text", ["", "x", "1/0", "-1", "-36/255", "nan", "inf", "1/inf/2", "36/", "/255", "1/2/3"]
)
def test_rejects_what_is_no_radius(text: str) -> None:
    with pytest.raises(ValueError, match=r"radius: expected .* such as 36/255, .* got"):
        parse_radius(text)


@pytest.mark.parametrize(
    ("radius", "label"),
    [(36 / 255, "36/255"), (108 / 255, "108/255"), (1.0, "1"), (0.5, "0.5"), (0.0, "0")],
)
def test_labels(radius: float, label: str) -> None:
    assert radius_label(radius) == label


@given(st.integers(1, 254))
def test_label_of_a_pixel_step_parses_back_exactly(steps: int) -> None:
    assert parse_radius(radius_label(steps / 255)) == steps / 255


@given(st.floats(0, 10))
def test_label_is_close_to_the_radius(radius: float) -> None:
    assert math.isclose(parse_radius(radius_label(radius)), radius, rel_tol=1e-5)
