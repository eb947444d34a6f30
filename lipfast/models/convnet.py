"""The convolutional network of "1-Lipschitz Layers Compared" (Prach et al., CVPR 2024)."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipfast.nn import METHODS, FirstChannels, MaxMin, PixelUnshuffle, ZeroChannelPad
from lipfast.nn.layers import positive_int
from lipfast.nn.options import split_options

SIZES = {"XS": 16, "S": 32, "M": 64, "L": 128}


class ConvNet(nn.Sequential):
    """The paper's network, 1-Lipschitz from image to scores.

    Zero channels up to the width w; a 1x1 convolution and MaxMin; log2(h) blocks, block i of width
    w 2^i: `layers_per_block` x [convolution, MaxMin], the first half of the channels,
    PixelUnshuffle(2); kernel 3, but 1 in the last block, whose maps are 2x2; a linear layer on the
    flattened features; the first `n_classes` of its outputs. Five blocks for 32x32 images, six for
    64x64 (there w is half as large), three for 8x8.

    Args:
        method: key of `lipfast.nn.METHODS`: aol, bcop, cayley, cpl, lot, sll, soc.
        size: XS, S, M or L (w = 16, 32, 64, 128; half of that for 64x64 images); None with `width`.
        n_classes: number of scores, at most the number of features.
        input_size: (channels, h, h) with h a power of two, at least 2.
        width: w, even, in place of `size`.
        layers_per_block: convolutions per block.
        device: of the parameters.
        dtype: of the parameters.
        layer_options: keywords for each layer, as its class documents them: `ridge=1e-4` for LOT,
            `series="taylor", norm="unfolding"` for SOC, `norm="sound"` for CPL, `bias=False`, and
            `padding_mode` for the convolutions.

    Attributes:
        config: the arguments, without device and dtype, in the types of JSON: `ConvNet(**config)`
            is the same network with fresh weights.

    Shapes:
        (n, channels, h, h) to (n, n_classes).

    Raises:
        TypeError: the layers do not take one of the options.
        ValueError: an argument is out of range, or the input has another shape.
    """

    def __init__(
        self,
        method: str,
        size: str | None = "XS",
        *,
        n_classes: int = 10,
        input_size: tuple[int, int, int] = (3, 32, 32),
        width: int | None = None,
        layers_per_block: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer_options: Any,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        positive_int("n_classes", n_classes, "ConvNet")
        positive_int("layers_per_block", layers_per_block, "ConvNet")
        n_blocks = _n_blocks(input_size)
        w = _width(size, width, input_size)
        channels = input_size[0]
        features = w * 2**n_blocks
        if channels > w:
            raise ValueError(f"input_size: expected at most {w} channels, got {channels}")
        if not 2 <= n_classes <= features:
            raise ValueError(f"n_classes: expected 2 to {features}, got {n_classes!r}")
        conv, linear = METHODS[method].conv, METHODS[method].linear
        conv_options, linear_options = split_options(layer_options, conv, linear)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        conv_options.update(factory)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["image"] = _Image((channels, input_size[1], input_size[2]))
        layers["pad"] = ZeroChannelPad(w)
        layers["first_conv"] = conv(w, w, 1, **conv_options)
        layers["first_activation"] = MaxMin()
        for i in range(n_blocks):
            c = w * 2**i
            kernel_size = 1 if i == n_blocks - 1 else 3
            block: list[nn.Module] = []
            for _ in range(layers_per_block):
                block += [conv(c, c, kernel_size, **conv_options), MaxMin()]
            layers[f"block{i + 1}"] = nn.Sequential(
                *block, FirstChannels(c // 2), PixelUnshuffle(2)
            )
        layers["flatten"] = nn.Flatten()
        layers["linear"] = linear(features, features, **linear_options, **factory)
        layers["classes"] = FirstChannels(n_classes)
        super().__init__(layers)
        self.config: dict[str, Any] = {
            "method": method,
            "size": size if width is None else None,
            "n_classes": n_classes,
            "input_size": list(input_size),
            "width": width,
            "layers_per_block": layers_per_block,
            **layer_options,
        }


class _Image(nn.Module):
    """Refuses inputs of another shape than (n, *size)."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.size:
            raise ValueError(
                f"input: ConvNet expected (n, {', '.join(map(str, self.size))}), "
                f"got shape {tuple(x.shape)}"
            )
        return x

    def lipschitz_bound(self) -> float:
        """Return 1: the identity."""
        return 1.0


def _n_blocks(input_size: tuple[int, int, int]) -> int:
    if not isinstance(input_size, Sequence) or len(input_size) != 3:
        raise ValueError(f"input_size: expected (channels, h, h), got {input_size!r}")
    for size in input_size:
        positive_int("input_size", size, "ConvNet")
    _, h, w = input_size
    if h != w or h < 2 or h & (h - 1):
        raise ValueError(f"input_size: expected a square map, a power of two, got {h}x{w}")
    return int(h).bit_length() - 1


def _width(size: str | None, width: int | None, input_size: tuple[int, int, int]) -> int:
    if width is not None:
        if positive_int("width", width, "ConvNet") % 2:
            raise ValueError(f"width: expected an even number >= 2, got {width!r}")
        return width
    if size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
    return SIZES[size] // 2 if input_size[1] >= 64 else SIZES[size]
