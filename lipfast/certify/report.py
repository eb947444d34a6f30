"""Certification of a network on a data set."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .factors import runs_forward_of
from .lipschitz import bound_for_any_batch, known_bounds
from .radius import RADII, certified_radius, certified_robust_accuracy


@dataclass(frozen=True)
class CertificationReport:
    """Accuracies (fractions of `n_samples`) and the bounds on which they rest."""

    accuracy: float
    certified: dict[float, float]
    lipschitz_bound: float
    layer_bounds: dict[str, float]
    n_samples: int


def report(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    radii: Sequence[float] = RADII,
) -> CertificationReport:
    """Certify a network on the samples of a loader.

    The network runs in evaluation mode without autocast, TF32 or reduced-precision products, and
    radii are divided by its proved Lipschitz bound. Where the last module of an `nn.Sequential` is
    a plain `nn.Linear`, the exact pairwise radius is used. Its mode is restored afterwards.

    Args:
        model: a network with a known bound, on the first sample at least: see `lipschitz_bound`.
        loader: yields (x, y), x (b, ...) on any device, y (b,) class indices.
        radii: Euclidean radii in the units of x.

    Raises:
        ValueError: the loader is empty, or a score is not finite.
        TypeError: the model has a layer without a known bound, stays in training mode, or has
            parameters in half precision, or none.
    """
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        awake = [name or "the top" for name, module in model.named_modules() if module.training]
        if awake:
            raise TypeError(f"model: expected evaluation mode after eval(), not so in {awake[0]}")
        with torch.no_grad(), full_precision():
            scores, labels, example = _predict(model, loader)
            bounds = known_bounds(model)
            body, head = _split_head(model)
            bound = bound_for_any_batch(body, example)
            whole = bound_for_any_batch(model, example)
        weight = None if head is None else head.weight.detach()
        radius = certified_radius(scores, labels, lipschitz=bound, head_weight=weight)
        return CertificationReport(
            accuracy=float((scores.argmax(dim=1) == labels).double().mean()),
            certified={float(eps): certified_robust_accuracy(radius, eps) for eps in radii},
            lipschitz_bound=whole,
            layer_bounds=bounds,
            n_samples=len(labels),
        )
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32: no autocast, no TF32, no bfloat16 passes."""
    legacy = _legacy_precision()
    owners = _precision_owners()
    saved = [owner.fp32_precision for owner in owners]
    if legacy is not None:
        _set_legacy_precision("highest", False)
    for owner in owners:
        if owner.fp32_precision not in ("ieee", "none"):
            owner.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        if legacy is not None:
            _set_legacy_precision(*legacy)
        for owner, value in zip(owners, saved, strict=True):
            owner.fp32_precision = value


def _legacy_precision() -> tuple[str, bool] | None:
    """The settings of torch before 2.9; None where the user has mixed them with the newer ones."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_legacy_precision(matmul: str, cudnn_tf32: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn_tf32


def _precision_owners() -> list[Any]:
    """Where torch since 2.9 keeps the precision of float32 products, the general ones first."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "fp32_precision"):
        return []
    owners = [backends, backends.cuda.matmul]
    for library in (backends.cudnn, backends.mkldnn):
        owners += [library, library.conv, library.rnn]
    return [*owners, backends.mkldnn.matmul]


def _predict(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores, labels, and the first samples as an example."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    if not parameters:
        raise TypeError("model: expected parameters, got none")
    parameter = parameters[0]
    for other in parameters:
        if other.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"model: expected float32 or float64 parameters to certify, got {other.dtype}"
            )
    scores: list[Tensor] = []
    labels: list[Tensor] = []
    examples: list[Tensor] = []
    for x, y in loader:
        images = x.to(parameter.device, parameter.dtype)
        if not examples and len(images):
            examples = [images[:2]]
        if examples and images.shape[1:] != examples[0].shape[1:]:
            raise ValueError(
                f"loader: expected samples of one shape, for which the bound is proved, got "
                f"{tuple(examples[0].shape[1:])} and {tuple(images.shape[1:])}"
            )
        scores.append(model(images))
        labels.append(y.to(parameter.device))
    if not scores:
        raise ValueError("loader: expected at least one batch, got none")
    all_scores = torch.cat(scores)
    if not bool(torch.isfinite(all_scores).all()):
        raise ValueError("model: expected finite scores, got NaN or Inf")
    return all_scores, torch.cat(labels), examples[0] if examples else None


def _split_head(model: nn.Module) -> tuple[nn.Module, nn.Linear | None]:
    """The network before a plain last layer and that layer, where nothing stands around them."""
    if (
        isinstance(model, nn.Sequential)
        and runs_forward_of(model, nn.Sequential)
        and len(model) > 1
        and isinstance(model[-1], nn.Linear)
        and runs_forward_of(model[-1], nn.Linear)
        and not hasattr(model, "lipschitz_bound")
        and not hasattr(model[-1], "lipschitz_bound")
    ):
        return nn.Sequential(*list(model)[:-1]), model[-1]
    return model, None
