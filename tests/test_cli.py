import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

import lipfast
from lipfast.cli import app

CONTROL_CODES = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def run(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Run the command and return its output and error output."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert not CONTROL_CODES.search(result.stdout)
    assert not CONTROL_CODES.search(result.stderr)
    return result.stdout, result.stderr


def error_line(*arguments: str | Path, code: int = 2) -> str:
    _, error = run(*arguments, code=code)
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    return error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    output, _ = run(
        "train", "--method", "aol", "--data", "digits", "--epochs", "1", "--out", folder
    )
    assert "aol on digits, " in output
    assert re.search(r"^epoch 1/1: loss \d", output, re.MULTILINE)
    path = folder / "last.safetensors"
    assert f"checkpoint: {path}\n" in output
    assert path.exists()
    return path


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipfast.report.measure.MINIMUM_SECONDS", 0.0)
    monkeypatch.setattr("lipfast.report.measure.MINIMUM_REPEATS", 1)


def test_version() -> None:
    assert run("--version")[0] == f"lipfast {lipfast.__version__}\n"


def test_help_names_the_commands() -> None:
    output, _ = run("--help")
    for command in ("info", "train", "certify", "compare"):
        assert re.search(rf"^ +{command} ", output, re.MULTILINE)


def test_info_says_what_is_available() -> None:
    output, _ = run("info")
    for word in ("Versions", "torch", "lipfast._C", "Backends", "Environment variables", "maxmin"):
        assert word in output
    assert re.search(r"reference +available", output)
    for backend, reason in lipfast.backends.info()["backends"].items():
        if reason is not None:
            assert re.search(rf"{backend} +not available: {re.escape(reason[:20])}", output)


def test_certify_prints_and_writes_the_same_figures(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "figures.json"
    output, _ = run(
        *("certify", checkpoint, "--data", "digits"),
        *("--radius", "36/255", "--radius", "0.01", "--json", file),
    )
    figures = json.loads(file.read_text())
    assert figures["n_samples"] == 360
    assert [c["label"] for c in figures["certified"]] == ["36/255", "0.01"]
    assert figures["certified"][0]["radius"] == 36 / 255
    assert f"accuracy             {100 * figures['accuracy']:.2f} %\n" in output
    for entry in figures["certified"]:
        assert re.search(
            rf"certified at {entry['label']} +{100 * entry['accuracy']:.2f} %\n", output
        )
        assert entry["accuracy"] <= figures["accuracy"]
    assert max(figures["layer_bounds"].values()) <= 1 + 1e-6
    assert re.search(r"Lipschitz bound +1", output)
    assert re.search(r"largest layer bound +1.*\(\w", output)


def test_certify_takes_the_papers_radii_by_default(checkpoint: Path) -> None:
    output, _ = run("certify", checkpoint, "--data", "digits")
    assert re.findall(r"certified at (\S+)", output) == ["36/255", "72/255", "108/255", "1"]


def test_train_resumes(checkpoint: Path) -> None:
    arguments = ("train", "--method", "aol", "--data", "digits", "--resume", "--out")
    output, _ = run(*arguments, checkpoint.parent, "--epochs", "1")
    assert "1 epochs in" in output
    assert "epochs = 1" in error_line(*arguments, checkpoint.parent, "--epochs", "2")
    assert "no checkpoint" in error_line(*arguments, checkpoint.parent / "empty")


def test_compare_writes_the_report_and_prints_the_table(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("compare", "--data", "digits", "--methods", "cpl", "--epochs", "1", "--out", out)
    output, error = run(*arguments)
    assert error == ""
    assert re.search(r"^CPL +\S+k( +[\d.]+){9}$", output, re.MULTILINE)
    assert "largest layer bound: 1" in output
    for name in ("comparison.json", "table.md", "table.csv", "report.html", "radar.png"):
        assert f"{out / name}\n" in output
        assert (out / name).exists()
    assert "kept from" in run(*arguments, "--resume")[0]
    assert "its seed is 0" in error_line(*arguments, "--resume", "--seed", "1")


def test_compare_with_a_failed_method_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lipfast.report.compare.train", train)
    output, error = run(
        *("compare", "--data", "digits", "--methods", "aol", "--out", tmp_path), code=1
    )
    assert error == "error: AOL failed: out of memory\n"
    assert re.search(r"^AOL +failed *$", output, re.MULTILINE)


def test_diverged_training_is_one_line(tmp_path: Path) -> None:
    error = error_line(
        *("train", "--method", "cpl", "--data", "digits", "--lr", "1e30", "--epochs", "2"),
        *("--out", tmp_path),
        code=1,
    )
    assert "diverged" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--method", "xyz", "--data", "digits", "--out", "x"), "aol, bcop, .* 'xyz'"),
        (("train", "--method", "aol", "--data", "mnist", "--out", "x"), "digits, .* 'mnist'"),
        (("train", "--method", "aol", "--data", "cifar10", "--out", "x"), "cifar10 is not in"),
        (("train", "--method", "aol", "--data", "digits", "--lr", "-1", "--out", "x"), "lr must"),
        (("train", "--method", "aol", "--data", "digits", "--size", "Q", "--out", "x"), "size: "),
        (("train", "--method", "aol", "--data", "digits", "--device", "q", "--out", "x"), "device"),
        (("train", "--method", "aol", "--data", "digits", "--batch-size", "0", "--out", "x"), "0"),
        (("compare", "--data", "cifar10", "--out", "x"), "cifar10 is not in"),
        (("compare", "--data", "digits", "--methods", "aol,q", "--out", "x"), "methods: .* got q"),
        (("compare", "--data", "digits", "--epochs", "0", "--out", "x"), "epochs must be"),
        (("compare", "--data", "digits", "--out", "file"), "file"),
        (("certify", "none.safetensors", "--data", "digits"), "none.safetensors"),
        (("certify", "file", "--data", "digits"), "file is truncated or not a safetensors"),
        (("certify", "other.safetensors", "--data", "digits"), "not written by lipfast"),
    ],
)
def test_user_errors_are_one_line_with_code_2(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIPFAST_DATA", raising=False)
    Path("file").write_bytes(b"not a checkpoint")
    save_file({"x": torch.zeros(1)}, "other.safetensors")
    assert re.search(words, error_line(*arguments))


@pytest.mark.parametrize("radius", ["x", "1/0", "-1", "nan"])
def test_bad_radius(checkpoint: Path, radius: str) -> None:
    error = error_line("certify", checkpoint, "--data", "digits", f"--radius={radius}")
    assert "fraction such as 36/255" in error


def test_another_data_set_than_in_training(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lipfast.data import load

    digits = load("digits")
    monkeypatch.setattr("lipfast.report.certification.load", lambda name, root: digits)
    error = error_line("certify", checkpoint, "--data", "cifar10")
    assert "expected digits, as in training, got cifar10" in error


def test_missing_option_is_a_usage_error() -> None:
    _, error = run("train", "--method", "aol", code=2)
    assert "Missing option '--data'" in error


def test_unexpected_errors_keep_their_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("lipfast.training.train", train)
    with pytest.raises(AssertionError, match="a bug"):
        run("train", "--method", "aol", "--data", "digits", "--out", tmp_path)


def test_python_m_and_torchrun_environment(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lipfast"]
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"lipfast {lipfast.__version__}\n"
    arguments = ["train", "--method", "cpl", "--data", "digits", "--epochs", "1", "--out", "out"]
    arguments += ["--shard-weights", "--timeout", "60"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    shown = subprocess.run(
        [*launcher, "--nproc-per-node=2", "-m", "lipfast", *arguments, "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("epoch 1/1: loss") == 1
    assert (tmp_path / "out" / "last.safetensors").exists()
