"""What `lipfast info` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def info_tables(info: Mapping[str, Any]) -> dict[str, Table]:
    """Return a titled table of each thing that `lipfast.backends.info` found: versions, what was
    built, which backends can run and why the others cannot, environment variables that are set."""
    return {
        "Versions": _table(_versions(info)),
        "Compiled extension lipfast._C": _table(_extension(info["extension"])),
        "GPU": _table(_gpu(info["gpu"])),
        "Backends": _table(_backends(info["backends"])),
        "Ops": _table([(op, ", ".join(names)) for op, names in info["ops"].items()]),
        "Environment variables": _table(list(info["environment"].items()) or [("none set", "")]),
    }


def _table(rows: list[tuple[str, str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True, min_width=14)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _versions(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ("lipfast", "python", "torch", "triton")
    return [(name, info[name] or "not installed") for name in names]


def _extension(extension: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not extension["built"]:
        return [("built", f"no: {extension['reason']}")]
    rows = [("built", "yes"), ("OpenMP threads", str(extension["openmp_threads"]))]
    if not extension["cuda"]:
        return [*rows, ("CUDA part", f"no: {extension['cuda_reason']}")]
    return [
        *rows,
        ("CUDA part", "yes"),
        ("architectures", str(extension["cuda_archs"]).replace(",", ", ")),
        ("nvcc", str(extension["nvcc"])),
    ]


def _gpu(gpu: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if gpu is None:
        return [("none", "torch finds no CUDA GPU")]
    return [
        ("name", gpu["name"]),
        ("capability", gpu["capability"]),
        ("memory", f"{gpu['memory_bytes'] / 2**30:.1f} GiB"),
        ("multiprocessors", str(gpu["multiprocessors"])),
        ("CUDA of torch", str(gpu["torch_cuda"])),
    ]


def _backends(backends: Mapping[str, str | None]) -> list[tuple[str, str]]:
    return [
        (name, "available" if reason is None else f"not available: {reason}")
        for name, reason in backends.items()
    ]
