"""Each example runs as a script and learns something that can be certified."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LINE = re.compile(
    r"^(?P<name>.+): accuracy (?P<accuracy>[\d.]+), certified at 36/255 (?P<certified>[\d.]+), "
    r"Lipschitz bound (?P<bound>[\d.]+)$",
    re.MULTILINE,
)


def results(script, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {
        match["name"]: [float(match[key]) for key in ("accuracy", "certified", "bound")]
        for match in LINE.finditer(done.stdout)
    }


def check(result, least):
    accuracy, certified, bound = result
    assert accuracy >= least
    assert least / 2 <= certified <= accuracy
    assert bound <= 1.001


@pytest.mark.slow
def test_both_swaps_in_a_plain_loop():
    found = results("plain_loop.py", "--epochs", "10")
    assert list(found) == ["accelerate", "convert"]
    for result in found.values():
        check(result, least=0.6)


@pytest.mark.slow
def test_lightning():
    pytest.importorskip("lightning")
    found = results("lightning_example.py", "--epochs", "10", "--method", "cpl")
    check(found["lightning, cpl"], least=0.6)


@pytest.mark.slow
def test_hugging_face_accelerate_in_mixed_precision():
    pytest.importorskip("accelerate")
    found = results("accelerate_example.py", "--epochs", "10", "--mixed-precision", "bf16")
    check(found["accelerate, aol, bf16"], least=0.6)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py"), key=str), ids=lambda p: p.name)
def test_an_example_is_short_and_tested(script):
    source = script.read_text()
    assert len(source.splitlines()) <= 100
    compile(source, str(script), "exec")
    if script.name != "common.py":
        assert f'"{script.name}"' in Path(__file__).read_text()
