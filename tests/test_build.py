"""The build: wheels that work elsewhere, and machines without nvcc or without a compiler."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    "csrc",
    "kernels",
    "lipfast",
    "CMakeLists.txt",
    "pyproject.toml",
    "setup.py",
    "README.md",
]
COMPILER_VARIABLES = ["CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "LIPFAST_CUDA_ARCHS"]


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lipfast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(monkeypatch) -> ModuleType:
    """setup.py as a module, in an environment that names no compiler."""
    for name in [*COMPILER_VARIABLES, "LIPFAST_CUDA"]:
        monkeypatch.delenv(name, raising=False)
    return load_setup()


@pytest.fixture
def executable(tmp_path):
    def make(name: str, output: str = "") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\nprintf '{output}'\n")
        path.chmod(0o755)
        return path

    return make


def test_nvcc_is_searched_in_order(build, executable, monkeypatch):
    monkeypatch.setenv("PATH", str(executable("path/nvcc").parent))
    default = executable("default/bin/nvcc")
    monkeypatch.setattr(build, "CUDA_FOLDERS", (str(default.parents[1]),))
    assert build.find_nvcc().endswith("path/nvcc")
    for name, nvcc in [("CUDA_PATH", "path2/bin/nvcc"), ("CUDA_HOME", "home/bin/nvcc")]:
        monkeypatch.setenv(name, str(executable(nvcc).parents[1]))
        assert build.find_nvcc().endswith(nvcc)
    monkeypatch.setenv("CUDACXX", str(executable("own/nvcc")))
    assert build.find_nvcc().endswith("own/nvcc")
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "")
    assert build.find_nvcc() == str(default)


def test_nvcc_missing(build, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(build, "CUDA_FOLDERS", ())
    assert build.find_cuda() == (None, "nvcc was not found when lipfast was built")
    monkeypatch.setenv("LIPFAST_CUDA", "1")
    with pytest.raises(
        SystemExit, match=r"LIPFAST_CUDA=1, but nvcc was not found.*install the CUDA"
    ):
        build.find_cuda()


def test_cuda_left_out(build, monkeypatch):
    monkeypatch.setenv("LIPFAST_CUDA", "0")
    assert build.find_cuda() == (None, "LIPFAST_CUDA=0 when lipfast was built")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("LIPFAST_CUDA", "yes", "LIPFAST_CUDA=yes: expected 0, 1 or nothing"),
        ("CUDACXX", "/nowhere/nvcc", "CUDACXX=/nowhere/nvcc: no such compiler"),
    ],
)
def test_bad_variables(build, monkeypatch, name, value, text):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=text):
        build.find_cuda()


def test_named_compiler_must_exist(build, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(SystemExit, match=r"CXX=/nowhere/g\+\+: no such compiler"):
        build.find_compiler()


@pytest.mark.parametrize(
    ("known", "wanted", "archs"),
    [
        ("75 80 86 90 100 120", "", ["80", "90", "100"]),
        ("50 60 70 80", "", ["80"]),
        ("50 60", "", ["60"]),
        ("75 80 86 90 100 120", "86;120", ["86", "120"]),
        ("75 80 86 90 100 120", "90a, 100", ["90a", "100"]),
    ],
)
def test_architectures(build, executable, monkeypatch, known, wanted, archs):
    listing = "".join(f"compute_{arch}\\n" for arch in known.split())
    monkeypatch.setenv("LIPFAST_CUDA_ARCHS", wanted)
    assert build.cuda_archs(str(executable("nvcc", listing))) == archs


def test_unknown_architecture(build, executable, monkeypatch):
    monkeypatch.setenv("LIPFAST_CUDA_ARCHS", "sm_90")
    with pytest.raises(SystemExit, match="LIPFAST_CUDA_ARCHS: 'sm_90' is not an architecture"):
        build.cuda_archs(str(executable("nvcc", "compute_90\\n")))


def copy_sources(folder: Path) -> Path:
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, folder)
    return folder


def unpack_wheel(checkout: Path, target: Path, **environment: str) -> Path:
    """Builds a wheel without network and unpacks it, as an installer would."""
    clean = {name: value for name, value in os.environ.items() if name not in COMPILER_VARIABLES}
    result = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)],
        cwd=checkout,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = target.glob("*.whl")
    site = target / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run_in(site: Path, code: str) -> str:
    """Runs code with the unpacked wheel before everything else, outside the checkout."""
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n" + code
    )
    result = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code],
        cwd=site.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


CHECK = """
import lipfast, torch
from lipfast import backends, ops
assert lipfast.__file__.startswith({site!r}), lipfast.__file__
assert ops.maxmin(torch.tensor([[1.0, 2.0]])).tolist() == [[2.0, 1.0]]
"""


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(tmp_path):
    checkout = copy_sources(tmp_path / "checkout")
    site = unpack_wheel(checkout, tmp_path / "wheel", LIPFAST_CUDA="0")
    code = (
        CHECK.format(site=str(site))
        + """
import lipfast._C, lipfast.kernels.maxmin
assert lipfast._C.__file__.startswith(sys.path[0]), lipfast._C.__file__
assert lipfast.kernels.maxmin.__file__.startswith(sys.path[0])
assert backends.choose("maxmin", torch.ones(1, 2)) == "cpp"
print(lipfast._C.cuda_absent)
"""
    )
    assert run_in(site, code) == "LIPFAST_CUDA=0 when lipfast was built"
    assert (site / "lipfast" / "py.typed").exists()
    templates = {path.relative_to(ROOT) for path in ROOT.glob("lipfast/report/**/*.j2")}
    assert all((site / path).exists() for path in templates)
    objects = {path: path.stat().st_mtime_ns for path in checkout.glob("build/**/*.o")}
    unpack_wheel(checkout, tmp_path / "again", LIPFAST_CUDA="0")
    assert objects
    assert objects == {path: path.stat().st_mtime_ns for path in objects}  # nothing was recompiled


@pytest.mark.slow
def test_without_any_compiler(tmp_path):
    checkout = copy_sources(tmp_path / "checkout")
    (tmp_path / "empty").mkdir()
    site = unpack_wheel(checkout, tmp_path / "wheel", PATH=str(tmp_path / "empty"))
    code = CHECK.format(site=str(site)) + "print(backends.info()['extension']['reason'])"
    assert "no C++ compiler was found when lipfast was installed" in run_in(site, code)


@pytest.mark.slow
def test_failing_compiler_is_an_error(tmp_path):
    checkout = copy_sources(tmp_path / "checkout")
    (checkout / "csrc" / "maxmin.cpp").write_text("#error broken on purpose\n")
    with pytest.raises(AssertionError, match="broken on purpose"):
        unpack_wheel(checkout, tmp_path / "wheel", LIPFAST_CUDA="0")
