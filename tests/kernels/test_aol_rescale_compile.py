"""The Triton kernels of aol_rescale, compiled for each GPU generation without a GPU."""

import pytest
from compiled_kernels import compile_kernel, needs_triton, resources

pytest.importorskip("triton")
pytestmark = needs_triton

STRIDES = ["n_stride", "row_stride", "channel_stride", "tap_stride"]
POINTERS = {
    "aol_rescale_forward_kernel": {"weight": "fp32", "r": "fp32", "out": "half"},
    "aol_rescale_backward_kernel": {
        "grad": "half",
        "weight": "fp32",
        "r": "fp32",
        "out": "fp32",
        "partial": "fp32",
    },
}


SIZES = ["rows", "channels", "taps", *STRIDES]


def compile_as_launched(name: str, channels: int, taps: int, half: str, arch: int, ones=()):
    """Compile with the launcher's hints, and the sizes in `ones` specialised to 1."""
    from lipfast.kernels import aol_rescale as kernels

    pointers = {key: f"*{half if kind == 'half' else kind}" for key, kind in POINTERS[name].items()}
    block, padded = kernels._block(channels, taps)
    constants = {"ROWS": kernels._ROWS} if "backward" in name else {}
    return compile_kernel(
        getattr(kernels, name),
        pointers | dict.fromkeys(SIZES, "i32"),
        constants | {"BLOCK": block, "TAPS": padded},
        arch,
        divisible=[*pointers, "channels"],  # what the launcher sees at the paper's widths
        ones=ones,
    )


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("channels", "taps", "half"),
    [(16, 9, "fp32"), (1024, 9, "bf16"), (1024, 1, "fp16"), (64, 49, "bf16")],
)
@pytest.mark.parametrize("name", POINTERS)
def test_compiles_without_spills(name, channels, taps, half, arch, check_baseline):
    taken = resources(compile_as_launched(name, channels, taps, half, arch))
    assert taken["stack"] == taken["local"] == 0
    check_baseline("kernels", {f"{name} {channels} {taps} {half} sm_{arch}": taken})


@pytest.mark.parametrize("ones", [SIZES, ["taps", "tap_stride"]], ids="-".join)
@pytest.mark.parametrize("name", POINTERS)
def test_sizes_of_one_compile(name, ones):
    """Triton takes integer arguments equal to 1 for constants of the compiler."""
    assert compile_as_launched(name, 1, 1, "bf16", 90, ones).asm["cubin"]
