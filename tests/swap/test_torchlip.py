"""The layers of deel-torchlip, from the package itself."""

import copy
import functools

import pytest
import torch
from torch import nn

import lipfast

torchlip = pytest.importorskip("deel.torchlip")
from swap.peer_checks import check_bound, check_same, distance, perturb, reason  # noqa: E402

from lipfast.swap.torchlip_bjorck import stopped_bjorck  # noqa: E402


def _trained(make, *args, amount, **kwargs):
    """Such a layer, as far from an orthogonal weight as given, with vectors that fit it."""
    torch.manual_seed(0)
    layer = perturb(make(*args, **kwargs), amount)
    with torch.no_grad():
        for _ in range(50):
            layer.weight  # noqa: B018
    return layer


AMOUNTS = pytest.mark.parametrize("amount", [0.0, 0.3, 1.0])


@AMOUNTS
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 9), {}),
        ((9, 6), {"bias": False}),
        ((30, 8), {"k_coef_lip": 2.0}),
        ((8, 8), {"eps_bjorck": 1e-4}),
    ],
)
def test_spectral_linear(shape, options, amount):
    layer = _trained(torchlip.SpectralLinear, *shape, amount=amount, **options)
    ours = check_same(layer, (4, shape[0]))
    check_bound(ours, (shape[0],), expected=options.get("k_coef_lip", 1.0))


@AMOUNTS
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((4, 6), {"kernel_size": 3, "padding": 1}),
        ((3, 40), {"kernel_size": 3, "padding": "same", "bias": False}),
        ((6, 4), {"kernel_size": 2, "stride": 2}),
        ((4, 6), {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)}),
        ((4, 6), {"kernel_size": 3, "padding": 1, "groups": 2, "k_coef_lip": 0.5}),
        ((4, 6), {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    ],
)
def test_spectral_convolution(channels, options, amount):
    layer = _trained(torchlip.SpectralConv2d, *channels, amount=amount, **options)
    ours = check_same(layer, (2, channels[0], 8, 8))
    check_bound(ours, (1, channels[0], 6, 6), expected=options.get("k_coef_lip", 1.0))


def test_spectral_convolution_repeats_pixels_of_some_circular_maps():
    options = {"stride": 3, "padding": 1, "padding_mode": "circular"}
    layer = _trained(torchlip.SpectralConv2d, 4, 6, 3, amount=0.3, **options)
    ours = check_same(layer, (2, 4, 8, 8))
    check_bound(ours, (1, 4, 9, 9))
    check_bound(ours, (1, 4, 7, 9), expected=2**0.5)
    check_bound(ours, (1, 4, 7, 7), expected=2.0)


@pytest.mark.parametrize("shape", [(6, 1), (6, 4)])
@pytest.mark.parametrize("options", [{}, {"disjoint_neurons": False, "bias": False}])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_frobenius_linear(shape, options, factor):
    torch.manual_seed(0)
    layer = perturb(torchlip.FrobeniusLinear(*shape, k_coef_lip=factor, **options), 0.5)
    ours = check_same(layer, (4, shape[0]))
    norm = float(torch.linalg.matrix_norm(layer.eval().weight.detach().double(), 2))
    bound = ours.lipschitz_bound()
    assert norm <= bound * (1 + 1e-6)
    assert bound <= norm * (1 + 1e-3)


@pytest.mark.parametrize("channels", [(4, 1), (3, 5)])
def test_frobenius_convolution(channels):
    torch.manual_seed(0)
    layer = perturb(torchlip.FrobeniusConv2d(*channels, 3, padding=1), 0.5)
    ours = check_same(layer, (2, channels[0], 7, 7))
    matrix = layer.eval().weight.detach().double().flatten(1)
    check_bound(ours, (1, channels[0], 6, 6), 3 * float(torch.linalg.matrix_norm(matrix, 2)))


@pytest.mark.parametrize(
    "make",
    [
        torchlip.GroupSort2,
        functools.partial(torchlip.GroupSort2, 0.5),
        lambda: torchlip.GroupSort(2),
    ],
)
@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 5, 3), (3, 1)])
def test_group_sort(make, shape):
    peer = make()
    ours = lipfast.accelerate(copy.deepcopy(peer))
    assert isinstance(ours, lipfast.nn.MaxMin)
    assert ours.lipschitz_bound() == peer._coefficient_lip
    xs = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()]
    xs.append(xs[0].detach().clone().requires_grad_())
    expected, found = peer(xs[0]), ours(xs[1])
    assert torch.equal(found, expected)
    for y in (expected, found):
        (y**3).sum().backward()
    assert torch.equal(xs[1].grad, xs[0].grad)


