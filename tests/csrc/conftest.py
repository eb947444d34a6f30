"""Building the CUDA sources for the CPU."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build_on_cpu(tmp_path_factory) -> Callable[[str], ctypes.CDLL]:
    """Compile <op>_on_cpu.cpp, which includes <op>.cu, with the host compiler, and load it."""
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    compiler = next(filter(shutil.which, filter(None, compilers)), None)
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-fPIC", "-shared"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined", f"-I{ROOT}/csrc"]

    def build(op: str) -> ctypes.CDLL:
        source = Path(__file__).parent / f"{op}_on_cpu.cpp"
        target = tmp_path_factory.mktemp("cuda_on_cpu") / f"{op}.so"
        subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))

    return build
