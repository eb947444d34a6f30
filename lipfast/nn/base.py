"""What every 1-Lipschitz layer shares: the protocol, the weight cache, the input checks."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lipfast.ops.context import (
    is_autocast,
    is_traced,
    outside_transforms,
    without_autocast,
    without_tangents,
)

from .signature import full_signature
from .sources import Source


class SoundWeights(NamedTuple):
    """Weights for evaluation in their storage dtype, and a float64 bound of the layer they make."""

    weights: tuple[Tensor, ...]
    bound: Tensor


class Prebuilt(NamedTuple):
    """Training weights with their graph that were built before the layer's forward pass."""

    map_size: tuple[int, int]
    weights: tuple[Tensor, ...]


class _CacheEntry(NamedTuple):
    map_size: tuple[int, int]
    sources: list[Source]
    sound: SoundWeights


class LipschitzModule(nn.Module):
    """Base class of the 1-Lipschitz layers.

    In training mode the weights are rebuilt, with their graph, in every forward pass, in the
    parameters' dtype but never below float32. In evaluation mode they are built once, without a
    graph (their parameters get no gradient there; inputs do, and so does a bias that is added at
    the end), in float64, and kept until a parameter changes, moves or is replaced, the map size
    changes, or `train()` or `eval()` is called. A write that PyTorch itself does not count
    (`parameter.data.copy_(...)`) needs such a call. A graph of torch.compile builds them in every
    call: for compiled inference compile `to_plain()`'s module.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _inner_channels: int  # of the map that the weights act on, after space-to-depth
    _inner_stride: tuple[int, int]  # of the convolution on it
    weight: nn.Parameter
    bias: nn.Parameter | None

    _linear: ClassVar[bool] = False
    _depends_on_map_size = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = full_signature(cls)  # type: ignore[attr-defined]

    def __init__(self) -> None:
        super().__init__()
        self._cache: _CacheEntry | None = None
        self._last_map_size: tuple[int, int] | None = None
        self.prebuilt: Prebuilt | None = None  # whoever sets it takes it away again

    def effective_kernel(self, input_size: tuple[int, int] | None = None) -> Tensor:
        """Return the kernel of the one convolution that the layer is in evaluation mode.

        Args:
            input_size: (h, w) of the map, for layers whose kernel depends on it; the size of the
                last input by default.

        Raises:
            TypeError: the layer is not a single convolution.
            ValueError: the size is needed and unknown, or a parameter is not finite.
        """
        raise TypeError(
            f"{type(self).__name__} is not a single convolution and has no effective kernel; "
            "use to_plain() for an equivalent module"
        )

    def lipschitz_bound(self, input_size: tuple[int, int] | None = None) -> float:
        """Return a proved upper bound of the layer's Lipschitz constant in evaluation mode.

        Computed in float64 from the weights as they are stored, rounding of their cast included;
        rounding in the forward pass itself is not. Euclidean norm on inputs and outputs.

        Args:
            input_size: (h, w) of the map, for layers whose weights depend on it; the size of the
                last input by default.

        Raises:
            ValueError: the size is needed and unknown, or a parameter is not finite.
        """
        return float(self._sound(self._map_size(input_size)).bound)

    def to_plain(self, input_size: tuple[int, int] | None = None) -> nn.Module:
        """Return an equivalent module of plain torch layers, without graph or parametrisation.

        Args:
            input_size: (h, w) of the map, for layers whose weights depend on it; the size of the
                last input by default. The module then accepts this size only.

        Raises:
            ValueError: the size is needed and unknown, or a parameter is not finite.
        """
        map_size = self._map_size(input_size)
        return self._plain(self._sound(map_size).weights, map_size).train(self.training)

    def train(self, mode: bool = True) -> "LipschitzModule":
        self._cache = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "LipschitzModule":
        self._cache = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache = None  # its weak references would forbid swapping the parameters
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "prebuilt": None}

    # What a method defines -----------------------------------------------------------------------

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        """Register the weight and the bias, or None for it; further parameters go on top."""
        raise NotImplementedError

    def _register_bias(self, size: int | None, factory: dict[str, Any]) -> None:
        bias = None if size is None else nn.Parameter(torch.empty(size, **factory))
        self.register_parameter("bias", bias)

    def reset_parameters(self) -> None:
        """Initialise the parameters as the method was published."""
        raise NotImplementedError

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        """Weights of `layers` with their graph, each (layers, ...); at least float32.

        The layers are built alike, this one is the first of them; autocast is off.
        """
        raise NotImplementedError

    def _build_options(self) -> tuple[Hashable, ...]:
        """What layers that are built alike have in common beside the shapes of their parameters."""
        sizes = (self._inner_channels, self.out_channels, self.kernel_size, self.groups)
        return (*sizes, self.padding_mode)

    def _training_weights(self, map_size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Weights of this layer with their graph."""
        return tuple(stack.squeeze(0) for stack in self._stacked_weights([self], map_size))

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        """Weights whose layer is proved to have the returned bound."""
        raise NotImplementedError

    def _run(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """Apply the layer to x (n, _inner_channels, h, w)."""
        raise NotImplementedError

    def _weight_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the training weights for an input of `dtype`, outside autocast."""
        return dtype

    def _plain(
        self,
        weights: tuple[Tensor, ...],
        map_size: tuple[int, int],
        channels: tuple[int, int] | None = None,
    ) -> nn.Module:
        """Plain torch module with these weights, for the first `channels` in and out, or all."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------

    def _weights(self, map_size: tuple[int, int], x: Tensor) -> tuple[Tensor, ...]:
        self._last_map_size = map_size
        if not self.training:
            h, w = map_size if self._depends_on_map_size else (1, 1)
            return self._sound((int(h), int(w))).weights
        return self._for_input(x, self.training_weights(map_size))

    def training_weights(self, map_size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return the weights of training mode with their graph, `prebuilt` where they are.

        At least float32, whatever autocast says; `map_size` is (h, w) of the map that the weights
        act on, after a stride's space-to-depth. Counts as a training step: it writes the layer's
        power vectors and residuals.

        Raises:
            ValueError: a parameter is not finite (on a CPU; elsewhere reading it would wait).
        """
        prebuilt = self.prebuilt
        if prebuilt is not None and (
            not self._depends_on_map_size or prebuilt.map_size == tuple(map_size)
        ):
            return prebuilt.weights
        with without_autocast(self.weight):
            self._check_finite(on_device=False)
            return self._training_weights(map_size)

    def _for_input(self, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The training weights in the form in which the layer meets x with them."""
        if is_autocast(x):
            return weights
        return tuple(weight.to(self._weight_dtype(x.dtype)) for weight in weights)

    def _sound(self, map_size: tuple[int, int]) -> SoundWeights:
        parameters = [*self.parameters(), *self.buffers()]  # of parametrisations too
        if any(is_traced(p) for p in parameters):
            return self._build_sound(map_size)
        entry = self._cache
        if (
            entry is None
            or entry.map_size != map_size
            or len(entry.sources) != len(parameters)
            or not all(s.is_unchanged(p) for s, p in zip(entry.sources, parameters, strict=True))
        ):
            self._check_finite(on_device=True)
            sources = [Source.of(p) for p in parameters]
            entry = _CacheEntry(map_size, sources, self._build_sound(map_size))
            self._cache = entry
        return entry.sound

    def _build_sound(self, map_size: tuple[int, int]) -> SoundWeights:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            without_tangents(),
            without_autocast(self.weight),
            outside_transforms(self.weight, *self.parameters(), *self.buffers()),
        ):
            return self._sound_weights(map_size)

    def _map_size(self, input_size: tuple[int, int] | None) -> tuple[int, int]:
        if not self._depends_on_map_size:
            return (1, 1)
        if input_size is None:
            if self._last_map_size is None:
                raise ValueError(
                    f"input_size: the weights of {type(self).__name__} depend on the size of the "
                    "map; expected (height, width), or one forward pass before, got None"
                )
            return self._last_map_size
        if len(input_size) != 2 or any(int(n) != n or n < 1 for n in input_size):
            raise ValueError(f"input_size: expected (height, width) >= 1, got {input_size!r}")
        return (int(input_size[0]), int(input_size[1]))

    def _check_finite(self, *, on_device: bool) -> None:
        """Name the parameter that is not finite; on a GPU only where a synchronisation is free."""
        if is_traced(self.weight) or (not on_device and self.weight.device.type != "cpu"):
            return
        for name, parameter in self.named_parameters():  # of parametrisations too
            if hasattr(parameter, "full_tensor"):
                wanted = "expected a whole tensor, got a DTensor: unshard() the FSDP module first"
                raise ValueError(f"{name}: {wanted}")
            values = parameter.detach()
            if values.numel() and not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"{name}: expected finite values in {type(self).__name__}, got "
                    f"{int((~torch.isfinite(values)).sum())} NaN or Inf of {values.numel()}"
                )

    def _check_input(self, x: Tensor, channels_dim: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"input: expected a Tensor, got {type(x).__name__}")
        if x.shape[channels_dim] != self.in_channels:
            raise ValueError(
                f"input: expected {self.in_channels} channels in dimension {channels_dim} for "
                f"{type(self).__name__}, got shape {tuple(x.shape)}"
            )
        if x.device != self.weight.device:
            raise ValueError(
                f"input: expected device {self.weight.device} as the weight, got {x.device}"
            )
        if x.dtype == self.weight.dtype:
            return
        if not (x.is_floating_point() and x.dtype != torch.float64 and is_autocast(x)):
            raise TypeError(
                f"input: expected dtype {self.weight.dtype} as the weight (or autocast), "
                f"got {x.dtype}"
            )
