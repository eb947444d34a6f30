"""Defects that published implementations have: each test shows the defect, or fails with it."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lipfast
from lipfast import backends, certify, reference
from lipfast import nn as lnn
from lipfast.models import ConvNet
from lipfast.nn import bcop

F64 = torch.float64
METHODS = list(lnn.METHODS)
SIZES = [(1, 1), (1, 4), (5, 3), (4, 7), (6, 6)]


def make_conv(method: str, *args, seed: int = 0, **kwargs) -> lnn.LipschitzConv2d:
    torch.manual_seed(seed)
    layer = lnn.METHODS[method].conv(*args, **kwargs)
    with torch.no_grad():
        layer.weight.add_(0.3 * torch.randn(layer.weight.shape))
    return layer


def dense_norm(function, channels: int, size: tuple[int, int], dtype=torch.float32) -> float:
    """The spectral norm of a linear map of (n, channels, h, w)."""
    n = channels * size[0] * size[1]
    basis = torch.eye(n, dtype=dtype).reshape(n, channels, *size)
    with torch.no_grad():
        return float(torch.linalg.matrix_norm(function(basis).flatten(1).double(), 2))


def jacobian_norm(function, x: Tensor) -> float:
    """The spectral norm of the Jacobian at x (1, ...)."""
    jacobian = torch.autograd.functional.jacobian(function, x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))


# Soundness ----------------------------------------------------------------------------------------


def test_cold_power_iteration_as_a_norm():
    """CPL divided by the estimate of 1, 10 or 100 cold steps is expansive."""
    torch.manual_seed(0)
    conv = lnn.CPLConv2d(8, 8, 3, bias=False)
    size = (8, 8)
    true = dense_norm(
        lambda x: reference.conv2d_same(x, conv.weight.double(), None, "zeros"), 8, size, F64
    )
    cold = torch.randn(1, 8, *size)
    estimates = [
        float(reference.power_iteration(conv.weight, cold, "zeros", steps=steps)[0].detach())
        for steps in (1, 10)
    ]
    # on x with W x > 0 the layer is I - (2 / estimate^2) W^T W: norm 2 (true / estimate)^2 - 1
    assert [2 * (true / estimate) ** 2 - 1 > 1.01 for estimate in estimates] == [True, True]
    conv.eval()
    _, _, t = conv._sound(size).weights
    kernel = conv._sound(size).weights[0].double()
    norm = dense_norm(lambda x: reference.conv2d_same(x, kernel, None, "zeros"), 8, size, F64)
    assert 0.995 < float(t) * norm**2 / 2 <= 1
    assert float(conv.power_vector.norm()) > 0


def test_start_vector_kept_from_another_input_size():
    """The norm at evaluation is of the map at hand, whatever the layer saw in training."""
    conv = make_conv("cpl", 4, 4, 3, bias=False)
    for _ in range(50):
        conv(torch.randn(1, 4, 2, 2))
    conv.eval()
    for size in ((12, 12), (3, 3), (12, 12), (1, 1)):
        conv(torch.zeros(1, 4, *size))
        kernel, _, t = conv._sound(size).weights
        kernel = kernel.double()
        norm = dense_norm(
            lambda x, k=kernel: reference.conv2d_same(x, k, None, "zeros"), 4, size, F64
        )
        assert float(t) * norm**2 <= 2 * (1 + 1e-9)


def test_smallest_of_four_lower_bounds():
    """SOC takes the smallest of four unfoldings' norms: each must be an upper bound."""
    torch.manual_seed(0)
    weight = torch.randn(6, 6, 3, 3, dtype=F64)
    kernel = reference.skew_kernel(weight)
    true = dense_norm(lambda x: reference.conv2d_same(x, kernel, None, "circular"), 6, (9, 9), F64)
    unfoldings = [kernel.reshape(6, -1), kernel.permute(0, 2, 1, 3).reshape(18, 18)]
    estimates = []
    for matrix in unfoldings:
        v = torch.zeros(matrix.shape[1], dtype=F64)  # a start vector that hardly moved
        v[0] = 1
        estimates.append(3 * float((matrix @ v).norm()))
    assert min(estimates) < true
    assert float(reference.unfolding_bound(kernel, skew=True)) >= true
    conv = lnn.SOCConv2d(6, 6, 3, padding_mode="circular", dtype=F64, bias=False)
    with torch.no_grad():
        conv.weight.copy_(weight)
    for training in (True, False):
        assert dense_norm(conv.train(training), 6, (9, 9), F64) <= 1 + 1e-12


