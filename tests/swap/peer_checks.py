"""What every layer of another package is put through, before and after `accelerate`."""

import copy

import torch

import lipfast
from lipfast.nn import LipschitzModule

OUTPUT = 3e-5  # relative, of what is promised to 1e-4
GRADIENT = 3e-4  # relative, of what is promised to 1e-3


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm of what is expected, where that is not rounding."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-5))


def perturb(module: torch.nn.Module, amount: float, seed: int = 0) -> torch.nn.Module:
    """Move the learned parameters away from where the package starts them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                size = parameter.abs().mean()
                parameter.add_(amount * size * torch.randn(parameter.shape, generator=generator))
    return module


def check_same(peer: torch.nn.Module, shape: tuple[int, ...], steps: int = 3) -> LipschitzModule:
    """Train the peer and its accelerated copy side by side; return the copy, in evaluation mode."""
    ours = copy.deepcopy(peer)
    names = [name for name, _ in ours.named_parameters()]
    before = list(ours.parameters())
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=1.0) for m in (ours, peer))
    assert lipfast.accelerate(ours) is ours
    assert isinstance(ours, LipschitzModule)
    assert [name for name, _ in ours.named_parameters()] == names
    assert all(now is then for now, then in zip(ours.parameters(), before, strict=True))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for training in (True, False):
            _compare(peer.train(training), ours.train(training), shape, generator)
            if training:
                for model, optimizer in ((peer, theirs), (ours, mine)):
                    _shorten_gradients(model)
                    optimizer.step()
    for now, then in zip(ours.parameters(), peer.parameters(), strict=True):
        if now.requires_grad:
            assert distance(now.detach(), then.detach()) < GRADIENT
    _check_state(peer, ours, shape)
    return ours


def _shorten_gradients(model: torch.nn.Module) -> None:
    """So that a step moves each parameter by 5 percent at most, whatever its scale is."""
    for parameter in model.parameters():
        limit = 0.05 * float(parameter.detach().norm())
        torch.nn.utils.clip_grad_norm_([parameter], limit)


def _compare(
    peer: torch.nn.Module, ours: torch.nn.Module, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    expected, found = peer(xs[0]), ours(xs[1])
    assert found.shape == expected.shape
    assert distance(found.detach(), expected.detach()) < OUTPUT
    weight = torch.randn(expected.shape, generator=generator)
    for model, y in ((peer, expected), (ours, found)):
        model.zero_grad()
        y.backward(weight)
    assert distance(xs[1].grad, xs[0].grad) < OUTPUT
    if ours.training:
        pairs = list(zip(peer.named_parameters(), ours.parameters(), strict=True))
        # some gradients vanish but for rounding
        rounding = 1e-3 * max(float(p.grad.norm()) for (_, p), _ in pairs if p.grad is not None)
        for (name, p), q in pairs:
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                size = max(float(p.grad.norm()), rounding)
                assert float((q.grad - p.grad).norm()) < GRADIENT * size, name


def _check_state(peer: torch.nn.Module, ours: torch.nn.Module, shape: tuple[int, ...]) -> None:
    """State dictionaries go both ways, strictly, and mean the same."""
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    assert list(state) == list(peer.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    fresh = perturb(copy.deepcopy(peer), 0.5, seed=3)
    fresh.load_state_dict(state)
    assert distance(fresh.eval()(x).detach(), ours.eval()(x).detach()) < OUTPUT
    perturb(ours, 0.5, seed=4)
    ours.load_state_dict(peer.state_dict())
    assert distance(ours(x).detach(), peer.eval()(x).detach()) < OUTPUT


def check_bound(ours: LipschitzModule, shape: tuple[int, ...], expected: float = 1.0) -> None:
    """The Jacobian's norm on one example is at most the bound, and the bound is as `expected`."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    bound = ours.lipschitz_bound(tuple(shape[-2:]))
    rows = torch.autograd.functional.jacobian(ours.eval(), x)
    norm = float(torch.linalg.matrix_norm(rows.double().reshape(-1, x.numel()), 2))
    assert norm <= bound * (1 + 1e-5)
    assert abs(bound - expected) <= 1e-6 * expected


def reason(module: torch.nn.Module) -> str:
    """Why `accelerate` leaves the module alone."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    (entry,) = lipfast.accelerate(module, dry_run=True).left_alone
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name
    return entry.outcome
