"""A network of plain torch layers in place of one with lipfast's layers."""

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from lipfast.certify import full_precision
from lipfast.models.convnet import ConvNet, _Image
from lipfast.nn import (
    FirstChannels,
    LipschitzModule,
    MaxMin,
    PixelUnshuffle,
    ZeroChannelPad,
)

from .certificate import Certificate, certify, check_fingerprint, fingerprint, structure
from .merge import Merged, has_hooks, merge
from .sizes import Shapes, example, record

_HELPERS = (FirstChannels, MaxMin, PixelUnshuffle, ZeroChannelPad, _Image)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def to_plain(model: nn.Module, input_size: Sequence[int] | Tensor | None = None) -> nn.Module:
    """Return a copy of a network with plain torch layers in place of lipfast's.

    The same function as `model.eval()`, up to rounding, in modules that run, save and load without
    lipfast; names of children stay, a `ConvNet` becomes an `nn.Sequential`, modules of other
    classes are copied. With an input size, channels that no layer needs are left out: after
    ZeroChannelPad, and before FirstChannels. The copy is in evaluation mode and its parameters
    take no gradient. `model` itself, its mode, buffers and caches stay as they are. Where a custom
    module calls functions of lipfast, its copy does so too.

    Args:
        model: lipfast layers in any module, compiled or wrapped for data-parallel training or not;
            parameters on a device and finite.
        input_size: sizes of one input without the batch, such as (3, 32, 32), or an example input
            (n, ...); a `ConvNet` knows its own. One forward pass of the copy learns the map sizes,
            on which the weights of CPL, and of Cayley and LOT with kernels larger than 1x1, depend:
            the copy then takes maps of this size only. By default those of each layer's last input.

    Returns:
        The network. Its attribute `certificate` is a `Certificate`, a dict with the proved
        Lipschitz bound, or with the reason why there is none.

    Raises:
        TypeError: `model` is no module, or has a lipfast class or subclass without a plain form.
        ValueError: a parameter has no values or is not finite, a map size is unknown or not the
            only one of its layer, the model does not take such an input, or it is plain already
            and its weights, modules or input size are not those of its certificate.
        RuntimeError: the copy does not compute the same scores for the input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    model = _unwrapped(model)
    _check_values(model)
    if is_plain(model):
        check_fingerprint(model, model.certificate)  # type: ignore[arg-type]
        _check_size(model, input_size)
        return copy.deepcopy(model).eval()
    if input_size is None and isinstance(model, ConvNet):
        input_size = model.config["input_size"]
    with torch.inference_mode(False), torch.no_grad(), full_precision():
        source = _copy(model)
        shapes: Shapes = {}
        x = None if input_size is None else example(source, input_size)
        if x is not None:
            shapes, expected = record(source, x)
        merged = merge(source, shapes)
        _check_layers(source, shapes)
        certificate = certify(source, x)
        plain = _Replacement(source, shapes, merged).of(source)
        if isinstance(plain, fx.GraphModule) and plain is not source:
            plain = nn.Sequential(plain)  # which keeps the certificate when it is copied
        plain.eval().requires_grad_(False)
        if x is not None:
            _check_output(plain(x), expected)
    certificate["weights_sha256"] = fingerprint(plain)
    plain.certificate = certificate  # type: ignore[assignment]
    plain.certified_structure = structure(plain)  # type: ignore[assignment]
    return plain


def is_plain(model: nn.Module) -> bool:
    """Whether the module is what `to_plain` returns."""
    certificate = getattr(model, "certificate", None)
    known = isinstance(certificate, dict) and Certificate.__required_keys__ <= set(certificate)
    return known and not any(_is_lipfast(module) for module in model.modules())


def _check_size(plain: nn.Module, input_size: Sequence[int] | Tensor | None) -> None:
    expected = plain.certificate["input_size"]  # type: ignore[index]
    size = input_size.shape[1:] if isinstance(input_size, Tensor) else input_size
    if size is not None and expected is not None and list(size) != expected:
        raise ValueError(
            f"input_size: expected {expected}, for which the model was made, got {list(size)}"
        )


def _is_lipfast(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "lipfast" for kind in type(module).__mro__)


def _unwrapped(module: nn.Module) -> nn.Module:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif isinstance(module, torch._dynamo.OptimizedModule):
            module = module._orig_mod
        else:
            return module


def _check_values(model: nn.Module) -> None:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise ValueError(f"{name}: expected values, got a tensor on the meta device")
        if hasattr(value, "full_tensor"):
            raise ValueError(f"{name}: expected the whole tensor, got a shard of it (DTensor)")
    for name, value in model.named_parameters():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: expected finite values, got NaN or Inf")


def _copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without compiled wrappers and without lipfast's hooks."""
    source = copy.deepcopy(model)
    for module in source.modules():
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _unwrapped(child)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if str(getattr(hook, "__module__", "")).partition(".")[0] == "lipfast":
                    del hooks[key]
    return source.eval()


