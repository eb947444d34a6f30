"""The Triton kernel of fourier_conv, compiled for each GPU generation without a GPU."""

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

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = ["a_real", "a_imaginary", "b_real", "b_imaginary", "out_real", "out_imaginary"]
TENSOR_CORE = {80: r"\bHMMA\S*TF32", 90: r"\bHGMMA\S*TF32", 100: r"\bUTC\w*MMA"}


SIZES = ["m", "n", "depth", "a_stride", "b_stride"]


def compile_kernel(arch: int, rows: int, columns: int, precision: str, conjugate: bool, ones=()):
    """Compile with the launcher's hints, and the sizes in `ones` specialised to 1."""
    from lipfast.kernels.fourier_conv import _schedule, planar_product_kernel

    options = _schedule(rows, columns, precision)
    signature = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(SIZES, "i32")
    divisible = list(signature)  # what the launcher sees at the paper's widths and batches
    values = {
        "ROWS": rows,
        "COLUMNS": columns,
        "DEPTH": options.pop("DEPTH"),
        "CONJUGATE": conjugate,
        "PRECISION": precision,
    }
    values |= dict.fromkeys(ones, 1)
    signature |= dict.fromkeys(values, "constexpr")
    names = list(signature)
    source = ASTSource(
        fn=planar_product_kernel,
        signature=signature,
        constexprs={(names.index(key),): value for key, value in values.items()},
        attrs={
            (names.index(key),): [["tt.divisibility", 16]] for key in divisible if key not in ones
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def dump(cubin: bytes, folder: Path, option: str) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [str(TOOLS / "cuobjdump"), option, str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(("m", "n", "conjugate"), [(256, 16, False), (256, 1024, True)])
def test_compiles_without_spills(m, n, conjugate, precision, arch, tmp_path):
    from lipfast.kernels import fourier_conv as kernels

    compiled = compile_kernel(arch, kernels._tile(m), kernels._tile(n), precision, conjugate)
    usage = dump(compiled.asm["cubin"], tmp_path, "-res-usage")
    sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert sizes["STACK"] == 0
    assert sizes["LOCAL"] == 0
    assert compiled.metadata.shared <= 163 * 1024  # of a block on sm_80, the least of the three
    code = dump(compiled.asm["cubin"], tmp_path, "--dump-sass")
    if precision == "ieee":
        assert not re.search(r"\b(H|HG|UTC\w*)MMA\b", code)
    elif min(m, n) >= 64:
        assert re.search(TENSOR_CORE[arch], code)
    else:
        assert re.search(r"\b(H|HG|UTC\w*)MMA\S*", code)


@pytest.mark.parametrize("ones", [SIZES, ["m"], ["depth"]], ids="-".join)
def test_sizes_of_one_compile(ones):
    """Triton takes integer arguments equal to 1 for constants of the compiler."""
    assert compile_kernel(90, 16, 16, "tf32", True, ones).asm["cubin"]
