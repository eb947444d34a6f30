"""The shapes that the layers of a network meet in one forward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Shapes = dict[int, list[tuple[int, ...]]]  # by the module's id, one for each call


def example(model: nn.Module, input_size: Sequence[int] | Tensor) -> Tensor:
    """Return an input: the given one, or standard normal numbers (1, *input_size).

    Raises:
        ValueError, TypeError: it is neither sizes nor a tensor with a batch dimension.
    """
    if isinstance(input_size, Tensor):
        if input_size.dim() < 2:
            raise ValueError(
                f"input_size: expected an example input (n, ...), got {tuple(input_size.shape)}"
            )
        return input_size.detach()
    sizes = list(input_size) if isinstance(input_size, Sequence) else [input_size]
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(
            "input_size: expected integers >= 1 without the batch, such as (3, 32, 32), or an "
            f"example input, got {input_size!r}"
        )
    noise = torch.randn(1, *sizes, generator=torch.Generator().manual_seed(0))
    like = next((p for p in model.parameters() if p.is_floating_point()), noise)
    return noise.to(like.device, like.dtype)


def record(model: nn.Module, x: Tensor) -> tuple[Shapes, Any]:
    """Return the shapes of the inputs of all modules in model(x), and its output.

    Raises:
        ValueError: the model does not take x.
    """
    shapes: Shapes = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if values:
            shapes.setdefault(id(module), []).append(tuple(values[0].shape))

    modules = {id(module): module for module in model.modules()}.values()
    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    try:
        y = model(x)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"input_size: the model takes no input of shape {tuple(x.shape)}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return shapes, y
