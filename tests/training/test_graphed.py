"""GraphedStep: what a step asks of the host, what it refuses, and graphs against eager steps."""

import copy
import importlib
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lipfast import backends
from lipfast import nn as lnn
from lipfast.models import ConvNet
from lipfast.nn.base import LipschitzModule
from lipfast.training import margin_cross_entropy
from lipfast.training.graphed import GraphedStep, _check_optimizer

METHODS = list(lnn.METHODS)
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True, foreach=True),
}


def make_network(method: str, device: str = "cpu") -> ConvNet:
    torch.manual_seed(0)
    options = {"input_size": (3, 4, 4), "n_classes": 3, "layers_per_block": 1}
    return ConvNet(method, width=4, **options).to(device)


def draw(count: int = 4, device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 4, 4, generator=generator)
    return x.to(device), (torch.arange(count) % 3).to(device)


class NoHost(TorchDispatchMode):
    """Refuse what a capturing stream refuses: reading values back, and tensors from the host.

    Here the tensors that are given no device go to "meta", so that none of them is overlooked.
    """

    SYNCHRONISES = (
        *("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"),
        *("unique_dim", "_unique2", "repeat_interleave"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.calls += 1
        name = func.overloadpacket.__name__
        masks = args[1] if name == "index" else []
        if name in self.SYNCHRONISES or any(m is not None and m.dtype == torch.bool for m in masks):
            raise AssertionError(f"{func} waits for the device")
        self.refuse_host(func, (args, kwargs))
        body = BODIES.get(name) if func.namespace == "lipfast" else None
        if body is None:
            out = func(*args, **kwargs)
        else:
            module, function = body
            run = getattr(importlib.import_module(f"lipfast.ops.{module}"), function)
            with self, torch.no_grad():  # what the operator runs, in sight of this mode
                out = run(*args, **kwargs)
        self.refuse_host(func, out)
        return out

    def refuse_host(self, func, values) -> None:
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
        if func is torch.ops.aten.lift_fresh.default or any(t.is_meta for t in tensors):
            raise AssertionError(f"{func} meets a tensor of the host")


@contextmanager
def no_host():
    mode = NoHost()
    with torch.device("meta"), mode:
        yield mode


# what the registered operators of a training step run: (module of lipfast.ops, function)
BODIES = {
    "aol_rescale": ("aol_rescale", "_forward"),
    "aol_rescale_backward": ("aol_rescale", "_backward"),
    "block_conv": ("block_conv", "_forward"),
    "cayley": ("cayley", "_forward"),
    "cayley_backward": ("cayley", "_backward"),
    "conv_norm": ("conv_norm", "_forward"),
    "conv_norm_backward": ("conv_norm", "_backward"),
    "fourier_conv": ("fourier_conv", "_forward"),
    "fourier_conv_backward": ("fourier_conv", "_backward"),
    "gram_bound": ("gram_bound", "_forward"),
    "gram_bound_backward": ("gram_bound", "_backward"),
    "kernel_spectrum": ("fourier_conv_spectrum", "_forward"),
    "kernel_spectrum_adjoint": ("fourier_conv_spectrum", "_adjoint"),
    "polar": ("polar_op", "_forward"),
    "polar_backward": ("polar_op", "_backward"),
    "residual_conv": ("residual_conv", "_forward"),
    "schatten_norm": ("conv_norm_schatten", "_forward"),
    "schatten_norm_backward": ("conv_norm_schatten", "_backward"),
    "skew_exp": ("skew_exp_derivative", "_forward"),
    "skew_exp_backward": ("skew_exp_derivative", "_backward_op"),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The code that a GPU would run, as far as a CPU can: no look at values, backend "torch"."""
    choose = backends.choose

    def torch_where_there_is(op: str, *args, backend: str | None = None) -> str:
        has_torch = backends.why_not(op, "torch", *args) is None
        return choose(op, *args, backend="torch" if backend is None and has_torch else backend)

    monkeypatch.setattr(backends, "choose", torch_where_there_is)
    monkeypatch.setattr(LipschitzModule, "_check_finite", lambda *_, **__: None)
    adam = sys.modules[torch.optim.Adam.__module__]
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])


class Recorded(GraphedStep):
    """Replays by running the step on the static batch: what a graph does, in Python."""

    def _check(self, *_) -> None:
        pass

    def _record(self, warmup: int) -> None:
        for _ in range(warmup):
            self.eager_step(*self._batch)
        self._forget_gradients()
        self._graph = self
        self._loss = torch.zeros(())

    def replay(self) -> None:
        self._loss.copy_(self.eager_step(*self._batch))


CASES = [(method, amp, "SGD") for method in METHODS for amp in (None, torch.bfloat16)]
CASES += [("aol", None, "AdamW")]  # the foreach form asks the host on a CPU only


@pytest.mark.parametrize(("method", "amp_dtype", "name"), CASES)
def test_a_step_asks_nothing_of_the_host(method, amp_dtype, name, as_on_a_gpu):
    network = make_network(method)
    optimizer = OPTIMIZERS[name](network.parameters())
    step = Recorded(network, optimizer, margin_cross_entropy, draw(), amp_dtype=amp_dtype)
    before = [p.detach().clone() for p in network.parameters()]
    batch = draw(seed=2)
    with no_host() as seen:
        loss = step(*batch)
    assert loss.isfinite()
    assert any(not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
    assert seen.calls > 100


@pytest.mark.parametrize(
    ("method", "options"), [("soc", {"save": "input"}), ("cpl", {"norm": "sound"})]
)
def test_other_forms_ask_nothing_of_the_host(method, options, as_on_a_gpu):
    torch.manual_seed(0)
    layer = lnn.METHODS[method].conv(4, 4, 3, **options)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    with no_host():
        layer(x).square().sum().backward()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isnan().any()),
        lambda x: x[x > 0],
        lambda x: x + torch.arange(3),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x * torch.tensor(2.0, device=x.device),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_check_sees_reads_and_copies(read):
    x = torch.ones(3)
    with no_host(), pytest.raises(AssertionError, match=r"waits for the device|of the host"):
        read(x)


@pytest.mark.parametrize(
    ("method", "name"), [("aol", "AdamW"), ("aol", "foreach AdamW"), ("cpl", "SGD"), ("soc", "SGD")]
)
def test_recorded_steps_are_the_eager_ones_from_the_first_on(method, name, as_on_a_gpu):
    """Warming up leaves no trace; batches, learning rates and buffers are those of the step."""
    network, other = make_network(method), make_network(method)
    step = Recorded(network, OPTIMIZERS[name](network.parameters()), margin_cross_entropy, draw())
    optimizer = OPTIMIZERS[name](other.parameters())
    eager = GraphedStep(other, optimizer, margin_cross_entropy, draw(), eager=True)
    for number in range(4):
        for group, own in zip(step.optimizer.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = own["lr"] = 0.02 / (1 + number)
        batch = draw(seed=number)
        torch.testing.assert_close(step(*batch), eager(*batch), rtol=1e-5, atol=1e-6)
        assert all(isinstance(g["lr"], Tensor) for g in step.optimizer.param_groups)
    torch.testing.assert_close(network.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)


def test_warming_up_puts_everything_back(as_on_a_gpu):
    network = make_network("cpl")
    optimizer = OPTIMIZERS["SGD"](network.parameters())
    eager = GraphedStep(network, optimizer, margin_cross_entropy, draw(), eager=True)
    eager(*draw(seed=3))
    state = copy.deepcopy(network.state_dict())
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in network.parameters()]
    Recorded(network, optimizer, margin_cross_entropy, draw())
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    for parameter, momentum in zip(network.parameters(), momenta, strict=True):
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum)


def test_what_the_loss_learns_is_put_back_too(as_on_a_gpu):
    network, temperature = make_network("aol"), torch.nn.Parameter(torch.ones(()))
    optimizer = OPTIMIZERS["SGD"]([*network.parameters(), temperature])
    Recorded(network, optimizer, lambda s, y: temperature * margin_cross_entropy(s, y), draw())
    assert temperature == 1


def test_a_capture_that_fails_puts_everything_back(as_on_a_gpu):
    network = make_network("cpl")
    optimizer = OPTIMIZERS["SGD"](network.parameters())
    state, calls = copy.deepcopy(network.state_dict()), []

    def loss(scores, targets):
        calls.append(scores)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return margin_cross_entropy(scores, targets)

    with pytest.raises(RuntimeError, match="out of memory"):
        Recorded(network, optimizer, loss, draw())
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert isinstance(optimizer.param_groups[0]["lr"], float)
    assert all(p.grad is None for p in network.parameters())
    eager = GraphedStep(network, optimizer, margin_cross_entropy, draw(), eager=True)
    other = make_network("cpl")
    momentum_of_none = OPTIMIZERS["SGD"](other.parameters())
    first = GraphedStep(other, momentum_of_none, margin_cross_entropy, draw(), eager=True)
    torch.testing.assert_close(eager(*draw()), first(*draw()))
    torch.testing.assert_close(network.state_dict(), other.state_dict())


def test_gradients_outside_the_optimizer_start_from_nothing(as_on_a_gpu):
    """The graph would write where the user may have freed them."""
    network = make_network("aol")
    left_out, *others = network.parameters()
    left_out.grad = before = torch.ones_like(left_out)
    Recorded(network, OPTIMIZERS["SGD"](others), margin_cross_entropy, draw())
    assert left_out.grad is not before


def test_losses_of_several_steps_can_be_kept(as_on_a_gpu):
    network = make_network("aol")
    step = Recorded(network, OPTIMIZERS["SGD"](network.parameters()), margin_cross_entropy, draw())
    losses = [step(*draw(seed=number)) for number in range(3)]
    assert len({float(loss) for loss in losses}) == 3


def test_batches_that_require_gradients_are_values(as_on_a_gpu):
    network = make_network("aol")
    x, y = draw()
    x.requires_grad_()
    step = Recorded(
        network, OPTIMIZERS["SGD"](network.parameters()), margin_cross_entropy, (x * 1, y)
    )
    for _ in range(2):
        assert step(x * 2, y).isfinite()
    assert x.grad is None


def test_an_autocast_around_the_step_hands_it_no_old_weights():
    """Linear layers of torch are cast in each step, as a graph must cast them in each replay."""
    torch.manual_seed(0)
    losses = []
    for around in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Linear(6, 3)
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        step = GraphedStep(
            network,
            optimizer,
            margin_cross_entropy,
            (torch.ones(4, 6), torch.arange(4) % 3),
            amp_dtype=torch.bfloat16,
            eager=True,
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            losses.append([float(step(torch.ones(4, 6), torch.arange(4) % 3)) for _ in range(3)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_weights_cached_in_evaluation_follow_replays(as_on_a_gpu):
    network = make_network("aol")
    step = Recorded(network, OPTIMIZERS["SGD"](network.parameters()), margin_cross_entropy, draw())
    layer = next(m for m in network.modules() if isinstance(m, lnn.AOLConv2d))
    x = torch.randn(1, 4, 4, 4)
    layer.eval()(x)
    layer.training = True  # train() and eval() would drop the cache anyway
    versions = [p._version for p in network.parameters()]
    step(*draw())
    assert all(p._version > v for p, v in zip(network.parameters(), versions, strict=True))
    layer.training = False
    assert torch.equal(layer(x), copy.deepcopy(layer).eval()(x))


def test_batches_that_do_not_fit_are_named(as_on_a_gpu):
    network = make_network("aol")
    step = Recorded(network, OPTIMIZERS["SGD"](network.parameters()), margin_cross_entropy, draw())
    with pytest.raises(ValueError, match=r"x: expected shape \(4, 3, 4, 4\).*got \(3, 3, 4, 4\)"):
        step(*draw(3))
    assert step.eager_step(*draw(3)).isfinite()
    with pytest.raises(ValueError, match=r"y: expected .* torch.int64.* torch.int32"):
        step(draw()[0], draw()[1].int())
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="make a new GraphedStep"):
        step(*draw())
    network.eval()
    for run in (step, step.eager_step):
        with pytest.raises(ValueError, match="in training mode"):
            run(*draw())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one GPU, got them on cpu; eager=True"),
        ({"warmup": 0}, "warmup: expected an integer >= 1, got 0"),
        ({"amp_dtype": torch.float16}, "amp_dtype: expected torch.bfloat16"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, message):
    network = make_network("aol")
    optimizer = OPTIMIZERS["SGD"](network.parameters())
    with pytest.raises(ValueError, match=message):
        GraphedStep(network, optimizer, margin_cross_entropy, draw(), **options)


def test_models_of_several_processes_are_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        network = torch.nn.parallel.DistributedDataParallel(make_network("aol"))
        optimizer = OPTIMIZERS["SGD"](network.parameters())
        with pytest.raises(ValueError, match="no DistributedDataParallel and no"):
            GraphedStep(network, optimizer, margin_cross_entropy, draw())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), ValueError, "SGD with fused=True"),
        (lambda p: torch.optim.AdamW(p, 0.1), ValueError, "AdamW with capturable=True"),
        (
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5, fused=True),
            ValueError,
            "without dampening",
        ),
        (lambda p: torch.optim.RMSprop(p, 0.1), TypeError, "got RMSprop"),
    ],
)
def test_optimizers_that_a_graph_cannot_hold_are_named(make, error, message):
    with pytest.raises(error, match=message):
        _check_optimizer(make(make_network("aol").parameters()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_graphs_take_the_eager_steps(method, amp_dtype, name):
    network, other = make_network(method, "cuda"), make_network(method, "cuda")
    step = GraphedStep(
        network,
        OPTIMIZERS[name](network.parameters()),
        margin_cross_entropy,
        draw(device="cuda"),
        amp_dtype=amp_dtype,
    )
    optimizer = OPTIMIZERS[name](other.parameters())
    eager = GraphedStep(
        other,
        optimizer,
        margin_cross_entropy,
        draw(device="cuda"),
        amp_dtype=amp_dtype,
        eager=True,
    )
    tolerance = 2e-2 if amp_dtype else 1e-3
    for number in range(5):
        for group, own in zip(step.optimizer.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = own["lr"] = 0.02 / (1 + number)
        batch = draw(seed=number, device="cuda")
        torch.testing.assert_close(step(*batch), eager(*batch), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        network.state_dict(), other.state_dict(), rtol=tolerance, atol=tolerance
    )
    x, _ = draw(device="cuda")
    torch.testing.assert_close(network.eval()(x), other.eval()(x), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_graphs_survive_an_evaluation_and_a_last_batch_in_between():
    network = make_network("soc", "cuda")
    optimizer = OPTIMIZERS["SGD"](network.parameters())
    step = GraphedStep(network, optimizer, margin_cross_entropy, draw(device="cuda"))
    other = copy.deepcopy(network)
    eager = GraphedStep(
        other,
        OPTIMIZERS["SGD"](other.parameters()),
        margin_cross_entropy,
        draw(device="cuda"),
        eager=True,
    )
    for graphed, plain in (
        (step, eager.eager_step),
        (step.eager_step, eager.eager_step),
        (step, eager),
    ):
        count = 3 if graphed == step.eager_step else 4
        batch = draw(count, device="cuda")
        torch.testing.assert_close(graphed(*batch), plain(*batch), rtol=1e-3, atol=1e-3)
        network.eval()
        network(batch[0])
        network.train()
    torch.testing.assert_close(network.state_dict(), other.state_dict(), rtol=1e-3, atol=1e-3)
