"""Layers that are one convolution with a finite kernel, or one matrix."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import backends
from lipfast.ops.context import (
    inside_transforms,
    is_autocast,
    is_transformed,
    why_not_transformed,
)
from lipfast.ops.convolution import conv2d

from .base import LipschitzModule


class KernelModule(LipschitzModule):
    """A layer whose only weight is the kernel (out, in / groups, kh, kw) of a convolution."""

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        taps = () if self._linear else self.kernel_size
        shape = (self.out_channels, self._inner_channels // self.groups, *taps)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self._register_bias(self.out_channels if bias else None, factory)

    def _run(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        return conv2d(
            x,
            weights[0],
            self.bias,
            self.padding_mode,
            stride=self._inner_stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def effective_kernel(self, input_size: tuple[int, int] | None = None) -> Tensor:
        """Return the kernel (out, in / groups, kh, kw), or matrix (out, in), of evaluation mode.

        With stride s it acts on `torch.nn.PixelUnshuffle(s)` of the input, in = s^2 in_channels;
        AOL's acts on the input itself, with the layer's stride.
        """
        (kernel,) = self._sound(self._map_size(input_size)).weights
        return (kernel.flatten(1) if self._linear else kernel).clone()

    def _plain(
        self,
        weights: tuple[Tensor, ...],
        map_size: tuple[int, int],
        channels: tuple[int, int] | None = None,
    ) -> nn.Module:
        return plain_kernel(self, *kept_channels(weights[0], self.bias, channels))


def as_kernel(weight: Tensor) -> Tensor:
    """Return a weight (out, in, kh, kw) or (out, in) as a kernel in at least float32.

    Or several, from (layers, ...).
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight if weight.dim() >= 4 else weight[..., None, None]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors behind each other along a new first dimension; a view of a single one."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def stacked_kernels(layers: Sequence[Any]) -> Tensor:
    """Return the layers' weights as kernels (layers, out, in, kh, kw) in at least float32."""
    return as_kernel(stacked([layer.weight for layer in layers]))


@torch.no_grad()
def write_buffers(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy one value into each buffer, on a GPU in one launch."""
    torch._foreach_copy_(list(buffers), list(values))


def matched_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which a convolution multiplies x with `weight`: autocast spares float64."""
    if not is_autocast(x):
        return x.dtype
    return (
        weight.dtype if weight.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether the memory of x is (n, h, w, c), and not (n, c, h, w) too."""
    return (
        x.dim() == 4
        and not is_transformed(x)  # torch.func does not say
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """`torch.nn.functional.pixel_unshuffle`, with the right shape for an empty batch too."""
    if x.numel() or x.dim() != 4:
        return F.pixel_unshuffle(x, factor)
    n, c, h, w = x.shape
    return x.reshape(n, c * factor**2, h // factor, w // factor)


def gram_backend() -> str | None:
    """The backend of ops in training: inside torch.func transforms the published form."""
    return "reference" if inside_transforms() else None


def sound_backend(weight: Tensor) -> str:
    """The backend that builds the weights of evaluation mode, in float64 on any device."""
    published = backends.forced() == "reference" or why_not_transformed(weight) is not None
    return "reference" if published else "torch"


def kept_channels(
    kernel: Tensor, bias: Tensor | None, channels: tuple[int, int] | None
) -> tuple[Tensor, Tensor | None]:
    """Return the kernel and bias for the first `channels` of the inputs and of the outputs."""
    if channels is None:
        return kernel, bias
    inputs, outputs = channels
    return kernel[:outputs, :inputs], None if bias is None else bias[:outputs]


def plain_kernel(module: LipschitzModule, kernel: Tensor, bias: Tensor | None) -> nn.Module:
    """Return `nn.Linear` or `nn.Conv2d`, as `module` is, with this kernel and bias."""
    out_channels, in_channels, kh, kw = kernel.shape
    factory = {"device": kernel.device, "dtype": kernel.dtype, "bias": bias is not None}
    plain: nn.Linear | nn.Conv2d
    if module._linear:
        plain = nn.utils.skip_init(nn.Linear, in_channels, out_channels, **factory)
        kernel = kernel.flatten(1)
    else:
        plain = nn.utils.skip_init(
            nn.Conv2d,
            in_channels * module.groups,
            out_channels,
            (kh, kw),
            stride=module._inner_stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
            **factory,
        )
    plain.weight.data = kernel.detach().clone(memory_format=torch.contiguous_format)
    if bias is not None and plain.bias is not None:
        plain.bias.data = bias.detach().clone()
    return plain


def assert_map_size(x: Tensor, map_size: tuple[int, int]) -> None:
    """Refuse other maps, in plain modules too: `torch._assert` is traced by torch.fx."""
    for dim, name, expected in ((-2, "height", map_size[0]), (-1, "width", map_size[1])):
        message = f"input: expected maps of {name} {expected}, for which this module was made"
        torch._assert(x.size(dim) == expected, message)
