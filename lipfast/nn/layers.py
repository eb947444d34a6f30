"""The convolution and linear shells: constructor arguments, checks, and shapes."""

import math
import operator
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import LipschitzModule
from .kernel import pixel_unshuffle

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LipschitzConv2d(LipschitzModule):
    """A 1-Lipschitz layer with the signature of `torch.nn.Conv2d`.

    Maps (n, in_channels, h, w), or (in_channels, h, w), to the same with out_channels, and with the
    map size kept unless the layer takes other strides or paddings.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; each layer says how it makes them differ.
        kernel_size: odd number, or a pair of equal ones; of any odd ones where the layer says so.
        stride: s, or a pair of equal ones; any pair where the layer says so. For s > 1 the layer
            acts on `torch.nn.PixelUnshuffle(s)` of the input, an isometry, whose s^2 in_channels
            channels are its input channels; h and w must be multiples of s.
        padding: "same", or the number of pixels that means the same at stride 1,
            dilation * (kernel_size // 2); others and "valid" where the layer says so.
        dilation: 1, or any where the layer says so.
        groups: 1, or a divisor of both numbers of channels where the layer says so.
        bias: learn an additive bias.
        padding_mode: "zeros" or "circular", where the method's bound holds; the published one
            by default.
        device: of the parameters.
        dtype: of the parameters, a real floating-point type.

    Raises:
        ValueError: an argument is outside what the method can do.
    """

    _padding_modes: ClassVar[tuple[str, ...]] = ("zeros", "circular")
    # of "kernel_size" (not square), "stride", "padding", "dilation" and "groups"
    _free_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = "same",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_channels = positive_int("in_channels", in_channels, name)
        self.out_channels = positive_int("out_channels", out_channels, name)
        self.kernel_size = _pair("kernel_size", kernel_size, name)
        if any(k < 1 or k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size: {name} expected odd sizes >= 1, got {kernel_size!r}")
        if not self._is_free("kernel_size") and self.kernel_size[0] != self.kernel_size[1]:
            raise ValueError(f"kernel_size: {name} expected a square kernel, got {kernel_size!r}")
        self.stride = self._checked_stride(stride)
        self.dilation = self._positive_pair("dilation", dilation)
        self.groups = self._checked_groups(groups)
        self.padding_mode = self._padding_modes[0] if padding_mode is None else padding_mode
        if self.padding_mode not in self._padding_modes:
            raise ValueError(
                f"padding_mode: {name} is 1-Lipschitz for {' and '.join(self._padding_modes)} "
                f"padding, got {padding_mode!r}"
            )
        self.padding = self._checked_padding(padding)
        check_floating(dtype, name)
        strided = self._is_free("stride")
        self._downscale = 1 if strided else self.stride[0]
        self._inner_stride = self.stride if strided else (1, 1)
        self._inner_channels = self.in_channels * self._downscale**2
        self._make_parameters(bool(bias), {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _is_free(self, argument: str) -> bool:
        return argument in self._free_arguments

    def _positive_pair(self, argument: str, value: int | Sequence[int]) -> tuple[int, int]:
        name = type(self).__name__
        pair = _pair(argument, value, name)
        if not self._is_free(argument) and pair != (1, 1):
            raise ValueError(f"{argument}: {name} expected 1, got {value!r}")
        if min(pair) < 1:
            raise ValueError(f"{argument}: {name} expected integers >= 1, got {value!r}")
        return pair

    def _checked_stride(self, stride: int | Sequence[int]) -> tuple[int, int]:
        if self._is_free("stride"):
            return self._positive_pair("stride", stride)
        name = type(self).__name__
        pair = _pair("stride", stride, name)
        if pair[0] != pair[1] or pair[0] < 1:
            raise ValueError(
                f"stride: {name} expected an integer >= 1 or a pair of equal ones, got {stride!r}"
            )
        return pair

    def _checked_groups(self, groups: int) -> int:
        name = type(self).__name__
        if not self._is_free("groups"):
            return self._positive_pair("groups", groups)[0]
        groups = positive_int("groups", groups, name)
        if self.in_channels % groups or self.out_channels % groups:
            raise ValueError(
                f"groups: {name} expected a divisor of in_channels {self.in_channels} and "
                f"out_channels {self.out_channels}, got {groups}"
            )
        return groups

    def _checked_padding(self, padding: int | str | Sequence[int]) -> tuple[int, int]:
        name = type(self).__name__
        free = self._is_free("padding")
        same = tuple(d * (k // 2) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        if padding == "same":
            return same  # type: ignore[return-value]
        if padding == "valid" and free:
            return (0, 0)
        if isinstance(padding, str) or (not free and _pair("padding", padding, name) != same):
            sizes = (
                "expected 'same', 'valid' or numbers"
                if free
                else (
                    f"keeps the size of the map; expected 'same' or {same[0]} for kernel size "
                    f"{self.kernel_size[0]}"
                )
            )
            raise ValueError(f"padding: {name} {sizes}, got {padding!r}")
        pair = _pair("padding", padding, name)
        if min(pair) < 0:
            raise ValueError(f"padding: {name} expected integers >= 0, got {padding!r}")
        # more circular padding repeats outputs, which adds to their norm
        if self.padding_mode == "circular" and any(p > s for p, s in zip(pair, same, strict=True)):
            raise ValueError(
                f"padding: {name} is 1-Lipschitz for circular padding of at most {same}, "
                f"got {padding!r}"
            )
        return pair

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (n, in_channels, h, w) or (in_channels, h, w).

        Any h, w >= 1; less padding than "same" needs maps of the size of the kernel, and strides
        multiples of themselves except for AOL.
        """
        if not isinstance(x, Tensor) or x.dim() not in (3, 4):
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            kind = TypeError if not isinstance(x, Tensor) else ValueError
            raise kind(
                f"input: {type(self).__name__} expected (n, {self.in_channels}, h, w) or "
                f"({self.in_channels}, h, w), got {got}"
            )
        self._check_input(x, channels_dim=-3)
        batch = x if x.dim() == 4 else x[None]
        h, w = batch.shape[-2:]
        needed = tuple(
            max(1, d * (k - 1) + 1 - 2 * p)
            for k, d, p in zip(self.kernel_size, self.dilation, self.padding, strict=True)
        )
        if h < needed[0] or w < needed[1]:
            least = "h, w >= 1" if needed == (1, 1) else f"h, w >= {needed[0]}, {needed[1]}"
            raise ValueError(f"input: expected {least}, got shape {tuple(x.shape)}")
        map_size = self._downscaled((h, w), "input")
        if self._downscale > 1:
            batch = pixel_unshuffle(batch, self._downscale)
        y = self._run(batch, self._weights(map_size, x))
        return y if x.dim() == 4 else y[0]

    def to_plain(self, input_size: tuple[int, int] | None = None) -> nn.Module:
        plain = super().to_plain(input_size)
        if self._downscale == 1:
            return plain
        return nn.Sequential(nn.PixelUnshuffle(self._downscale), plain).train(self.training)

    def _map_size(self, input_size: tuple[int, int] | None) -> tuple[int, int]:
        map_size = super()._map_size(input_size)
        if input_size is None or not self._depends_on_map_size:
            return map_size
        return self._downscaled(map_size, "input_size")

    def _downscaled(self, size: tuple[int, int], argument: str) -> tuple[int, int]:
        h, w = size
        if h % self._downscale or w % self._downscale:
            raise ValueError(
                f"{argument}: {type(self).__name__} expected height and width that are multiples "
                f"of the stride {self._downscale}, got {h} x {w}"
            )
        return (h // self._downscale, w // self._downscale)

    def extra_repr(self) -> str:
        free = ("stride", "padding", "dilation", "groups")
        shown = [
            f"{name}={getattr(self, name)}"
            for name in free
            if self._is_free(name) or (name == "stride" and self.stride != (1, 1))
        ]
        return ", ".join(
            [
                f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}",
                *shown,
                f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}",
            ]
        )


class LipschitzLinear(LipschitzModule):
    """A 1-Lipschitz layer with the signature of `torch.nn.Linear`.

    Maps (..., in_features) to (..., out_features).

    Args:
        in_features: length of an input vector.
        out_features: length of an output vector.
        bias: learn an additive bias.
        device: of the parameters.
        dtype: of the parameters, a real floating-point type.

    Raises:
        ValueError: an argument is outside what the method can do.
    """

    _linear = True
    kernel_size = stride = dilation = _inner_stride = (1, 1)
    padding = (0, 0)
    groups = 1
    padding_mode = "zeros"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_channels = self.in_features = positive_int("in_features", in_features, name)
        self._inner_channels = self.in_channels
        self.out_channels = self.out_features = positive_int("out_features", out_features, name)
        check_floating(dtype, name)
        self._make_parameters(bool(bias), {"device": device, "dtype": dtype})
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (..., in_features)."""
        if not isinstance(x, Tensor):
            raise TypeError(f"input: expected a Tensor, got {type(x).__name__}")
        if x.dim() < 1:
            raise ValueError(f"input: expected (..., {self.in_features}), got a scalar")
        self._check_input(x, channels_dim=-1)
        weights = self._weights((1, 1), x)
        y = self._run(x.reshape(math.prod(x.shape[:-1]), self.in_channels, 1, 1), weights)
        return y.reshape(*x.shape[:-1], self.out_channels)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def positive_int(argument: str, value: int, name: str) -> int:
    """Return `value` as an int, or raise a ValueError that names the argument."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{argument}: {name} expected an integer >= 1, got {value!r}")
    return number


def check_floating(dtype: torch.dtype | None, name: str) -> None:
    """Raise a ValueError where `dtype` is not a real floating-point type."""
    if dtype is not None and dtype not in _DTYPES:
        expected = ", ".join(str(known) for known in _DTYPES)
        raise ValueError(
            f"dtype: {name} expected a floating-point type, one of {expected}, got {dtype!r}"
        )


def _pair(argument: str, value: int | str | Sequence[int], name: str) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{argument}: {name} expected an integer or a pair, got {value!r}")
    return values  # type: ignore[return-value]
