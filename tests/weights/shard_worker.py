"""One process of the tests of lipfast.shard: runs the cases by name and reports figures."""

import copy
import pickle
import weakref

import processes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from lipfast.models import ConvNet
from lipfast.nn import (
    METHODS,
    AOLLinear,
    BCOPConv2d,
    CPLConv2d,
    LOTConv2d,
    LOTLinear,
    MaxMin,
    SOCConv2d,
)
from lipfast.nn.base import LipschitzModule
from lipfast.weights import fuse, shard, unshard
from lipfast.weights.shard_step import Step


def network(method, **options):
    torch.manual_seed(0)
    options = {"width": 4, "layers_per_block": 1, "input_size": (3, 8, 8), "n_classes": 3} | options
    return ConvNet(method, None, dtype=torch.float64, **options)


def data(n=8, size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % 3


def part(tensors, rank, ranks):
    n = len(tensors[0])
    return [t[n * rank // ranks : n * (rank + 1) // ranks] for t in tensors]


def fit(model, parameters, x, y, steps=4):
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(5 * model(x * (1 + 0.1 * step)), y).backward()
        optimizer.step()


def difference(one, other):
    """Largest difference of parameters and buffers, relative to the largest entry or 1."""
    pairs = zip(
        [*one.parameters(), *one.buffers()], [*other.parameters(), *other.buffers()], strict=True
    )
    return max(
        float((a - b).detach().abs().max() / a.detach().abs().max().clamp_min(1)) for a, b in pairs
    )


def gradients(model, x, y, ranks=1):
    """Of the mean loss over the ranks, as a list; they are averaged here."""
    model.zero_grad()
    F.cross_entropy(5 * model(x), y).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    if ranks > 1:
        for gradient in found:
            dist.all_reduce(gradient)
            gradient /= ranks
    return found


def gradient_difference(make, rank, ranks, change=lambda model: None, steps=2):
    """Between one process on the whole batch and sharded ones on parts, in the last step."""
    one, other = make(), make()
    change(one)
    change(other)
    shard(other)
    x, y = data()
    for _ in range(steps):
        expected = gradients(one, x, y)
        found = gradients(other, *part((x, y), rank, ranks), ranks)
    pairs = zip(expected, found, strict=True)
    largest = max(float(g.abs().max()) for g in expected)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def error_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, LipschitzModule)]


# Cases -------------------------------------------------------------------------------------------


def same_as_one_process(rank, ranks, methods=tuple(METHODS)):
    found = {}
    x, y = data()
    for method in methods:
        one, other = network(method), network(method)
        fit(one, one.parameters(), x, y)
        net = DistributedDataParallel(shard(other), gradient_as_bucket_view=True)
        fit(net, other.parameters(), *part((x, y), rank, ranks))
        apart = difference(one, other)
        one.eval(), other.eval()
        found[method] = [apart, float((one(x) - other(x)).abs().max())]
    return found


def shares(rank, ranks):
    """FLOPs and constructions of a LOT step in one process, and in this one of several."""
    model = network("lot", width=8, layers_per_block=3)
    x, y = data(1)
    built = []

    def counted(construct):
        def function(map_size):
            built.append(construct)
            return construct(map_size)

        return function

    for layer in layers_of(model):
        layer._training_weights = counted(layer._training_weights)

    def count():
        built.clear()
        with FlopCounterMode(display=False) as counter:
            gradients(model, x, y)
        return counter.get_total_flops(), len(built)

    gradients(model, x, y)
    whole, n_layers = count()
    with FlopCounterMode(display=False) as counter:
        for layer in layers_of(model):
            weights = layer.training_weights(layer._last_map_size)
            torch.autograd.grad([w.sum() for w in weights], [layer.weight])
    construction = counter.get_total_flops()
    shard(model)
    for _ in range(2):
        gradients(model, x, y)
    own, n_own = count()
    return {
        "layers": n_layers,
        "own layers": n_own,
        "construction": construction / whole,
        "own share": (own - whole + construction) / construction,
    }


def special_models(rank, ranks):
    def shared():
        torch.manual_seed(0)
        layer = LOTLinear(192, 192, dtype=torch.float64)
        return nn.Sequential(nn.Flatten(), layer, MaxMin(), layer)

    class ToFloat64(nn.Module):
        def forward(self, x):
            return x.double()

    def mixed():
        torch.manual_seed(0)
        first = AOLLinear(192, 8)
        return nn.Sequential(
            nn.Flatten(), _Cast(), first, ToFloat64(), LOTLinear(8, 8, dtype=torch.float64)
        )

    def convolutions():
        torch.manual_seed(0)
        kinds = (LOTConv2d, SOCConv2d, CPLConv2d, BCOPConv2d)
        layers = [kind(3, 3, 3, dtype=torch.float64) for kind in kinds]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 3, dtype=torch.float64))

    def freeze(model):
        layers_of(model)[1].requires_grad_(False)
        layers_of(model)[0].weight.requires_grad_(False)

    def evaluate(model):
        layers_of(model)[1].eval()

    def lot():
        return network("lot")

    one, other = lot(), fuse(shard(lot()))
    x, y = data()
    for _ in range(2):
        expected = gradients(one, x, y)
        found = gradients(other, *part((x, y), rank, ranks), ranks)
    fused_later = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    return {
        "shared layer": gradient_difference(shared, rank, ranks),
        "two dtypes": gradient_difference(mixed, rank, ranks),
        "methods mixed": gradient_difference(convolutions, rank, ranks),
        "frozen": gradient_difference(lot, rank, ranks, freeze),
        "a layer in eval mode": gradient_difference(lot, rank, ranks, evaluate),
        "fused": gradient_difference(lot, rank, ranks, fuse),
        "first step": gradient_difference(lot, rank, ranks, steps=1),
        "fused later": fused_later,
    }


