"""Defects of published implementations: soundness. Each test shows the defect, or fails with it."""

import copy
import math

import pytest
import torch
from moved_layers import METHODS, SIZES, make_conv, settle_norm
from torch import Tensor, nn

from lipfast import certify, reference
from lipfast import nn as lnn

F64 = torch.float64


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
    for norm in ("unfolding", "spectral"):
        conv = lnn.SOCConv2d(6, 6, 3, padding_mode="circular", dtype=F64, bias=False, norm=norm)
        with torch.no_grad():
            conv.weight.copy_(weight)
        # the spectral norm is an estimate in training, as CPL's
        for training in (True, False)[norm == "spectral" :]:
            assert dense_norm(conv.train(training), 6, (9, 9), F64) <= 1 + 1e-12


def test_norm_of_a_filter_that_is_then_drawn_again():
    """SOC's scale follows its weight: nothing from before the change is left in evaluation."""
    for norm in ("unfolding", "spectral"):
        conv = lnn.SOCConv2d(4, 4, 3, bias=False, dtype=F64, norm=norm)
        conv(torch.zeros(1, 4, 6, 6, dtype=F64))
        for seed in range(3):
            torch.manual_seed(seed)
            nn.init.normal_(conv.weight, std=10.0**seed)
            for training in (True, False)[norm == "spectral" :]:
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
        settle_norm(conv)
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
    # AOL's kernel is cast once, after it was built in float32
    dtypes = (torch.bfloat16,) if method == "aol" else (torch.float32, torch.complex64)
    assert under.dtype in dtypes
    assert torch.equal(under, plain.to(under.dtype))
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

        def lipschitz_bound(self) -> float:
            return 1.0

    model = nn.Sequential(Probe(), nn.Linear(4, 3))
    batch = (torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    before = torch.backends.cudnn.conv.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        certify.report(model, [batch])
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {(False, False)}
    assert torch.backends.cudnn.conv.fp32_precision == before
