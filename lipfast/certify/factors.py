"""Lipschitz constants of torch's own modules."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lipfast import reference


class Factor(NamedTuple):
    """An upper bound of a module's Lipschitz constant.

    Args:
        value: Euclidean norm, evaluation mode; inf where there is none, None where none is known.
        note: what to know or to do about it; "" where there is nothing.
        training: the bound in training mode where it is larger; inf where there is none.
    """

    value: float | None
    note: str = ""
    training: float = 0.0


def module_factor(module: nn.Module) -> Factor:
    """Return the proved factor of one module, from its weights as they are now.

    A module's own `lipschitz_bound()`, else the table of torch's modules, which a subclass with
    another `forward` does not share. Containers have none of their own.

    Raises:
        ValueError: a weight is not finite, or a layer whose weights depend on the map has not seen
            an input yet.
    """
    if has_other_forward(module):
        return Factor(None, "its forward function was replaced on the object")
    bound: Any = getattr(module, "lipschitz_bound", None)
    if bound is not None:
        return Factor(float(bound()))
    for kind, entry in _TABLE.items():
        if runs_forward_of(module, kind):
            return entry if isinstance(entry, Factor) else entry(module)
    return Factor(None, "not known")


def is_known(module: nn.Module) -> bool:
    """Whether a module has a bound of its own or stands in the table, known factor or not."""
    has_own = hasattr(module, "lipschitz_bound")
    return has_own or any(runs_forward_of(module, kind) for kind in _TABLE)


def runs_forward_of(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module runs torch's own forward pass of this kind."""
    return isinstance(module, kind) and all(
        getattr(type(module), name, None) is getattr(kind, name, None)
        for name in ("forward", "_conv_forward", "__call__")
    )


def has_other_forward(module: Any) -> bool:
    """Whether a forward function was put on the object that is not that of its class."""
    own, kind = module.__dict__.get("forward"), type(module)
    if own is None:
        return False
    # unwrapping a model puts its own back
    function = getattr(own, "__func__", None)
    return getattr(own, "__self__", None) is not module or function is not kind.forward


