"""Accelerated networks of orthogonium's and deel-torchlip's layers, exported."""

import pytest
import torch
from torch import nn

import lipfast
from lipfast.nn import LipschitzModule, MaxMin

pytest.importorskip("orthogonium")
torchlip = pytest.importorskip("deel.torchlip")
from orthogonium import layers  # noqa: E402
from orthogonium.layers.conv import AOC, AOL, SLL  # noqa: E402


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "orthogonium": nn.Sequential(
            AOL.AOLConv2D(3, 4, 3, padding=1),
            AOC.AdaptiveOrthoConv2d(4, 6, 3),
            layers.MaxMin(),
            AOC.AdaptiveOrthoConv2d(6, 6, 3, stride=2, padding=1),
            SLL.SDPBasedLipschitzResBlock(6, 2),
            nn.Flatten(),
            SLL.SDPBasedLipschitzDense(96, 96, 5),
            layers.OrthoLinear(96, 10),
        ),
        "torchlip": nn.Sequential(
            torchlip.SpectralConv2d(3, 4, 3, padding=1, padding_mode="circular"),
            torchlip.GroupSort2(),
            torchlip.FrobeniusConv2d(4, 4, 3, padding=1),
            nn.Flatten(),
            torchlip.SpectralLinear(256, 10),
        ),
    }


@pytest.mark.parametrize("package", networks())
def test_layers_of_peers_become_plain_ones(package):
    model = networks()[package].eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(x)  # creates what is created late
    lipfast.accelerate(model)
    assert all(isinstance(m, LipschitzModule | MaxMin | nn.Flatten) for m in model)
    plain = lipfast.to_plain(model, (3, 8, 8))
    foreign = ("lipfast", "orthogonium", "deel")
    assert not any(type(m).__module__.startswith(foreign) for m in plain.modules())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)
    bounds = plain.certificate["layer_bounds"]
    assert bounds == {n: m.lipschitz_bound() for n, m in model.named_children() if n in bounds}
    assert len(bounds) == sum(isinstance(m, LipschitzModule) for m in model)
