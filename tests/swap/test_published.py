"""Published layers and networks, before and after accelerate."""

import copy
import io
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from swap import published
from swap.published.dense import BnBLinear
from swap.published.spectral import LOT
from torch import Tensor, nn

import lipfast
from lipfast.nn import LipschitzModule

# (layer, shape of its input): square and not, strided, 1x1, without bias
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "aol": (lambda: published.AOLConv2d(6, 6, 3), (2, 6, 5, 7)),
    "aol wide": (lambda: published.AOLConv2d(4, 6, 3), (2, 4, 6, 6)),
    "aol dilated": (lambda: published.AOLConv2d(4, 4, 3, dilation=2), (2, 4, 6, 6)),
    "bcop": (lambda: published.BCOP(6, 6, 3), (2, 6, 5, 6)),
    "bcop odd": (lambda: published.BCOP(5, 5, 5, bias=False), (2, 5, 6, 6)),
    "bcop wide": (lambda: published.BCOP(4, 6, 3), (2, 4, 6, 6)),
    "bcop narrow": (lambda: published.BCOP(6, 4, 3), (2, 6, 6, 6)),
    "bcop 1x1": (lambda: published.BCOP(6, 6, 1), (2, 6, 4, 4)),
    "bcop 1x1 narrow": (lambda: published.BCOP(6, 4, 1), (2, 6, 4, 4)),
    "cayley": (lambda: published.CayleyConv(6, 6, 3), (2, 6, 6, 6)),
    "cayley wide": (lambda: published.CayleyConv(4, 6, 3), (2, 4, 8, 8)),
    "cayley narrow": (lambda: published.CayleyConv(6, 4, 5, bias=False), (2, 6, 8, 8)),
    "cayley 1x1": (lambda: published.CayleyConv(6, 4, 1), (2, 6, 4, 4)),
    "cayley linear": (lambda: published.CayleyLinear(6, 4), (3, 6)),
    "cpl": (lambda: published.CPLConv2d(6, 6, 3), (2, 6, 5, 7)),
    "cpl 1x1": (lambda: published.CPLConv2d(6, 6, 1), (2, 6, 5, 7)),
    "lot": (lambda: published.LOT(6, 6, 3), (2, 6, 5, 5)),
    "lot wide": (lambda: published.LOT(4, 6, 3), (2, 4, 6, 6)),
    "lot narrow": (lambda: published.LOT(6, 4, 3, bias=False), (2, 6, 6, 6)),
    "lot stride": (lambda: published.LOT(2, 8, 3, stride=2), (2, 2, 8, 8)),
    "lot 1x1": (lambda: published.LOT(6, 6, 1), (2, 6, 4, 4)),
    "sll": (lambda: published.SLLConv2d(6, 6, 3), (2, 6, 5, 7)),
    "sll padding": (lambda: published.SLLConv2d(4, 4, 5, padding=2), (2, 4, 5, 7)),
    "soc": (lambda: published.SOC(6, 6, 3), (2, 6, 5, 7)),
    "soc wide": (lambda: published.SOC(4, 6, 3, bias=False), (2, 4, 5, 7)),
    "soc stride": (lambda: published.SOC(2, 6, 3, stride=2), (2, 2, 6, 8)),
    "soc 1x1": (lambda: published.SOC(6, 6, 1, train_terms=4), (2, 6, 5, 7)),
    "bjorck linear": (lambda: published.BjorckLinear(6, 4), (3, 6)),
    "bnb": (lambda: BnBLinear(4, 6), (3, 4)),
    "bnb 20": (lambda: published.BnBLinearBCOP(6, 6), (3, 6)),
    "maxmin": (published.MaxMin, (2, 5, 4, 4)),
}
METHODS = tuple(published.LAYERS)


