"""Lipschitz factors of torch's own modules: never below what can be measured, and tight."""

import math

import pytest
import torch
from torch import nn

from lipfast import certify
from lipfast.certify.factors import module_factor, window_count


def jacobian_norm(module, x):
    flat = torch.autograd.functional.jacobian(module, x).reshape(-1, x.numel())
    return float(torch.linalg.matrix_norm(flat, 2))


def batch_norm(kind, channels, **kwargs):
    module = kind(channels, **kwargs)
    with torch.no_grad():
        module.running_var.uniform_(0.1, 2)
        if module.affine:
            module.weight.normal_()
    return module


MAP = (1, 4, 6, 6)
MODULES = [
    *[(kind(), (1, 200), 0.94) for kind in (nn.ReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)],
    *[(kind(), (1, 200), 0.94) for kind in (nn.SELU, nn.Softsign, nn.Softplus, nn.Tanhshrink)],
    *[(kind(), (1, 200), 0.94) for kind in (nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid)],
    (nn.GELU(approximate="tanh"), (1, 200), 0.999),
    (nn.ELU(1.7), (1, 200), 0.95),
    (nn.LeakyReLU(2.5), (1, 200), 1),
    (nn.LeakyReLU(0.1), (1, 200), 1),
    (nn.PReLU(4, init=-1.5), MAP, 1),
    (nn.RReLU(0.2, 1.4), (1, 200), 0.7),
    (nn.Softmax(1), (1, 2), 0.9),
    (nn.MaxPool2d(2), MAP, 1),
    (nn.MaxPool2d(3, 1, 1), MAP, 0.3),
    (nn.MaxPool2d(3, 2, 1, dilation=2), MAP, 0.3),
    (nn.AvgPool2d(2), MAP, 0.999),
    (nn.AvgPool2d(3, 1), MAP, 0.6),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), MAP, 0.2),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True), MAP, 0.2),
    (nn.AvgPool2d(2, divisor_override=1), MAP, 0.999),
    (nn.AvgPool1d(3), (1, 2, 9), 0.999),
    (nn.AdaptiveAvgPool2d(1), MAP, 0.15),
    (nn.AdaptiveMaxPool2d((1, 1)), MAP, 1),
    (nn.Upsample(scale_factor=(2, 2)), MAP, 0.999),
    (nn.PixelUnshuffle(2), MAP, 1),
    (nn.ZeroPad2d(2), MAP, 1),
    (nn.Dropout(0.5).eval(), (1, 20), 1),
    (batch_norm(nn.BatchNorm2d, 4).eval(), MAP, 0.999),
    (batch_norm(nn.BatchNorm1d, 5, affine=False).eval(), (1, 5), 0.999),
    (nn.GroupNorm(2, 4, eps=0.5), MAP, 0.05),
    (nn.LayerNorm(8, eps=0.5), (1, 8), 0.5),
    (nn.RMSNorm(8, eps=0.5), (1, 8), 0.5),
    (nn.InstanceNorm2d(4, eps=0.5), MAP, 0.05),
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), MAP, 0.7),
    (nn.Conv2d(4, 6, 3, padding=2, dilation=2), MAP, 0.5),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), MAP, 0.7),
    (nn.Conv2d(4, 6, (2, 3), stride=2), MAP, 0.3),
    (nn.Linear(6, 3), (1, 6), 0.999),
]


@pytest.mark.parametrize(
    ("module", "shape", "tightness"),
    [pytest.param(*case, id=f"{i}-{type(case[0]).__name__}") for i, case in enumerate(MODULES)],
)
def test_a_factor_is_a_bound_and_not_far_above_the_norm(module, shape, tightness):
    torch.manual_seed(0)
    module = module.double()
    factor = module_factor(module).value
    measured = 0.0
    for scale in (0.0, 0.1, 1.0, 3.0):
        x = scale * torch.randn(shape, dtype=torch.float64)
        if len(shape) == 2 and shape[1] == 200:
            x = torch.linspace(-6, 6, 200, dtype=torch.float64)[None]
        measured = max(measured, jacobian_norm(module, x))
    assert tightness * factor <= measured <= factor * (1 + 1e-9)


def test_windows_that_meet_a_position_are_counted():
    for kernel in range(1, 6):
        for stride in range(1, 5):
            for dilation in range(1, 4):
                taps = [{i * stride + j * dilation for j in range(kernel)} for i in range(40)]
                most = max(sum(p in window for window in taps) for p in range(30, 60))
                assert window_count(kernel, stride, dilation) == most


def test_what_acts_in_training_is_said():
    assert module_factor(nn.Dropout(0.75)).training == 4
    assert module_factor(nn.Dropout(0.0)).training == 0
    assert module_factor(nn.BatchNorm2d(2)).training == math.inf
    assert module_factor(nn.MultiheadAttention(4, 2)).value == math.inf
    assert module_factor(nn.Embedding(3, 2)).value is None
    assert "alpha" not in module_factor(nn.Module()).note


def test_a_subclass_with_the_same_forward_pass_counts_as_torchs():
    class Pool(nn.MaxPool2d):
        pass

    class Other(nn.MaxPool2d):
        def forward(self, x):
            return 3 * super().forward(x)

    assert module_factor(Pool(3, 1)).value == 3
    assert module_factor(Other(3, 1)).value is None


def test_weights_that_are_not_finite_are_named():
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^1\.weight: expected finite values"):
        certify.lipschitz_bound(nn.Sequential(nn.ReLU(), linear))
