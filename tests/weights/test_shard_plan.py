"""What one process can tell of sharding: shares, layouts, and calls that need no other process."""

import copy

import pytest
import torch
from torch import nn

import lipfast
from lipfast.models import ConvNet
from lipfast.nn import AOLLinear, LOTConv2d
from lipfast.nn.base import LipschitzModule
from lipfast.weights import unshard
from lipfast.weights.shard_plan import (
    Bucket,
    Entry,
    Layout,
    Plan,
    assign,
    construction_cost,
    split,
)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shares_are_balanced(ranks):
    costs = [7, 1, 5, 5, 3, 2, 2, 9, 4]
    owners = assign(costs, ranks)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
    # Graham's bound for the largest first: 4/3 of the best possible
    assert max(loads) <= 4 / 3 * max(max(costs), sum(costs) / ranks)
    assert owners == assign(costs, ranks)


def test_more_ranks_than_layers():
    assert assign([5, 3], 4) == [0, 1]
    assert assign([], 3) == []


@pytest.mark.parametrize("costs", [[1], [1, 1, 1, 1], [0, 0, 0], [1, 1, 98], [98, 1, 1]])
def test_split_keeps_order_and_leaves_nothing_out(costs):
    for parts in (1, 2, 4):
        ranges = split(costs, parts)
        assert len(ranges) <= parts
        assert [i for numbers in ranges for i in numbers] == list(range(len(costs)))
        assert all(len(numbers) > 0 for numbers in ranges)
    assert split([1, 1, 1, 1], 2) == [range(2), range(2, 4)]


def test_a_segment_has_room_for_every_tensor():
    tensors = [torch.zeros(3, dtype=torch.float64), torch.zeros(5), torch.zeros(())]
    layout = Layout.of(tensors[:2], tensors[2:])
    entries = tuple(Entry(i, (1, 1)) for i in range(3))
    offsets, n_bytes = Bucket(entries, (0, 1, 0), (layout,) * 3).offsets(2)
    for owner in (0, 1):
        places = sorted(
            place
            for o, places in zip((0, 1, 0), offsets, strict=True)
            if o == owner
            for place in places
        )
        sizes = [24, 20, 4] * (len(places) // 3)
        ends = [place + size for place, size in zip(places, sizes, strict=True)]
        assert places[0] > 0  # behind the flag
        assert all(place % 64 == 0 for place in places)
        assert all(end <= place for end, place in zip(ends, [*places[1:], n_bytes], strict=True))


@pytest.mark.parametrize("method", ["lot", "bcop", "aol", "sll", "soc", "cpl", "cayley"])
def test_shares_of_a_network_are_even(method):
    model = ConvNet(method, "XS")
    model.train()(torch.zeros(1, 3, 32, 32))
    layers = [m for m in model.modules() if isinstance(m, LipschitzModule)]
    sizes = [layer._last_map_size for layer in layers]
    costs = [construction_cost(layer, s) for layer, s in zip(layers, sizes, strict=True)]
    entries = [Entry(i, s) for i, s in enumerate(sizes)]
    owners = Plan(entries, layers, 2).owners
    assert all(cost > 0 for cost in costs)
    share = sum(c for c, o in zip(costs, owners, strict=True) if o == 0) / sum(costs)
    assert abs(share - 0.5) < 0.05


def test_one_process_needs_no_group():
    model = ConvNet("aol", None, width=4, layers_per_block=1, input_size=(3, 8, 8), n_classes=3)
    keys = list(model.state_dict())
    assert lipfast.shard(model) is model
    assert not model._forward_pre_hooks
    assert unshard(model) is model
    assert list(copy.deepcopy(model).state_dict()) == keys


def test_bad_input():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        lipfast.shard(3)
    with pytest.raises(ValueError, match="model with lipfast layers, got Linear without any"):
        lipfast.shard(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="on one device, got cpu, meta"):
        lipfast.shard(nn.Sequential(AOLLinear(2, 2), AOLLinear(2, 2, device="meta")))
    with pytest.raises(ValueError, match="on one device, got meta"):
        lipfast.shard(LOTConv2d(2, 2, 3, device="meta"))
