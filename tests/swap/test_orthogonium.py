"""The layers of orthogonium, from the package itself."""

import copy
import functools

import pytest
import torch
from torch import nn

import lipfast

pytest.importorskip("orthogonium")
from orthogonium import layers, reparametrizers
from orthogonium.layers.conv import AOC, AOL, SLL, adaptiveSOC
from swap.peer_checks import check_bound, check_same, distance, perturb, reason

Conv = functools.partial(AOC.AdaptiveOrthoConv2d)


def _seeded(make, *args, amount=0.1, **kwargs):
    torch.manual_seed(0)
    return perturb(make(*args, **kwargs), amount)


def _conditioned(make, *args, amount=0.2, **kwargs):
    """Such a layer with random matrices that are as well conditioned as wide ones are."""
    layer = make(*args, **kwargs)
    generator = torch.Generator().manual_seed(0)
    for name in layer.parametrizations:
        original = layer.parametrizations[name].original
        matrices = original.data.flatten(1) if name == "weight_2" else original.data
        for matrix in matrices.reshape(-1, *matrices.shape[-2:]):
            nn.init.orthogonal_(matrix, generator=generator)
    return perturb(layer, amount)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((4, 6), {"padding": 1}),
        ((6, 4), {"padding": 1}),
        ((4, 4), {"stride": 2}),
        ((4, 8), {"groups": 2, "dilation": 2}),
        ((8, 4), {"groups": 2, "padding": 1, "padding_mode": "circular"}),
    ],
)
def test_aol(channels, options, bias):
    layer = _seeded(AOL.AOLConv2D, *channels, 3, bias=bias, **options)
    ours = check_same(layer, (2, channels[0], 7, 7))
    check_bound(ours, (1, channels[0], 6, 6))


def test_aol_scales_zero_and_tiny_kernels():
    layer = lipfast.accelerate(_seeded(AOL.AOLConv2D, 3, 5, 3))
    with torch.no_grad():
        expected = layer(x := torch.randn(1, 3, 5, 5))
        layer.weight.mul_(1e-25)
        assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-6)
        layer.weight.zero_()
        assert torch.equal(layer(x), layer.bias[:, None, None].expand(1, 5, 3, 3))


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((4, 6), {"kernel_size": 3}),
        ((6, 4), {"kernel_size": 3, "bias": False}),
        ((4, 4), {"kernel_size": 5, "padding_mode": "zeros"}),
        ((6, 4), {"kernel_size": 4, "padding": 1}),
        ((3, 5), {"kernel_size": 7, "padding": 2}),
        ((4, 8), {"kernel_size": 3, "groups": 2}),
        ((8, 4), {"kernel_size": 3, "dilation": 2, "groups": 2}),
        ((2, 2), {"kernel_size": 2, "padding": 0}),
    ],
)
def test_block_convolution(channels, options):
    layer = _conditioned(Conv, *channels, **options)
    assert type(layer).__name__ == "ParametrizedFastBlockConv2d"
    ours = check_same(layer, (2, channels[0], 8, 8))
    check_bound(ours, (1, channels[0], 7, 7))


def test_block_convolution_with_stride():
    layer = _conditioned(AOC.FastBlockConv2d, 6, 4, 3, stride=2, padding=1)
    check_bound(check_same(layer, (2, 6, 7, 8)), (1, 6, 7, 8))


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((4, 6), {"kernel_size": 2, "stride": 2, "padding": 0}),
        ((6, 4), {"kernel_size": 3, "stride": 3, "padding": 1, "padding_mode": "zeros"}),
        ((4, 12), {"kernel_size": 2, "stride": 2, "padding": 0, "groups": 2, "bias": False}),
        ((6, 4), {"kernel_size": 1}),
    ],
)
def test_patch_convolution(channels, options):
    layer = _conditioned(Conv, *channels, **options)
    assert type(layer).__name__ == "ParametrizedRKOConv2d"
    ours = check_same(layer, (2, channels[0], 8, 8))
    check_bound(ours, (1, channels[0], 8, 8))


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((4, 6), {"kernel_size": 3}),
        ((4, 16), {"kernel_size": 3, "bias": False}),
        ((6, 4), {"kernel_size": 4}),
        ((4, 8), {"kernel_size": 4, "groups": 2}),
    ],
)
@pytest.mark.parametrize("mode", ["circular", "zeros"])
def test_strided_convolution(channels, options, mode):
    layer = _conditioned(Conv, *channels, stride=2, padding=1, padding_mode=mode, **options)
    assert type(layer).__name__ == "ParametrizedBcopRkoConv2d"
    ours = check_same(layer, (2, channels[0], 8, 8))
    check_bound(ours, (1, channels[0], 6, 8))


