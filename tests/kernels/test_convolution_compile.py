"""The implicit-GEMM convolution, compiled for each GPU generation without a GPU."""

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

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE = {
    "tf32": {80: r"\bHMMA\S*TF32", 90: r"\bHGMMA\S*TF32", 100: r"\bUTC\w*MMA"},
    "bf16": {80: r"\bHMMA\S*BF16", 90: r"\bHGMMA\S*BF16", 100: r"\bUTC\w*MMA"},
}
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


def compile_kernel(
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
    values = {
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
    values |= dict.fromkeys(ones, 1)
    types |= dict.fromkeys(values, "constexpr")
    names = [parameter.name for parameter in kernels.convolution_kernel.params]
    source = ASTSource(
        fn=kernels.convolution_kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(key),): value for key, value in values.items()},
        attrs={
            (names.index(key),): [["tt.divisibility", 16]] for key in divisible if key not in ones
        },
    )
    options = {"num_warps": warps, "num_stages": 3}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def dump(cubin: bytes, folder: Path, option: str) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [str(TOOLS / "cuobjdump"), option, str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles_without_spills(case, arch, tmp_path):
    compiled = compile_kernel(*case, arch)
    usage = dump(compiled.asm["cubin"], tmp_path, "-res-usage")
    sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert sizes["STACK"] == 0
    assert sizes["LOCAL"] == 0
    assert compiled.metadata.shared <= 163 * 1024  # of a block on sm_80, the least of the three
    code = dump(compiled.asm["cubin"], tmp_path, "--dump-sass")
    operands = case[0]
    if operands == "ieee":  # no tensor core multiplies float32 exactly
        assert not re.search(r"\b(H|HG|UTC\w*)MMA\b", code)
    else:
        assert re.search(TENSOR_CORE[operands][arch], code)


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
    assert compile_kernel("ieee", epilogue, channels, 1 << 10, padding, 90, ones).asm["cubin"]


@pytest.mark.parametrize("size", ["i32", "constexpr"])
def test_mask_packing_compiles_without_spills(size, tmp_path):
    from lipfast.kernels import convolution as kernels

    values = {3: kernels._BLOCK} | ({2: 1} if size == "constexpr" else {})
    source = ASTSource(
        fn=kernels.pack_signs_kernel,
        signature={"values": "*bf16", "mask": "*u8", "size": size, "BLOCK": "constexpr"},
        constexprs={(index,): value for index, value in values.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    usage = dump(compiled.asm["cubin"], tmp_path, "-res-usage")
    sizes = {key: int(value) for key, value in re.findall(r"(STACK|LOCAL):(\d+)", usage)}
    assert sizes == {"STACK": 0, "LOCAL": 0}
