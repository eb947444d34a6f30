"""The Triton kernels of aol_rescale, compiled for each GPU generation without a GPU."""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
STRIDES = ["n_stride", "row_stride", "channel_stride", "tap_stride"]
POINTERS = {
    "aol_rescale_forward_kernel": {"weight": "fp32", "r": "fp32", "out": "half"},
    "aol_rescale_backward_kernel": {
        "grad": "half",
        "weight": "fp32",
        "r": "fp32",
        "out": "fp32",
        "partial": "fp32",
    },
}


SIZES = ["rows", "channels", "taps", *STRIDES]


def compile_kernel(name: str, channels: int, taps: int, half: str, arch: int, ones=()):
    """Compile with the launcher's hints, and the sizes in `ones` specialised to 1."""
    from lipfast.kernels import aol_rescale as kernels

    kinds = {key: half if kind == "half" else kind for key, kind in POINTERS[name].items()}
    signature = {key: f"*{kind}" for key, kind in kinds.items()}
    divisible = [*signature, "channels"]  # what the launcher sees at the paper's widths
    signature |= dict.fromkeys(SIZES, "i32")
    block, padded = kernels._block(channels, taps)
    values = {"ROWS": kernels._ROWS} if "backward" in name else {}
    values |= {"BLOCK": block, "TAPS": padded} | dict.fromkeys(ones, 1)
    signature |= dict.fromkeys(values, "constexpr")
    names = list(signature)
    source = ASTSource(
        fn=getattr(kernels, name),
        signature=signature,
        constexprs={(names.index(key),): value for key, value in values.items()},
        attrs={
            (names.index(key),): [["tt.divisibility", 16]] for key in divisible if key not in ones
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("channels", "taps", "half"),
    [(16, 9, "fp32"), (1024, 9, "bf16"), (1024, 1, "fp16"), (64, 49, "bf16")],
)
@pytest.mark.parametrize("name", POINTERS)
def test_compiles_without_spills(name, channels, taps, half, arch, tmp_path):
    compiled = compile_kernel(name, channels, taps, half, arch)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [str(CUOBJDUMP), "-res-usage", str(cubin)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sizes = {key: int(value) for key, value in re.findall(r"(STACK|LOCAL):(\d+)", usage)}
    assert sizes == {"STACK": 0, "LOCAL": 0}


@pytest.mark.parametrize("ones", [SIZES, ["taps", "tap_stride"]], ids="-".join)
@pytest.mark.parametrize("name", POINTERS)
def test_sizes_of_one_compile(name, ones):
    """Triton takes integer arguments equal to 1 for constants of the compiler."""
    assert compile_kernel(name, 1, 1, "bf16", 90, ones).asm["cubin"]