def test_norm_of_a_filter_that_is_then_drawn_again():
    """SOC's scale follows its weight: nothing from before the change is left."""
    conv = lnn.SOCConv2d(4, 4, 3, bias=False, dtype=F64)
    conv(torch.zeros(1, 4, 6, 6, dtype=F64))
    for seed in range(3):
        torch.manual_seed(seed)
        nn.init.normal_(conv.weight, std=10.0**seed)
        for training in (True, False, True):
            assert dense_norm(conv.train(training), 4, (6, 6), F64) <= 1 + 1e-12


@pytest.mark.parametrize("limit", [1.0, 1.7])
def test_five_taylor_terms_exceed_one(limit):
    angle = torch.tensor([[0.0, limit], [-limit, 0.0]], dtype=F64)
    kernel = angle[:, :, None, None]
    norms = [
        dense_norm(lambda x, n=n: reference.skew_exp(x, kernel, n, "zeros"), 2, (1, 1), F64)
        for n in (5, 12)
    ]
    assert norms[0] > 1.0008
    assert norms[1] == pytest.approx(1, abs=1e-5)
    for k, factor in ((1, 1.0), (3, 2.1), (5, 3.5)):
        conv = lnn.SOCConv2d(2, 2, k, bias=False, dtype=F64, padding_mode="circular")
        with torch.no_grad():
            conv.weight.zero_()
            conv.weight[:, :, k // 2, k // 2] = angle / limit
        for training in (True, False):
            assert dense_norm(conv.train(training), 2, (5, 5), F64) <= 1 + 1e-12
        assert reference.taylor_supremum(5, factor) > 1 + 1e-4


@pytest.mark.parametrize("q", [1e-6, 1e-7])
def test_epsilon_only_in_the_inverse_of_q(q):
    torch.manual_seed(0)
    linear = lnn.SLLLinear(8, 8, bias=False, dtype=F64)
    with torch.no_grad():
        linear.q.fill_(q)

    def published(x: Tensor) -> Tensor:
        gram = (linear.weight @ linear.weight.T).abs()
        t = 2 / (gram * linear.q[None, :] / (linear.q[:, None] + 1e-6)).sum(dim=1)
        return x - (t * (x @ linear.weight.T).relu()) @ linear.weight

    x = torch.randn(64, 8, dtype=F64)
    norms = [max(jacobian_norm(f, row[None]) for row in x) for f in (published, linear)]
    assert norms[0] > 1.3
    assert norms[1] <= 1 + 1e-12


def test_q_that_cancels_never_learns():
    linear = lnn.SLLLinear(8, 8)
    (linear(torch.randn(4, 8)) * torch.randn(4, 8)).sum().backward()
    assert float(linear.q.grad.norm()) > 1e-4
    # multiplied and divided along the same axis, q leaves the row sums as they are
    gram, q = torch.rand(8, 8), linear.q.detach().abs()
    torch.testing.assert_close((gram * q[:, None] / q[:, None]).sum(1), gram.sum(1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("cpl", "sll")])
def test_norm_on_maps_whose_size_the_kernel_does_not_divide(method, size):
    """An orthogonal k x k DFT grid, dilated, is exact only where k divides the map (ECO)."""
    for k in (3, 5):
        conv = make_conv(method, 4, 4, k, bias=False, dtype=F64)
        for training in (True, False):
            norm = dense_norm(conv.train(training), 4, size, F64)
            assert norm <= 1 + (1e-9 if training else 1e-12)


def test_kernel_of_one_tap_treated_as_matrices_of_size_one():
    """A 1x1 kernel (c, c, 1, 1) orthogonalised over its last axes: each entry becomes +-1."""
    for c in (4, 12):
        weight = torch.randn(c, c, 1, 1)
        published = reference.bjorck(weight / weight.abs().amax(dim=(2, 3), keepdim=True))
        assert float(torch.linalg.matrix_norm(published[:, :, 0, 0], 2)) > 1.5
        conv = make_conv("bcop", c, c, 1, bias=False).eval()
        matrix = conv.effective_kernel()[:, :, 0, 0].double()
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(c, dtype=F64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_modes_for_which_the_bound_does_not_hold(mode):
    conv = lnn.AOLConv2d(1, 1, 3, bias=False, dtype=F64).eval()
    with torch.no_grad():
        conv.weight.fill_(1.0)
    kernel = conv.effective_kernel()
    padded = nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode, bias=False, dtype=F64)
    padded.weight.data = kernel
    assert dense_norm(padded, 1, (2, 2), F64) > 1 - 1e-5
    corner = torch.zeros(1, 1, 3, 3, dtype=F64)
    corner[..., 0, 0] = corner[..., 1, 1] = 0.5  # AOL leaves it as it is, nearly
    padded.weight.data = corner * reference.aol_rescale(corner)
    assert dense_norm(padded, 1, (3, 3), F64) > 1.01
    for method in METHODS:
        with pytest.raises(ValueError, match=f"padding_mode: .*{mode}"):
            lnn.METHODS[method].conv(1, 1, 3, padding_mode=mode)


@pytest.mark.parametrize("method", METHODS)
def test_weights_built_in_half_precision_under_autocast(method):
    conv = make_conv(method, 8, 8, 3, bias=False)
    state = copy.deepcopy(conv.state_dict())
    x = torch.randn(1, 8, 5, 5)
    (plain,) = [conv._weights((5, 5), x)[0]]
    conv.load_state_dict(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = conv._weights((5, 5), x)[0]
        assert conv(x).shape == x.shape
        conv.eval()
        sound = conv._sound((5, 5)).weights[0]
    assert under.dtype in (torch.float32, torch.complex64)
    assert torch.equal(under, plain)
    assert torch.equal(sound, copy.deepcopy(conv)._sound((5, 5)).weights[0])


def test_head_with_normalised_rows_is_certified_by_pairwise_differences():
    """norm(w_i - w_j) can be 2, above sqrt(2), for rows of norm 1."""
    head = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    x = torch.tensor([[0.5, 0.0]], dtype=F64)
    scores, label = x @ head.T, torch.tensor([0])
    sqrt2 = certify.certified_radius(scores, label)
    exact = certify.certified_radius(scores, label, head_weight=head)
    assert float(exact) == pytest.approx(0.5)
    assert float(sqrt2) > 0.7  # x - 0.6 e_1 lies inside and has the other class
    assert int(((x - torch.tensor([[0.6, 0.0]])) @ head.T).argmax()) == 1


def test_ties_are_never_certified():
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    labels = torch.zeros(3, dtype=torch.long)
    assert int(scores[0].argmax()) == 0  # counted as right by argmax
    for head in (None, torch.eye(3), torch.ones(3, 3)):
        radius = certify.certified_radius(scores, labels, head_weight=head)
        assert certify.certified_robust_accuracy(radius, 0.0) == 0
    assert certify.certified_robust_accuracy(torch.tensor([0.5]), 0.5) == 0


def _precision_settings() -> list[tuple[object, str]]:
    b = torch.backends
    owners = [b, b.cuda.matmul, b.cudnn, b.cudnn.conv, b.cudnn.rnn]
    return [(o, "fp32_precision") for o in [*owners, b.mkldnn, b.mkldnn.conv, b.mkldnn.matmul]]


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch < 2.9")
def test_certification_switches_reduced_precision_off_and_restores_it():
    settings = _precision_settings()
    before = [getattr(owner, name) for owner, name in settings]
    changes = [
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
        lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16"),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    ]
    matmul = torch.get_float32_matmul_precision()
    try:
        for change in changes:
            change()
            user = [getattr(owner, name) for owner, name in settings]
            with torch.autocast("cpu", dtype=torch.bfloat16), certify.full_precision():
                assert {getattr(owner, name) for owner, name in settings} <= {"ieee", "none"}
                assert not torch.is_autocast_enabled("cpu")
            assert [getattr(owner, name) for owner, name in settings] == user
    finally:
        torch.set_float32_matmul_precision(matmul)
        for (owner, name), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch < 2.9")
def test_certification_runs_in_full_precision():
    seen = []

    class Probe(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"
            seen.append((torch.is_autocast_enabled("cpu"), tf32))
            return x

    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda module, args, y: Probe()(y))
    batch = (torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    before = torch.backends.cudnn.conv.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        certify.report(model, [batch])
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, False)]
    assert torch.backends.cudnn.conv.fp32_precision == before


# State --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_cache_holds_no_graph(method):
    """An attack differentiates the same evaluation layer again and again."""
    conv = make_conv(method, 3, 4, 3).eval()
    linear = lnn.METHODS[method].linear(4, 4).eval()
    x = torch.randn(2, 3, 5, 5)
    gradients = []
    for _ in range(3):
        point = x.clone().requires_grad_()
        linear(conv(point).mean(dim=(2, 3))).square().sum().backward()
        gradients.append(point.grad)
    assert torch.equal(gradients[0], gradients[2])
    assert float(gradients[0].norm()) > 0
    for layer in (conv, linear):
        assert not any(w.requires_grad for w in layer._cache.sound.weights)
        assert layer.weight.grad is None
    with torch.inference_mode():
        fresh = make_conv(method, 3, 4, 3, seed=1).eval()
        fresh(x)
    for layer in (fresh, conv):  # first run in inference mode, then attacked
        point = x.clone().requires_grad_()
        layer(point).square().sum().backward()
        assert float(point.grad.norm()) > 0


def changed_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight))


