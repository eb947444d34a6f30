"""Rules for the layers of orthogonium."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .orthogonium_gram import (
    HalvesMaxMin,
    OrthogoniumAOLConv2d,
    OrthogoniumSLLConv2d,
    OrthogoniumSLLLinear,
)
from .orthogonium_layers import (
    OrthogoniumBlockConv2d,
    OrthogoniumLinear,
    OrthogoniumPatchConv2d,
    OrthogoniumStridedConv2d,
)
from .peers import chain, class_name, conv_arguments, original, original_weight
from .rules import Replacement, Rule, Unsupported, View, attribute, expect

# up to which our iteration converges, and its derivative: nu / sigma_min and sigma_max / sigma_min
_LINEAR_LIMITS = (14.0, 6.0)  # of `OrthogoniumLinear`
_FACTOR_LIMITS = (45.0, 30.0)  # of `OrthogoniumBlockConv2d` and `OrthogoniumPatchConv2d`
_ITERATION_LIMIT = 1e-5  # how far a Bjorck iteration may end from an orthogonal matrix


def _maxmin(module: nn.Module, exact: bool) -> Replacement:
    return Replacement(HalvesMaxMin, {"axis": module.axis})


def _aol(module: nn.Module, exact: bool) -> Replacement:
    (entry, *_), names = chain(module)
    if names != "MultiStepAOLReparametrizer":
        raise Unsupported(f"its weight is parametrised by {names}")
    expect(entry, "niter", 1)
    views = {"weight": original_weight, "q": weight_q}
    arguments = conv_arguments(module)
    return Replacement(OrthogoniumAOLConv2d, arguments, views, parametrizations={"weight": names})


def _linear(module: nn.Module, exact: bool) -> Replacement:
    entries, names = chain(module)
    _check_bjorck(original(module, "weight"), *_pair(entries, names), exact, _LINEAR_LIMITS)
    arguments = {
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
    }
    views = {"weight": original_weight}
    return Replacement(OrthogoniumLinear, arguments, views, parametrizations={"weight": names})


def _block(module: nn.Module, exact: bool) -> Replacement:
    names = _checked_factors(module, "weight", exact)
    views = {"weight": original_weight}
    return Replacement(
        OrthogoniumBlockConv2d, conv_arguments(module), views, parametrizations={"weight": names}
    )


def _patch(module: nn.Module, exact: bool) -> Replacement:
    names = _checked_patches(module, "weight", exact)
    scale = chain(module)[0][0].scale
    return Replacement(
        OrthogoniumPatchConv2d,
        {**conv_arguments(module), "scale": scale},
        {"weight": original_weight},
        parametrizations={"weight": names},
    )


def _strided(module: nn.Module, exact: bool) -> Replacement:
    parametrizations = {
        "weight_1": _checked_factors(module, "weight_1", exact),
        "weight_2": _checked_patches(module, "weight_2", exact),
    }
    expect(chain(module, "weight_2")[0][0], "scale", 1)
    views = {
        "weight": original_block,
        "patch_weight": original_patch,
    }
    return Replacement(
        OrthogoniumStridedConv2d, conv_arguments(module), views, parametrizations=parametrizations
    )


def _sll_block(module: nn.Module, exact: bool) -> Replacement:
    _, names = chain(module, "kernel")
    if names != "AOLReparametrizer":
        raise Unsupported(f"its kernel is parametrised by {names}")
    expect(module, "groups", 1)
    _expect_relu(module)
    hidden, channels, *sizes = original(module, "kernel").shape
    arguments = {
        "in_channels": channels,
        "out_channels": channels,
        "kernel_size": tuple(sizes),
        "padding": module.padding,
        "padding_mode": "zeros",
        "hidden": hidden,
    }
    views: dict[str, View] = {
        "weight": original_kernel,
        "bias": flat_bias,
        "q": kernel_q,
    }
    return Replacement(OrthogoniumSLLConv2d, arguments, views, parametrizations={"kernel": names})


def _sll_dense(module: nn.Module, exact: bool) -> Replacement:
    _expect_relu(module)
    hidden, features = module._parameters["weight"].shape  # type: ignore[union-attr]
    arguments = {"in_features": features, "out_features": features, "hidden": hidden}
    return Replacement(OrthogoniumSLLLinear, arguments, {"bias": flat_bias})


def original_block(module: nn.Module) -> Tensor:
    """Return the matrices of a strided convolution's block convolution."""
    return original(module, "weight_1")


def original_patch(module: nn.Module) -> Tensor:
    """Return the kernel of a strided convolution's second one."""
    return original(module, "weight_2")


def original_kernel(module: nn.Module) -> Tensor:
    """Return the kernel of a residual layer before its rescaling."""
    return original(module, "kernel")


def weight_q(module: nn.Module) -> Tensor:
    """Return q of the weight's AOL rescaling."""
    return chain(module)[0][0].q


def kernel_q(module: nn.Module) -> Tensor:
    """Return q of the kernel's AOL rescaling."""
    return chain(module, "kernel")[0][0].q


def flat_bias(module: nn.Module) -> Tensor:
    """Return the bias of a residual layer without the axes that make it broadcast."""
    return module._parameters["bias"].flatten()  # type: ignore[union-attr]


def _expect_relu(module: nn.Module) -> None:
    kind = class_name(attribute(module, "activation"))
    if kind != "ReLU":
        raise Unsupported(f"its activation is {kind}, expected ReLU")