@pytest.mark.parametrize("shape", [(5, 7), (5, 10), (24, 4), (3, 90)])
@pytest.mark.parametrize("smallest", [0.99, 0.6, 0.1, 1e-4])
def test_stopped_iteration_in_float64(shape, smallest):
    """Against the steps as the source takes them, to a few ulps, with the second derivative."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    u, _, v = torch.linalg.svd(torch.randn(shape, **options), full_matrices=False)
    x = (u * torch.linspace(1, smallest, min(shape), dtype=torch.float64)) @ v
    grad = torch.randn(shape, **options)
    from deel.torchlip.normalizers import bjorck_normalization

    found, expected = [], []
    for function, results in ((stopped_bjorck, found), (bjorck_normalization, expected)):
        leaf = x.clone().requires_grad_()
        y = function(leaf, 1e-3)
        (first,) = torch.autograd.grad(y, leaf, grad, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), leaf)
        plain = x.clone().requires_grad_()
        function(plain, 1e-3).backward(grad)
        results += [y.detach(), first.detach(), second, plain.grad]
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours, theirs) < 1e-12


def test_a_network_of_them_all():
    torch.manual_seed(0)
    network = torchlip.Sequential(
        torchlip.SpectralConv2d(3, 8, 3, padding=1),
        torchlip.GroupSort2(),
        torchlip.SpectralConv2d(8, 16, 2, stride=2),
        torchlip.GroupSort2(),
        nn.Flatten(),
        torchlip.SpectralLinear(256, 32),
        torchlip.FullSort(),
        torchlip.FrobeniusLinear(32, 1),
        k_coef_lip=1.0,
    )
    ours = copy.deepcopy(network)
    report = lipfast.accelerate(ours, dry_run=True)
    assert len(report.replaced) == 6
    assert [entry.kind for entry in report.left_alone] == ["FullSort"]
    with pytest.warns(UserWarning, match="more than two channels"):
        lipfast.accelerate(ours)
    assert not lipfast.accelerate(ours, dry_run=True).replaced
    x = torch.randn(4, 3, 8, 8)
    for mode in (True, False):
        expected, found = network.train(mode)(x), ours.train(mode)(x)
        assert distance(found.detach(), expected.detach()) < 1e-5
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))


def test_training_compiles_without_breaks():
    layer = lipfast.accelerate(_trained(torchlip.SpectralLinear, 8, 6, amount=1.0))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    for _ in range(2):
        for model in (compiled, twin):
            model(x).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        assert distance(ours.grad, theirs.grad) < 1e-5


def _far_from_orthogonal():
    layer = torchlip.SpectralLinear(4, 4)
    layer.parametrizations.weight[1]._w_bjorck.mul_(0.9)
    return layer


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torchlip.SpectralLinear(4, 4, eps_bjorck=None), "no bound"),
        (lambda: torchlip.SpectralLinear(4, 4, eps_bjorck=0.1), "eps_bjorck is 0.1"),
        (_far_from_orthogonal, "from an orthogonal one"),
        (
            lambda: torchlip.SpectralConv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            "repeats pixels",
        ),
        (
            lambda: torchlip.SpectralConv2d(3, 4, 5, padding=2, padding_mode="symmetric"),
            "repeats pixels",
        ),
        (
            lambda: torchlip.SpectralConv2d(3, 4, 3, padding=2, padding_mode="circular"),
            "repeats outputs",
        ),
        (lambda: torchlip.SpectralConv1d(3, 4, 3), "one dimension"),
        (lambda: torchlip.SpectralConvTranspose2d(3, 4, 3), "transposed"),
        (torchlip.MaxMin, "doubles the channels"),
        (torchlip.FullSort, "more than two"),
        (lambda: torchlip.GroupSort(4), "group_size is 4"),
        (lambda: torchlip.HouseHolder(4), "Householder"),
    ],
)
def test_what_is_left_alone(make, text):
    torch.manual_seed(0)
    assert text in reason(make())


def test_unknown_parametrisations_are_left_alone():
    layer = torchlip.SpectralLinear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    assert "Softplus" in reason(layer)