def trained_layer(name: str) -> tuple[nn.Module, Tensor]:
    """A layer as some steps of training might leave it, after a forward pass, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    with torch.no_grad():
        layer(x)
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * parameter.abs().mean() * torch.randn_like(parameter)
    published.forget_weights(layer)
    return layer, x


def small_network(method: str) -> tuple[nn.Module, Tensor]:
    """Of the paper's structure, in float64: in float32 rounding may choose another maximum."""
    torch.manual_seed(1)
    model = published.network(method, width=8, blocks=3, layers=1).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    published.forget_weights(model)
    return model, x


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients: of the input, and in training mode of the parameters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)  # for layers that draw numbers
    y = model(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad and model.training)]
    return [y.detach(), *torch.autograd.grad(y, wanted, direction)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Outputs to 1e-4 and gradients to 1e-3, relative in the Euclidean norm."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        limit = 1e-3 if index else 1e-4
        assert a.shape == b.shape
        # a gradient that vanishes in exact arithmetic has only rounding
        assert float((a - b).norm()) <= limit * float(b.norm()) + 1e-6


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_published_layer(name, training):
    layer, x = trained_layer(name)
    before = copy.deepcopy(layer).train(training)
    after = lipfast.accelerate(layer.train(training))
    assert after is layer
    assert type(after).__module__.startswith("lipfast")
    assert_equal(results(after, x), results(before, x))


@pytest.mark.parametrize("method", METHODS)
def test_optimizer_built_before_goes_on(method):
    before, x = small_network(method)
    model = copy.deepcopy(before)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.002, momentum=0.9)
        for m in (before, model)
    ]
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    after = lipfast.accelerate(model)
    assert [name for name, _ in after.named_parameters()] == names
    assert all(p is q for p, q in zip(after.parameters(), parameters, strict=True))
    start = [p.detach().clone() for p in before.parameters()]
    for _ in range(3):
        for net, optimizer in zip((before, after), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    moved = [
        float((p - q).detach().norm()) for p, q in zip(before.parameters(), start, strict=True)
    ]
    assert max(moved) > 1e-4
    for p, q in zip(after.state_dict().values(), before.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    published.forget_weights(before)
    assert_equal(results(after.eval(), x), results(before.eval(), x))


@pytest.mark.parametrize("method", METHODS)
def test_state_dicts_fit_both_ways(method, tmp_path):
    model, x = small_network(method)
    keys = list(model.state_dict())
    trained = lipfast.accelerate(copy.deepcopy(model))
    assert list(trained.state_dict()) == keys
    with torch.no_grad():
        trained(x)  # in training mode: power iterations move
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.05).add_(0.01 * torch.randn_like(parameter))
    expected = results(trained.eval(), x)

    safetensors.torch.save_file(trained.state_dict(), tmp_path / "after.safetensors")
    state = safetensors.torch.load_file(tmp_path / "after.safetensors")
    original = copy.deepcopy(model)
    original.load_state_dict(state, strict=True)
    assert_equal(expected, results(original.eval(), x))

    other = lipfast.accelerate(copy.deepcopy(model)).eval()
    other(x)  # fills the caches, which loading must empty
    other.load_state_dict(original.state_dict(), strict=True)
    assert_equal(results(other, x), expected)
    missing = dict(state)
    missing.pop(next(iter(missing)))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(missing, strict=True)


@pytest.mark.parametrize("method", METHODS)
def test_accelerated_networks_can_be_copied_and_saved(method):
    model, x = small_network(method)
    model = lipfast.accelerate(model).eval()
    expected = results(model, x)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        assert all(parameter is not own for own in model.parameters())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_().add_(1e-3)
    for other in (copied, loaded):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert_equal(results(other, x), expected)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "sound"])