def window_count(kernel: int, stride: int, dilation: int = 1) -> int:
    """Return how many windows of a pooling layer meet one position at most, along one axis."""
    step = stride // math.gcd(stride, dilation)
    return -(-kernel // step)


def _finite(weight: Tensor, name: str) -> Tensor:
    weight = weight.detach().double()
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got NaN or Inf")
    return weight


def _linear(module: nn.Linear) -> Factor:
    norm = reference.schatten_bound(_finite(module.weight, "weight"), squarings=11)
    return Factor(float(norm), _PLAIN)


def _conv2d(module: nn.Conv2d) -> Factor:
    weight = _finite(module.weight, "weight")
    sizes = zip(conv_padding(module), module.kernel_size, module.dilation, strict=True)
    # a window of the convolution on the whole plane, or of that on a torus
    if not (
        module.padding_mode == "zeros"
        or (module.padding_mode == "circular" and all(2 * p <= d * (k - 1) for p, k, d in sizes))
    ):
        return Factor(None, f"{module.padding_mode} padding repeats pixels; use zeros")
    norms = [float(reference.torus_bound(block)) for block in weight.chunk(module.groups)]
    return Factor(max(norms), _PLAIN)


def conv_padding(module: nn.Conv2d) -> tuple[int, ...]:
    """The zeros in front of the map, as numbers."""
    if module.padding == "same":
        sizes = zip(module.dilation, module.kernel_size, strict=True)
        return tuple(d * (k - 1) // 2 for d, k in sizes)
    return (0, 0) if module.padding == "valid" else tuple(module.padding)  # type: ignore[arg-type]


def _batch_norm(module: Any) -> Factor:
    if module.running_var is None:
        return Factor(None, "normalises by the batch, which couples its samples; " + _NO_NORM)
    scale = (_finite(module.running_var, "running_var") + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * _finite(module.weight, "weight").abs()
    note = "in training it divides by the batch's spread; " + _NO_NORM
    return Factor(float(scale.amax()), note, math.inf)


def _sample_norm(module: Any) -> Factor:
    if getattr(module, "running_var", None) is not None:
        return _batch_norm(module)
    if module.eps is None:
        return Factor(None, _NO_NORM)
    weight = getattr(module, "weight", None)
    largest = 1.0 if weight is None else float(_finite(weight, "weight").abs().amax())
    return Factor(largest / math.sqrt(module.eps), "divides by the sample's spread; " + _NO_NORM)


def _max_pool(module: Any) -> Factor:
    count = _windows(module)
    if count == 1:
        return Factor(1.0)
    return Factor(math.sqrt(count), "windows overlap; use kernel_size = stride, or a strided layer")


def _avg_pool(module: Any) -> Factor:
    taps = math.prod(_sizes(module, module.kernel_size))
    count = _windows(module)
    divisor = getattr(module, "divisor_override", None)
    whole = module.count_include_pad or not any(_sizes(module, module.padding))
    if divisor is None and (module.ceil_mode or not whole):  # edges divide by fewer pixels
        return Factor(math.sqrt(count), _SHRINKS)
    return Factor(math.sqrt(count * taps) / abs(divisor or taps), _SHRINKS)


def _windows(module: Any) -> int:
    kernel = _sizes(module, module.kernel_size)
    stride, dilation = _sizes(module, module.stride), _sizes(module, getattr(module, "dilation", 1))
    return math.prod(map(window_count, kernel, stride, dilation))


def _sizes(module: Any, value: Any) -> tuple[int, ...]:
    kinds = (nn.MaxPool1d, nn.AvgPool1d), (nn.MaxPool2d, nn.AvgPool2d), (nn.MaxPool3d, nn.AvgPool3d)
    axes = next(axes for axes, kind in enumerate(kinds, 1) if isinstance(module, kind))
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * axes if len(values) == 1 else values


def _adaptive_pool(module: Any) -> Factor:
    size = module.output_size
    one = all(n == 1 for n in size) if isinstance(size, tuple | list) else size == 1
    if one:
        return Factor(1.0, "" if "Max" in type(module).__name__ else _SHRINKS)
    return Factor(None, "its windows depend on the map; use a fixed kernel_size = stride")


def _upsample(module: nn.Upsample) -> Factor:
    scale = module.scale_factor
    if module.mode != "nearest" or scale is None:
        return Factor(None, "repeats or mixes pixels; use nn.PixelShuffle")
    # one number is that of up to three axes
    scales = tuple(scale) if isinstance(scale, tuple | list) else (scale,) * 3
    if any(s != int(s) or s < 1 for s in scales):
        return Factor(None, "repeats or mixes pixels; use nn.PixelShuffle")
    return Factor(math.sqrt(math.prod(scales)), "repeats pixels; use nn.PixelShuffle")


def _dropout(module: Any) -> Factor:
    if module.p == 0:
        return Factor(1.0)
    scale = math.inf if module.p >= 1 else 1 / (1 - module.p)
    return Factor(1.0, f"1 / (1 - p) = {scale:.3g} in training; remove it", scale)


def _slope(module: Any) -> Factor:
    slopes = [getattr(module, n, 1.0) for n in ("negative_slope", "lower", "upper", "alpha")]
    slope = max(1.0, *(abs(s) for s in slopes))
    return Factor(slope, "" if slope == 1 else "a slope above 1; use lipfast.nn.MaxMin")


def _celu(module: nn.CELU) -> Factor:
    return Factor(1.0) if module.alpha > 0 else _UNBOUNDED


def _softplus(module: nn.Softplus) -> Factor:
    # it jumps at its threshold by exp(-threshold) / beta, from 20 on less than it is rounded by
    return Factor(1.0) if module.threshold >= 20 else _JUMPS


def _prelu(module: nn.PReLU) -> Factor:
    slope = max(1.0, float(_finite(module.weight, "weight").abs().amax()))
    return Factor(slope, "its slope is learned; " + _MAXMIN)


_PLAIN = "not converted: its norm is not bounded in training"
_NO_NORM = "remove it, or centre only"
_SHRINKS = "shrinks the signal; nn.PixelUnshuffle keeps it"
_MAXMIN = "use lipfast.nn.MaxMin"
_UNBOUNDED = Factor(math.inf, "not Lipschitz")
_ATTENTION = Factor(math.inf, "dot-product attention is not Lipschitz")
_JUMPS = Factor(math.inf, "not continuous")
_INDICES = Factor(None, "a table of indices; the bound starts at its output")
_NO_LAYER = Factor(None, "there is no 1-Lipschitz layer for it here")
_RECURRENT = Factor(None, "a recurrent network has no known bound")
_REPEATS = Factor(None, "repeats pixels; use zero padding")

# largest absolute derivatives, rounded up
_TABLE: dict[type[nn.Module], Factor | Callable[[Any], Factor]] = {
    **dict.fromkeys(
        (
            *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle),
            *(nn.ChannelShuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
            *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
            *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.Softshrink),
            *(nn.LogSigmoid, nn.Tanhshrink),
        ),
        Factor(1.0),
    ),
    nn.Sigmoid: Factor(0.25),
    nn.Hardsigmoid: Factor(0.16667),
    nn.Softmax: Factor(0.5),
    nn.Softmax2d: Factor(0.5),
    nn.Softmin: Factor(0.5),
    nn.GELU: Factor(1.13, _MAXMIN),
    nn.SiLU: Factor(1.1, _MAXMIN),
    nn.Mish: Factor(1.089, _MAXMIN),
    nn.Hardswish: Factor(1.5, _MAXMIN),
    nn.SELU: Factor(1.7581, _MAXMIN),
    nn.ELU: _slope,
    nn.LeakyReLU: _slope,
    nn.RReLU: _slope,
    nn.PReLU: _prelu,
    nn.CELU: _celu,
    nn.Softplus: _softplus,
    **dict.fromkeys((nn.Hardshrink, nn.Threshold), _JUMPS),
    nn.GLU: Factor(math.inf, "a product of two signals is not Lipschitz"),
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    **dict.fromkeys(
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), _dropout
    ),
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _batch_norm
    ),
    **dict.fromkeys(
        (
            *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
            *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        ),
        _sample_norm,
    ),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _max_pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _avg_pool),
    **dict.fromkeys(
        (
            *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
            *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        ),
        _adaptive_pool,
    ),
    nn.Upsample: _upsample,
    **dict.fromkeys(
        (
            *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
            *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
        ),
        _REPEATS,
    ),
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag), _INDICES),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell), _RECURRENT),
    **dict.fromkeys(
        (
            *(nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
            *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
        ),
        _ATTENTION,
    ),
    nn.Bilinear: _UNBOUNDED,
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        _NO_LAYER,
    ),
}
