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
    group.addoption(
        "--budget", type=float, help="Seconds after which no benchmark starts; ops come first."
    )


def pytest_configure(config):
    config.lipfast_start = time.monotonic()


def pytest_collection_modifyitems(config, items):
    """In a budget first the ops, then networks from XS to L, so that what is left out is large."""
    if config.getoption("--budget") is not None:
        items.sort(key=lambda item: _place(getattr(item, "callspec", None)))


def _place(callspec) -> int:
    values = {} if callspec is None else callspec.params
    size = values.get("network_size", values.get("size"))
    return list(SIZES).index(size) + 1 if size in SIZES else 0


def pytest_runtest_setup(item):
    budget = item.config.getoption("--budget")
    if budget is not None and time.monotonic() - item.config.lipfast_start > budget:
        pytest.skip(f"the budget of {budget:g} seconds is used up")


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

    There are as many rounds, 1 to `rounds`, as fit in about `seconds`. Where `first_counts`, the
    first run of a variant that takes longer than that is its only one; not so where it may compile.
    `verify` gets what the first runs return, before the others are timed. Variants other than the
    first that do not fit in a GPU's memory are left out. With the FLOPs or the bytes that any
    variant needs, a GPU's share of its floor is recorded.
    """

    def run(
        variants: Variants,
        *,
        rounds: int = 15,
        warmup: int = 3,
        seconds: float = 3.0,
        first_counts: bool = not torch.cuda.is_available(),
        verify: Callable[[dict[str, object]], None] | None = None,
        flops: float = 0.0,
        moved_bytes: float = 0.0,
        precision: str = "fp32",
    ) -> dict[str, float]:
        ours = next(iter(variants))
        variants, first = once(variants, verify)
        for name in first.keys() - variants.keys():
            benchmark.extra_info.setdefault("out of memory", []).append(name)
        slow = {name for name in variants if first_counts and first[name] > seconds}
        times = {name: [first[name]] if name in slow else [] for name in variants}
        timed = {name: function for name, function in variants.items() if name not in slow}
        short = sum(first[name] for name in timed) < seconds / 4
        for _ in range(warmup - 1 if short or not first_counts else 0):
            for function in timed.values():
                finish(function)
        start = last = time.perf_counter()
        for place in range(rounds):
            now = time.perf_counter()
            if place and now - start + now - last > seconds:
                break
            last = now
            for name, function in timed.items():
                times[name].append(elapsed(function))
        medians = {name: statistics.median(times[name]) for name in variants}
        others = [name for name in variants if name != ours]
        own = max(1, int(min(rounds, seconds / 4 / medians[ours])))  # what pytest-benchmark times
        benchmark.pedantic(lambda: finish(variants[ours]), rounds=own, warmup_rounds=0)
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


def once(
    variants: Variants, verify: Callable[[dict[str, object]], None] | None
) -> tuple[Variants, dict[str, float]]:
    """Run each variant once; return those that fit in the memory, and the seconds of all."""
    fitting: Variants = {}
    seconds: dict[str, float] = {}
    results: dict[str, object] = {}
    for name, function in variants.items():
        begin = time.perf_counter()
        try:
            result = function()
            synchronize()
        except torch.OutOfMemoryError:
            if not fitting:
                pytest.skip(f"{name} does not fit in the memory")
        else:
            fitting[name] = function
            if verify is not None:
                results[name] = result
        seconds[name] = time.perf_counter() - begin
    if verify is not None:
        verify(results)
    return fitting, seconds


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
    synchronize()


def synchronize() -> None:
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
