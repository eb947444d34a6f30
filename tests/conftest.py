"""What every test may use: skips without a GPU, poisoned outputs, the committed counts."""

import os
from collections.abc import Callable

import pytest
import torch
from baseline.compare import check


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # the longest first
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA GPU is available"
    if os.environ.get("TRITON_INTERPRET") != "1":
        reasons["interpreter"] = "needs TRITON_INTERPRET=1"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def poisoned_empty():
    """Fill whatever torch.empty and empty_like return: an output left unwritten shows as NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def check_baseline(request) -> Callable[[str, dict[str, dict[str, int]]], None]:
    """(topic, {entry: counts}): compare with tests/baseline/<topic>.json; see docs/baseline.md."""
    recorder = request.config.pluginmanager.get_plugin("baseline-recorder")
    return check if recorder is None else recorder.record
