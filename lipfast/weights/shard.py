"""Training weights that the processes of a group build together, each one its share."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lipfast.nn.base import LipschitzModule
from lipfast.ops.context import inside_transforms

from .fuse import _inner, is_fused
from .plan import lipschitz_layers
from .shard_group import Control, fingerprint
from .shard_plan import Entry, Plan
from .shard_step import Step

_Model = TypeVar("_Model", bound=nn.Module)


def shard(model: _Model, group: dist.ProcessGroup | None = None) -> _Model:
    """Let every process build the training weights of its share of the layers, and exchange them.

    In training mode each forward pass builds the weights of the process's own layers, gathers those
    of the others, and returns the gradients of all weights to the processes that built them: what
    the weights cost is divided by the number of processes. Outputs are those of the unsharded
    model. Gradients are, once they are averaged over the processes, as DistributedDataParallel does
    (wrap the model before or after); before that the parameters of a layer have theirs in one
    process, and zero in the others. Evaluation, forward passes under `torch.no_grad()`, state
    dicts and copies of the model are as without sharding, and need no other process.

    Layers whose weights depend on the size of the map join from the second forward pass of an input
    shape on. A layer that is called several times in one forward pass gets its weights built once.
    Inside torch.compile and torch.func every process builds its own weights. Of a model that is
    fused (`lipfast.fuse`, before or after) every process builds its share in batches. Without a
    process group, or in a group of one, nothing changes; nor when it is called again.

    Every process of the group calls this with the same model, and takes part in every forward and
    backward pass in training mode with inputs of the same size (the batch size may differ).

    Args:
        model: a network with lipfast layers; changed in place.
        group: the processes that share the work, all of them by default.

    Returns:
        The model.

    Raises:
        TypeError: the model is no module.
        ValueError: it has no lipfast layer, layers on several devices or on meta, or DTensor
            parameters (FSDP); it has been compiled; some of its layers are sharded otherwise; or
            the processes' models differ.
    """
    inner = _inner(model, "shard")
    layers = lipschitz_layers(inner)
    if not layers:
        name = type(inner).__name__
        raise ValueError(f"shard: expected a model with lipfast layers, got {name} without any")
    before = [sharding for layer in layers.values() for sharding in _hooks_of(layer)]
    if any(hook.group is group for hook in _hooks_of(inner)):
        return model
    if before:
        raise ValueError(
            "shard: layers of the model are sharded already, in another group or with another "
            f"module: {', '.join(before[0].names)}; lipfast.weights.unshard undoes it"
        )
    _refuse_dtensors(layers)
    devices = {str(p.device) for layer in layers.values() for p in layer.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise ValueError(
            f"shard: expected all lipfast layers on one device, got {', '.join(sorted(devices))}"
        )
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return model
    if dist.get_rank(group) < 0:
        raise ValueError("shard: expected a group that this process is in")
    sharding = _Sharding(layers, group)
    sharding.check_models()
    sharding.attach(inner)
    return model


def unshard(model: _Model) -> _Model:
    """Undo `shard`, in place, and return the model; one that is not sharded stays as it is."""
    for sharding in _hooks_of(_inner(model, "unshard")):
        sharding.detach()
    return model


class _Sharding:
    """The hooks of one sharded model. Copies and pickles of the model have idle ones."""

    def __init__(self, layers: dict[str, LipschitzModule], group: dist.ProcessGroup | None) -> None:
        self.names, self.layers = list(layers), list(layers.values())
        self.group: dist.ProcessGroup | None = group
        self.control = Control(group)
        self.handles: list[RemovableHandle] = []
        self.step: Step | None = None
        self.signature: tuple[Any, ...] | None = None
        self.map_sizes: dict[tuple[Any, ...], dict[int, tuple[int, int]]] = {}
        self.plans: dict[tuple[Any, ...], Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": [], "handles": [], "step": None, "signature": None}

    def attach(self, model: nn.Module) -> None:
        self.handles = [
            model.register_forward_pre_hook(self.before_model, with_kwargs=True, prepend=True),
            model.register_forward_hook(self.after_model, always_call=True),
            *(layer.register_forward_pre_hook(self.before_layer) for layer in self.layers),
        ]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.layers = [], []

    def check_models(self) -> None:
        """Raise on every rank where the models differ in what the shares depend on."""
        own = [
            (name, type(layer).__name__, layer.extra_repr(), _parameters_text(layer))
            for name, layer in zip(self.names, self.layers, strict=True)
        ]
        every = self.control.tell_object(own)
        for rank, theirs in enumerate(every):
            if theirs == every[0]:
                continue
            if len(theirs) != len(every[0]):
                difference = f"{len(every[0])} and {len(theirs)} lipfast layers"
            else:
                first, other = next(p for p in zip(every[0], theirs, strict=True) if p[0] != p[1])
                difference = f"{' '.join(first)} and {' '.join(other)}"
            raise ValueError(
                "shard: expected the same lipfast layers in every process, rank 0 and rank "
                f"{rank} have {difference}"
            )

    # Hooks ---------------------------------------------------------------------------------------

    def before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.step = self.signature = None
        active = [i for i, layer in enumerate(self.layers) if layer.training]
        if (
            not active
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or inside_transforms()
        ):
            return
        self.signature = tuple(
            tuple(leaf.shape[1:])
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        )
        sizes = self.map_sizes.get(self.signature, {})
        entries = []
        for number in active:
            if not self.layers[number]._depends_on_map_size:
                entries.append(Entry(number, (1, 1)))
            elif number in sizes:
                entries.append(Entry(number, sizes[number]))
        parameters = {id(p): p for e in entries for p in self.layers[e.layer].parameters()}
        wanted = [p for p in parameters.values() if p.requires_grad]
        if any(p._backward_hooks for p in wanted):
            raise ValueError(
                "shard: hooks on the parameters of sharded layers would run twice; expected "
                "register_post_accumulate_grad_hook, got register_hook"
            )
        plan = self._agree(entries, len(active))
        if not entries:
            return
        self.step = Step(self.layers, plan, wanted, self.control, self.group, is_fused(module))
        try:
            self.step.begin()
        except BaseException:
            self.step.abandon()
            raise

    def before_layer(self, layer: nn.Module, args: Any) -> None:
        if self.step is not None and layer.training:
            self.step.finish(layer)

    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        step, self.step = self.step, None
        if self.signature is not None:
            seen = self.map_sizes.setdefault(self.signature, {})
            for number, layer in enumerate(self.layers):
                if layer.training and layer._last_map_size is not None:
                    seen[number] = layer._last_map_size
        if step is not None:
            step.end()

    def _agree(self, entries: list[Entry], n_active: int) -> Plan:
        """Return the plan for the entries, or raise on every rank where ranks have others."""
        layers = self.layers
        _refuse_dtensors({self.names[e.layer]: layers[e.layer] for e in entries})
        parameters = [p for e in entries for p in layers[e.layer].parameters()]
        flags = tuple(p.requires_grad for p in parameters)
        dtypes = tuple(str(p.dtype) for p in parameters)
        fixed = all(not layer._depends_on_map_size for layer in layers)
        shapes = () if fixed else self.signature
        key = (tuple(entries), n_active, flags, dtypes, shapes)
        plan = self.plans.get(key)
        if plan is None:
            plan = Plan(entries, layers, self.control.ranks)
            plan.fingerprint = fingerprint(key)
        told = self.control.tell(plan.fingerprint, int(not plan.buckets))
        if any(mark != told[0][0] for mark, _ in told):
            own = {
                "input shapes without the batch": shapes,
                "layers in training mode": n_active,
                "map sizes": [(self.names[e.layer], tuple(e.map_size)) for e in entries],
                "trained parameters": sum(flags),
                "dtypes": list(dict.fromkeys(dtypes)),
            }
            every = self.control.tell_object(own)
            rank = next(r for r, (mark, _) in enumerate(told) if mark != told[0][0])
            what = next((k for k in own if every[0][k] != every[rank][k]), "map sizes")
            raise ValueError(
                "every process of a sharded model must take the same step, rank 0 and rank "
                f"{rank} differ in {what}: {every[0][what]} and {every[rank][what]}"
            )
        if any(fresh for _, fresh in told):
            plan.buckets = []
        self.plans[key] = plan
        return plan


def _hooks_of(module: nn.Module) -> list[_Sharding]:
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, _Sharding) and owner.layers]


def _refuse_dtensors(layers: dict[str, LipschitzModule]) -> None:
    for name, layer in layers.items():
        for parameter in layer.parameters():
            if type(parameter) not in (nn.Parameter, Tensor) and hasattr(parameter, "full_tensor"):
                raise ValueError(
                    f"shard: {name} has DTensor parameters, as FSDP makes them; lipfast.shard "
                    "needs whole parameters in every process (DistributedDataParallel)"
                )


def _parameters_text(layer: LipschitzModule) -> str:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors)
