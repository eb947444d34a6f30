"""Fourier layers in real arithmetic: each way to compute them, on even, odd and tiny maps."""

import pytest
import torch
from torch import fx

from lipfast.nn import CayleyConv2d, LOTConv2d
from lipfast.nn import plain_fourier as module

F64 = torch.float64
LAYERS = [(CayleyConv2d, "circular"), (LOTConv2d, "circular"), (LOTConv2d, "zeros")]
KINDS = [module._Direct, module._Separable, module._Dense]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layer", "padding_mode"), LAYERS)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 5), (4, 3), (6, 8), (7, 5)])
def test_every_way_computes_the_layer(kind, layer, padding_mode, size):
    torch.manual_seed(0)
    conv = layer(3, 4, 3, padding_mode=padding_mode, dtype=F64).eval()
    torch.nn.init.normal_(conv.bias)
    (spectrum,) = conv._sound(size).weights
    plain = fx.symbolic_trace(kind(spectrum, conv.bias, size, conv._padding()))
    x = torch.randn(5, 3, *size, dtype=F64)
    y = conv(x)
    for ours, theirs in ((plain(x), y), (plain(x[0]), y[0]), (plain(x[:0]), y[:0])):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
        assert ours.is_contiguous()
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(plain(transposed), y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_near_to_float64_as_the_layer(kind):
    torch.manual_seed(0)
    layer = LOTConv2d(8, 8, 3).eval()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(16, 8, 8, 8)
    (spectrum,) = layer._sound((8, 8)).weights
    plain = fx.symbolic_trace(kind(spectrum, layer.bias, (8, 8), layer._padding()))
    exact = fx.symbolic_trace(kind(spectrum.double(), None, (8, 8), layer._padding()))
    truth = exact(x.double()) + layer.bias.double()[:, None, None]
    error, theirs = ((f(x) - truth).norm() / truth.norm() for f in (plain, layer))
    assert error < 2 * theirs + 1e-6


def test_no_complex_number_and_no_fourier_transform_is_left():
    for size in [(1, 1), (4, 4), (16, 16)]:
        plain = CayleyConv2d(8, 8, 3).eval().to_plain(size)
        assert "fft" not in plain.code
        assert not any(value.is_complex() for value in plain.state_dict().values())


def test_the_cheapest_way_is_taken():
    """A dense matrix on tiny maps with few channels, one table on small maps."""
    chosen = {
        (c, side): type(CayleyConv2d(c, c, 3).eval().to_plain((side, side))).__name__
        for c, side in [(4, 2), (4, 4), (32, 4), (8, 16)]
    }
    assert chosen == {
        (4, 2): "_Dense",
        (4, 4): "_Dense",
        (32, 4): "_Direct",
        (8, 16): "_Separable",
    }
