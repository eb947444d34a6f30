"""Whether a parameter is the one that cached weights were built from."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class Source(NamedTuple):
    """A parameter or buffer, and what changes when its values do."""

    parameter: "weakref.ref[Tensor]"
    state: tuple[int, float, int, torch.device, torch.dtype]

    @classmethod
    def of(cls, parameter: Tensor) -> "Source":
        place = (parameter.data_ptr(), parameter.device, parameter.dtype)
        # an inference tensor counts no versions: NaN equals nothing, so it is never unchanged
        version = float("nan") if parameter.is_inference() else parameter._version
        return cls(weakref.ref(parameter), (_uncounted_steps, version, *place))

    def is_unchanged(self, parameter: Tensor) -> bool:
        return self.parameter() is parameter and self.state == Source.of(parameter).state


# Fused optimizers write parameters without counting it in `_version`, and FSDP's layers see a copy
# of what is stepped, whose version it keeps.
_uncounted_steps = 0


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    global _uncounted_steps
    groups = optimizer.param_groups
    if any(g.get("fused") or any(hasattr(p, "full_tensor") for p in g["params"]) for g in groups):
        _uncounted_steps += 1


register_optimizer_step_post_hook(_count_step)
