"""What is known of the operations in a traced graph."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn


def flat_nodes(value: Any) -> list[fx.Node]:
    """The nodes among arguments, as often as they stand there."""
    if isinstance(value, fx.Node):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [node for part in value for node in flat_nodes(part)]
    return []


def is_signal(node: fx.Node) -> bool:
    """Whether a value depends on the input of the network."""
    if node.op == "get_attr" or is_size(node):
        return False
    return node.op == "placeholder" or any(is_signal(n) for n in node.all_input_nodes)


def is_size(node: fx.Node) -> bool:
    """Whether a value says something about the shape or type of a tensor only."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op in ("call_function", "call_method") and node.target in SIZES


def is_slice(index: Any) -> bool:
    """Whether an index takes each element at most once."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is ... or isinstance(part, int | slice) for part in parts)


def as_module(node: fx.Node, make: Callable[..., nn.Module]) -> nn.Module:
    """Return the module that computes what a call of a function does."""
    skipped = ("input", "training", "dtype", "_stacklevel")
    options = {k: v for k, v in node.kwargs.items() if k not in skipped}
    return make(*node.args[1:], **options)


ADD = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub} | {
    *("add", "add_", "sub", "sub_")
}
JOIN = {torch.cat, torch.concat, torch.stack, torch.hstack, torch.vstack}
MULTIPLY = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
PRODUCTS = {torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm", torch.einsum}
DIVIDE = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
SIZES = {"size", "dim", "numel", len}
INDEX = {operator.getitem}
VIEWS = {torch.flatten, torch.permute, torch.transpose, torch.reshape, torch.squeeze} | {
    *(torch.unsqueeze, torch.chunk, torch.split, torch.neg, torch.abs, operator.neg, torch.clone),
    *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous"),
    *("chunk", "split", "unbind", "narrow", "clone", "detach", "float", "double", "neg", "abs"),
    *("clamp", "clamp_min", torch.clamp, "t", "movedim", "unflatten", torch.unflatten),
}
MEANS = {torch.mean, "mean"}
SUMS = {torch.sum, "sum"}
EXPANSIONS = {"expand", "expand_as", "repeat"}
ADAPTIVE = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


def _module(kind: type[nn.Module], *names: str) -> Callable[..., nn.Module]:
    def make(*args: Any, **options: Any) -> nn.Module:
        return kind(**dict(zip(names, args, strict=False)), **options)

    return make


MODULES: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", torch.relu_, "relu_"), _module(nn.ReLU)),
    **dict.fromkeys((torch.tanh, "tanh", F.tanh), _module(nn.Tanh)),
    **dict.fromkeys((torch.sigmoid, "sigmoid", F.sigmoid), _module(nn.Sigmoid)),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), _module(nn.Softmax, "dim")),
    F.relu6: _module(nn.ReLU6),
    F.leaky_relu: _module(nn.LeakyReLU, "negative_slope"),
    F.elu: _module(nn.ELU, "alpha"),
    F.gelu: _module(nn.GELU, "approximate"),
    F.silu: _module(nn.SiLU),
    F.mish: _module(nn.Mish),
    F.hardswish: _module(nn.Hardswish),
    F.softplus: _module(nn.Softplus, "beta", "threshold"),
    F.hardtanh: _module(nn.Hardtanh, "min_val", "max_val"),
    F.dropout: _module(nn.Dropout, "p"),
    F.pixel_unshuffle: _module(nn.PixelUnshuffle, "downscale_factor"),
    F.max_pool2d: _module(nn.MaxPool2d, "kernel_size", "stride", "padding", "dilation"),
    F.avg_pool2d: _module(
        *(nn.AvgPool2d, "kernel_size", "stride", "padding", "ceil_mode"),
        *("count_include_pad", "divisor_override"),
    ),
    F.adaptive_avg_pool2d: _module(nn.AdaptiveAvgPool2d, "output_size"),
    F.adaptive_max_pool2d: _module(nn.AdaptiveMaxPool2d, "output_size"),
}