class _Cast(nn.Module):
    def forward(self, x):
        return x.float()


def more_ranks(rank, ranks):
    """Ranks without a layer, and a number of layers that the ranks do not divide."""

    def two_layers():
        torch.manual_seed(0)
        layers = LOTLinear(192, 16), MaxMin(), LOTLinear(16, 4)
        return nn.Sequential(nn.Flatten(), *layers).double()

    x, y = data()
    one, other = network("lot"), network("lot")
    fit(one, one.parameters(), x, y)
    net = DistributedDataParallel(shard(other))
    fit(net, other.parameters(), *part((x, y), rank, ranks))
    return {
        "layers": len(layers_of(one)),
        "apart": difference(one, other),
        "fewer layers than ranks": gradient_difference(two_layers, rank, ranks),
        "a group of some": some_of(rank),
    }


def some_of(rank):
    """Ranks 1 and 3 share among themselves."""
    group = dist.new_group([1, 3])
    outside = error_of(lambda: shard(network("aol"), group)) if rank in (0, 2) else None
    if rank in (0, 2):
        return outside
    one, other = network("soc"), shard(network("soc"), group)
    x, y = data()
    for _ in range(2):
        expected = gradients(one, x, y)
        found = gradients(other, x, y)
    # both have the same batch: the sum over the two is twice the gradient of one
    layer = layers_of(one)[-1].weight
    number = next(i for i, p in enumerate(one.parameters()) if p is layer)
    total = found[number].clone()
    dist.all_reduce(total, group=group)
    return float((total / 2 - expected[number]).abs().max())


def map_sizes(rank, ranks):
    """Two sizes of maps by turns."""
    torch.manual_seed(0)

    def make():
        torch.manual_seed(0)
        pool = nn.AdaptiveAvgPool2d(1)
        first, second = LOTConv2d(3, 4, 3), LOTConv2d(4, 3, 3)
        return nn.Sequential(first, MaxMin(), second, pool, nn.Flatten()).double()

    one, other = make(), shard(make())
    worst = 0.0
    for size in (8, 6, 8, 6, 8):
        x, y = data(size=size)
        expected = gradients(one, x, y)
        found = gradients(other, *part((x, y), rank, ranks), ranks)
        worst = max(
            worst, *(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
        )
    return worst


def backward_twice(rank, ranks):
    model = shard(network("aol"))
    x, y = data()
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    doubled = max(
        float((p.grad - 2 * g).abs().max()) for p, g in zip(model.parameters(), once, strict=True)
    )
    again = error_of(lambda: loss.backward())
    weight = layers_of(model)[0].weight
    first = torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)[0]
    second = error_of(lambda: first.square().sum().backward())
    return {"doubled": doubled, "again": again, "second derivative": second}


def gradient_penalty(rank, ranks):
    """The derivative of an input gradient's norm, which is not that of a parameter's gradient."""

    def parameter_gradients(model, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        model.zero_grad()
        slope.square().sum().div(len(x)).backward()
        found = [layer.weight.grad for layer in layers_of(model)]
        for gradient in found:
            dist.all_reduce(gradient)
        return [gradient / dist.get_world_size() for gradient in found]

    one, other = network("aol"), shard(network("aol"))
    x, _ = data()
    expected = parameter_gradients(one, x)
    found = parameter_gradients(other, *part((x,), rank, ranks))
    largest = max(float(a.abs().max()) for a in expected)
    pairs = zip(expected, found, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def accumulation(rank, ranks):
    one, other = network("lot"), network("lot")
    x, y = data()
    for _ in range(2):
        F.cross_entropy(one(x), y).backward()
    net = DistributedDataParallel(shard(other))
    mine = part((x, y), rank, ranks)
    with net.no_sync():
        F.cross_entropy(net(mine[0]), mine[1]).backward()
    F.cross_entropy(net(mine[0]), mine[1]).backward()
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.grad - b.grad).abs().max()) for a, b in pairs)


