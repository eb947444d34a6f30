"""torch.func and forward-mode differentiation: the same numbers as loops over autograd."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from lipfast import nn as lnn
from lipfast.models import ConvNet
from lipfast.ops import maxmin

METHODS = list(lnn.METHODS)
F64 = torch.float64
CLASSES = 3
# transforms take the published form, whose iterations end a little earlier than the default's
TOLERANCE = {"lot": 1e-4, "bcop": 1e-4}

pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")


def make_network(method: str, training: bool) -> ConvNet:
    torch.manual_seed(0)
    options = {"input_size": (3, 4, 4), "n_classes": CLASSES, "layers_per_block": 1}
    network = ConvNet(method, width=4, **options).double().train(training)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def draw(batch: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 4, 4, dtype=F64), torch.arange(batch) % CLASSES


def parts(network: ConvNet) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters = {name: p.detach().clone() for name, p in network.named_parameters()}
    return parameters, {name: b.detach().clone() for name, b in network.named_buffers()}


def close(method: str, ours, expected) -> None:
    tolerance = TOLERANCE.get(method, 1e-8)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[True, False], ids=["training", "evaluation"])
def training(request):
    return request.param


@pytest.mark.parametrize("method", METHODS)
def test_gradients_for_each_example(method, training):
    network = make_network(method, training)
    parameters, buffers = parts(network)
    x, y = draw()

    def loss(parameters, image, label):
        scores = functional_call(network, (parameters, buffers), (image[None],))
        return torch.nn.functional.cross_entropy(scores, label[None])

    ours = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    after = network.state_dict()
    for name, value in {**parameters, **buffers}.items():
        if name in after:
            assert torch.equal(after[name], value), name  # transforms write no buffer
    for i in range(len(x)):
        network.load_state_dict({**parameters, **buffers}, strict=False)
        network.zero_grad()
        image = x[i : i + 1].clone().requires_grad_()  # some networks have no other graph in eval
        torch.nn.functional.cross_entropy(network(image), y[i : i + 1]).backward()
        for name, parameter in network.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            close(method, ours[name][i], expected)


@pytest.mark.parametrize("method", METHODS)
def test_jacobians_and_certificates_of_the_input(method, training):
    network = make_network(method, training)
    parameters, buffers = parts(network)
    x, _ = draw()

    def scores(image: Tensor) -> Tensor:
        state = {name: value.clone() for name, value in buffers.items()}
        return functional_call(network, (parameters, state), (image[None],))[0]

    expected = torch.stack([torch.autograd.functional.jacobian(scores, image) for image in x])
    for transform in (jacrev, jacfwd):
        ours = vmap(transform(scores))(x)
        close(method, ours, expected)
        norms = torch.linalg.matrix_norm(ours.flatten(2), ord=2)
        if not training:
            assert norms.max() <= 1 + 1e-9  # a 1-Lipschitz network is so at every point
    _, tangent = jvp(scores, (x[0],), (x[1],))
    close(method, tangent, expected[0].flatten(1) @ x[1].flatten())


@pytest.mark.parametrize("method", METHODS)
def test_hessians(method, training):
    network = make_network(method, training)
    parameters, buffers = parts(network)
    image = draw(1)[0][0]

    def energy(image: Tensor) -> Tensor:
        state = {name: value.clone() for name, value in buffers.items()}
        return functional_call(network, (parameters, state), (image[None],)).square().sum()

    expected = torch.autograd.functional.hessian(energy, image)
    close(method, hessian(energy)(image), expected)


@pytest.mark.parametrize("method", METHODS)
def test_forward_mode(method, training):
    network = make_network(method, training)
    parameters, buffers = parts(network)
    x, _ = draw()
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        y = network(forward_ad.make_dual(x, direction))
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent is not None
    network.load_state_dict({**parameters, **buffers}, strict=False)
    jacobian = torch.autograd.functional.jacobian(network, x).flatten(2).flatten(0, 1)
    expected = (jacobian @ direction.flatten()).view_as(tangent)
    close(method, tangent, expected)
    # nothing of it stays in the cache or in the buffers
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(network(x)).tangent is None


@pytest.mark.parametrize("method", METHODS)
def test_directional_derivatives_of_the_weights(method):
    network = make_network(method, True)
    parameters, buffers = parts(network)
    x, _ = draw()
    if method in ("cpl", "soc"):  # the derivative of an estimate is right where it has converged
        with torch.no_grad():
            for _ in range(300):
                network(x)
        parameters, buffers = parts(network)
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(parameters):
        state = {name: value.clone() for name, value in buffers.items()}
        return functional_call(network, (parameters, state), (x,)).square().sum()

    _, tangent = jvp(loss, (parameters,), (directions,))
    gradients = grad(loss)(parameters)
    slope = sum((gradients[name] * directions[name]).sum() for name in parameters)
    torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_holds_its_weights_constant(method):
    network = make_network(method, False)
    parameters, buffers = parts(network)
    x, _ = draw()

    name = next(n for n in parameters if n.endswith("weight"))
    weight = parameters[name]

    def by_weight(weight):
        return functional_call(network, {**parameters, **buffers, name: weight}, (x,)).sum()

    assert not grad(by_weight)(weight).any()
    _, tangent = jvp(by_weight, (weight,), (torch.randn_like(weight),))
    assert not tangent.any()


@pytest.mark.parametrize("method", METHODS)
def test_ensembles_by_vmap_over_weights(method, training):
    networks = [make_network(method, training) for _ in range(2)]
    with torch.no_grad():
        for parameter in networks[1].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    stacked = {
        name: torch.stack([p, other])
        for (name, p), other in zip(
            networks[0].named_parameters(), networks[1].parameters(), strict=True
        )
    }
    stacked = {name: value.detach() for name, value in stacked.items()}
    _, buffers = parts(networks[0])
    x, _ = draw()

    def scores(parameters):
        state = {name: value.clone() for name, value in buffers.items()}
        return functional_call(networks[0], (parameters, state), (x,))

    ours = vmap(scores)(stacked)
    for i in range(2):
        close(method, ours[i], scores({name: value[i] for name, value in stacked.items()}))


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_gradients(method, training):
    network = make_network(method, training)
    parameters, buffers = parts(network)
    x = draw(2)[0].requires_grad_()
    basis = torch.eye(2 * CLASSES, dtype=F64).view(-1, 2, CLASSES)
    (ours,) = torch.autograd.grad(network(x), x, basis, is_grads_batched=True)
    network.load_state_dict({**parameters, **buffers}, strict=False)
    y = network(x)
    rows = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in basis]
    torch.testing.assert_close(ours, torch.stack(rows))


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_maxmin_is_the_same_under_every_transform(channels):
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (6, channels, 3), dtype=F64)  # with ties
    x[0, 0, 0] = torch.nan
    y = maxmin(x)
    ours = vmap(lambda x: maxmin(x[None])[0])(x)
    torch.testing.assert_close(ours, y, equal_nan=True)
    torch.testing.assert_close(vmap(maxmin, 2, 2)(x), y, equal_nan=True)
    x = x.nan_to_num(0.0)
    expected = torch.autograd.functional.jacobian(maxmin, x)
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(maxmin)(x), expected)  # ties included
    assert torch.autograd.gradcheck(
        maxmin, x.add(torch.rand_like(x) * 0.1).requires_grad_(), check_forward_ad=True
    )


def test_maxmin_in_a_compiled_vmap():
    torch.compiler.reset()
    x = torch.randn(3, 2, 4, dtype=F64)
    compiled = torch.compile(vmap(maxmin), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.stack([maxmin(one) for one in x]))
