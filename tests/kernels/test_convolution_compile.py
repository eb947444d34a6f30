"""The implicit-GEMM convolution, compiled for each GPU generation without a GPU."""

import re

import pytest
import torch
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

# operands, epilogue, channels, positions, padding: each class of shapes, each epilogue
CASES = [
    ("tf32", "sum", 16, 1 << 18, "zeros"),
    ("tf32", "relu", 256, 1 << 16, "circular"),
    ("bf16", "sum", 64, 1 << 18, "zeros"),
    ("bf16", "sum", 64, 1 << 10, "circular"),
    ("bf16", "relu", 24, 1 << 16, "circular"),
    ("bf16", "masked", 256, 1 << 16, "zeros"),
    ("ieee", "sum", 64, 1 << 16, "circular"),
    ("ieee", "masked", 25, 1 << 16, "zeros"),
]


SIZES = ["positions", "height", "width", "depth", "channels"]


def compile_as_launched(
    operands: str, epilogue: str, channels: int, positions: int, padding: str, arch: int, ones=()
):
    """Compile with the launcher's hints, and the sizes in `ones` specialised to 1."""
    from lipfast.kernels import convolution as kernels

    dtype = torch.bfloat16 if operands == "bf16" else torch.float32
    precision = "tf32" if operands == "tf32" else "ieee"
    tile, columns, depth, warps = kernels._shape_class(
        positions, channels, channels, dtype, precision
    )
    pointer = "*bf16" if operands == "bf16" else "*fp32"
    types = dict.fromkeys(["x", "taps", "out", "operand", "other"], pointer)
    if epilogue != "sum":
        types |= {"operand": "*fp32", "other": "*u8"}
    divisible = [*types] + (["depth", "channels"] if channels % 16 == 0 else [])
    types |= dict.fromkeys(SIZES, "i32")
    types |= dict.fromkeys(["alpha", "beta", "gamma"], "fp32")
    constants = {
        "KH": 3,
        "KW": 3,
        "CIRCULAR": padding == "circular",
        "EPILOGUE": epilogue,
        "OPERAND": True,
        "OTHER": True,
        "WHOLE_BYTES": channels % 8 == 0,
        "WIDE": False,
        "TILE": tile,
        "COLUMNS": columns,
        "DEPTH": depth,
        "PRECISION": precision,
    }
    return compile_kernel(
        kernels.convolution_kernel,
        types,
        constants,
        arch,
        divisible=divisible,
        ones=ones,
        num_warps=warps,
        num_stages=3,
    )


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles_without_spills(case, arch, check_baseline):
    compiled = compile_as_launched(*case, arch)
    code = machine_code(compiled)
    taken = resources(compiled, code)
    assert taken["stack"] == taken["local"] == 0
    assert taken["shared"] <= SHARED_LIMIT
    operands = case[0]
    if operands == "ieee":  # no tensor core multiplies float32 exactly
        assert not re.search(ANY_TENSOR_CORE, code)
    else:
        assert re.search(TENSOR_CORE[operands][arch], code)
    entry = " ".join(["convolution_kernel", *map(str, case), f"sm_{arch}"])
    check_baseline("kernels", {entry: taken})


@pytest.mark.parametrize(
    ("epilogue", "padding", "ones"),
    [
        ("sum", "zeros", SIZES),
        ("relu", "circular", ["height", "width"]),
        ("relu", "zeros", ["channels"]),
        ("masked", "circular", SIZES),
        ("masked", "zeros", ["depth"]),
    ],
)
def test_sizes_of_one_compile(epilogue, padding, ones):
    """Triton takes integer arguments equal to 1 for constants of the compiler."""
    channels = 1 if "channels" in ones else 24
    assert compile_as_launched("ieee", epilogue, channels, 1 << 10, padding, 90, ones).asm["cubin"]


@pytest.mark.parametrize("size", ["i32", "constexpr"])
def test_mask_packing_compiles_without_spills(size, check_baseline):
    from lipfast.kernels import convolution as kernels

    compiled = compile_kernel(
        kernels.pack_signs_kernel,
        {"values": "*bf16", "mask": "*u8", "size": "i32"},
        {"BLOCK": kernels._BLOCK},
        90,
        ones=["size"] if size == "constexpr" else [],
    )
    taken = resources(compiled)
    assert taken["stack"] == taken["local"] == 0
    check_baseline("kernels", {f"pack_signs_kernel {size} sm_90": taken})
