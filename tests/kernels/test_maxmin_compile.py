"""The Triton kernels of maxmin, compiled for each GPU generation without a GPU: no spills."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


SIZES = ["pairs", "singles", "channels", "spatial"]


def compile_kernel(
    name: str, dtype: str, arch: int, channels_last: bool, odd: bool, wide: bool, ones=()
):
    """Compile with the launcher's hints, and the sizes in `ones` specialised to 1."""
    from lipfast.kernels import maxmin as kernels

    kernel = getattr(kernels, name)
    index = "i64" if wide else "i32"
    signature = {"x": f"*{dtype}", "y": f"*{dtype}", "mask": "*u8"}
    signature |= dict.fromkeys(SIZES, index)
    values = {"CHANNELS_LAST": channels_last, "ODD": odd, "WIDE": wide, "BLOCK": kernels._BLOCK}
    values |= dict.fromkeys(ones, 1)
    signature |= dict.fromkeys(values, "constexpr")
    names = list(signature)
    # What the launcher sees in a network: pointers and sizes divisible by 16, an odd count aside.
    divisible = ["x", "y", "mask", "pairs", "spatial", *([] if odd else ["channels"])]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(key),): value for key, value in values.items()},
        attrs={
            (names.index(key),): [["tt.divisibility", 16]] for key in divisible if key not in ones
        },
    )
    options = {"num_warps": 4, "num_stages": 3}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [str(CUOBJDUMP), "-res-usage", str(file)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["maxmin_forward_kernel", "maxmin_backward_kernel"])
@pytest.mark.parametrize(
    ("channels_last", "odd", "wide"),
    [(False, False, False), (True, False, False), (True, True, False), (False, True, True)],
)
def test_compiles_without_spills(name, dtype, arch, channels_last, odd, wide, tmp_path):
    compiled = compile_kernel(name, dtype, arch, channels_last, odd, wide)
    usage = resources(compiled.asm["cubin"], tmp_path)
    assert usage["STACK"] == 0
    assert usage["LOCAL"] == 0
    assert usage["REG"] <= 128


@pytest.mark.parametrize("channels_last", [False, True])
def test_reads_sixteen_bytes_at_a_time(channels_last):
    """Aligned float32 maps are read and written by vectors, or half the bandwidth is lost."""
    ptx = compile_kernel("maxmin_forward_kernel", "fp32", 90, channels_last, False, False).asm[
        "ptx"
    ]
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx


@pytest.mark.parametrize(("channels_last", "wide"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["maxmin_forward_kernel", "maxmin_backward_kernel"])
def test_sizes_of_one_compile(name, channels_last, wide):
    """Triton takes integer arguments equal to 1 for constants of the compiler."""
    assert compile_kernel(name, "fp32", 90, channels_last, True, wide, SIZES).asm["cubin"]
