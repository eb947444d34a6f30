"""Networks of plain torch layers, which run without lipfast, and their files with a certificate."""

from .certificate import Certificate
from .files import read_certificate, to_onnx, to_pt2, to_safetensors
from .plain import to_plain

__all__ = [
    "Certificate",
    "read_certificate",
    "to_onnx",
    "to_plain",
    "to_pt2",
    "to_safetensors",
]
