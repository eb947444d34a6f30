"""Small networks with layers that are built alike, and a training step that tells all."""

import torch
from torch import Tensor, nn

from lipfast.nn import METHODS, MaxMin

F64 = torch.float64


def network(method: str, dtype: torch.dtype = F64, **options) -> nn.Sequential:
    """Pairs of equal layers, wide, tall and square, with 3x3, 1x1 and no taps, on odd maps."""
    torch.manual_seed(0)
    conv, linear = METHODS[method].conv, METHODS[method].linear
    shapes = [(4, 6, 3), (6, 4, 3), (4, 6, 3), (6, 4, 3), (4, 4, 1), (4, 4, 1)]
    layers: list[nn.Module] = [conv(*shape, dtype=dtype, **options) for shape in shapes]
    layers += [MaxMin(), nn.Flatten()]
    layers += [linear(*sizes, dtype=dtype) for sizes in [(60, 7), (7, 7), (7, 7)]]
    return away_from_the_start(nn.Sequential(*layers))


def away_from_the_start(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Output, gradients of input and parameters, buffers after one training step."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.double().square().sum().backward()
    result: dict[str, Tensor | None] = {"output": y.detach(), "input": x.grad}
    result |= {f"{n}.grad": p.grad for n, p in model.named_parameters()}
    result |= {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad
    return result
