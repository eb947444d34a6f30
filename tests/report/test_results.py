import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from lipfast.report import Comparison

Make = Callable[..., Comparison]


def test_json_round_trip_is_exact(make_comparison: Make, tmp_path: Path) -> None:
    comparison = make_comparison(failed=("lot",))
    comparison.save(tmp_path / "new" / "comparison.json")
    assert Comparison.load(tmp_path / "new" / "comparison.json") == comparison
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["comparison.json"]


def test_json_is_standard_even_with_an_infinite_bound(make_comparison: Make) -> None:
    comparison = make_comparison(("aol",))
    result = dataclasses.replace(comparison.results[0], lipschitz_bound=math.inf)
    comparison = dataclasses.replace(comparison, results=(result,))
    text = comparison.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Comparison.from_json(text) == comparison


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 99, "results": []}', '{"format": 1, "results": [{}]}']
)
def test_other_files_are_refused_with_their_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"comparison\.json: .*expected a comparison as JSON"):
        Comparison.load(path)


def test_failures_are_told_from_finished(make_comparison: Make) -> None:
    comparison = make_comparison(failed=("lot", "soc"))
    assert [r.method for r in comparison.failures] == ["lot", "soc"]
    assert len(comparison.finished) == 5
    assert comparison.radii == (36 / 255, 72 / 255, 108 / 255, 1.0)