def _pair(entries: list[nn.Module], names: str) -> tuple[nn.Module, nn.Module]:
    if len(entries) != 2:
        raise Unsupported(f"its weight is parametrised by {names}")
    return entries[0], entries[1]


def _checked_factors(module: nn.Module, name: str, exact: bool) -> str:
    """Check the parametrisation of a block convolution, and return its names."""
    entries, names = chain(module, name)
    if class_name(entries[-1]) != "BCOPTrivializer" or len(entries) not in (2, 3):
        raise Unsupported(f"its {name} is parametrised by {names}")
    factors = original(module, name)
    if factors.shape[-1] == 0:
        raise Unsupported("it has one channel per group")
    if len(entries) == 3:
        _check_bjorck(factors, entries[0], entries[1], exact)
    elif class_name(entries[0]) != "L2Normalize" or factors.shape[-1] != 1:
        raise Unsupported(f"its {name} is parametrised by {names}")
    return names


def _checked_patches(module: nn.Module, name: str, exact: bool) -> str:
    entries, names = chain(module, name)
    if names != "RKOParametrizer":
        raise Unsupported(f"its {name} is parametrised by {names}")
    (entry,) = entries
    weight = original(module, name)
    groups = int(module.groups)  # type: ignore[arg-type]
    matrices = weight.reshape(groups, weight.shape[0] // groups, -1)
    _check_bjorck(matrices, entry.pi, entry.bjorck, exact)
    return names


def _check_bjorck(
    matrices: Tensor,
    normaliser: nn.Module,
    orthogonaliser: nn.Module,
    exact: bool,
    limits: tuple[float, float] = _FACTOR_LIMITS,
) -> None:
    """Raise `Unsupported` unless the iteration's result is the polar factor of the matrices."""
    kind = class_name(orthogonaliser)
    if kind != "BatchedBjorckOrthogonalization":
        raise Unsupported(f"{kind} makes another orthogonal matrix than the polar factor")
    if orthogonaliser.pass_through:
        raise Unsupported("pass_through=True gives its weight no gradient")
    normalised = class_name(normaliser).removeprefix("Parametrized") == "BatchedPowerIteration"
    if not normalised and class_name(normaliser) != "BatchedIdentity":
        raise Unsupported(f"its weight is normalised by {class_name(normaliser)}")
    if not exact or matrices.is_meta:
        return
    values = torch.linalg.svdvals(matrices.detach().double())
    smallest, largest = values[..., -1], values[..., 0]
    nu = values.pow(4).sum(dim=-1).pow(0.25)
    spread = tuple(float((n / smallest).amax()) for n in (nu, largest))
    if not all(found <= limit for found, limit in zip(spread, limits, strict=True)):
        raise Unsupported(
            f"singular values of its weight differ by a factor of {spread[1]:.3g}, too much for "
            "the result and the derivative of its iteration to be those of the polar factor"
        )
    x = values / largest[..., None] if normalised else values
    beta = float(orthogonaliser.beta)  # type: ignore[arg-type]
    for _ in range(int(orthogonaliser.niters)):  # type: ignore[arg-type]
        x = (1 + beta) * x - beta * x**3
    error = float((x - 1).abs().amax())
    if not error <= _ITERATION_LIMIT:
        raise Unsupported(
            f"{orthogonaliser.niters} Bjorck steps end {error:.1g} from an orthogonal matrix"
        )


def _refused(reason: str) -> Callable[[nn.Module, bool], Replacement]:
    def build(module: nn.Module, exact: bool) -> Replacement:
        raise Unsupported(reason)

    return build


_TRANSPOSED = _refused("a transposed convolution, which no layer of lipfast is")
_SKEW = _refused(
    "its kernel is a truncated exponential of a kernel that is not skew-symmetric any more: not "
    "1-Lipschitz, and not what SOC computes"
)
_LEGACY = _refused("legacy code, which orthogonium keeps for comparison")
_BUILDERS: dict[str, Callable[[nn.Module, bool], Replacement]] = {
    "MaxMin": _maxmin,
    "AOLConv2D": _aol,
    "OrthoLinear": _linear,
    "FastBlockConv2d": _block,
    "RKOConv2d": _patch,
    "BcopRkoConv2d": _strided,
    "SDPBasedLipschitzResBlock": _sll_block,
    "SDPBasedLipschitzDense": _sll_dense,
    "UnitNormLinear": _refused("each output is 1-Lipschitz, the layer is not"),
    "SLLxAOCLipschitzResBlock": _refused(
        "its convolutions change the size of the map, other than those of a residual layer here"
    ),
    "AOCLipschitzResBlock": _refused(
        "its convolution has no padding, other than that of a residual layer here"
    ),
    "FastSOC": _SKEW,
    "SOCRkoConv2d": _SKEW,
    "AOLConvTranspose2D": _TRANSPOSED,
    "FastBlockConvTranspose2D": _TRANSPOSED,
    "RkoConvTranspose2d": _TRANSPOSED,
    "BcopRkoConvTranspose2d": _TRANSPOSED,
    "SOCTranspose": _TRANSPOSED,
    "SOCRkoConvTranspose2d": _TRANSPOSED,
    "HouseHolder": _refused("lipfast has no Householder activation"),
    "HouseHolder_Order_2": _refused("lipfast has no Householder activation"),
    **dict.fromkeys(("BCOP", "Cayley", "CayleyLinear", "SOC"), _LEGACY),
}
RULES: tuple[Rule, ...] = tuple(
    Rule("orthogonium", name, build, "orthogonium") for name, build in _BUILDERS.items()
)