def test_strided_convolution_repeats_pixels_of_odd_circular_maps():
    layer = _conditioned(Conv, 4, 16, 3, stride=2, padding=1)
    ours = check_same(layer, (2, 4, 9, 9))
    check_bound(ours, (1, 4, 7, 8), expected=2**0.5)
    check_bound(ours, (1, 4, 7, 7), expected=2.0)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias):
    ours = check_same(_seeded(layers.OrthoLinear, *shape, bias=bias), (3, shape[0]))
    check_bound(ours, (shape[0],))


@pytest.mark.parametrize("hidden", [4, 8, 11])
def test_sll_dense(hidden):
    layer = _seeded(SLL.SDPBasedLipschitzDense, 8, 8, hidden, amount=0.5)
    check_bound(check_same(layer, (5, 8)), (8,))


@pytest.mark.parametrize("factor", [1, 2.5])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_sll_convolution(factor, kernel_size):
    layer = _seeded(SLL.SDPBasedLipschitzResBlock, 4, factor, kernel_size, amount=0.5)
    check_bound(check_same(layer, (2, 4, 7, 7)), (1, 4, 6, 6))


@pytest.mark.parametrize(
    ("axis", "shape"), [(1, (2, 6, 5, 4)), (1, (3, 8)), (-1, (3, 4, 8)), (2, (2, 3, 6, 4))]
)
def test_maxmin(axis, shape):
    peer = layers.MaxMin(axis)
    ours = lipfast.accelerate(copy.deepcopy(peer))
    assert isinstance(ours, lipfast.nn.MaxMin)
    assert ours.lipschitz_bound() == 1
    x = torch.randn(shape, dtype=torch.float64)
    for view in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        xs = [view.clone().requires_grad_() for _ in range(2)]
        expected, found = peer(xs[0]), ours(xs[1])
        assert torch.equal(found, expected)
        for y in (expected, found):
            (y**3).sum().backward()
        assert torch.equal(xs[1].grad, xs[0].grad)
    with pytest.raises(ValueError, match="even number"):
        ours(torch.randn(3, 5, 5, 5))


def test_maxmin_keeps_channels_last():
    x = torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last)
    expected = layers.MaxMin()(x)
    found = lipfast.accelerate(layers.MaxMin())(x)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_a_network_of_them_all():
    torch.manual_seed(0)
    network = nn.Sequential(
        Conv(3, 8, 3),
        layers.MaxMin(),
        Conv(8, 16, 3, stride=2, padding=1),
        SLL.SDPBasedLipschitzResBlock(16, 1),
        Conv(16, 16, 2, stride=2, padding=0),
        nn.Flatten(),
        layers.OrthoLinear(256, 10),
    )
    ours = copy.deepcopy(network)
    report = lipfast.accelerate(ours, dry_run=True)
    assert len(report.replaced) == 6
    lipfast.accelerate(ours)
    assert not lipfast.accelerate(ours, dry_run=True).replaced
    x = torch.randn(4, 3, 16, 16)
    expected, found = network(x), ours(x)
    assert distance(found.detach(), expected.detach()) < 1e-5
    twin = copy.deepcopy(ours).eval()
    assert torch.equal(twin(x), ours.eval()(x))
    assert abs(lipfast.certify.lipschitz_bound(ours) - 1) < 1e-6


