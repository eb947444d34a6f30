"""The Triton kernels of the polar factor, compiled for each GPU generation without a GPU."""

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

# product: (kernel, its constants but for those of the tile)
PRODUCTS = {
    "gram": ("polar_adjoint_kernel", {"TWO": False, "SCALED": False, "REDUCE": "norms"}),
    "defect": ("polar_adjoint_kernel", {"TWO": False, "SCALED": False, "REDUCE": "defect"}),
    "lyapunov": ("polar_adjoint_kernel", {"TWO": True, "SCALED": False, "REDUCE": "inner"}),
    "two_sided": ("polar_adjoint_kernel", {"TWO": True, "SCALED": True, "REDUCE": "none"}),
    "step": (
        "polar_multiply_kernel",
        {"SQUARE": True, "ADD": True, "SCALED": True, "TURN": True},
    ),
    "last_step": (
        "polar_multiply_kernel",
        {"SQUARE": False, "ADD": True, "SCALED": False, "TURN": False},
    ),
}
POINTERS = {
    "polar_adjoint_kernel": ["left", "right", "scale", "out", "partial"],
    "polar_multiply_kernel": ["s", "s2", "turned", "add", "factors", "out", "out_turned"],
    "polar_scale_kernel": ["x", "largest", "out", "turned"],
    "polar_normaliser_kernel": ["partial", "factors"],
    "polar_update_kernel": [
        *["partial", "state", "next_state", "left", "product", "solution", "r", "p", "hp"]
    ],
}
SIZES = {
    "polar_adjoint_kernel": ["rows", "depth", "right_count", "skew"],
    "polar_multiply_kernel": ["rows", "columns"],
    "polar_scale_kernel": ["rows", "columns", "planes"],
    "polar_normaliser_kernel": ["rows", "tiles"],
    "polar_update_kernel": ["size", "tiles"],
}
DIVISIBLE = {"rows", "depth", "columns", "size"}  # by 16, at the paper's widths


def compile_as_launched(name: str, arch: int, constants: dict, warps: int, stages: int, ones=()):
    """Compile with the launcher's hints, and the sizes in `ones` specialised to 1."""
    from lipfast.kernels import polar, polar_adjoint, polar_multiply

    module = next(m for m in (polar, polar_adjoint, polar_multiply) if hasattr(m, name))
    kernel = getattr(module, name)
    pointers, sizes = POINTERS[name], SIZES[name]
    types = dict.fromkeys(kernel.arg_names, "fp32") | dict.fromkeys(sizes, "i32")
    return compile_kernel(
        kernel,
        types | dict.fromkeys(pointers, "*fp32"),
        constants,
        arch,
        divisible=[*pointers, *(key for key in sizes if key in DIVISIBLE)],
        ones=ones,
        num_warps=warps,
        num_stages=stages,
    )


def check_limits(taken: dict[str, int]) -> None:
    assert taken["stack"] <= 16  # a few addresses, kept there during the loop
    assert taken["local"] == 0
    assert taken["shared"] <= SHARED_LIMIT


# product, planes, rows, precision, architectures
CASES = [
    ("gram", 2, 16, "tf32", (90,)),
    ("step", 1, 16, "tf32", (100,)),
    ("lyapunov", 2, 128, "tf32", (80, 90, 100)),
    ("step", 2, 128, "tf32", (80, 90, 100)),
    ("lyapunov", 1, 1024, "tf32", (90, 100)),
    ("step", 1, 1024, "tf32", (80, 90)),
    ("defect", 2, 128, "tf32x3", (80, 90, 100)),
    ("last_step", 2, 128, "tf32x3", (80, 90, 100)),
    ("step", 2, 128, "tf32x3", (80, 90)),
    ("two_sided", 2, 128, "ieee", (80, 100)),
    ("step", 2, 128, "ieee", (90,)),
]


@pytest.mark.parametrize(
    ("product", "planes", "rows", "precision", "arch"),
    [(*case, arch) for *case, archs in CASES for arch in archs],
)
def test_products_compile_without_spills(product, planes, rows, precision, arch, check_baseline):
    from lipfast.kernels.polar_multiply import DEPTH, STAGES, tile_size, warps

    name, constants = PRODUCTS[product]
    tile = tile_size(rows, planes, precision, arch // 10)
    constants = constants | {"PLANES": planes, "TILE": tile, "DEPTH": DEPTH}
    constants["PRECISION"] = precision
    compiled = compile_as_launched(name, arch, constants, warps(tile), STAGES)
    code = machine_code(compiled)
    taken = resources(compiled, code)
    check_limits(taken)
    if precision == "ieee":
        assert not re.search(ANY_TENSOR_CORE, code)  # none multiplies float32 exactly
    else:
        # a tile of 32 x 32 is too small for the instructions of whole warp groups
        assert re.search(TENSOR_CORE["tf32"][80 if tile == 32 else arch], code)
    check_baseline("kernels", {f"{name} {product} {planes}x{rows} {precision} sm_{arch}": taken})


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("polar_scale_kernel", {"TILE": 32}),
        ("polar_normaliser_kernel", {"BLOCK": 1024}),
        ("polar_update_kernel", {"FIRST": True, "LAST": False, "TILES": 64, "BLOCK": 1024}),
        ("polar_update_kernel", {"FIRST": False, "LAST": False, "TILES": 64, "BLOCK": 1024}),
    ],
)
def test_other_kernels_compile_without_spills(name, constants, check_baseline):
    taken = resources(compile_as_launched(name, 90, constants, 8, 3))
    check_limits(taken)
    entry = " ".join([name, *("first" for first in [constants.get("FIRST")] if first), "sm_90"])
    check_baseline("kernels", {entry: taken})


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_one_compile(name):
    """Triton takes integer arguments equal to 1 for constants of the compiler."""
    tile = {"PLANES": 2, "TILE": 32, "DEPTH": 16, "PRECISION": "ieee"}
    constants = {
        "polar_adjoint_kernel": PRODUCTS["lyapunov"][1] | tile,
        "polar_multiply_kernel": PRODUCTS["step"][1] | tile,
        "polar_scale_kernel": {"TILE": 32},
        "polar_normaliser_kernel": {"BLOCK": 1},
        "polar_update_kernel": {"FIRST": False, "LAST": True, "TILES": 1, "BLOCK": 1024},
    }
    compile_as_launched(name, 90, constants[name], 4, 3, ones=SIZES[name])
