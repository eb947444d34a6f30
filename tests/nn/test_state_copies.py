"""Layers saved, loaded, copied, averaged, moved and parametrised as any module of torch."""

import copy
import inspect
import io

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lipfast import nn as lnn
from lipfast.models import ConvNet

METHODS = list(lnn.METHODS)


def make_network(method: str, seed: int = 0, **options) -> ConvNet:
    torch.manual_seed(seed)
    sizes = {"input_size": (3, 4, 4), "n_classes": 3, "layers_per_block": 1}
    return ConvNet(method, width=4, **sizes, **options)


def trained(method: str) -> tuple[ConvNet, Tensor, Tensor]:
    """A network after a step, an input, and the scores in evaluation mode."""
    network = make_network(method)
    x = torch.randn(2, 3, 4, 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    network(x).square().sum().backward()
    optimizer.step()
    return network, x, network.eval()(x)


def other(method: str, x: Tensor) -> ConvNet:
    """A network of other weights that has already built those of evaluation mode."""
    network = make_network(method, seed=1).eval()
    network(x)
    return network


@pytest.mark.parametrize("method", METHODS)
def test_safetensors_without_pickle(method, tmp_path):
    network, x, y = trained(method)
    save_model(network, tmp_path / "model.safetensors")
    again = other(method, x)
    assert load_model(again, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(again(x), y)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_load_with_weights_only(method, assign, tmp_path):
    network, x, y = trained(method)
    torch.save(network.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True, mmap=assign)
    again = other(method, x)
    again.load_state_dict(state, assign=assign)
    assert torch.equal(again(x), y)


@pytest.mark.parametrize("method", METHODS)
def test_whole_models_by_pickle_and_copy(method):
    network, x, y = trained(method)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(network)):
        assert torch.equal(again(x), y)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.mul_(-0.5)
        assert torch.equal(network(x), y)
        assert not torch.equal(again(x), y)


@pytest.mark.parametrize("method", METHODS)
def test_meta_devices_and_skipped_initialisation(method):
    network, x, y = trained(method)
    with torch.device("meta"):
        empty, assigned = make_network(method), make_network(method)
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(network.state_dict())
    assigned.eval().load_state_dict(network.state_dict(), assign=True)
    for again in (empty, assigned):
        assert torch.equal(again(x), y)
        for kind, sizes in (("conv", (4, 4, 3)), ("linear", (4, 3))):
            layer = getattr(lnn.METHODS[method], kind)(*sizes)
            skipped = nn.utils.skip_init(type(layer), *sizes)
            skipped.load_state_dict(layer.state_dict())
            image = torch.randn(1, 4, 5, 5) if kind == "conv" else torch.randn(2, 4)
            assert torch.equal(skipped.eval()(image), layer.eval()(image))


@pytest.mark.parametrize("method", METHODS)
def test_signatures_show_all_arguments(method):
    kinds = lnn.METHODS[method]
    for layer, first in ((kinds.conv, "in_channels"), (kinds.linear, "in_features")):
        parameters = inspect.signature(layer).parameters
        assert next(iter(parameters)) == first
        assert {"bias", "device", "dtype"} <= set(parameters)
        assert not {"args", "kwargs", "self"} & set(parameters)
    assert "terms" not in inspect.signature(lnn.CPLConv2d).parameters
    assert "terms" in inspect.signature(lnn.SOCConv2d).parameters


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "ema"])
def test_averaged_models_follow_in_evaluation(method, use_buffers, average):
    network = make_network(method)
    x = torch.randn(2, 3, 4, 4)
    averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=use_buffers).eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    before = averaged(x)
    for _ in range(3):  # the copy is evaluated in between: its weights of evaluation must follow
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(network)
        fresh = make_network(method, seed=1).eval()
        fresh.load_state_dict(averaged.module.state_dict())
        assert torch.equal(averaged(x), fresh(x))
        assert not torch.equal(averaged(x), before)
        before = averaged(x)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("method", METHODS)