class _Skips(nn.Module):
    """Two layers, of which a call leaves one out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (AOLLinear(4, 4, dtype=torch.float64) for _ in range(2))

    def forward(self, x, skip):
        for name in "ab":
            x = x if name == skip else getattr(self, name)(x)
        return x


def left_out(rank, ranks):
    """Layers that only some ranks use in a step, and a dtype that changes between two steps."""
    one, other = _Skips(), shard(_Skips())
    x = data()[0].flatten()[:16].view(4, 4)
    apart = []
    for skips in ("  ", " b", " a", "ab", "aa"):
        one.zero_grad()
        other.zero_grad()
        sum(one(x + r, skips[r]).square().sum() for r in range(ranks)).div(ranks).backward()
        other(x + rank, skips[rank]).square().sum().backward()
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            dist.all_reduce(q.grad)
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            apart.append(float((expected - q.grad / ranks).abs().max()))
    for model in (one, other):
        model.b.float()
        model.b.register_forward_pre_hook(lambda _, args: args[0].float())
    apart.append(float((one(x, "") - other(x, "")).detach().abs().max()))
    return max(apart)


def autocast(rank, ranks):
    torch.manual_seed(0)
    one = network("lot").float()
    other = shard(copy.deepcopy(one))
    x = data()[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [(one(x), other(x)) for _ in range(2)][-1]
    outputs[1].sum().backward()
    finite = all(bool(p.grad.isfinite().all()) for p in other.parameters())
    return [float((outputs[0] - outputs[1]).detach().abs().max()), finite]


def alone(rank, ranks):
    """What one process may do without the others, and that nothing of a step stays behind."""
    model = shard(network("cpl"))
    names = list(model.state_dict())
    x, y = data()
    step_alive = []
    begin = Step.begin
    Step.begin = lambda self: (step_alive.append(weakref.ref(self)), begin(self))[1]
    loss = F.cross_entropy(model(x), y)
    loss = F.cross_entropy(model(x), y)  # the first step's graph goes unused
    loss.backward()
    del loss
    Step.begin = begin
    left = [layer.prebuilt for layer in layers_of(model)]
    if rank == 0:
        model.eval()(x)
        model.train()
        with torch.no_grad():
            model(x)
        twin = copy.deepcopy(model)
        gradients(twin, x, y)
        gradients(pickle.loads(pickle.dumps(model)), x, y)
        twin.load_state_dict(model.state_dict())
    hooks = len(model._forward_pre_hooks)
    same = shard(model) is model and len(model._forward_pre_hooks) == hooks
    outer = error_of(lambda: shard(nn.Sequential(model)))
    inner = error_of(lambda: shard(model.block1))
    unshard(model)
    if rank == 0:
        gradients(model, x, y)
    clean = not model._forward_pre_hooks and not layers_of(model)[0]._forward_pre_hooks
    return {
        "names": names == list(network("cpl").state_dict()),
        "steps alive": sum(step() is not None for step in step_alive),
        "left": [None] * len(left) == left,
        "twice": same,
        "outer": outer,
        "inner": inner,
        "clean": clean,
    }


def errors(rank, ranks):
    x, y = data()
    found = {
        "another model": error_of(lambda: shard(network("aol", width=4 + 4 * rank))),
        "another method": error_of(lambda: shard(network("aol" if rank else "lot"))),
        "fewer layers": error_of(lambda: shard(network("aol", layers_per_block=1 + rank))),
    }
    model = nn.Sequential(LOTConv2d(3, 3, 3).double(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    shard(model)
    gradients(model, x, y)
    size = 8 - 2 * rank
    found["input shapes"] = error_of(lambda: model(x[:, :, :size, :size]))
    found["left"] = model[0].prebuilt is None
    gradients(model, x, y)  # goes on
    model = shard(network("lot"))
    gradients(model, x, y)
    gradients(model, x, y)
    weights = [layer.weight for layer in layers_of(model)]
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        weights[1].fill_(torch.nan)
    found["not finite"] = error_of(lambda: model(x))
    with torch.no_grad():
        weights[1].copy_(kept[1])
    fresh = shard(network("aol"))
    with torch.no_grad():
        layers_of(fresh)[1].weight.fill_(torch.nan)
    found["not finite at first"] = error_of(lambda: fresh(x))

    def fail(module, args):
        raise KeyError("in the model")

    handle = model.linear.register_forward_pre_hook(fail)
    found["in the model"] = error_of(lambda: model(x))
    handle.remove()
    found["nothing left"] = all(layer.prebuilt is None for layer in layers_of(model))
    gradients(model, x, y)  # goes on
    handle = weights[0].register_hook(lambda gradient: gradient)
    found["parameter hook"] = error_of(lambda: model(x))
    handle.remove()
    return found


CASES = {
    "same as one process": same_as_one_process,
    "shares": shares,
    "special models": special_models,
    "more ranks": more_ranks,
    "map sizes": map_sizes,
    "backward twice": backward_twice,
    "gradient penalty": gradient_penalty,
    "accumulation": accumulation,
    "left out": left_out,
    "autocast": autocast,
    "alone": alone,
    "errors": errors,
}

if __name__ == "__main__":
    processes.main(CASES)
