"""Whether the iterations that make weights orthogonal have converged, known on the device alone."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipfast import ops
from lipfast.ops.context import inside_transforms, is_transformed

from .kernel import KernelModule, write_buffers

# ||I - X X^H||_F before the last step: after it, singular values are above 0.996
RESIDUAL_LIMIT = 0.1


class PolarModule(KernelModule):
    """A layer with matrices that are orthogonalised by an iteration.

    `polar_residual` is the largest ||I - X X^H||_F of the last forward pass in training, X a matrix
    before the last step of its iteration.
    """

    polar_residual: Tensor

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        super()._make_parameters(bias, factory)
        self._register_residual(factory)

    def _register_residual(self, factory: dict[str, Any]) -> None:
        residual = torch.zeros((), device=factory["device"])
        self.register_buffer("polar_residual", residual, persistent=False)

    def _polar(
        self,
        layers: Sequence[Any],
        matrices: Tensor,
        backend: str | None,
        **options: Any,
    ) -> Tensor:
        """`ops.polar` of the layers' matrices (layers, ...).

        In training, where `backend` is None, each layer keeps its residual.
        """
        training = backend is None
        if training and is_transformed(matrices):
            backend = "reference"  # the others cannot be derived by torch.func
        factors, residuals = ops.polar(matrices, return_residual=True, backend=backend, **options)
        if training and not inside_transforms():
            largest = residuals.view(len(layers), -1).amax(dim=1)
            write_buffers([layer.polar_residual for layer in layers], largest.unbind())
        return factors


def unconverged_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers whose iteration did not converge in the last training step.

    Such a layer is 1-Lipschitz, but some of its singular values lie below 1 and its gradient is not
    exact. Waits for the device.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PolarModule)}
    # NaN has not converged either
    return [n for n, p in layers.items() if not float(p.polar_residual) <= RESIDUAL_LIMIT]


def warn_of_unconverged_layers(model: nn.Module) -> None:
    """Warn where `unconverged_layers` names any, and say what helps."""
    names = unconverged_layers(model)
    if names:
        warnings.warn(
            f"the weights of {', '.join(names)} are not orthogonal: their singular values lie so "
            "far apart that the iteration did not converge. The layers are 1-Lipschitz, but lose "
            "some of the signal, and their gradients are not exact. A lower learning rate or a "
            "start from reset_parameters() keeps the singular values together.",
            stacklevel=2,
        )