def test_layers_of_equal_shape_are_built_together():
    layers = [_conditioned(Conv, 4, 4, 3, stride=2, padding=1) for _ in range(2)]
    apart = lipfast.accelerate(nn.Sequential(*layers))
    together = lipfast.fuse(copy.deepcopy(apart))
    x = torch.randn(2, 4, 8, 8)
    for model in (apart, together):
        model(x).square().sum().backward()
    for p, q in zip(apart.parameters(), together.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or distance(q.grad, p.grad) < 1e-5


def test_transforms_compiler_and_second_derivatives():
    layer = lipfast.accelerate(_conditioned(Conv, 4, 6, 3, stride=2, padding=1))
    x = torch.randn(2, 4, 6, 6)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    assert distance(compiled(x).detach(), layer(x).detach()) < 1e-5
    parameters = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}

    def loss(values):
        return torch.func.functional_call(layer, values, x).square().sum()

    layer(x).square().sum().backward()
    for name, grad in torch.func.grad(loss)(parameters).items():
        assert distance(grad, layer.get_parameter(name).grad) < 1e-4
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    # affine, y = J x + b: the gradient is g = 2 J^T y, and that of its square 4 J^T J g
    jacobian = torch.autograd.functional.jacobian(layer, x[:1]).reshape(-1, x[0].numel())
    gram = jacobian.T @ jacobian
    expected = 4 * (grad.detach().flatten(1) @ gram)
    assert distance(second.flatten(1), expected) < 1e-4


def _parameters(**kwargs):
    return {"ortho_params": reparametrizers.OrthoParams(**kwargs)}


_PASS_THROUGH = reparametrizers.BJORCK_PASS_THROUGH_ORTHO_PARAMS
_FEW_STEPS = functools.partial(reparametrizers.BatchedBjorckOrthogonalization, niters=2)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AOL.AOLConv2D(4, 4, 3, niter=3), "niter is 3"),
        (lambda: AOL.AOLConv2D(4, 4, 3, padding=1, padding_mode="reflect"), "repeats pixels"),
        (lambda: AOL.AOLConv2D(4, 4, 3, padding=2, padding_mode="circular"), "repeats outputs"),
        (lambda: AOL.AOLConvTranspose2D(4, 4, 3), "transposed"),
        (lambda: Conv(4, 4, 2), "even kernel"),
        (lambda: Conv(4, 4, 3, groups=4), "one channel per group"),
        (lambda: Conv(4, 4, 3, ortho_params=reparametrizers.QR_ORTHO_PARAMS), "BatchedQR"),
        (lambda: Conv(4, 4, 3, ortho_params=reparametrizers.EXP_ORTHO_PARAMS), "BatchedExp"),
        (lambda: Conv(4, 4, 1, ortho_params=_PASS_THROUGH), "no gradient"),
        (lambda: Conv(8, 8, 3, **_parameters(orthogonalizer=_FEW_STEPS)), "2 Bjorck steps"),
        (
            lambda: layers.OrthoLinear(4, 4, ortho_params=reparametrizers.CHOLESKY_ORTHO_PARAMS),
            "BatchedCholesky",
        ),
        (lambda: layers.UnitNormLinear(4, 3), "the layer is not"),
        (lambda: AOC.AdaptiveOrthoConvTranspose2d(4, 4, 3), "transposed"),
        (lambda: AOC.RkoConvTranspose2d(4, 4, 2, stride=2), "transposed"),
        (lambda: AOC.BcopRkoConvTranspose2d(4, 4, 3, stride=2), "transposed"),
        (lambda: adaptiveSOC.AdaptiveSOCConv2d(4, 4, 3), "not skew-symmetric"),
        (lambda: SLL.SLLxAOCLipschitzResBlock(4, 4, 1), "size of the map"),
        (lambda: SLL.AOCLipschitzResBlock(4, 1, 3), "no padding"),
        (lambda: SLL.SDPBasedLipschitzResBlock(4, 1, 4), "kernel_size"),
        (lambda: SLL.SDPBasedLipschitzResBlock(4, 1, groups=2), "groups is 2"),
        (lambda: layers.HouseHolder(4), "Householder"),
    ],
)
def test_what_is_left_alone(make, text):
    torch.manual_seed(0)
    assert text in reason(make())


def test_ill_conditioned_weights_are_left_alone_unless_exact_is_false():
    torch.manual_seed(0)
    layer = layers.OrthoLinear(8, 8)
    with torch.no_grad():
        layer.parametrizations.weight.original[0] *= 0.05
    assert "differ by a factor of 20" in reason(layer)
    lipfast.accelerate(layer, exact=False)
    assert abs(layer.eval().lipschitz_bound() - 1) < 1e-6


def test_subclasses_are_left_alone():
    class Other(layers.OrthoLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not lipfast.accelerate(Other(3, 3), dry_run=True).replaced
