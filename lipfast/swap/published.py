"""Rules for the published code of "1-Lipschitz Layers Compared" (Prach et al., CVPR 2024).

Facts from github.com/berndprach/1LipschitzLayersCompared: models/layers and lipnn/layers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lipfast import nn as lnn
from lipfast.reference.maxmin import maxmin

from . import published_linear
from .published_iterations import PublishedCPLConv2d, PublishedSOCConv2d
from .published_layers import (
    PublishedBCOPConv2d,
    PublishedCayleyConv2d,
    PublishedLOTConv2d,
    PublishedSLLConv2d,
)
from .rules import Replacement, Rule, Unsupported, attribute, expect

_SOURCE = "1-Lipschitz Layers Compared"


def _aol(module: nn.Module, exact: bool) -> Replacement:
    arguments = _conv_arguments(module)
    for name in ("stride", "dilation", "padding_mode", "groups"):
        arguments[name] = attribute(module, name)
    if arguments["groups"] != 1:
        raise Unsupported("groups is not 1: the published scaling then mixes the groups")
    padding = module.padding
    arguments["padding"] = padding if isinstance(padding, str) else _pair(padding)
    return Replacement(
        lnn.AOLConv2d,
        arguments,
        {"weight": "parametrizations.weight.original"},
        parametrizations={"weight": "AOLConv2DRescaling"},
    )


def _bcop(module: nn.Module, exact: bool) -> Replacement:
    expect(module, "stride", 1)
    arguments = _sizes(module)
    arguments["bias"] = module._parameters.get("bias") is not None
    if arguments["kernel_size"] == 1 and arguments["in_channels"] < arguments["out_channels"]:
        raise Unsupported("a 1x1 kernel with more outputs than inputs, which does not run")
    if exact:
        expect(module, "power_iteration_scaling", True)
        if attribute(module, "bjorck_iters") < 20:
            raise Unsupported(f"bjorck_iters is {module.bjorck_iters}, expected at least 20")
    mask = attribute(module, "mask")
    half = torch.arange(mask.shape[-1], device=mask.device) < mask.shape[-1] // 2
    if not mask.is_meta and not bool((mask == half).all()):
        raise Unsupported("mask keeps other columns than the first half")
    return Replacement(
        PublishedBCOPConv2d, arguments, {"weight": "param_matrices"}, forget=("weight",)
    )


def _cayley_conv(module: nn.Module, exact: bool) -> Replacement:
    for name in ("stride", "dilation", "groups"):
        expect(module, name, 1)
    alpha = attribute(module, "alpha")
    if alpha is not None and alpha.numel() != 1:
        raise Unsupported(f"alpha has the shape {tuple(alpha.shape)}, expected one number")
    arguments = _conv_arguments(module)
    return Replacement(
        PublishedCayleyConv2d, arguments, forget=("val_cache", "wfft_cache", "shift_matrix")
    )


def _cpl(module: nn.Module, exact: bool) -> Replacement:
    arguments = _residual_arguments(module)
    steps = attribute(module, "val_niter")
    if exact:
        expect(module, "epsilon", 1e-6)
        return Replacement(
            PublishedCPLConv2d,
            {**arguments, "eval_steps": steps},
            {"weight": "kernel"},
            forget=_CPL_CACHES,
        )
    return Replacement(
        lnn.CPLConv2d,
        arguments,
        {"weight": "kernel"},
        forget=_CPL_CACHES,
        finish=_start_power_vector,
    )


_CPL_CACHES = ("val_rescaling_cached", "u_initialized")


def _sll(module: nn.Module, exact: bool) -> Replacement:
    if exact:
        expect(module, "epsilon", 1e-6)
    layer = PublishedSLLConv2d if exact else lnn.SLLConv2d
    return Replacement(
        layer, _residual_arguments(module), {"weight": "kernel"}, forget=("val_rescaling_cached",)
    )


def _residual_arguments(module: nn.Module) -> dict[str, Any]:
    kernel = module._parameters.get("kernel")
    if kernel is None or kernel.dim() != 4:
        raise Unsupported("it has no parameter 'kernel' of four dimensions")
    out_channels, in_channels, kh, kw = kernel.shape
    if out_channels != in_channels:
        raise Unsupported(
            f"{out_channels} hidden channels, expected {in_channels} as the input has"
        )
    if not isinstance(getattr(module, "activation", None), nn.ReLU):
        raise Unsupported("its activation is not torch.nn.ReLU")
    expect(module, "padding", "same", kh // 2)
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": (kh, kw),
        "bias": module._parameters.get("bias") is not None,
        "padding_mode": "zeros",
    }


def _start_power_vector(module: nn.Module) -> None:
    """A fixed random vector: the global generator stays as it is."""
    vector = module.power_vector
    assert isinstance(vector, Tensor)
    values = torch.randn(vector.shape, generator=torch.Generator().manual_seed(0))
    vector.copy_(values)


def _lot(module: nn.Module, exact: bool) -> Replacement:
    stride = attribute(module, "strd")
    for name in ("stride", "groups", "dilation"):
        expect(module, name, 1)
    if exact:
        expect(module, "iter_T", 10)
        expect(module, "eval_iter_T", 10)
    arguments = _conv_arguments(module)
    arguments["in_channels"] //= stride**2
    arguments["stride"] = stride
    arguments["padding_mode"] = "zeros"
    if exact:
        arguments["ridge"] = 1e-4
    layer = PublishedLOTConv2d if exact else lnn.LOTConv2d
    return Replacement(layer, arguments, forget=("w_cached", "cached_w", "use_cached_w"))


def _soc(module: nn.Module, exact: bool) -> Replacement:
    stride = attribute(module, "stride")
    arguments = _sizes(module)
    arguments["in_channels"] //= stride**2
    arguments |= {
        "stride": stride,
        "bias": module._parameters.get("bias") is not None,
        "padding_mode": "zeros",
    }
    view = {"weight": "random_conv_filter"}
    if not exact:
        return Replacement(lnn.SOCConv2d, arguments, view, finish=_iterate_power_vector)
    arguments["terms"] = attribute(module, "train_terms")
    arguments["eval_terms"] = attribute(module, "eval_terms")
    for name in ("init_iters", "update_iters", "update_freq", "total_iters"):
        if not isinstance(attribute(module, name), int):
            raise Unsupported(f"{name} is {attribute(module, name)!r}, expected an integer")
    vectors = [f"{letter}{i}" for letter in "uv" for i in range(1, 5)]
    for name in [*vectors, "correction"]:
        if name not in module._parameters:
            raise Unsupported(f"it has no parameter {name!r}")
    return Replacement(PublishedSOCConv2d, arguments, view)


def _iterate_power_vector(module: nn.Module) -> None:
    assert isinstance(module, lnn.SOCConv2d)
    if not module.weight.is_meta:
        module.reset_power_vector()


def _maxmin(module: nn.Module, exact: bool) -> Replacement:
    own = set(module.__dict__) - set(nn.Module().__dict__)
    own |= {*module._parameters, *module._buffers, *module._modules}
    if own:
        raise Unsupported(f"it has attributes of its own: {', '.join(sorted(own))}")
    probe = torch.tensor([1.0, 2.0, 4.0, 3.0, 5.0])[None, :, None, None]
    try:
        found = module.forward(probe)
    except Exception as error:
        raise Unsupported(f"it does not run on five channels: {error}") from error
    if not isinstance(found, Tensor) or not torch.equal(found, maxmin(probe)):
        raise Unsupported("it does not order pairs of neighbouring channels as (max, min)")
    return Replacement(lnn.MaxMin)


def _sizes(module: nn.Module) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size")
    return {name: attribute(module, name) for name in names}


def _conv_arguments(module: nn.Module) -> dict[str, Any]:
    arguments = _sizes(module)
    arguments["kernel_size"] = _pair(module.kernel_size)
    arguments["bias"] = module._parameters.get("bias") is not None
    return arguments


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, tuple | list) else value


RULES: tuple[Rule, ...] = (
    *(Rule(_SOURCE, name, _aol) for name in ("AOLConv2d", "AOLConv2dDirac", "AOLConv2dOrth")),
    Rule(_SOURCE, "BCOP", _bcop),
    Rule(_SOURCE, "CayleyConv", _cayley_conv),
    Rule(_SOURCE, "CPLConv2d", _cpl),
    Rule(_SOURCE, "LOT", _lot),
    Rule(_SOURCE, "LOT2t", _lot),
    Rule(_SOURCE, "MaxMin", _maxmin),
    Rule(_SOURCE, "SLLConv2d", _sll),
    Rule(_SOURCE, "SOC", _soc),
    *published_linear.RULES,
)
