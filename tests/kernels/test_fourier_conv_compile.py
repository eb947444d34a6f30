"""The Triton kernel of fourier_conv, compiled for each GPU generation without a GPU."""

import re

import pytest
from compiled_kernels import (
    ANY_TENSOR_CORE,
    SHARED_LIMIT,
    TENSOR_CORE,
    compile_kernel,
    machine_code,
    needs_triton,
    resources,
)

pytest.importorskip("triton")
pytestmark = needs_triton

POINTERS = ["a_real", "a_imaginary", "b_real", "b_imaginary", "out_real", "out_imaginary"]
SIZES = ["m", "n", "depth", "a_stride", "b_stride"]


def compile_as_launched(
    arch: int, rows: int, columns: int, precision: str, conjugate: bool, ones=()
):
    """Compile with the launcher's hints, and the sizes in `ones` specialised to 1."""
    from lipfast.kernels.fourier_conv import _schedule, planar_product_kernel

    options = _schedule(rows, columns, precision)
    types = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(SIZES, "i32")
    constants = {"ROWS": rows, "COLUMNS": columns, "DEPTH": options.pop("DEPTH")}
    return compile_kernel(
        planar_product_kernel,
        types,
        constants | {"CONJUGATE": conjugate, "PRECISION": precision},
        arch,
        divisible=types,  # what the launcher sees at the paper's widths and batches
        ones=ones,
        **options,
    )


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(("m", "n", "conjugate"), [(256, 16, False), (256, 1024, True)])
def test_compiles_without_spills(m, n, conjugate, precision, arch, check_baseline):
    from lipfast.kernels import fourier_conv as kernels

    compiled = compile_as_launched(arch, kernels._tile(m), kernels._tile(n), precision, conjugate)
    code = machine_code(compiled)
    taken = resources(compiled, code)
    assert taken["stack"] == taken["local"] == 0
    assert taken["shared"] <= SHARED_LIMIT
    if precision == "ieee":  # no tensor core multiplies float32 exactly
        assert not re.search(ANY_TENSOR_CORE, code)
    elif min(m, n) >= 64:
        assert re.search(TENSOR_CORE["tf32"][arch], code)
    else:
        assert re.search(ANY_TENSOR_CORE, code)
    entry = f"planar_product_kernel {m}x{n} {precision}{' conjugate' if conjugate else ''}"
    check_baseline("kernels", {f"{entry} sm_{arch}": taken})


@pytest.mark.parametrize("ones", [SIZES, ["m"], ["depth"]], ids="-".join)
def test_sizes_of_one_compile(ones):
    """Triton takes integer arguments equal to 1 for constants of the compiler."""
    assert compile_as_launched(90, 16, 16, "tf32", True, ones).asm["cubin"]
