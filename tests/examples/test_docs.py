"""The code in docs/swap.md runs, from top to bottom, and says what the page says."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lipfast.models import ConvNet, published_state_dict

PAGE = Path(__file__).parents[2] / "docs" / "swap.md"


@pytest.mark.slow
def test_the_page_on_swapping_runs(tmp_path, monkeypatch, capsys):
    from swap import published

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.save(published_state_dict(ConvNet("lot", "XS", ridge=1e-4)), "published.pth")
    names = {
        "torch": torch,
        "nn": nn,
        "my_network": lambda: published.network("aol", width=4, blocks=3, layers=1),
    }
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    shown = re.search(r"```text\n(.*?)```", text, re.DOTALL).group(1)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    for line in shown.splitlines()[:-1]:
        assert line in printed
    assert names["bound"] == pytest.approx(1, abs=1e-3)
    assert names["plain"].certificate["lipschitz_bound"] <= 1 + 1e-4
    before = torch.load("published.pth", weights_only=True)
    after = torch.load("back.pth", weights_only=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert "accelerate" in sys.modules["lipfast.swap"].__all__
