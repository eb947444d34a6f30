"""The Triton kernels of maxmin, compiled for each GPU generation without a GPU: no spills."""

import pytest
from compiled_kernels import compile_kernel, needs_triton, resources

pytest.importorskip("triton")
pytestmark = needs_triton

DTYPES = ["fp32", "bf16", "fp16", "fp64"]
SIZES = ["pairs", "singles", "channels", "spatial"]


def compile_as_launched(
    name: str, dtype: str, arch: int, channels_last: bool, odd: bool, wide: bool, ones=()
):
    """Compile with the launcher's hints, and the sizes in `ones` specialised to 1."""
    from lipfast.kernels import maxmin as kernels

    types = {"x": f"*{dtype}", "y": f"*{dtype}", "mask": "*u8"}
    types |= dict.fromkeys(SIZES, "i64" if wide else "i32")
    constants = {"CHANNELS_LAST": channels_last, "ODD": odd, "WIDE": wide}
    return compile_kernel(
        getattr(kernels, name),
        types,
        constants | {"BLOCK": kernels._BLOCK},
        arch,
        # in a network pointers and sizes are divisible by 16, an odd count aside
        divisible=["x", "y", "mask", "pairs", "spatial", *([] if odd else ["channels"])],
        ones=ones,
        num_warps=4,
        num_stages=3,
    )


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["maxmin_forward_kernel", "maxmin_backward_kernel"])
@pytest.mark.parametrize(
    ("channels_last", "odd", "wide"),
    [(False, False, False), (True, False, False), (True, True, False), (False, True, True)],
)
def test_compiles_without_spills(name, dtype, arch, channels_last, odd, wide, check_baseline):
    taken = resources(compile_as_launched(name, dtype, arch, channels_last, odd, wide))
    assert taken["stack"] == taken["local"] == 0
    assert taken["registers"] <= 128
    flags = {"channels_last": channels_last, "odd": odd, "wide": wide}
    chosen = [flag for flag, is_set in flags.items() if is_set]
    check_baseline("kernels", {" ".join([name, dtype, *chosen, f"sm_{arch}"]): taken})


@pytest.mark.parametrize("channels_last", [False, True])
def test_reads_sixteen_bytes_at_a_time(channels_last):
    """Aligned float32 maps are read and written by vectors, or half the bandwidth is lost."""
    ptx = compile_as_launched("maxmin_forward_kernel", "fp32", 90, channels_last, False, False).asm[
        "ptx"
    ]
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx


@pytest.mark.parametrize(("channels_last", "wide"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["maxmin_forward_kernel", "maxmin_backward_kernel"])
def test_sizes_of_one_compile(name, channels_last, wide):
    """Triton takes integer arguments equal to 1 for constants of the compiler."""
    assert compile_as_launched(name, "fp32", 90, channels_last, True, wide, SIZES).asm["cubin"]
