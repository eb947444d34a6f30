"""What is proved of an exported network, in a form that travels with it."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, fx, nn

import lipfast
from lipfast.certify.factors import has_other_forward, is_known, module_factor
from lipfast.certify.lipschitz import bound_for_any_batch

RADIUS = "margin / (sqrt(2) * lipschitz_bound), margin = score of the class - highest other score"
ROUNDING = (
    "not covered: the rounding of the forward pass and of constants that the export computes from "
    "the weights, about 1e-6 relative in float32"
)


class Certificate(TypedDict):
    """A plain, JSON-able dict: what is proved of a plain network, and how to use it."""

    lipfast_version: str
    norm: str  # of inputs and outputs: "l2"
    lipschitz_bound: float | None  # proved, from the input to the scores; None: see `reason`
    reason: str | None  # why there is no bound
    layer_bounds: dict[str, float | None]  # of layers with parameters; None: no finite one
    radius: str  # how a margin becomes a radius, in the units of the network's input
    rounding: str  # what the bound leaves out
    input_size: list[int] | None  # without the batch: the bound is proved for such inputs
    input_normalisation: dict[str, Any] | None  # {"module", "mean", "std"} inside the network
    weights_sha256: str  # of the state_dict: see `fingerprint`


def certify(model: nn.Module, example: Tensor | None) -> Certificate:
    """Return the certificate of a network in evaluation mode, without the weights' hash."""
    bound, reason = _bound(model, example)
    return Certificate(
        lipfast_version=lipfast.__version__,
        norm="l2",
        lipschitz_bound=bound,
        reason=reason,
        layer_bounds=_layer_bounds(model),
        radius=RADIUS,
        rounding=ROUNDING,
        input_size=None if example is None else list(example.shape[1:]),
        input_normalisation=_normalisation(model),
        weights_sha256="",
    )


def check_fingerprint(plain: nn.Module, certificate: Certificate) -> None:
    """Raise a ValueError where the weights are not those that were certified."""
    if fingerprint(plain) != certificate["weights_sha256"]:
        raise ValueError(
            "model: expected the weights that to_plain returned, got others (trained, loaded or "
            "cast since then); its certificate does not hold for them"
        )
    if structure(plain) != getattr(plain, "certified_structure", None):
        raise ValueError(
            "model: expected the modules that to_plain returned, got others (replaced, hooked or "
            "with other attributes since then); its certificate does not hold for them"
        )


def structure(model: nn.Module) -> str:
    """SHA-256 of what decides on the function beside the state_dict, as far as modules show it."""
    digest = hashlib.sha256()
    for name, module in model.named_modules(remove_duplicate=False):
        # copies of a GraphModule are instances of other classes, with the same code
        traced = isinstance(module, fx.GraphModule)
        kind = module.code if traced else f"{type(module).__module__}.{type(module).__qualname__}"
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        own = has_other_forward(module)
        digest.update(f"{name} {kind} {module.extra_repr()} {hooks} {own}\n".encode())
    state = model.state_dict()
    hidden = {name: b for name, b in model.named_buffers() if name not in state}
    digest.update(state_fingerprint(hidden).encode())
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of the state_dict, sorted by name."""
    return state_fingerprint(model.state_dict())


def state_fingerprint(state: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def to_json(certificate: Certificate) -> str:
    return json.dumps(certificate, indent=1, allow_nan=False)


def from_json(text: str) -> Certificate:
    certificate = json.loads(text)
    missing = Certificate.__required_keys__ - set(certificate)
    if missing:
        raise ValueError(f"certificate: expected the keys {sorted(missing)}, got none of them")
    return certificate


def _bound(model: nn.Module, example: Tensor | None) -> tuple[float | None, str | None]:
    short = sorted({str(p.dtype) for p in model.parameters() if _is_short(p)})
    if short:
        return None, f"parameters in {', '.join(short)}: rounding of such a forward pass is large"
    try:
        bound = bound_for_any_batch(model, example)
    except TypeError as error:
        return None, str(error).removeprefix("model: ")
    if not math.isfinite(bound):
        return None, "the product of the bounds of the layers is not finite"
    return bound, None


def _is_short(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.dtype.itemsize < 4


def _layer_bounds(model: nn.Module) -> dict[str, float | None]:
    bounds: dict[str, float | None] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in bounds)
        has_parameters = next(module.parameters(recurse=False), None) is not None
        if has_parameters and not inside and is_known(module):
            value = module_factor(module).value
            bounds[name] = value if value is not None and math.isfinite(value) else None
    return bounds


def _normalisation(model: nn.Module) -> dict[str, Any] | None:
    """The first module with a mean and a standard deviation, as torchvision's Normalize has."""
    for name, module in model.named_modules():
        mean, std = (getattr(module, key, None) for key in ("mean", "std"))
        if mean is not None and std is not None and not callable(mean) and not callable(std):
            values = {"mean": mean, "std": std}
            return {"module": name} | {
                key: torch.as_tensor(value).double().flatten().tolist()
                for key, value in values.items()
            }
    return None
