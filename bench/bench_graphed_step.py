"""Training steps as one CUDA graph against the same steps launched one kernel after another."""

import copy

import pytest
import torch

from lipfast.models import ConvNet
from lipfast.nn import METHODS
from lipfast.training import margin_cross_entropy
from lipfast.training.graphed import GraphedStep

BATCH = 256
TARGET = 2.0  # times the speed of eager steps, for XS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is available")
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["XS", "S"])
@pytest.mark.parametrize("method", METHODS)
def bench_training_step(compare, benchmark, method, size, amp_dtype):
    torch.manual_seed(0)
    models = [ConvNet(method, size).cuda()]
    models.append(copy.deepcopy(models[0]))
    x = torch.randn(BATCH, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    y = torch.arange(BATCH, device="cuda") % 10
    graphed, eager = (
        GraphedStep(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True),
            margin_cross_entropy,
            (x, y),
            amp_dtype=amp_dtype,
            eager=index == 1,
        )
        for index, model in enumerate(models)
    )
    tolerance = 1e-2 if amp_dtype is None else 5e-2
    for _ in range(3):
        torch.testing.assert_close(graphed(x, y), eager(x, y), rtol=tolerance, atol=tolerance)
    ratios = compare({"graph": lambda: graphed(x, y), "eager": lambda: eager(x, y)})
    benchmark.extra_info["target"] = TARGET
    print(f"target {TARGET}x, reached {ratios['eager']:.2f}x")
