"""Rules for the layers of deel-torchlip."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .peers import chain, class_name, conv_arguments, original_weight
from .rules import Replacement, Rule, Unsupported, View, expect
from .torchlip_layers import (
    TorchlipFrobeniusConv2d,
    TorchlipFrobeniusLinear,
    TorchlipMinMax,
    TorchlipSpectralConv2d,
    TorchlipSpectralLinear,
)

_TOLERANCE_LIMIT = 5e-3  # of the iteration, for its result to be orthogonal to 1e-4
_DISTANCE_LIMIT = 1e-4  # of the last matrix from an orthogonal one
_FACTORS = {"_LConvNorm": "lconv_coefficient", "_LipschitzCoefMultiplication": "_coef"}
_SPECTRAL = ("_SpectralNorm", "_BjorckNorm")
_FROBENIUS = ("_FrobeniusNorm",)


def _group_sort(module: nn.Module, exact: bool) -> Replacement:
    expect(module, "group_size", 2)
    return Replacement(TorchlipMinMax, {"coefficient": float(module._coefficient_lip)})  # type: ignore[arg-type]


def _spectral_linear(module: nn.Module, exact: bool) -> Replacement:
    return _spectral(module, TorchlipSpectralLinear, _linear_arguments(module), exact)


def _spectral_conv(module: nn.Module, exact: bool) -> Replacement:
    return _spectral(module, TorchlipSpectralConv2d, conv_arguments(module), exact)


def _spectral(
    module: nn.Module, layer: type[nn.Module], arguments: dict[str, Any], exact: bool
) -> Replacement:
    (norm, bjorck), factor, names = _checked_chain(module, _SPECTRAL)
    expect(norm, "n_power_iterations", 1)
    if not bjorck.eps <= _TOLERANCE_LIMIT:
        raise Unsupported(
            f"eps_bjorck is {bjorck.eps:g}, which ends far from an orthogonal matrix; expected at "
            f"most {_TOLERANCE_LIMIT:g}"
        )
    kept = bjorck._w_bjorck
    if exact and not kept.is_meta:
        rows = kept.double().flatten(1)
        rows = rows if rows.shape[0] <= rows.shape[1] else rows.mT
        identity = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        distance = float(torch.linalg.matrix_norm(rows @ rows.mT - identity))
        if not distance <= _DISTANCE_LIMIT:
            raise Unsupported(
                f"the matrix that it keeps for evaluation is {distance:.1g} from an orthogonal one"
            )
    arguments = {**arguments, "factor": factor, "tolerance": float(bjorck.eps)}
    views: dict[str, View] = {"weight": original_weight}
    return Replacement(layer, arguments, views, parametrizations={"weight": names})


def _frobenius_linear(module: nn.Module, exact: bool) -> Replacement:
    return _frobenius(module, TorchlipFrobeniusLinear, _linear_arguments(module))


def _frobenius_conv(module: nn.Module, exact: bool) -> Replacement:
    return _frobenius(module, TorchlipFrobeniusConv2d, conv_arguments(module))


def _frobenius(module: nn.Module, layer: type[nn.Module], arguments: dict[str, Any]) -> Replacement:
    (norm,), factor, names = _checked_chain(module, _FROBENIUS)
    arguments = {**arguments, "factor": factor, "disjoint": norm.dim_norm is not None}
    views: dict[str, View] = {"weight": original_weight}
    return Replacement(layer, arguments, views, parametrizations={"weight": names})


def _linear_arguments(module: nn.Module) -> dict[str, Any]:
    return {
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
    }


def _checked_chain(module: nn.Module, expected: tuple[str, ...]) -> tuple[list[Any], float, str]:
    """The parametrisations with the expected names, the factor that follows, and all names."""
    entries, names = chain(module)
    number = len(expected)
    if tuple(class_name(entry) for entry in entries[:number]) != expected:
        if names.startswith("_SpectralNorm"):
            raise Unsupported(
                "without Bjorck's iteration it divides by an estimate of the norm, which is no "
                "bound"
            )
        raise Unsupported(f"its weight is parametrised by {names}")
    factor = 1.0
    for entry in entries[number:]:
        if class_name(entry) not in _FACTORS:
            raise Unsupported(f"its weight is parametrised by {names}")
        factor *= float(getattr(entry, _FACTORS[class_name(entry)]))
    return entries[:number], factor, names


def _refused(reason: str) -> Callable[[nn.Module, bool], Replacement]:
    def build(module: nn.Module, exact: bool) -> Replacement:
        raise Unsupported(reason)

    return build


_SORT = _refused("sorts more than two channels at a time, which no op of lipfast does")
_BUILDERS: dict[str, Callable[[nn.Module, bool], Replacement]] = {
    "GroupSort2": _group_sort,
    "GroupSort": _group_sort,
    "SpectralLinear": _spectral_linear,
    "SpectralConv2d": _spectral_conv,
    "FrobeniusLinear": _frobenius_linear,
    "FrobeniusConv2d": _frobenius_conv,
    "FullSort": _SORT,
    "MaxMin": _refused("doubles the channels as relu(x) and relu(-x), which is not MaxMin here"),
    "HouseHolder": _refused("lipfast has no Householder activation"),
    "SpectralConv1d": _refused("a convolution in one dimension, which no layer of lipfast is"),
    "SpectralConvTranspose2d": _refused("a transposed convolution, which no layer of lipfast is"),
}
RULES: tuple[Rule, ...] = tuple(
    Rule("deel-torchlip", name, build, "deel.torchlip") for name, build in _BUILDERS.items()
)