@pytest.mark.parametrize("method", METHODS)
def test_bounds_hold(method, exact):
    """Against the largest ratio of two outputs' and inputs' distances, ascended to."""
    model, x = small_network(method)
    model = lipfast.accelerate(model, exact=exact).eval()
    product = 1.0
    model(x)
    for module in model.modules():
        if isinstance(module, LipschitzModule):
            bound = module.lipschitz_bound()
            assert bound < 1.1 if exact else bound <= 1 + 1e-6
            product *= bound
    for seed in range(3):
        torch.manual_seed(seed)
        step = torch.randn_like(x[:1])
        for _ in range(5):
            _, tangent = torch.autograd.functional.jvp(model, x[:1], step)
            _, step = torch.autograd.functional.vjp(model, x[:1], tangent)
            step = step / step.norm()
        _, tangent = torch.autograd.functional.jvp(model, x[:1], step)
        assert float(tangent.norm()) <= product * (1 + 1e-9)


def test_bound_is_honest_where_the_published_norm_has_not_converged():
    torch.manual_seed(0)
    layer = published.CPLConv2d(4, 4, 3, val_niter=1).eval()
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        layer.bias.fill_(5.0)  # every unit is active: the layer is affine
        layer(x)
    layer.val_rescaling_cached = None
    after = lipfast.accelerate(layer)
    jacobian = torch.autograd.functional.jacobian(after, x).reshape(x.numel(), x.numel())
    norm = float(torch.linalg.matrix_norm(jacobian.double(), ord=2))
    assert norm > 1.05
    assert norm <= after.lipschitz_bound((6, 6)) * (1 + 1e-5)
    assert after.lipschitz_bound((6, 6)) < norm * 1.01


def test_bound_of_five_terms_is_above_one():
    torch.manual_seed(0)
    layer = published.SOC(4, 4, 3, eval_terms=5)
    layer(torch.randn(1, 4, 6, 6))
    after = lipfast.accelerate(layer.eval())
    jacobian = torch.autograd.functional.jacobian(after, torch.randn(1, 4, 6, 6)).reshape(144, 144)
    norm = float(torch.linalg.matrix_norm(jacobian.double(), ord=2))
    assert 1.0001 < norm <= after.lipschitz_bound() * (1 + 1e-6) < 1.005


@pytest.mark.parametrize("method", ["cayley", "cpl"])
def test_what_published_layers_create_late_is_created_alike(method):
    """alpha and u, in layers that have not run: with the same seed the same numbers."""
    torch.manual_seed(0)
    before = published.LAYERS[method](4, 4, 3)
    after = lipfast.accelerate(copy.deepcopy(before))
    assert list(after.state_dict()) == list(before.state_dict())
    x = torch.randn(2, 4, 6, 6)
    for layer in (before, after):
        torch.manual_seed(1)
        layer(x)
    states = before.state_dict(), after.state_dict()
    assert list(states[0]) == list(states[1])
    for a, b in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    fresh = lipfast.accelerate(published.LAYERS[method](4, 4, 3))
    fresh.load_state_dict(states[0], strict=True)
    published.forget_weights(before)
    assert_equal(results(fresh.eval(), x), results(before.eval(), x))


def test_cached_weights_are_forgotten():
    torch.manual_seed(0)
    layer, x = published.LOT(4, 4, 3).eval(), torch.randn(2, 4, 6, 6)
    stale = layer(x).detach()
    with torch.no_grad():
        layer.weight.add_(0.3 * torch.randn_like(layer.weight))
    torch.testing.assert_close(layer(x), stale)  # the published defect
    after = lipfast.accelerate(layer)
    assert "w_cached" not in vars(after)
    fresh = published.LOT(4, 4, 3).eval()
    fresh.load_state_dict(after.state_dict())
    assert_equal(results(after, x), results(fresh, x))
    assert float((after(x) - stale).detach().norm()) > 0.01


