"""The Triton kernels of gram_bound, compiled for each GPU generation without a GPU."""

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
POINTERS = {
    "gram_bound_forward_kernel": {"taps": "fp32", "q": "fp32", "signs": "i8", "partial": "fp32"},
    "gram_bound_backward_kernel": {
        "taps": "fp32",
        "signs": "i8",
        "a": "fp32",
        "q": "fp32",
        "grad": "fp32",
    },
}
TENSOR_CORE = {80: r"\bHMMA\S*TF32", 90: r"\bHGMMA\S*TF32", 100: r"\bUTC\w*MMA"}


def compile_kernel(name: str, arch: int, tile: int, precision: str, ones: tuple[str, ...] = ()):
    from lipfast.kernels import gram_bound as kernels

    signature = {key: f"*{kind}" for key, kind in POINTERS[name].items()}
    divisible = [*signature, "channels", "depth"]  # what the launcher sees at the paper's widths
    signature |= dict.fromkeys(["channels", "depth", "kh", "kw"], "i32")
    if "backward" in name:
        strides = ["batch_stride", "row_stride", "column_stride", "channel_stride", "depth_stride"]
        signature |= dict.fromkeys(strides, "i32")
    values = {"TILE": tile, "DEPTH": 32, "PRECISION": precision}
    values |= dict.fromkeys(ones, 1)  # as the launcher compiles a size of 1
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
    options = {"num_warps": kernels._warps(tile), "num_stages": 3}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def dump(cubin: bytes, folder: Path, option: str) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [str(TOOLS / "cuobjdump"), option, str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("channels", [16, 128, 1024])
@pytest.mark.parametrize("name", POINTERS)
def test_compiles_without_spills(name, channels, precision, arch, tmp_path):
    from lipfast.kernels import gram_bound as kernels

    tile = kernels._tile(channels, precision, backward="backward" in name)
    compiled = compile_kernel(name, arch, tile, precision)
    usage = dump(compiled.asm["cubin"], tmp_path, "-res-usage")
    sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert sizes["STACK"] == 0
    assert sizes["LOCAL"] == 0
    assert compiled.metadata.shared <= 163 * 1024  # of a block on sm_80, the least of the three
    code = dump(compiled.asm["cubin"], tmp_path, "--dump-sass")
    if precision == "ieee":
        assert not re.search(
            r"\b(H|HG|UTC\w*)MMA\b", code
        )  # no tensor core multiplies float32 exactly
    elif channels > 32:
        assert re.search(TENSOR_CORE[arch], code)


@pytest.mark.parametrize("ones", [("kh", "kw"), ("channels",), ("channels", "depth", "kh", "kw")])
@pytest.mark.parametrize("name", POINTERS)
def test_sizes_of_one_compile(name, ones):
    compiled = compile_kernel(name, 90, 16, "tf32", ones)
    assert compiled.asm["cubin"]
