import pytest

from lipfast.report.roofline import ceiling, floor_seconds


def test_the_slower_of_arithmetic_and_memory_is_the_floor():
    gpu = "NVIDIA H200"
    assert floor_seconds(gpu, flops=67e12) == pytest.approx(1)
    assert floor_seconds(gpu, moved_bytes=4.3e12) == pytest.approx(1)
    assert floor_seconds(gpu, flops=67e12, moved_bytes=2 * 4.3e12) == pytest.approx(2)
    slow, fast = (floor_seconds(gpu, flops=1e12, precision=p) for p in ("tf32", "bf16"))
    assert slow == pytest.approx(2 * fast, rel=0.01)


def test_unknown_gpus_have_no_floor():
    assert floor_seconds("Some GPU", flops=1.0) is None
    assert floor_seconds(None, flops=1.0) is None
    assert ceiling("NVIDIA A100-SXM4-80GB") is not None


def test_bad_precision():
    with pytest.raises(ValueError, match="precision"):
        floor_seconds("NVIDIA H100 80GB HBM3", flops=1.0, precision="int8")
