"""The Triton kernels of gram_bound, compiled for each GPU generation without a GPU."""

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


def compile_as_launched(
    name: str, arch: int, tile: int, precision: str, ones: tuple[str, ...] = ()
):
    """Compile with the launcher's hints, and the sizes in `ones` specialised to 1."""
    from lipfast.kernels import gram_bound as kernels

    pointers = {key: f"*{kind}" for key, kind in POINTERS[name].items()}
    sizes = ["channels", "depth", "kh", "kw"]
    if "backward" in name:
        sizes += ["batch_stride", "row_stride", "column_stride", "channel_stride", "depth_stride"]
    return compile_kernel(
        getattr(kernels, name),
        pointers | dict.fromkeys(sizes, "i32"),
        {"TILE": tile, "DEPTH": 32, "PRECISION": precision},
        arch,
        divisible=[*pointers, "channels", "depth"],  # what the launcher sees at the paper's widths
        ones=ones,
        num_warps=kernels._warps(tile),
        num_stages=3,
    )


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("channels", [16, 128, 1024])
@pytest.mark.parametrize("name", POINTERS)
def test_compiles_without_spills(name, channels, precision, arch, check_baseline):
    from lipfast.kernels import gram_bound as kernels

    tile = kernels._tile(channels, precision, backward="backward" in name)
    compiled = compile_as_launched(name, arch, tile, precision)
    code = machine_code(compiled)
    taken = resources(compiled, code)
    assert taken["stack"] == taken["local"] == 0
    assert taken["shared"] <= SHARED_LIMIT
    if precision == "ieee":  # no tensor core multiplies float32 exactly
        assert not re.search(ANY_TENSOR_CORE, code)
    elif channels > 32:
        assert re.search(TENSOR_CORE["tf32"][arch], code)
    check_baseline("kernels", {f"{name} {channels} {precision} sm_{arch}": taken})


@pytest.mark.parametrize("ones", [("kh", "kw"), ("channels",), ("channels", "depth", "kh", "kw")])
@pytest.mark.parametrize("name", POINTERS)
def test_sizes_of_one_compile(name, ones):
    compiled = compile_as_launched(name, 90, 16, "tf32", ones)
    assert compiled.asm["cubin"]
