"""fuse: outputs, gradients and buffers of the seven methods are those of the model as it was."""

import copy
from collections.abc import Callable

import pytest
import torch
from fused_networks import F64, network, step
from torch import Tensor, nn

import lipfast
from lipfast.nn import METHODS, CPLConv2d, LipschitzModule, LOTConv2d, SOCConv2d
from lipfast.weights import fuse, plan


def assert_same_steps(model: nn.Module, x: Tensor, *, tolerance: float, steps: int = 3) -> None:
    """Train the model and a fused copy side by side."""
    fused = fuse(copy.deepcopy(model))
    for number in range(steps):
        ours, expected = step(fused, x), step(model, x)
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            other = ours[name]
            if value is None or other is None:
                assert value is other, f"step {number}, {name}"
                continue
            scale = max(1.0, float(value.double().abs().max()))
            error = float((value.double() - other.double()).abs().max())
            assert error <= tolerance * scale, f"step {number}, {name}: off by {error}"
    assert all(layer.prebuilt is None for layer in plan.lipschitz_layers(fused).values())


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """Sizes of the batches that are built."""
    sizes: list[int] = []
    build = plan.build

    def record(layers, map_sizes):
        sizes.append(len(layers))
        return build(layers, map_sizes)

    monkeypatch.setattr(plan, "build", record)
    return sizes


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("method", METHODS)
def test_same_steps(method, dtype, tolerance, batches):
    assert_same_steps(
        network(method, dtype), torch.randn(2, 4, 3, 5, dtype=dtype), tolerance=tolerance
    )
    assert batches[-4:] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lot", {"ridge": 1e-4}),
        ("cpl", {"norm": "sound"}),
        ("soc", {"norm": "unfolding", "series": "taylor"}),
        ("aol", {"bias": False, "padding_mode": "circular"}),
        ("sll", {"bias": False}),
        ("bcop", {"padding_mode": "zeros"}),
    ],
)
def test_same_steps_with_options(method, options, batches):
    assert_same_steps(
        network(method, **options), torch.randn(2, 4, 3, 5, dtype=F64), tolerance=1e-12
    )
    assert batches[-4:] == [2, 2, 2, 2]


@pytest.mark.parametrize("method", METHODS)
def test_same_steps_of_the_published_forms(method):
    with lipfast.backend("reference"):
        assert_same_steps(
            network(method), torch.randn(2, 4, 3, 5, dtype=F64), tolerance=1e-11, steps=2
        )


@pytest.mark.parametrize("method", METHODS)
def test_same_steps_under_autocast(method):
    model, x = network(method, torch.float32), torch.randn(2, 4, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_steps(model, x, tolerance=1e-2, steps=2)


@pytest.mark.parametrize("method", ["aol", "cpl", "lot"])
def test_half_precision_weights(method, batches):
    model = network(method, torch.bfloat16)
    assert_same_steps(model, torch.randn(2, 4, 3, 5, dtype=torch.bfloat16), tolerance=0.05)
    assert 2 in batches


def grouped(*layers: LipschitzModule, size: tuple[int, int] = (4, 4)) -> list[int]:
    return [len(members) for members, _ in plan.groups(layers, [size] * len(layers))]


def test_layers_that_differ_are_not_built_together():
    lot = LOTConv2d(4, 4, 3)
    assert grouped(lot, LOTConv2d(4, 4, 3)) == [2]
    others: list[Callable[[], LipschitzModule]] = [
        lambda: LOTConv2d(4, 4, 5),
        lambda: LOTConv2d(4, 4, 3, dtype=F64),
        lambda: LOTConv2d(4, 4, 3, device="meta"),
        lambda: LOTConv2d(4, 4, 3, bias=False),
        lambda: LOTConv2d(4, 4, 3, ridge=1e-4),
        lambda: LOTConv2d(4, 4, 3, padding_mode="circular"),
        lambda: LOTConv2d(4, 4, 3).requires_grad_(False),
        lambda: METHODS["cayley"].conv(4, 4, 3),
    ]
    for other in others:
        assert grouped(lot, other()) == [1, 1]
    assert [len(m) for m, _ in plan.groups([lot, LOTConv2d(4, 4, 3)], [(4, 4), (4, 5)])] == [1, 1]
    assert grouped(CPLConv2d(4, 4, 3), CPLConv2d(4, 4, 3, norm="sound")) == [1, 1]
    assert grouped(SOCConv2d(4, 4, 3), SOCConv2d(4, 4, 3, norm="unfolding")) == [1, 1]
    # BCOP's weights do not show which side is wider
    bcop = METHODS["bcop"].conv
    assert grouped(bcop(4, 6, 3), bcop(6, 4, 3)) == [1, 1]


def test_a_subclass_is_built_with_its_own_kind_only():
    class Other(METHODS["bcop"].conv):
        def _compose(self, matrices, backend):
            return -super()._compose(matrices, backend)

    assert grouped(METHODS["bcop"].conv(4, 4, 3), Other(4, 4, 3)) == [1, 1]
    assert grouped(Other(4, 4, 3), Other(4, 4, 3)) == [2]


def test_layers_with_a_construction_of_their_own_are_built_alone():
    class Doubled(METHODS["aol"].conv):
        def _training_weights(self, map_size):
            return tuple(2 * w for w in super()._training_weights(map_size))

    assert grouped(Doubled(4, 4, 3), Doubled(4, 4, 3)) == [1, 1]
    parametrised = [METHODS["aol"].conv(4, 4, 3) for _ in range(2)]
    for layer in parametrised:
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert grouped(*parametrised) == [1, 1]


@pytest.mark.parametrize("method", METHODS)
def test_mixed_dtypes_frozen_and_evaluated_layers(method, batches):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = network(method, F64), network(method, torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.narrow(x.float())

    torch.manual_seed(1)
    model = Mixed()
    model.narrow[0].requires_grad_(False)
    model.wide[1].eval()
    assert_same_steps(model, torch.randn(2, 4, 3, 5, dtype=F64), tolerance=1e-4)
    assert batches[-6:] == [2] * 6  # less one pair in each half


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_equals_layers_one_by_one(method):
    layers = [layer for layer in network(method) if isinstance(layer, LipschitzModule)][:4:2]
    copies = copy.deepcopy(layers)
    size = (3, 5)
    for one, other in zip(plan.build(layers, [size] * 2), copies, strict=True):
        expected = other.training_weights(size)
        assert [w.shape for w in one] == [w.shape for w in expected]
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
