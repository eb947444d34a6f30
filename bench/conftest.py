"""Benchmarks: results are compared before they are timed, variants are timed in turns."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lipfast

Variants = dict[str, Callable[[], object]]


@pytest.fixture
def compare(benchmark, request):
    """Time variants in turns; the first is ours, the ratios say how much slower the others are."""

    def run(variants: Variants, *, rounds: int = 15, warmup: int = 3) -> dict[str, float]:
        for _ in range(warmup):
            for function in variants.values():
                function()
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, function in variants.items():
                seconds[name].append(elapsed(function))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ours, *others = variants
        benchmark.pedantic(lambda: finish(variants[ours]), rounds=rounds, warmup_rounds=1)
        ratios = {name: medians[name] / medians[ours] for name in others}
        benchmark.extra_info["median_ms"] = {k: round(v * 1e3, 4) for k, v in medians.items()}
        benchmark.extra_info["ratio"] = {k: round(v, 3) for k, v in ratios.items()}
        shown = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        print(f"\n{request.node.name}: {ours} {medians[ours] * 1e3:.3f} ms; {shown}")
        return ratios

    return run


def elapsed(function: Callable[[], object]) -> float:
    """Seconds of one call; on a GPU by events, with a flushed L2 cache."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    torch.empty(1 << 28, dtype=torch.uint8, device="cuda").zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def finish(function: Callable[[], object]) -> None:
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["lipfast"] = describe_machine()


def describe_machine() -> dict[str, object]:
    gpu = torch.cuda.is_available()
    return {
        "commit": first_line("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "info": lipfast.backends.info(),
    }


def first_line(*command: str) -> str | None:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.splitlines()[0] if result.stdout else None
