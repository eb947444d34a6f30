"""Checkpoints of the published code: strict loads both ways, equal scores, errors with names."""

import pytest
import torch
from swap import published

from lipfast import nn as lnn
from lipfast import reference
from lipfast.models import ConvNet, load_published, published_state_dict

OPTIONS = {"lot": {"ridge": 1e-4}, "soc": {"series": "taylor", "norm": "unfolding"}}
METHODS = list(lnn.METHODS)
# published LOT shrinks singular values by 5e-5 per layer, published CPL is not quite 1-Lipschitz
TOLERANCE = {**dict.fromkeys(METHODS, 1e-4), "cpl": 1e-3, "lot": 1e-3}


def ours(method, width=4, blocks=3, **options):
    return ConvNet(
        method,
        input_size=(3, 2**blocks, 2**blocks),
        width=width,
        layers_per_block=2,
        **{**OPTIONS.get(method, {}), **options},
    )


@torch.no_grad()
def disturb(net):
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_scores_are_those_of_the_published_network(method):
    torch.manual_seed(0)
    source = published.network(method, width=4, blocks=3, layers=2)
    x = torch.randn(6, 3, 8, 8)
    source(x)  # makes the parameters that it lacks
    disturb(source)
    for _ in range(300 if method in ("cpl", "soc") else 0):
        source(x[:1])  # one step of its power iterations
    published.forget_weights(source)
    scores = source.eval()(x)
    state = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    model = load_published(ours(method), state).eval()
    largest = float(scores.abs().max())
    assert largest > 0.1
    torch.testing.assert_close(model(x), scores, rtol=0, atol=TOLERANCE[method] * largest)
    assert all(torch.equal(tensor, state[key]) for key, tensor in source.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_way_back_loads_strictly_and_gives_the_same_scores(method):
    torch.manual_seed(0)
    model = ours(method)
    disturb(model)
    target = published.network(method, width=4, blocks=3, layers=2)
    x = torch.randn(6, 3, 8, 8)
    target(x)  # the parameters that it lacks before
    state = published_state_dict(model)
    assert state.keys() == target.state_dict().keys()
    target.load_state_dict(state, strict=True)
    published.forget_weights(target)
    scores = model.eval()(x)
    found = target.eval()(x)
    limit = TOLERANCE[method] * float(scores.abs().max())
    torch.testing.assert_close(found, scores, rtol=0, atol=limit)
    again = load_published(ours(method), state).eval()
    torch.testing.assert_close(again(x), scores, rtol=1e-4, atol=1e-4 * float(scores.abs().max()))


@pytest.mark.parametrize("method", ["bcop", "cayley"])
@torch.no_grad()
def test_the_head_may_be_a_convolution(method):
    torch.manual_seed(0)
    model = ours(method).eval()
    states = [published_state_dict(model, head=head) for head in ("conv", "linear")]
    keys = [{key for key in state if key.startswith("ClassificationHead")} for state in states]
    assert all(key.startswith("ClassificationHead.0.") for key in keys[0])
    assert all(key.startswith("ClassificationHead.1.") for key in keys[1])
    x = torch.randn(2, 3, 8, 8)
    for state in states:
        torch.testing.assert_close(load_published(ours(method), state).eval()(x), model(x))
    with pytest.raises(ValueError, match="head: expected conv for aol, got 'linear'"):
        published_state_dict(ours("aol"), head="linear")


@torch.no_grad()
def test_vectors_of_a_larger_map_and_absent_ones():
    torch.manual_seed(0)
    model = ours("cpl", blocks=6)
    state = published_state_dict(model)
    assert state["Block1.0.u"].shape == (1, 4, 64, 64)
    assert state["FirstConv.u"].shape == (1, 4, 64, 64)
    again = load_published(ours("cpl", blocks=6), state)
    for name, vector in model.named_buffers():
        if name.startswith(("block1", "first_conv")):  # others keep pixels that are never used
            second = again.get_buffer(name).flatten()
            assert float(torch.cosine_similarity(vector.flatten(), second, dim=0)) > 0.9999
    without = {key: tensor for key, tensor in state.items() if not key.endswith(".u")}
    fresh = load_published(ours("cpl", blocks=6), without)
    assert torch.equal(fresh.block1[0].weight, model.block1[0].weight)
    state = published_state_dict(ours("cayley"))
    del state["FirstConv.alpha"]
    first = load_published(ours("cayley"), state).first_conv
    torch.testing.assert_close(first.alpha, first.weight.norm())


def test_another_function_of_the_same_parameters_is_refused_unless_asked_for():
    torch.manual_seed(0)
    state = published_state_dict(ours("soc"))
    model = ours("soc", series="unimodular", norm="spectral")
    with pytest.raises(ValueError, match="the published soc network has series='taylor'"):
        load_published(model, state)
    load_published(model, state, exact=False)
    assert torch.equal(
        model.linear.weight, state["ClassificationHead.0.random_conv_filter"][..., 0, 0]
    )
    layer = model.block1[0]
    kernel = reference.skew_kernel(layer.weight.detach())
    found, _ = reference.skew_power_iteration(kernel, layer.power_vector, layer._side)
    norm, _ = reference.skew_norm_bound(kernel.double(), layer._side)
    assert 0.98 * float(norm) < float(found) < 1.001 * float(norm)
    with pytest.raises(ValueError, match=r"has ridge=0.0001, got \{'ridge': 0.0\}"):
        load_published(ours("lot", ridge=0.0), published_state_dict(ours("lot")))


def broken(method, change):
    state = published_state_dict(ours(method))
    change(state)
    return state


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("lot", lambda s: s.pop("Block2.2.weight"), r"in 1 places: Block2\.2\.weight is missing"),
        ("sll", lambda s: s.update(extra=torch.ones(1)), "extra is unexpected"),
        (
            "aol",
            lambda s: s.update({"FirstConv.bias": torch.ones(5)}),
            r"FirstConv\.bias has the shape \(5,\), expected \(4,\)",
        ),
        ("lot", lambda s: s.update({"FirstConv.bias": 3}), r"FirstConv\.bias is no tensor but int"),
        ("bcop", lambda s: s["Block1.0.mask"].fill_(1), r"Block1\.0\.mask is not that of half"),
        (
            "soc",
            lambda s: s["Block1.0.correction"].fill_(0.5),
            r"expected Block1\.0\.correction to be 0\.7, got 0\.5",
        ),
        ("cpl", lambda s: s.clear(), r"in 16 places: .*, and 12 more"),
    ],
)
def test_what_does_not_fit_is_named(method, change, message):
    model = ours(method)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_published(model, broken(method, change))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_other_networks_are_refused():
    with pytest.raises(TypeError, match=r"model: expected a lipfast.models.ConvNet, got Linear"):
        load_published(torch.nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match=r"Block3\.0\.kernel is unexpected|has the shape"):
        load_published(ours("sll", blocks=2), published_state_dict(ours("sll")))
