"""Kernels compiled for GPUs that are not there, and what their machine code needs of a GPU."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_LIMIT = 163 * 1024  # bytes of a block on sm_80, the least of sm_80, sm_90 and sm_100
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")

ANY_TENSOR_CORE = r"\b(?:[DHI]|HG|UTC\w*)MMA\b"
TENSOR_CORE = {  # the widest instructions of each generation
    "tf32": {80: r"\bHMMA\S*TF32", 90: r"\bHGMMA\S*TF32", 100: r"\bUTC\w*MMA"},
    "bf16": {80: r"\bHMMA\S*BF16", 90: r"\bHGMMA\S*BF16", 100: r"\bUTC\w*MMA"},
}

PTXAS = {
    "registers": r"Used (\d+) registers",
    "stack": r"(\d+) bytes stack frame",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}

needs_triton = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    arch: int,
    *,
    divisible: Collection[str] = (),
    ones: Collection[str] = (),
    **options: object,
) -> Any:
    """Compile a Triton kernel as its launcher would on a GPU of `arch`.

    Args:
        kernel: the kernel.
        types: argument -> Triton's type, such as "*fp32" or "i32".
        constants: compile-time argument -> value.
        arch: 80, 90 or 100.
        divisible: arguments that are multiples of 16; those in `ones` are not.
        ones: arguments equal to 1, which Triton takes for constants.
        options: num_warps, num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, **dict.fromkeys(ones, 1)}
    types = {**types, **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in divisible
            if name not in ones
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any, code: str | None = None) -> dict[str, int]:
    """Return what a compiled Triton kernel takes of a GPU.

    Returns:
        registers a thread, bytes of stack (spilled registers lie there) and of local memory a
        thread, bytes of shared memory a block, and, given its machine code, the number of its
        tensor-core instructions.
    """
    report = _cuobjdump(compiled.asm["cubin"], "-res-usage")
    taken = {
        name: int(re.findall(rf"\b{key}:(\d+)", report)[0])
        for name, key in [("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL")]
    }
    taken["shared"] = compiled.metadata.shared
    if code is not None:
        taken["tensor_core_instructions"] = len(re.findall(ANY_TENSOR_CORE, code))
    return taken


def machine_code(compiled: Any) -> str:
    """Return the instructions of a compiled Triton kernel as text."""
    return _cuobjdump(compiled.asm["cubin"], "--dump-sass")


def _cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def nvcc_resources(op: str, arch: int, cubin: Path, *options: str) -> dict[str, dict[str, int]]:
    """Compile csrc/<op>.cu to `cubin` with nvcc and return what each of its kernels takes.

    Returns:
        kernel<template arguments> -> registers a thread, bytes of stack a thread, of spill stores
        and of spill loads, bytes of static shared memory a block.
    """
    command = [NVCC, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", *options]
    command += ["-o", str(cubin), str(ROOT / "csrc" / f"{op}.cu")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    taken = {}
    for part in report.split("Compiling entry function '")[1:]:
        counts = {name: int(re.findall(regex, part)[0]) for name, regex in PTXAS.items()}
        shared = re.findall(r"(\d+) bytes smem", part)  # not there where it is 0
        taken[part.split("'")[0]] = {**counts, "shared": int(shared[0]) if shared else 0}
    lines = "\n".join(taken)
    demangled = subprocess.run(["c++filt"], input=lines, check=True, capture_output=True, text=True)
    noise = r"lipfast::|\(anonymous namespace\)::|^void |\(lipfast.*"
    names = [re.sub(noise, "", name) for name in demangled.stdout.split("\n")]
    return dict(zip(names, taken.values(), strict=True))
