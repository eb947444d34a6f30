"""Make a network of plain layers a network of 1-Lipschitz layers, in place."""

import logging
import warnings
from typing import Any, Literal, TypeVar, overload

from torch import Tensor, nn

from .convert_plan import perform, planned
from .convert_report import ConvertReport, breaking_text, report_of, steps_of

_Network = TypeVar("_Network", bound=nn.Module)
_LOG = logging.getLogger("lipfast")


@overload
def convert(
    model: _Network,
    method: str = "aol",
    *,
    activation: str | None = None,
    example: Tensor | None = None,
    dry_run: Literal[False] = False,
    **layer_options: Any,
) -> _Network: ...


@overload
def convert(
    model: nn.Module,
    method: str = "aol",
    *,
    activation: str | None = None,
    example: Tensor | None = None,
    dry_run: Literal[True],
    **layer_options: Any,
) -> ConvertReport: ...


def convert(
    model: _Network,
    method: str = "aol",
    *,
    activation: str | None = None,
    example: Tensor | None = None,
    dry_run: bool = False,
    **layer_options: Any,
) -> _Network | ConvertReport:
    """Make each `nn.Conv2d` and `nn.Linear` of a network a 1-Lipschitz layer, in place.

    Each layer stays the object that it is, with its name, hooks, training flag, device and dtype,
    and whether its parameters are trained, and becomes an instance of the method's class. Weights
    and biases stay the same `nn.Parameter` objects where the new layer is near the old one: for AOL
    and LOT, and the linear layers of BCOP, unless LOT turns a stride into more channels. The other
    methods start from `reset_parameters()`, with new parameters: build the optimizer afterwards.

    What the method cannot do is left alone with the reason (even kernels, transposed convolutions,
    for all but AOL groups, dilation and paddings that change the map), and so is what cannot be
    converted by itself (attention, recurrent layers). Cayley pads circularly. A stride is taken by
    AOL as it is and by the others as `PixelUnshuffle`, which needs maps of a multiple of it.

    The layers are 1-Lipschitz then; whether the network is depends on the rest. The report says
    layer by layer, and for the operations of the forward pass that `torch.fx` can follow, what
    breaks the bound, by which factor, and what to do: call this with `dry_run`, before or after.
    Logs the report ("lipfast", level INFO), and warns where something breaks the bound.

    Args:
        model: any network.
        method: key of `lipfast.nn.METHODS`: aol, bcop, cayley, cpl, lot, sll, soc.
        activation: "maxmin" to make elementwise activations `lipfast.nn.MaxMin`; None leaves them.
        example: an input (n, ...), with which the report has a proved bound of a network with any
            traceable forward pass; see `lipfast.certify.lipschitz_bound`.
        dry_run: change nothing, and return the report.
        layer_options: keywords for each new layer, as its class documents them.

    Returns:
        The model, or with `dry_run` a `ConvertReport` whose text is a table.

    Raises:
        TypeError: `model` is not a module, or the layers do not take one of the options.
        ValueError: unknown method or activation; a layer that has not been initialised; nothing to
            convert in a network without 1-Lipschitz layers.
    """
    plan = planned(model, method, activation, layer_options)
    steps = steps_of(model, plan)
    if dry_run:
        return report_of(model, steps, example)
    perform(plan)
    report = report_of(model, steps, example, bounded=example is not None)
    _LOG.info("convert:\n%s", report)
    if report.breaking:
        text = breaking_text(report.breaking)
        warnings.warn(f"convert left what breaks the bound: {text}", stacklevel=2)
    return model
