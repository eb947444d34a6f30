"""Rules for the linear layers of the published code of "1-Lipschitz Layers Compared"."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipfast import nn as lnn

from .published_layers import BjorckStepsLinear
from .rules import Replacement, Rule, Unsupported, attribute

_SOURCE = "1-Lipschitz Layers Compared"
_CONVERGED = 15  # Bjorck steps from which the polar factor is taken to be reached
_ALPHA_LIMIT = 1e3  # of lipfast's CayleyLinear


def _cayley_linear(module: nn.Module, exact: bool) -> Replacement:
    alpha = attribute(module, "alpha")
    if not isinstance(alpha, Tensor) or alpha.numel() != 1:
        raise Unsupported("alpha is not one number")
    if exact and not alpha.is_meta and float(alpha.detach().abs()) > _ALPHA_LIMIT:
        raise Unsupported(f"alpha is {float(alpha.detach()):g}, expected at most {_ALPHA_LIMIT:g}")
    return Replacement(
        lnn.CayleyLinear,
        _linear_arguments(module),
        {"alpha": _one_alpha},
        forget=("Q_cached", "Q"),
    )


def _one_alpha(module: nn.Module) -> Tensor:
    alpha = module._parameters["alpha"]
    assert alpha is not None
    return alpha.reshape(())


def _bjorck_linear(module: nn.Module, exact: bool) -> Replacement:
    if not parametrize.is_parametrized(module, "weight"):
        raise Unsupported("weight is not parametrised by Bjorck_and_Bowie")
    steps: Any = module.parametrizations.weight[0]  # type: ignore[union-attr,index]
    return _bjorck(
        module,
        exact,
        steps=(attribute(steps, "bjorck_iters_train"), attribute(steps, "bjorck_iters_eval")),
        scaled=attribute(steps, "power_iteration_scaling"),
        options=(attribute(steps, "bjorck_beta"), attribute(steps, "bjorck_order")),
        where={
            "views": {"weight": "parametrizations.weight.original"},
            "parametrizations": {"weight": "Bjorck_and_Bowie"},
        },
    )


def _bnb_linear(module: nn.Module, exact: bool) -> Replacement:
    steps = attribute(module, "rescale")
    options = dict(attribute(steps, "kwargs"))
    scaled = options.pop("power_iteration_scaling", False)
    beta, order = options.pop("beta", 0.5), options.pop("order", 1)
    if options.pop("default_scaling", False) and not scaled:
        raise Unsupported("default_scaling is True, expected False")
    if options:
        raise Unsupported(f"its rescaling has the options {sorted(options)}")
    return _bjorck(
        module,
        exact,
        steps=(attribute(steps, "train_iterations"), attribute(steps, "val_iterations")),
        scaled=scaled,
        options=(beta, order),
        where={"forget": ("val_cache",)},
    )


def _bjorck(
    module: nn.Module,
    exact: bool,
    *,
    steps: tuple[int, int],
    scaled: bool,
    options: tuple[float, int],
    where: dict[str, Any],
) -> Replacement:
    if options != (0.5, 1):
        raise Unsupported(f"beta and order are {options}, expected (0.5, 1)")
    arguments = _linear_arguments(module)
    if not exact or min(steps) >= _CONVERGED:
        return Replacement(lnn.BjorckLinear, arguments, **where)
    arguments |= {"steps": steps[0], "eval_steps": steps[1], "scaled": scaled}
    return Replacement(BjorckStepsLinear, arguments, **where)


def _unsound_sll_linear(module: nn.Module, exact: bool) -> Replacement:
    raise Unsupported("its epsilon is added to one of the two q, so that no bound holds")


def _linear_arguments(module: nn.Module) -> dict[str, Any]:
    bias = module._parameters.get("bias") is not None
    names = ("in_features", "out_features")
    return {**{name: attribute(module, name) for name in names}, "bias": bias}


RULES: tuple[Rule, ...] = (
    Rule(_SOURCE, "BjorckLinear", _bjorck_linear),
    Rule(_SOURCE, "BnBLinear", _bnb_linear),
    Rule(_SOURCE, "BnBLinearBCOP", _bnb_linear),
    Rule(_SOURCE, "CayleyLinear", _cayley_linear),
    Rule(_SOURCE, "SLLLinear", _unsound_sll_linear),
)
