"""The Triton kernels of the polar factor, compiled for each GPU generation without a GPU."""

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
TENSOR_CORE = {80: r"\bHMMA\S*TF32", 90: r"\bHGMMA\S*TF32", 100: r"\bUTC\w*MMA"}
ANY_TENSOR_CORE = r"\b(H|HG|UTC\w*)MMA\b"

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


def compile_kernel(name: str, arch: int, constants: dict, warps: int, stages: int, ones=()):
    """Compile with the launcher's hints, and the sizes in `ones` specialised to 1."""
    from lipfast.kernels import polar, polar_adjoint, polar_multiply

    module = next(m for m in (polar, polar_adjoint, polar_multiply) if hasattr(m, name))
    fn = getattr(module, name)
    sizes = SIZES[name]
    kinds = dict.fromkeys(POINTERS[name], "*fp32") | dict.fromkeys(sizes, "i32")
    constants = constants | dict.fromkeys(ones, 1)
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {key: kinds.get(key, "fp32") for key in fn.arg_names}
    place = {key: (index,) for index, key in enumerate(signature)}
    hints = [*POINTERS[name], *(key for key in sizes if key in DIVISIBLE and key not in ones)]
    source = ASTSource(
        fn=fn,
        signature=signature,
        constexprs={place[key]: value for key, value in constants.items()},
        attrs={place[key]: [["tt.divisibility", 16]] for key in hints},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def dump(cubin: bytes, folder: Path, option: str) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [str(TOOLS / "cuobjdump"), option, str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_resources(compiled, folder: Path) -> None:
    usage = dump(compiled.asm["cubin"], folder, "-res-usage")
    sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert sizes["STACK"] <= 16  # a few addresses, kept there during the loop
    assert sizes["LOCAL"] == 0
    assert compiled.metadata.shared <= 163 * 1024  # of a block on sm_80, the least of the three


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
def test_products_compile_without_spills(product, planes, rows, precision, arch, tmp_path):
    from lipfast.kernels.polar_multiply import DEPTH, STAGES, tile_size, warps

    name, constants = PRODUCTS[product]
    tile = tile_size(rows, planes, precision, arch // 10)
    constants = constants | {"PLANES": planes, "TILE": tile, "DEPTH": DEPTH}
    constants["PRECISION"] = precision
    compiled = compile_kernel(name, arch, constants, warps(tile), STAGES)
    check_resources(compiled, tmp_path)
    code = dump(compiled.asm["cubin"], tmp_path, "--dump-sass")
    if precision == "ieee":
        assert not re.search(ANY_TENSOR_CORE, code)  # none multiplies float32 exactly
    else:
        # a tile of 32 x 32 is too small for the instructions of whole warp groups
        assert re.search(TENSOR_CORE[80] if tile == 32 else TENSOR_CORE[arch], code)


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("polar_scale_kernel", {"TILE": 32}),
        ("polar_normaliser_kernel", {"BLOCK": 1024}),
        ("polar_update_kernel", {"FIRST": True, "LAST": False, "TILES": 64, "BLOCK": 1024}),
        ("polar_update_kernel", {"FIRST": False, "LAST": False, "TILES": 64, "BLOCK": 1024}),
    ],
)
def test_other_kernels_compile_without_spills(name, constants, tmp_path):
    check_resources(compile_kernel(name, 90, constants, 8, 3), tmp_path)


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
    compile_kernel(name, 90, constants[name], 4, 3, ones=SIZES[name])
