"""The hardware and software of this process, in words."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import lipfast


def machine_description(device: str) -> str:
    """Return the processor, its cores that this process may use, and the GPU if `device` is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        words = f"{torch.cuda.get_device_name(device)}; {words}"
    return words


def software_versions() -> dict[str, str]:
    """Return the versions of lipfast, Python, torch, its CUDA, Triton and the system."""
    versions = {
        "lipfast": lipfast.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.version.cuda is not None:
        versions["CUDA of torch"] = torch.version.cuda
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["triton"] = metadata.version("triton")
    return {**versions, "system": platform.platform()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