def test_soc_counts_and_refreshes_as_published():
    torch.manual_seed(0)
    before, x = published.SOC(4, 4, 3, update_freq=3, init_iters=20), torch.randn(2, 4, 6, 6)
    before(x)
    after = lipfast.accelerate(copy.deepcopy(before))
    for step in range(4):
        with torch.no_grad():
            for layer in (before, after):
                noise = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(step))
                layer.random_conv_filter += 0.3 * noise
        assert_equal(results(after, x), results(before, x))
        assert after.total_iters == before.total_iters == step + 2
        for name in ("u1", "v2", "u3", "v4"):
            torch.testing.assert_close(getattr(after, name), getattr(before, name))
    assert not after.u1.requires_grad


def test_two_forward_passes_before_the_backward_pass():
    torch.manual_seed(0)
    for method in ("cpl", "soc"):
        layer = lipfast.accelerate(published.LAYERS[method](4, 4, 3))
        x = torch.randn(2, 4, 6, 6)
        (layer(x) + layer(x)).sum().backward()
        assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_accelerated_layers_compile_without_a_break(method):
    torch.manual_seed(0)
    layer, x = published.LAYERS[method](4, 4, 3), torch.randn(2, 4, 6, 6)
    layer(x)
    layer = lipfast.accelerate(layer)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        y, expected = compiled(x), twin(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        direction = torch.randn_like(expected)
        y.backward(direction)
        expected.backward(direction)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            assert float((p.grad - q.grad).norm()) <= 1e-3 * float(q.grad.norm()) + 1e-6


UNSUPPORTED = {
    "iter_T is 2": lambda: LOT(4, 4, 3, iter_T=2),
    "eval_iter_T is 20": lambda: LOT(4, 4, 3, eval_iter_T=20),
    "odd sizes": lambda: published.SOC(4, 4, 2),
    "bjorck_iters is 5": lambda: published.BCOP(4, 4, 3, bjorck_iters=5),
    "does not run": lambda: published.BCOP(4, 6, 1),
    "hidden channels": lambda: published.SLLConv2d(4, 6, 3),
    "groups is not 1": lambda: published.AOLConv2d(4, 4, 3, groups=2),
    "stride is 2": lambda: published.CayleyConv(4, 4, 3, stride=2),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_layers_with_other_attributes_are_left_alone(reason):
    layer = UNSUPPORTED[reason]()
    kind, attributes = type(layer), dict(vars(layer))
    with pytest.warns(UserWarning, match=reason):
        assert lipfast.accelerate(layer) is layer
    assert type(layer) is kind
    assert vars(layer) == attributes
    (entry,) = lipfast.accelerate(layer, dry_run=True).left_alone
    assert reason in entry.outcome


@pytest.mark.parametrize("name", ["mask", "activation", "parametrized", "alpha", "correction"])
def test_layers_that_were_changed_are_left_alone(name):
    layers = {
        "mask": published.BCOP(4, 4, 3),
        "activation": published.CPLConv2d(4, 4, 3),
        "parametrized": published.CPLConv2d(4, 4, 3),
        "alpha": published.CayleyLinear(4, 4),
        "correction": published.SOC(4, 4, 3),
    }
    layer = layers[name]
    if name == "mask":
        layer.mask.data.fill_(1.0)
    elif name == "activation":
        layer.activation = nn.Tanh()
    elif name == "parametrized":
        nn.utils.parametrize.register_parametrization(layer, "kernel", nn.Identity())
    elif name == "alpha":
        layer.alpha.data.fill_(1e4)
    else:
        del layer.correction
    with pytest.warns(UserWarning, match="left known layers alone"):
        lipfast.accelerate(layer)
    assert not isinstance(layer, LipschitzModule)


def test_other_orders_of_maxmin_are_left_alone():
    class MaxMin(nn.Module):
        def forward(self, x):
            a, b = x[:, :-1].chunk(2, dim=1)
            return torch.cat([torch.max(a, b), torch.min(a, b), x[:, -1:]], dim=1)

    layer = MaxMin()
    with pytest.warns(UserWarning, match="does not order pairs of neighbouring channels"):
        lipfast.accelerate(layer)
    assert type(layer) is MaxMin
