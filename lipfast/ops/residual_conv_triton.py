"""residual_conv on its Triton kernels, which are imported when they are first called.

The steps of the backward pass are ops of their own, so that torch.compile sees them whole.
"""

import torch
from torch import Tensor


def forward(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    padding_mode: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return y and the mask, see `lipfast.kernels.residual_conv.residual_conv_forward`."""
    from lipfast.kernels import residual_conv as kernels

    return kernels.residual_conv_forward(x, kernel, bias, scale, padding_mode, dtype=dtype)


def masked(
    x: Tensor, kernel: Tensor, bias: Tensor | None, mask: Tensor, padding_mode: str
) -> Tensor:
    """Return W x + bias where the mask has a bit and 0 elsewhere, in channels-last memory."""
    return torch.ops.lipfast.residual_conv_masked(x, kernel, bias, mask, padding_mode)


def subtract(x: Tensor, hidden: Tensor, kernel: Tensor, scale: Tensor, padding_mode: str) -> Tensor:
    """Return x - W^T (scale * hidden), of the dtype of x, in channels-last memory."""
    return torch.ops.lipfast.residual_conv_subtract(x, hidden, kernel, scale, padding_mode)


def _masked(
    x: Tensor, kernel: Tensor, bias: Tensor | None, mask: Tensor, padding_mode: str
) -> Tensor:
    from lipfast.kernels import residual_conv as kernels

    return kernels.residual_conv_masked(x, kernel, bias, mask, padding_mode)


def _subtract(
    x: Tensor, hidden: Tensor, kernel: Tensor, scale: Tensor, padding_mode: str
) -> Tensor:
    from lipfast.kernels import residual_conv as kernels

    return kernels.residual_conv_subtract(x, hidden, kernel, scale, padding_mode)


def _masked_fake(
    x: Tensor, kernel: Tensor, bias: Tensor | None, mask: Tensor, padding_mode: str
) -> Tensor:
    shape = (x.shape[0], kernel.shape[0], *x.shape[2:])
    return torch.empty_like(x.new_empty(shape), memory_format=torch.channels_last)


def _subtract_fake(x: Tensor, *others: Tensor | str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


torch.library.define(
    "lipfast::residual_conv_masked",
    "(Tensor x, Tensor kernel, Tensor? bias, Tensor mask, str padding_mode) -> Tensor",
)
torch.library.impl("lipfast::residual_conv_masked", ("cpu", "cuda"), _masked)
torch.library.register_fake("lipfast::residual_conv_masked", _masked_fake)
torch.library.define(
    "lipfast::residual_conv_subtract",
    "(Tensor x, Tensor hidden, Tensor kernel, Tensor scale, str padding_mode) -> Tensor",
)
torch.library.impl("lipfast::residual_conv_subtract", ("cpu", "cuda"), _subtract)
torch.library.register_fake("lipfast::residual_conv_subtract", _subtract_fake)
