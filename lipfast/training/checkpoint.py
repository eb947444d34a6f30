"""Checkpoints: one safetensors file with JSON metadata, replaced atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lipfast.data.files import atomic_write
from lipfast.models import ConvNet

_FORMAT = 1
_KEY = "lipfast"


class Checkpoint(NamedTuple):
    """State of a run after a whole number of epochs.

    Attributes:
        model: the model's state_dict.
        momentum: momentum buffer of every trained parameter, by its name.
        metadata: what JSON can hold. `train` writes the keys "version" (of lipfast), "epoch" and
            "step" (both completed), "losses", "seconds", "config" (the `TrainConfig`), "data" (set,
            size and augmentation) and "model" (the arguments of the `ConvNet`, or None).
    """

    model: dict[str, Tensor]
    momentum: dict[str, Tensor]
    metadata: dict[str, Any]


def save_checkpoint(path: Path | str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that `path` is at any moment either the old file or the whole new one.

    Raises:
        TypeError: the state holds something else than tensors, or the metadata is not JSON.
    """
    tensors = {}
    for prefix, state in (("model.", checkpoint.model), ("momentum.", checkpoint.momentum)):
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{prefix}{name} must be a tensor, got {type(tensor).__name__}")
            tensors[prefix + name] = tensor.detach().cpu().clone().contiguous()
    metadata = json.dumps({"format": _FORMAT, **checkpoint.metadata}, allow_nan=False)
    with atomic_write(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={_KEY: metadata})


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint; its tensors are on the CPU. Nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, not a safetensors file, or not written by lipfast.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{path} was not written by lipfast: it lacks the metadata {_KEY!r}")
    metadata = json.loads(text)
    if metadata.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} has an unknown format, expected {_FORMAT}")
    return Checkpoint(_part("model.", tensors), _part("momentum.", tensors), metadata)


def load_model(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the `ConvNet` of a checkpoint, with its trained weights, in eval mode on the CPU.

    Returns:
        The model and the checkpoint's metadata.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`; also when the checkpoint is not of a
            `ConvNet`, or its weights do not fit.
    """
    checkpoint = load_checkpoint(path)
    arguments = checkpoint.metadata.get("model")
    if arguments is None:
        raise ValueError(f"{path} is no checkpoint of a lipfast.models.ConvNet")
    model = ConvNet(**arguments | {"input_size": tuple(arguments["input_size"])})
    restore_model(model, checkpoint, path)
    return model.eval(), checkpoint.metadata


def restore_model(model: nn.Module, checkpoint: Checkpoint, path: Path | str) -> None:
    """Copy the checkpoint's weights into the model; `path` is for the error message.

    Raises:
        ValueError: names, shapes or dtypes differ.
    """
    own, stored = _layout(model.state_dict()), _layout(checkpoint.model)
    differing = [name for name in own | stored if own.get(name) != stored.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path} does not fit the model, {len(differing)} tensors differ; the first, {name}: "
            f"the model has {own.get(name, 'none')}, the checkpoint {stored.get(name, 'none')}"
        )
    model.load_state_dict(checkpoint.model)


def check_same(path: Path, part: str, own: Any, stored: Any) -> None:
    """Raise a ValueError where `part` of the checkpoint at `path` is not that of this run."""
    if not isinstance(own, dict) or not isinstance(stored, dict):
        own, stored = {part: own}, {part: stored}
    for name in own | stored:
        if name != "device" and own.get(name) != stored.get(name):
            raise ValueError(
                f"{path} is of another run: its {part} has {name} = {stored.get(name)!r}, this run "
                f"has {own.get(name)!r}"
            )


def _layout(state: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in state.items()}


def _part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