def test_parametrisations_of_users(method):
    torch.manual_seed(0)
    layer = lnn.METHODS[method].conv(4, 4, 3)
    x = torch.randn(1, 4, 4, 4)
    plain = layer.eval()(x)
    parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(layer(x), plain)
    layer.train()(x).sum().backward()
    original = layer.parametrizations.weight.original
    assert original.grad is not None
    y = layer.eval()(x)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), y)
    copied.load_state_dict({k: v / 2 for k, v in layer.state_dict().items()})
    assert torch.equal(copied(x), copied.train().eval()(x))
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("method", METHODS)
def test_weight_norm_on_a_layer_and_beside_it(method):
    torch.manual_seed(0)
    beside = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    own = parametrizations.weight_norm(lnn.METHODS[method].conv(4, 4, 3))
    network = nn.Sequential(beside, own)
    x = torch.randn(1, 4, 4, 4)
    network(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    y = network.eval()(x)
    again = copy.deepcopy(network)
    assert torch.equal(again(x), y)
    with torch.no_grad():
        again[1].parametrizations.weight.original1.add_(torch.rand(1))
    assert not torch.equal(again(x), y)


@pytest.mark.parametrize("method", METHODS)
def test_modules_that_swap_their_tensors(method):
    network, x, _ = trained(method)
    again = other(method, x)
    exact = copy.deepcopy(network).double()
    y = exact(x.double())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        again.double()
        again(x.double())
        again.load_state_dict(exact.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(again(x.double()), y)


@pytest.mark.parametrize("method", METHODS)
def test_keys_that_do_not_fit_are_named(method):
    network, x, y = trained(method)
    name = next(k for k in network.state_dict() if k.endswith("weight"))
    state = network.state_dict()
    found, expected = state[name].numel(), ", ".join(map(str, state[name].shape))
    wrong = {**state, name: state[name].flatten()}
    message = rf"size mismatch for {name}.*\(\[{found}\]\).*\(\[{expected}\]\)"
    with pytest.raises(RuntimeError, match=message):
        network.load_state_dict(wrong)
    missing = {k: v for k, v in state.items() if k != name} | {"elsewhere.weight": state[name]}
    with pytest.raises(RuntimeError, match=f"(?s)Missing.*{name}.*Unexpected.*elsewhere.weight"):
        network.load_state_dict(missing)
    keys = network.load_state_dict(missing, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == ([name], ["elsewhere.weight"])
    assert torch.equal(network(x), y)


@pytest.mark.parametrize("method", ["aol", "soc"])
def test_compiled_models_copy_and_give_their_state(method):
    torch.compiler.reset()
    torch.manual_seed(0)
    network = nn.Sequential(lnn.METHODS[method].conv(4, 4, 3), lnn.MaxMin()).eval()
    x = torch.randn(1, 4, 4, 4)
    y = network(x)
    compiled = torch.compile(network, backend="aot_eager")
    for form in (compiled, copy.deepcopy(compiled)):
        torch.testing.assert_close(form(x), y, rtol=1e-5, atol=1e-6)
    state = {k.removeprefix("_orig_mod."): v for k, v in compiled.state_dict().items()}
    assert state.keys() == network.state_dict().keys()


# SOC's vectors ------------------------------------------------------------------------------------


def without_vectors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.endswith("power_vector")}


@pytest.mark.parametrize("assign", [False, True])
def test_soc_without_power_vectors_starts_them_from_the_loaded_weight(assign):
    network, x, y = trained("soc")
    state = without_vectors(network.state_dict())
    assert len(state) < len(network.state_dict())
    again = other("soc", x)
    before = {k: v.clone() for k, v in again.named_buffers() if k.endswith("power_vector")}
    keys = again.load_state_dict(state, assign=assign)
    assert keys.missing_keys == keys.unexpected_keys == []
    torch.testing.assert_close(again(x), y, rtol=0, atol=0)
    assert all(not torch.equal(dict(again.named_buffers())[k], v) for k, v in before.items())
    # in training the estimate is at once as good as that of a fresh layer
    for layer in again.modules():
        if isinstance(layer, (lnn.SOCConv2d, lnn.SOCLinear)):
            layer.train()
            (kernel,) = layer.training_weights((4, 4))
            (sound,) = layer._sound_weights((4, 4)).weights
            if layer.kernel_size != (1, 1):  # there p(L) itself is stored
                assert 0.9 <= kernel.norm() / sound.norm() <= 1.1


def test_soc_from_meta_without_power_vectors():
    network, x, y = trained("soc")
    with torch.device("meta"):
        again = make_network("soc").eval()
    again.load_state_dict(without_vectors(network.state_dict()), assign=True)
    torch.testing.assert_close(again(x), y, rtol=0, atol=0)
    assert again.train()(x).isfinite().all()


def test_soc_still_misses_other_keys():
    layer = lnn.SOCConv2d(4, 4, 3)
    state = without_vectors(layer.state_dict())
    del state["weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*weight.*power_vector"):
        layer.load_state_dict(state)