def _check_layers(source: nn.Module, shapes: Shapes) -> None:
    for name, layer in source.named_modules():
        where = name or "the top"
        if not isinstance(layer, (LipschitzModule, *_HELPERS)):
            continue
        if not _computes_its_plain_form(layer):
            raise TypeError(
                f"model: {type(layer).__name__} at {where!r} has a forward pass of its own and no "
                "to_plain() for it"
            )
        if not isinstance(layer, LipschitzModule) or not layer._depends_on_map_size:
            continue
        sizes = {shape[-2:] for shape in shapes.get(id(layer), ())}
        if len(sizes) > 1:
            raise ValueError(
                f"model: expected maps of one size at {where!r}, as the weights of "
                f"{type(layer).__name__} depend on it, got {sorted(sizes)} in one forward pass"
            )
        if not sizes and layer._last_map_size is None:
            raise ValueError(
                f"input_size: the weights of {type(layer).__name__} at {where!r} depend on the "
                "size of its map, which is unknown"
            )


def _computes_its_plain_form(layer: nn.Module) -> bool:
    """Whether no subclass has changed the forward pass without changing the plain form."""

    def depth(name: str) -> int:
        kinds = type(layer).__mro__
        return next((i for i, kind in enumerate(kinds) if name in vars(kind)), len(kinds))

    plain = min(depth("_plain"), depth("to_plain"))
    return "forward" not in layer.__dict__ and (type(layer) is _Image or plain <= depth("forward"))


def _check_output(y: object, expected: object) -> None:
    if not isinstance(y, Tensor) or not isinstance(expected, Tensor):
        return
    tolerance = 1e-3 if expected.dtype.itemsize >= 4 else 0.1
    # not >: scores that are NaN do not agree
    if y.shape != expected.shape or not (y - expected).norm() <= tolerance * expected.norm():
        raise RuntimeError(
            "to_plain: the copy does not compute the scores of the model; a module of it may use "
            "its layers in other ways than by calling them"
        )


class _Replacement:
    def __init__(self, source: nn.Module, shapes: Shapes, merged: Merged) -> None:
        self.shapes, self.merged = shapes, merged
        self.names = {id(module): name for name, module in source.named_modules()}
        self.done: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """The plain module, the same one wherever `module` stands."""
        if id(module) not in self.done:
            plain = self._plain(module)
            if plain is not module and has_hooks(module):
                for hooks in _HOOKS:
                    setattr(plain, hooks, getattr(module, hooks))
            self.done[id(module)] = plain
        return self.done[id(module)]

    def _plain(self, module: nn.Module) -> nn.Module:
        if id(module) in self.merged.dropped:
            return nn.Identity()
        if isinstance(module, LipschitzModule):
            return self._layer(module)
        if isinstance(module, _HELPERS):
            return self._helper(module)
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = self.of(child)
        if not _is_lipfast(module):
            return module
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            return nn.Sequential(OrderedDict(module._modules))
        kind = f"{type(module).__module__}.{type(module).__name__}"
        where = self.names[id(module)] or "the top"
        raise TypeError(f"model: {kind} at {where!r} has no plain form")

    def _layer(self, layer: LipschitzModule) -> nn.Module:
        shapes = self.shapes.get(id(layer))
        size = None
        if shapes and layer._depends_on_map_size:
            size = (shapes[0][-2], shapes[0][-1])
        channels = None
        if id(layer) in self.merged.inputs or id(layer) in self.merged.outputs:
            channels = (
                self.merged.inputs.get(id(layer), layer._inner_channels),
                self.merged.outputs.get(id(layer), layer.out_channels),
            )
        if channels is None:
            return layer.to_plain(size)
        map_size = layer._map_size(size)
        plain = layer._plain(layer._sound(map_size).weights, map_size, channels)
        downscale = getattr(layer, "_downscale", 1)
        return plain if downscale == 1 else nn.Sequential(nn.PixelUnshuffle(downscale), plain)

    def _helper(self, module: nn.Module) -> nn.Module:
        seen = {shape[1] for shape in self.shapes.get(id(module), ())}
        channels = seen.pop() if len(seen) == 1 else None
        if isinstance(module, MaxMin):
            return module.to_plain(self.merged.channels.get(id(module), channels))
        if isinstance(module, ZeroChannelPad):
            return module.to_plain(channels)
        if isinstance(module, _Image):
            return fx.symbolic_trace(_PlainImage(module.size))
        return module.to_plain()  # type: ignore[operator]


class _PlainImage(nn.Module):
    def __init__(self, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        shape = ", ".join(map(str, self.size))
        for dim, size in enumerate(self.size, start=-3):
            torch._assert(x.size(dim) == size, f"input: expected (n, {shape})")
        return x
