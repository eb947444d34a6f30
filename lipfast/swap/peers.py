"""What lipfast's form of the layers of other packages shares."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lipfast import reference
from lipfast.nn.base import LipschitzModule, SoundWeights
from lipfast.nn.kernel import KernelModule
from lipfast.nn.layers import LipschitzConv2d, LipschitzLinear

from .rules import Unsupported


class PeerConv2d(KernelModule, LipschitzConv2d):
    """A convolution whose kernel another package defines, with the arguments of torch's.

    Other than the layers of `lipfast.nn` it takes even kernels and any stride: the arguments are
    those of a convolution that exists (`conv_arguments`).
    """

    _free_arguments = ("kernel_size", "stride", "padding", "dilation", "groups")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        LipschitzModule.__init__(self)
        self.in_channels = self._inner_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = self._inner_stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.padding_mode = padding_mode
        self._downscale = 1
        self._make_parameters(bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nothing: the parameters come from the layer that this one replaces."""


class PeerLinear(KernelModule, LipschitzLinear):
    """A linear layer whose matrix another package defines."""

    def reset_parameters(self) -> None:
        """Nothing: the parameters come from the layer that this one replaces."""


class PatchConv2d(PeerConv2d):
    """A convolution whose kernel is a contraction as a matrix (out, in kh kw) of its windows.

    Its norm is at most that of the matrix times the square root of the number of windows that a
    pixel is in.
    """

    _patch: ClassVar[str] = "kernel_size"  # the attribute with the size of the windows

    @property
    def _depends_on_map_size(self) -> bool:  # type: ignore[override]
        """Whether padding may put a pixel into more windows on some maps than on others."""
        return self.padding_mode == "circular" and self.padding != (0, 0) and self.stride != (1, 1)

    def _overlap(self, map_size: tuple[int, int]) -> int:
        """The largest number of windows that a pixel is in."""
        number = 1
        for axis in (0, 1):
            taps, k = getattr(self, self._patch)[axis], self.kernel_size[axis]
            s, d, p = self.stride[axis], self.dilation[axis], self.padding[axis]
            starts, period = range(1), s
            if self._depends_on_map_size:
                period = map_size[axis]
                starts = range(0, period + 2 * p - d * (k - 1), s)
            hits = Counter((i + t * d) % period for i in starts for t in range(taps))
            number *= max([1, *hits.values()])
        return number


def sound_windows(
    layer: KernelModule, kernel: Tensor, norm: Tensor, map_size: tuple[int, int]
) -> SoundWeights:
    """Return a float64 kernel as it is stored, for a proved norm of its matrix of windows."""
    overlap = layer._overlap(map_size) if isinstance(layer, PatchConv2d) else 1
    return SoundWeights(*stored(kernel, norm * overlap**0.5, layer.weight.dtype))


def stored(kernel: Tensor, bound: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor], Tensor]:
    """Return the fields of `SoundWeights` for a kernel in float64 with a proved bound."""
    kernel, bound = reference.round_contraction(kernel, bound, dtype)
    return (kernel,), bound


def conv_arguments(module: nn.Module) -> dict[str, Any]:
    """Return the arguments of `PeerConv2d` for a module with the attributes of `nn.Conv2d`.

    Raises:
        Unsupported: the padding is one for which no Lipschitz bound holds.
    """
    shape: dict[str, Any] = {
        name: getattr(module, name)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")
    }
    shape["kernel_size"] = tuple(shape["kernel_size"])
    extents = [d * (k - 1) for d, k in zip(shape["dilation"], shape["kernel_size"], strict=True)]
    mode = getattr(module, "old_padding_mode", module.padding_mode)
    if mode not in ("zeros", "circular"):
        raise Unsupported(f"padding_mode is {mode!r}, which repeats pixels and so expands")
    shape["padding_mode"] = mode
    shape["padding"] = _padding(module.padding, extents)  # type: ignore[arg-type]
    pairs = zip(shape["padding"], extents, strict=True)
    if mode == "circular" and any(2 * p > extent for p, extent in pairs):
        raise Unsupported(
            f"circular padding of {shape['padding']} repeats outputs, which adds to their norm"
        )
    shape["bias"] = module.bias is not None
    return shape


def _padding(padding: str | Sequence[int], extents: list[int]) -> tuple[int, ...]:
    if padding == "valid":
        return (0, 0)
    if padding != "same":
        return tuple(padding)  # type: ignore[arg-type]
    if any(extent % 2 for extent in extents):
        raise Unsupported("padding 'same' of an even kernel is wider on one side")
    return tuple(extent // 2 for extent in extents)


def chain(module: nn.Module, name: str = "weight") -> tuple[list[Any], str]:
    """Return the parametrisations of a tensor of the module, and their names as rules join them.

    Raises:
        Unsupported: the tensor has none.
    """
    entries: Any = getattr(module, "parametrizations", {})
    if name not in entries:
        raise Unsupported(f"{name} is not parametrised")
    found = list(entries[name])
    return found, " and ".join(class_name(entry) for entry in found)


def original(module: nn.Module, name: str = "weight") -> Tensor:
    """Return the parameter that a parametrised tensor of the module is computed from."""
    entries: Any = module._modules["parametrizations"]  # a tenth of the time of attributes
    return entries._modules[name]._parameters["original"]


def original_weight(module: nn.Module) -> Tensor:
    """Return the parameter of a parametrised `weight`: unlike a path, torch.compile traces it."""
    return original(module)


def class_name(module: nn.Module) -> str:
    """Return the name of a parametrisation's class."""
    return type(module).__name__
