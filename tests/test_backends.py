"""The choice of backends: forced, by environment, automatic; reasons; info."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lipfast.ops  # noqa: F401 (registers the ops)
from lipfast import backends

ROOT = Path(__file__).resolve().parents[1]
X = torch.randn(2, 4, 3)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_set_backend_forces_and_restores(name):
    try:
        backends.set_backend(name)
        assert backends.choose("maxmin", X) == name
    finally:
        backends.set_backend(None)
    assert backends.choose("maxmin", X) == "cpp"


def test_context_managers_nest_and_the_call_goes_first():
    outer = backends.backend("reference")
    with outer:
        with backends.backend("cpp"):
            assert backends.choose("maxmin", X) == "cpp"
            with outer:
                assert backends.choose("maxmin", X) == "reference"
            assert backends.choose("maxmin", X, backend="reference") == "reference"
        assert backends.choose("maxmin", X) == "reference"
    assert backends.choose("maxmin", X) == "cpp"


def test_context_manager_restores_after_an_error():
    with pytest.raises(KeyError), backends.backend("reference"):
        raise KeyError
    assert backends.choose("maxmin", X) == "cpp"


@pytest.mark.parametrize("force", [backends.set_backend, backends.backend])
def test_unknown_name(force):
    with pytest.raises(
        ValueError, match=r"one of triton, cuda, cpp, torch, reference or None, got 'gpu'"
    ):
        force("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks a machine without a GPU")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_forced_backend_that_cannot_run_says_why(name):
    with (
        backends.backend(name),
        pytest.raises(ValueError, match=f"maxmin: backend '{name}' cannot run: "),
    ):
        backends.choose("maxmin", X)


def test_forced_backend_that_the_op_does_not_have(monkeypatch):
    monkeypatch.setitem(backends._can_run, "plain", {"reference": lambda x: None})
    assert backends.choose("plain", X) == "reference"
    with (
        backends.backend("cpp"),
        pytest.raises(ValueError, match="plain: backend 'cpp' cannot run: plain has only"),
    ):
        backends.choose("plain", X)


def test_crossover_by_size(monkeypatch):
    rules = (backends._Rule("cpu", 100, ("cpp",)), backends._Rule("cpu", 0, ("reference",)))
    monkeypatch.setitem(backends._FASTEST, "maxmin", rules)
    assert backends.choose("maxmin", torch.empty(99, 1)) == "reference"
    assert backends.choose("maxmin", torch.empty(100, 1)) == "cpp"


@pytest.mark.parametrize(
    ("archs", "major", "minor", "runs"),
    [
        ("80-real,90-real,100-real,100-virtual", 8, 0, True),
        ("80-real,90-real,100-real,100-virtual", 8, 6, True),
        ("80-real,90-real,100-real,100-virtual", 7, 5, False),
        ("80-real,90-real,100-real,100-virtual", 12, 0, True),
        ("86-real,86-virtual", 8, 0, False),
        ("90a-real", 10, 0, False),
        ("80-real,80-virtual", 9, 0, True),
    ],
)
def test_compiled_architectures(monkeypatch, archs, major, minor, runs):
    class Extension:
        cuda_archs = archs

    monkeypatch.setattr(backends, "_extension", Extension)
    assert backends._compiled_for(major, minor) is runs


def test_environment_variable():
    code = "import torch, lipfast; from lipfast import backends, ops;"
    code += "print(backends.choose('maxmin', torch.ones(2, 2)))"
    assert run_python(code, LIPFAST_BACKEND="reference").stdout.strip() == "reference"
    assert run_python(code, LIPFAST_BACKEND="").stdout.strip() == "cpp"
    bad = run_python(code, LIPFAST_BACKEND="fast")
    assert "environment variable LIPFAST_BACKEND must be one of triton, cuda" in bad.stderr


def test_import_needs_neither_extension_nor_triton():
    code = """
import sys
sys.modules["lipfast._C"] = None
sys.modules["triton"] = None
import torch, lipfast
from lipfast import backends, ops
assert backends.choose("maxmin", torch.ones(2, 2)) == "reference"
assert ops.maxmin(torch.tensor([[1.0, 2.0]])).tolist() == [[2.0, 1.0]]
print(backends.info()["extension"]["reason"], backends.info()["backends"]["triton"], sep="|")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("|triton is not installed")
    assert "install g++ or clang++" in result.stdout


def test_info():
    info = backends.info()
    assert info["torch"] == torch.__version__
    assert info["backends"]["reference"] is None
    assert info["ops"]["maxmin"] == ["triton", "cuda", "cpp", "reference"]
    assert info["extension"]["built"] is (backends.cpp_can_run(torch.empty(0)) is None)


def test_every_environment_variable_is_documented():
    page = (ROOT / "docs" / "environment.md").read_text()
    rows = re.findall(r"^\| `(\w+)`", page, flags=re.MULTILINE)
    assert sorted(rows) == sorted(backends.ENVIRONMENT_VARIABLES)
