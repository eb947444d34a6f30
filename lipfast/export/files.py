"""Files of plain networks, with the certificate inside."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .certificate import Certificate, from_json, state_fingerprint, to_json
from .plain import to_plain

_KEY = "lipfast.certificate"
_EXTRA_FILE = "lipfast_certificate.json"
_ONNX_LIMIT = 1_500_000_000  # bytes of weights; an ONNX file ends at 2 GB, weights go beside it

Path_ = str | os.PathLike[str]
Size = Sequence[int] | Tensor | None


def to_onnx(
    model: nn.Module, path: Path_, input_size: Size = None, *, opset: int | None = None
) -> None:
    """Write a network as an ONNX file, with any batch size and the certificate in its metadata.

    Weights of more than 1.5 GB go to a file beside it. Needs the extra `export`.

    Args:
        model: of `to_plain`, or one that it takes.
        path: ends in .onnx.
        input_size: as for `to_plain`; that of the certificate by default.
        opset: version of the ONNX operators; torch's by default.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the path, the size or the weights do not fit, or `to_plain` refuses the model.
    """
    _check_suffix(path, ".onnx")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"to_onnx needs {' and '.join(missing)}: python -m pip install 'lipfast[export]'"
        )
    plain, x = _prepared(model, input_size)
    program = torch.onnx.export(
        plain,
        (x,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["input"],
        output_names=["scores"],
        opset_version=opset,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("to_onnx: torch.onnx.export returned no program")
    written = program.model.opset_imports[""]
    if opset is not None and written != opset:
        raise ValueError(f"opset: torch writes this network in version {written}, not in {opset}")
    program.model.metadata_props[_KEY] = to_json(_certificate(plain))
    size = sum(value.numel() * value.element_size() for value in plain.state_dict().values())
    program.save(path, external_data=size > _ONNX_LIMIT)


def to_pt2(model: nn.Module, path: Path_, input_size: Size = None) -> None:
    """Write a network as an exported program, with any batch size and the certificate beside it.

    `torch.export.load(path).module()` is the network; no lipfast is needed, and no pickle.

    Args:
        model: of `to_plain`, or one that it takes.
        path: ends in .pt2.
        input_size: as for `to_plain`; that of the certificate by default.

    Raises:
        ValueError: the path, the size or the weights do not fit, or `to_plain` refuses the model.
    """
    _check_suffix(path, ".pt2")
    plain, x = _prepared(model, input_size)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(plain, (x,), dynamic_shapes=shapes)
    extra_files = {_EXTRA_FILE: to_json(_certificate(plain))}
    torch.export.save(program, path, extra_files=extra_files)


def to_safetensors(model: nn.Module, path: Path_, input_size: Size = None) -> None:
    """Write the state_dict of a plain network, with the certificate in the file's metadata.

    Args:
        model: of `to_plain`, or one that it takes.
        path: ends in .safetensors.
        input_size: as for `to_plain`.

    Raises:
        ValueError: the path or the weights do not fit, or `to_plain` refuses the model.
    """
    _check_suffix(path, ".safetensors")
    plain = to_plain(model, input_size)
    # a shared module's tensors under each of its names
    state = {name: value.contiguous().clone() for name, value in plain.state_dict().items()}
    save_file(state, path, metadata={_KEY: to_json(_certificate(plain))})


def read_certificate(path: Path_) -> Certificate:
    """Return the certificate in a file of `to_onnx`, `to_pt2` or `to_safetensors`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, holds no certificate, or, for safetensors, other
            weights than those that were certified.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file, got {str(path)!r}")
    if path.suffix == ".onnx":
        import onnx

        properties = onnx.load(path, load_external_data=False).metadata_props
        text = {entry.key: entry.value for entry in properties}.get(_KEY)
    elif path.suffix == ".pt2":
        extra_files = {_EXTRA_FILE: ""}
        torch.export.load(path, extra_files=extra_files)
        text = extra_files[_EXTRA_FILE]
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118
            if text and from_json(text)["weights_sha256"] != state_fingerprint(state):
                raise ValueError(
                    f"path: expected the certified weights in {path.name!r}, got other weights"
                )
    else:
        raise ValueError(f"path: expected .onnx, .pt2 or .safetensors, got {path.name!r}")
    if not text:
        raise ValueError(f"path: expected a certificate of lipfast in {path.name!r}, found none")
    return from_json(text)


def _check_suffix(path: Path_, suffix: str) -> None:
    if Path(path).suffix != suffix:
        raise ValueError(f"path: expected a name that ends in {suffix}, got {str(path)!r}")


def _prepared(model: nn.Module, input_size: Size) -> tuple[nn.Module, Tensor]:
    """The plain network, and an input of two samples with its certificate's size."""
    plain = to_plain(model, input_size)
    size = _certificate(plain)["input_size"]
    if size is None:
        raise ValueError(
            "input_size: expected the sizes of one input, such as (3, 32, 32), got None"
        )
    like = next((p for p in plain.parameters() if p.is_floating_point()), torch.empty(0))
    x = input_size if isinstance(input_size, Tensor) else like.new_zeros(1, *size)
    return plain, x.new_zeros(2, *size)


def _certificate(plain: nn.Module) -> Certificate:
    return plain.certificate  # type: ignore[return-value]
