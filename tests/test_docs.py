"""The documentation builds without a warning, and its pages show what they should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    for page, names in {
        "models": ("swap.accelerate.accelerate", "export.plain.to_plain", "models.convnet.ConvNet"),
        "layers": ("nn.SOCConv2d", "nn.LipschitzModule.lipschitz_bound", "nn.MaxMin"),
        "ops": ("ops.gram_bound.gram_bound", "ops.polar.polar", "ops.skew_exp.skew_exp"),
        "certify": ("certify.certified_radius", "certify.lipschitz_bound"),
        "training": ("training.TrainConfig", "training.margin_cross_entropy"),
    }.items():
        text = (tmp_path / "api" / f"{page}.html").read_text()
        missing = [name for name in names if f'id="lipfast.{name}"' not in text]
        assert not missing, page
