"""One process of the tests of fully_shard: trains each method and reports figures."""

from functools import partial

import processes
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lipfast.models import ConvNet
from lipfast.nn import METHODS
from lipfast.nn.base import LipschitzModule
from lipfast.nn.sources import Source
from lipfast.weights import shard

WHOLE = StateDictOptions(full_state_dict=True)


def network(method):
    torch.manual_seed(0)
    options = {"width": 4, "layers_per_block": 1, "input_size": (3, 8, 8), "n_classes": 3}
    return ConvNet(method, None, dtype=torch.float64, **options)


def fully_sharded(model, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in layers_of(model):
        if isinstance(getattr(layer, "alpha", None), nn.Parameter):
            layer.alpha = nn.Parameter(layer.alpha.detach()[None])  # FSDP shards no scalars
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, LipschitzModule)]


def fit(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(5 * model(x * (1 + 0.1 * step)), y).backward()
        optimizer.step()


def largest(pairs):
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def error_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def every_method(rank, ranks):
    found = {}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.arange(8) % 3
    part = slice(8 * rank // ranks, 8 * (rank + 1) // ranks)
    for method in METHODS:
        one, other = network(method), fully_sharded(network(method), ranks)
        fit(one, x, y)
        fit(other, x[part], y[part])
        whole = get_model_state_dict(other, options=WHOLE)
        own = {name: tensor.clone() for name, tensor in one.state_dict().items()}
        one.eval(), other.eval()
        result = {
            "names": list(whole) == list(own),
            "state": largest((whole[name].reshape(t.shape), t) for name, t in own.items()),
            "outputs": largest([(one(x), other(x)), (one(x), other(x))]),
            "counted": [],
            "bound": error_of(layers_of(other)[0].lipschitz_bound),
            "shard": error_of(partial(shard, other)),
        }
        layer = layers_of(other)[1]
        layer.unshard()
        result["bound of the whole"] = abs(
            layer.lipschitz_bound() - layers_of(one)[1].lipschitz_bound()
        )
        layer.reshard()
        for model in (one, other):  # in evaluation mode: the cached weights must notice
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            before = [Source.of(p).state[0] for p in one.parameters()]
            optimizer.step()
            changed = before != [Source.of(p).state[0] for p in one.parameters()]
            result["counted"].append(changed)
        result["after a step"] = largest([(one(x), other(x))])
        set_model_state_dict(other, whole, options=WHOLE)
        one.load_state_dict(own)
        result["after loading"] = largest([(one(x), other(x))])
        found[method] = result
    return found


if __name__ == "__main__":
    processes.main({"every method": every_method})
