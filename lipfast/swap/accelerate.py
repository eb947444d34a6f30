"""Replace known layers of a network by lipfast layers, in place."""

import logging
import warnings
from typing import Literal, TypeVar, overload

import torch
from torch import nn
from torch.nn.utils import parametrize

from lipfast.nn import LipschitzModule
from lipfast.nn import MaxMin as FastMaxMin
from lipfast.nn.layers import check_floating

from . import orthogonium, published, torchlip
from .adopt import Adoption
from .report import Entry, SwapReport
from .rules import Rule, Unsupported, defining_class, find_rule

RULES: tuple[Rule, ...] = (*published.RULES, *orthogonium.RULES, *torchlip.RULES)

_Network = TypeVar("_Network", bound=nn.Module)
_LOG = logging.getLogger("lipfast")


@overload
def accelerate(
    model: _Network,
    dtype: torch.dtype | None = None,
    exact: bool = True,
    dry_run: Literal[False] = False,
) -> _Network: ...


@overload
def accelerate(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    exact: bool = True,
    *,
    dry_run: Literal[True],
) -> SwapReport: ...


def accelerate(
    model: _Network,
    dtype: torch.dtype | None = None,
    exact: bool = True,
    dry_run: bool = False,
) -> _Network | SwapReport:
    """Make the known 1-Lipschitz layers of a network lipfast layers, in place.

    Known are the published layers of "1-Lipschitz Layers Compared", and layers of orthogonium and
    deel-torchlip with the same mathematics; by the name of the class and its attributes, without
    importing those packages. Each layer stays the object that it is, with its parameters, buffers,
    names, hooks and training flag, and becomes an instance of a lipfast class: optimizers, other
    references to it and checkpoints, in both directions, go on. Weights that it had cached are
    forgotten. In evaluation mode its parameters get no gradient any more (inputs do), and
    `lipschitz_bound()` returns a proved bound. Everything else is left alone.

    Logs the table of what it did ("lipfast", level INFO), and warns of layers that look known but
    are left alone, and where nothing is known.

    Args:
        model: any module; the root may be a known layer itself. Inside of what `torch.compile`
            returned, the original network is changed: it compiles again in its next call.
        dtype: what to convert the parameters and buffers of the replaced layers to, in place as
            `torch.nn.Module.to` does; None leaves them.
        exact: compute what the layers computed, to 1e-4 relative, with the constants and power
            iterations of their source: where these are no bound, neither is 1, and
            `lipschitz_bound()` is honestly above it. False takes lipfast's own defaults for the
            same parameters: proved norms, and SOC's near-orthogonal polynomial.
        dry_run: change nothing, and return the report.

    Returns:
        The model, or with `dry_run` a `SwapReport` whose text is the table of what would change.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `dtype` is not a floating-point type.
    """
    adoptions, report = _planned(model, exact)
    check_floating(dtype, "accelerate")
    if dry_run:
        return report
    for adoption in adoptions:
        adoption.perform()
        if dtype is not None:
            adoption.module.to(dtype)
    _LOG.info("accelerate:\n%s", report)
    if report.left_alone:
        reasons = "; ".join(f"{' = '.join(e.paths)}: {e.outcome}" for e in report.left_alone)
        warnings.warn(f"accelerate left known layers alone: {reasons}", stacklevel=2)
    elif not adoptions and not any(entry.status == "lipfast" for entry in report.entries):
        warnings.warn("accelerate found no layer that it knows", stacklevel=2)
    return model


def _planned(model: nn.Module, exact: bool) -> tuple[list[Adoption], SwapReport]:
    """The replacements, checked and not performed, and the report of them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: accelerate expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(exact, bool):
        raise TypeError(f"exact: accelerate expected a bool, got {exact!r}")
    adoptions: list[Adoption] = []
    entries: list[Entry] = []
    for module, paths in _layers(model):
        kind = defining_class(module).__name__
        rule = find_rule(RULES, module)
        if isinstance(module, LipschitzModule | FastMaxMin):
            status, outcome = "lipfast", type(module).__name__
        elif rule is None:
            status, outcome = "unknown", ""
        else:
            try:
                adoption = Adoption(module, rule.build(module, exact))
            except Unsupported as reason:
                status, outcome = "left alone", str(reason)
            else:
                adoptions.append(adoption)
                name = adoption.replacement.layer.__name__
                status, outcome = "replaced", f"{name}, from {rule.source}"
        entries.append(Entry(paths, kind, status, outcome))
    return adoptions, SwapReport(tuple(entries), exact)


def _layers(model: nn.Module) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """The modules that count as layers, each once, with all of its names.

    Known ones, and others that have no children or parameters of their own; nothing inside of
    known ones and of parametrisations.
    """
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    inside: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
        modules[id(module)] = module
        whole = isinstance(module, LipschitzModule | FastMaxMin) or find_rule(RULES, module)
        parts = list(module.modules())[1:] if whole else []
        if parametrize.is_parametrized(module):
            parts += list(module.parametrizations.modules())
        inside.update(map(id, parts))

    def is_layer(module: nn.Module) -> bool:
        return (
            find_rule(RULES, module) is not None
            or isinstance(module, LipschitzModule)
            or not any(True for _ in module.children())
            or any(True for _ in module.parameters(recurse=False))
        )

    return [
        (module, tuple(paths[key]))
        for key, module in modules.items()
        if key not in inside and is_layer(module)
    ]
