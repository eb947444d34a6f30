"""State dicts of the code that was published with "1-Lipschitz Layers Compared", in and out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipfast.nn import LipschitzModule

from .convnet import ConvNet
from .published_base import Layout, Place
from .published_layers import LAYOUTS, linear_layout

_HEAD = "ClassificationHead"
_SHOWN = 4

# what the published network computes; everything else is a default of ours
_OPTIONS: dict[str, dict[str, Any]] = {
    "cpl": {"norm": "estimate"},
    "lot": {"ridge": 1e-4},
    "soc": {"series": "taylor", "norm": "unfolding", "terms": 5, "eval_terms": 12},
}


class _Layer(NamedTuple):
    name: str
    module: LipschitzModule
    place: Place
    layout: Layout


def load_published(
    model: ConvNet, state_dict: Mapping[str, Tensor], *, exact: bool = True
) -> ConvNet:
    """Load a state dict of the published network into ours, in place.

    Names as in github.com/berndprach/1LipschitzLayersCompared: FirstConv, Block1 and so on,
    ClassificationHead (a 1x1 convolution or, for BCOP and Cayley, a linear layer too). In
    evaluation mode the scores are then those of the published network, up to what its iterations
    lack to convergence: to 1e-4 of the largest, and to 1e-3 for CPL and LOT, where our proved norms
    and last step differ by 1e-4 per layer.

    Matrices are turned into ours where the parametrisation differs: BCOP multiplies in another
    order, Cayley takes the norm of the kernel on another grid. Power vectors are taken over (CPL)
    or not needed (SOC); those, and the alpha of Cayley, that the published layers make in their
    first forward pass may be missing.

    Args:
        model: with the size, classes and input size of the published one. LOT needs the option
            `ridge=1e-4`, SOC `series="taylor", norm="unfolding"`, to compute the same.
        state_dict: of a `SimplifiedConvNet` or `LipConvNet`, on any device, of any float dtype.
        exact: refuse a model whose options mean another function of the same parameters.

    Returns:
        The model.

    Raises:
        TypeError: the model is no ConvNet.
        ValueError: keys are missing, unexpected, or of another shape; a constant (SOC's correction,
            BCOP's mask) is not the published one; or the options differ.
    """
    _check_model(model, exact)
    linear_head = any(key.startswith(f"{_HEAD}.1.") for key in state_dict)
    layers = _layers(model, linear_head)
    _check_keys(state_dict, layers)
    own = dict(model.state_dict())
    for name, module, place, layout in layers:
        prefix = f"{place.name}."
        found = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
        found = {key: tensor.detach().to("cpu", torch.float64) for key, tensor in found.items()}
        for key, tensor in layout.ours(found, module, place).items():
            own[f"{name}.{key}"] = tensor.reshape(own[f"{name}.{key}"].shape)
    model.load_state_dict(own)
    for _, module, _, layout in layers:
        layout.finish(module)
    return model


def published_state_dict(model: ConvNet, *, head: str | None = None) -> dict[str, Tensor]:
    """Return the weights as a state dict of the published network, for a strict load there.

    The way back from `load_published`: fresh tensors on the model's device, in its dtype, with all
    keys that the published layers have after their first forward pass.

    Args:
        model: of any options; the published network is another function of these parameters where
            `load_published` would not be exact.
        head: "conv" or, for BCOP and Cayley, "linear", as the published network was built; by
            default that of the paper's experiments, linear for these two.

    Raises:
        TypeError: the model is no ConvNet.
        ValueError: the published code has no such head.
    """
    _check_model(model, exact=False)
    method = model.config["method"]
    choices = ("conv", "linear") if linear_layout(method) else ("conv",)
    if head not in (None, *choices):
        raise ValueError(f"head: expected {' or '.join(choices)} for {method}, got {head!r}")
    state: dict[str, Tensor] = {}
    for _, module, place, layout in _layers(model, (head or choices[-1]) == "linear"):
        own = {k: t.detach().to("cpu", torch.float64) for k, t in module.state_dict().items()}
        shapes = layout.shapes(module, place)
        for key, tensor in layout.published(own, module, place).items():
            weight = module.weight
            tensor = tensor.to(weight.device, weight.dtype, copy=True).reshape(shapes[key])
            state[f"{place.name}.{key}"] = tensor
    return state


def _check_model(model: ConvNet, exact: bool) -> None:
    if not isinstance(model, ConvNet):
        raise TypeError(f"model: expected a lipfast.models.ConvNet, got {type(model).__name__}")
    method = model.config["method"]
    wanted = _OPTIONS.get(method, {})
    layer = model.get_submodule("first_conv")
    found = {name: getattr(layer, name) for name in wanted}
    if exact and found != wanted:
        shown = ", ".join(f"{name}={value!r}" for name, value in wanted.items())
        raise ValueError(
            f"model: the published {method} network has {shown}, got {found}; build ConvNet with "
            "these options, or pass exact=False for another function of the same parameters"
        )


def _layers(model: ConvNet, linear_head: bool) -> list[_Layer]:
    """The layers with parameters and their places in the published network."""
    size = model.config["input_size"][1]
    method = model.config["method"]
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, LipschitzModule):
            continue
        layout = LAYOUTS[method]
        if name == "first_conv":
            place = Place("FirstConv", size)
        elif name == "linear":
            place = Place(f"{_HEAD}.{int(linear_head)}", 1)
            if linear_head:
                layout = linear_layout(method) or layout
        else:
            block = int(name.removeprefix("block").split(".")[0])
            place = Place(name.replace("block", "Block"), size // 2 ** (block - 1))
        found.append(_Layer(name, module, place, layout))
    return found


def _check_keys(state_dict: Mapping[str, Tensor], layers: list[_Layer]) -> None:
    wrong, expected = [], set()
    for _, module, place, layout in layers:
        for key, shape in layout.shapes(module, place).items():
            name = f"{place.name}.{key}"
            expected.add(name)
            if name not in state_dict:
                if key not in layout.optional:
                    wrong.append(f"{name} is missing")
            elif not isinstance(state_dict[name], Tensor):
                wrong.append(f"{name} is no tensor but {type(state_dict[name]).__name__}")
            elif tuple(state_dict[name].shape) != shape:
                got = tuple(state_dict[name].shape)
                wrong.append(f"{name} has the shape {got}, expected {shape}")
    wrong += [f"{name} is unexpected" for name in state_dict if name not in expected]
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(
            f"state_dict: it does not fit the model in {len(wrong)} places: "
            f"{', '.join(wrong[:_SHOWN])}{more}"
        )