def loaded(layer):
    layer.load_state_dict({k: v + torch.rand_like(v) for k, v in layer.state_dict().items()})


def assigned(layer):
    state = {k: v + torch.rand_like(v) for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def swapped(layer):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        loaded(layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def stepped(layer, optimizer=torch.optim.SGD, **kwargs):
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer(layer.parameters(), 0.5, **kwargs).step()


def replaced(layer):
    layer.weight = nn.Parameter(torch.rand_like(layer.weight))


def written_as_data(layer):
    layer.weight.data = torch.rand_like(layer.weight)


def copied_as_data(layer):
    """Not counted by torch: train() or eval() is the documented call."""
    layer.weight.data.copy_(torch.rand_like(layer.weight))
    layer.eval()


CHANGES = {
    "in place": changed_in_place,
    "load_state_dict": loaded,
    "load_state_dict(assign=True)": assigned,
    "load_state_dict, swapping": swapped,
    "optimizer step": stepped,
    "foreach step": lambda layer: stepped(layer, foreach=True),
    "fused step": lambda layer: stepped(layer, fused=True),
    "fused AdamW": lambda layer: stepped(layer, torch.optim.AdamW, fused=True),
    "replaced": replaced,
    "weight.data =": written_as_data,
    "weight.data.copy_": copied_as_data,
    "train, step, eval": lambda layer: (layer.train(), stepped(layer), layer.eval()),
    "to another dtype": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_cache_survives_no_change(method, change):
    torch.manual_seed(0)
    layer = lnn.METHODS[method].conv(4, 4, 3, bias=False).eval()
    x = torch.randn(1, 4, 5, 5)
    before = layer(x)
    CHANGES[change](layer)
    dtype = layer.weight.dtype
    after = layer(x.to(dtype))
    fresh = lnn.METHODS[method].conv(4, 4, 3, bias=False, dtype=dtype).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(after, fresh(x.to(dtype)))
    if dtype == torch.float32 and not (method == "lot" and change == "in place"):
        assert not torch.equal(after, before)
    assert layer.lipschitz_bound() == fresh.lipschitz_bound()


@pytest.mark.parametrize("method", METHODS)
def test_cache_survives_no_other_resolution(method):
    for k in (1, 3, 5):
        conv = make_conv(method, 4, 4, k).eval()
        for size in [*SIZES, *reversed(SIZES)]:
            x = torch.randn(2, 4, *size)
            torch.testing.assert_close(conv(x), copy.deepcopy(conv)(x), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_cache_moves_with_the_module(method):
    conv = make_conv(method, 4, 4, 3).eval()
    x = torch.randn(1, 4, 5, 5)
    expected = conv(x)
    assert conv.to("meta")(x.to("meta")).is_meta
    conv = make_conv(method, 4, 4, 3).eval()
    conv(x)
    torch.testing.assert_close(conv.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    assert conv.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(conv.float()(x), copy.deepcopy(conv)(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles(method, training):
    model = nn.Sequential(make_conv(method, 3, 4, 3), lnn.MaxMin())
    x = torch.randn(2, 3, 4, 5)
    model(x)
    model.train(training)(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    state = copy.deepcopy(model.state_dict())
    expected = model(x)
    for other in copies:
        other.load_state_dict(state)
        assert other.training == training
        assert torch.equal(other(x), expected)
    copies[0][0].weight.data.zero_()
    copies[0].eval()
    assert not torch.equal(copies[0](x), expected)  # the copy does not share the cache
    model.load_state_dict(state)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_caller_gets_is_not_the_cache(method):
    for k, size in ((1, (1, 1)), (3, (4, 5))):
        conv = make_conv(method, 4, 4, k, bias=False).eval()
        x = torch.randn(1, 4, *size)
        expected = conv(x)
        plain = conv.to_plain(size)
        with torch.no_grad():
            for tensor in [*plain.parameters(), *plain.buffers()]:
                tensor.zero_()
            if method not in ("cpl", "sll") and (method, k) != ("soc", 3):
                conv.effective_kernel(size).zero_()
        assert torch.equal(conv(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_exist_from_the_start(method):
    """A parameter made in the first forward is unknown to the optimizer and to a fresh model."""
    torch.manual_seed(0)
    model = ConvNet(method, input_size=(1, 8, 8), width=4, layers_per_block=1)
    keys = list(model.state_dict())
    parameters = {id(p) for p in model.parameters()}
    x = torch.randn(3, 1, 8, 8)
    model(x).sum().backward()
    model.eval()(x)
    model(x)
    assert list(model.state_dict()) == keys
    assert {id(p) for p in model.parameters()} == parameters
    assert all(p.grad is not None for p in model.parameters())
    fresh = ConvNet(method, input_size=(1, 8, 8), width=4, layers_per_block=1)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), model(x))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_forward_draws_no_random_vectors(method, k):
    conv = make_conv(method, 4, 4, k)
    linear = lnn.METHODS[method].linear(5, 4)
    for layer, x in ((conv, torch.randn(2, 4, 5, 5)), (linear, torch.randn(2, 5))):
        state = copy.deepcopy(layer.state_dict())
        for training in (True, False):
            layer.train(training)
            random = torch.get_rng_state()
            first = layer(x)
            layer.load_state_dict(state)  # CPL's power vector is the one buffer that moves on
            assert torch.equal(layer(x), first)
            assert torch.equal(torch.get_rng_state(), random)
            layer.load_state_dict(state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_shapes_that_crash_somewhere(method, k, bias):
    for channels in [(4, 4), (3, 5), (5, 3), (1, 2), (2, 1), (1, 1)]:
        conv = make_conv(method, *channels, k, bias=bias)
        for size in SIZES:
            x = torch.randn(2, channels[0], *size, requires_grad=True)
            y = conv.train()(x)
            y.sum().backward()
            assert y.shape == (2, channels[1], *size)
            assert bool(y.isfinite().all())
            assert bool(x.grad.isfinite().all())
            assert conv.eval()(x).shape == y.shape
            assert conv(x[0]).shape == y.shape[1:]
        assert all(bool(p.grad.isfinite().all()) for p in conv.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, dtype):
    for k in (1, 3):
        conv = make_conv(method, 4, 6, k)
        linear = lnn.METHODS[method].linear(6, 4)
        x = torch.randn(2, 4, 5, 3)
        expected = linear.eval()(conv.eval()(x).mean(dim=(2, 3)))
        for half in (True, False):
            net = [copy.deepcopy(layer).to(dtype) if half else layer for layer in (conv, linear)]
            for training in (True, False):
                inputs = x.to(dtype) if half else x
                with torch.autocast("cpu", dtype=dtype, enabled=not half):
                    y = net[0].train(training)(inputs).mean(dim=(2, 3)).to(inputs.dtype)
                    y = net[1].train(training)(y)
                if training:
                    y.float().sum().backward()
                assert bool(y.isfinite().all())
                assert all(bool(p.grad.isfinite().all()) for p in net[0].parameters())
            assert y.dtype == dtype or not half
            assert float((y.float() - expected).norm()) < 0.1 * float(1 + expected.norm())


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-12, -1e-9, 1e12])
def test_q_near_zero_gives_no_nan(value):
    torch.manual_seed(0)
    for layer, x in (
        (lnn.SLLConv2d(6, 6, 3), torch.randn(2, 6, 4, 4)),
        (lnn.SLLLinear(6, 6), None),
    ):
        x = torch.randn(2, 6) if x is None else x
        for entries in (slice(0, 1), slice(0, 5), slice(None)):
            with torch.no_grad():
                nn.init.normal_(layer.q)[entries] = value
            layer.zero_grad()
            y = layer.train()(x)
            y.square().sum().backward()
            assert bool(y.isfinite().all())
            assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
            assert bool(layer.eval()(x).isfinite().all())
            assert layer.lipschitz_bound() <= 1 + 1e-6


@pytest.mark.parametrize("method", ["cpl", "sll"])
def test_many_large_steps_give_no_nan(method):
    torch.manual_seed(0)
    model = nn.Sequential(make_conv(method, 4, 4, 3), make_conv(method, 4, 4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.9, weight_decay=0.05)
    x, direction = torch.randn(2, 4, 4, 6, 6)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (model(x) * direction).mean()
        loss.backward()
        optimizer.step()
        assert bool(loss.isfinite())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    model.eval()(x)
    assert certify.lipschitz_bound(model) <= 1 + 1e-6


def test_power_vector_that_the_convolution_maps_to_zero_gives_no_nan():
    conv = lnn.CPLConv2d(2, 2, 3, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :, 2, 1] = torch.eye(2)  # a shift: the vector's first row becomes 0
    conv(torch.randn(1, 2, 8, 8))
    assert not conv.power_vector[..., 0, :8].any()
    y = conv(torch.randn(1, 2, 1, 1))
    y.sum().backward()
    assert bool(conv.weight.grad.isfinite().all())
    with torch.no_grad():
        conv.power_vector.zero_()
        conv.weight[:, :, 1, 1] = torch.eye(2)
    x = -torch.ones(1, 2, 4, 4)
    assert not torch.equal(conv(-x), -x)  # it has not stopped for good at the identity
    assert bool(conv.power_vector[..., :4, :4].any())


# Speed and memory ---------------------------------------------------------------------------------


class OpCounter(TorchDispatchMode):
    """Counts operations by name and keeps the devices of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.devices |= {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result

    def count(self, *names: str) -> int:
        return sum(name in names for name in self.names)


def training_step(method: str, device: str) -> None:
    conv = lnn.METHODS[method].conv(4, 6, 3, device=device)
    linear = lnn.METHODS[method].linear(6, 5, device=device)
    x = torch.empty(2, 4, 5, 5, device=device)
    linear(conv(x).mean(dim=(2, 3))).square().sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_training_step_reads_no_value_on_the_host(method):
    """float(norm) and the like cannot run where tensors have no values."""
    with FakeTensorMode():
        with pytest.raises(Exception, match=r"item|local_scalar"):
            float(torch.ones(2).norm())
        training_step(method, "cpu")
    counter = OpCounter()
    conv = make_conv(method, 4, 4, 3)
    conv._check_finite = lambda *, on_device: None  # a check of values that runs on a CPU only
    x = torch.randn(2, 4, 5, 5)
    with counter:
        conv(x).sum().backward()
    assert counter.count("_local_scalar_dense", "is_nonzero", "equal", "nonzero") == 0


@pytest.mark.parametrize("method", METHODS)
def test_training_step_builds_nothing_on_the_cpu_for_another_device(method):
    conv = lnn.METHODS[method].conv(4, 6, 3, device="meta")
    linear = lnn.METHODS[method].linear(6, 5, device="meta")
    x = torch.empty(2, 4, 5, 5, device="meta")
    for training in (True, False):
        counter = OpCounter()
        with counter:
            y = linear.train(training)(conv.train(training)(x).mean(dim=(2, 3)))
            if training:
                y.square().sum().backward()
        assert counter.devices == {"meta"}


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 7)])
def test_half_of_the_frequencies(size):
    h, w = size
    x = torch.randn(1, 4, h, w)
    lot = make_conv("lot", 4, 4, 3)
    cayley = make_conv("cayley", 4, 4, 3)
    for training in (True, False):
        (spectrum,) = lot.train(training)._weights(size, x)
        assert len(spectrum) == (h + 2) * ((w + 2) // 2 + 1)  # of (h + 2) (w + 2)
        (spectrum,) = cayley.train(training)._weights(size, x)
        assert len(spectrum) == h * (w // 2 + 1)
    for method in ("lot", "cayley"):
        assert not make_conv(method, 4, 4, 1)._weights(size, x)[0].is_complex()


def test_one_orthogonalisation_for_all_matrices():
    counts = []
    for k in (1, 3, 5):
        matrices = torch.randn(2 * k - 1, 8, 8)
        with OpCounter() as counter:
            bcop._orthogonalise(matrices)
        counts.append(counter.count("mm", "bmm", "baddbmm", "matmul"))
    assert counts[0] == counts[1] == counts[2] > 0
    assert counts[0] <= 2 * bcop._ITERATIONS + 5  # and the norm


def test_composition_multiplies_by_each_projector_once():
    counts = []
    for k in (3, 5):
        factor, halves = torch.randn(8, 8), torch.randn(2 * (k - 1), 8, 4)
        projectors = halves @ halves.mT
        with OpCounter() as counter:
            reference.block_conv(factor, projectors)
        counts.append(counter.count("mm", "bmm"))
    assert counts == [4, 8]  # the published form: 25 for k = 3


def test_maxmin_saves_one_bit_per_pair_in_one_operation():
    if backends.choose("maxmin", torch.zeros(2, 2)) == "reference":
        pytest.skip("neither the extension nor Triton can run here")
    x = torch.randn(8, 32, 16, 16, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), OpCounter() as counter:
        y = lnn.MaxMin()(x)
    assert sum(t.nbytes for t in saved) <= x.numel() // 16 + 64
    assert sorted({*counter.names} - {"movedim"}) == ["maxmin"]  # movedim is a view
    assert counter.count("maxmin") == 1
    with OpCounter() as counter:
        y.sum().backward()
    assert counter.count("maxmin_backward") == 1
    with lipfast.backend("reference"), OpCounter() as counter:
        lnn.MaxMin()(x.detach())
    assert len(counter.names) > 3  # as published: reshape, two reductions, a concatenation
