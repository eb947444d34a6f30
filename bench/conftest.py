"""Benchmarks: results are compared before they are timed, variants are timed in turns."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

import lipfast
from lipfast.models import SIZES
from lipfast.nn import METHODS
from lipfast.report.bench import ratio_lines
from lipfast.report.roofline import floor_seconds

Variants = dict[str, Callable[[], object]]


def pytest_addoption(parser):
    group = parser.getgroup("lipfast")
    group.addoption("--size", help="Of the networks of bench_model.py, with commas: XS,S,M,L.")
    group.addoption("--method", help="Of the networks of bench_model.py, with commas: aol,lot.")
    group.addoption("--full", action="store_true", help="What takes long, too: see bench_model.py.")


def pytest_generate_tests(metafunc):
    """Networks by size and method: XS and S by default on a CPU, all on a GPU."""
    if "network_size" in metafunc.fixturenames:
        default = "XS,S,M,L" if torch.cuda.is_available() else "XS,S"
        metafunc.parametrize("network_size", chosen(metafunc, "--size", default, SIZES))
        metafunc.parametrize("method", chosen(metafunc, "--method", ",".join(METHODS), METHODS))


def chosen(metafunc, option: str, default: str, known: Iterable[str]) -> list[str]:
    names = [name.strip() for name in (metafunc.config.getoption(option) or default).split(",")]
    unknown = set(names) - set(known)
    if unknown:
        raise pytest.UsageError(f"{option}: expected some of {', '.join(known)}, got {unknown}")
    return names


@pytest.fixture
def full(request) -> bool:
    return request.config.getoption("--full")


@pytest.fixture
def compare(benchmark, request):
    """Time variants in turns; the first is ours, the ratios say how much slower the others are.

    With `seconds` there are as many rounds, 1 to `rounds`, as fit in about that time. With the
    FLOPs or the bytes that any variant needs, a GPU's share of its floor is recorded.
    """

    def run(
        variants: Variants,
        *,
        rounds: int = 15,
        warmup: int = 3,
        seconds: float | None = None,
        flops: float = 0.0,
        moved_bytes: float = 0.0,
        precision: str = "fp32",
    ) -> dict[str, float]:
        for _ in range(warmup):
            begin = time.perf_counter()
            for function in variants.values():
                finish(function)
            once = time.perf_counter() - begin
        if seconds is not None:
            rounds = min(rounds, max(1, int(seconds / once)))
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, function in variants.items():
                times[name].append(elapsed(function))
        medians = {name: statistics.median(values) for name, values in times.items()}
        ours, *others = variants
        own = 1 if seconds is not None else rounds  # what pytest-benchmark times itself
        benchmark.pedantic(lambda: finish(variants[ours]), rounds=own, warmup_rounds=int(own > 1))
        ratios = {name: medians[name] / medians[ours] for name in others}
        benchmark.extra_info["median_ms"] = {k: round(v * 1e3, 4) for k, v in medians.items()}
        benchmark.extra_info["ratio"] = {k: round(v, 3) for k, v in ratios.items()}
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        work = {"flops": flops, "moved_bytes": moved_bytes, "precision": precision}
        floor = floor_seconds(gpu, **work) if flops or moved_bytes else None
        if floor:
            shares = {name: round(floor / median, 3) for name, median in medians.items()}
            benchmark.extra_info["share of the floor"] = shares
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


def pytest_terminal_summary(terminalreporter, config):
    """The table of ratios."""
    session = getattr(config, "_benchmarksession", None)
    rows = [
        (bench.name, bench.extra_info)
        for bench in getattr(session, "benchmarks", ())
        if "ratio" in bench.extra_info
    ]
    if not rows:
        return
    terminalreporter.section("how many times as long the others take as the first")
    for line in ratio_lines(rows):
        terminalreporter.write_line(line)


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
