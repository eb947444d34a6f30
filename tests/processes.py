"""Several gloo processes for a test: each runs a script and reports a dictionary."""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).parents[1]


def run_ranks(script, ranks, folder, *arguments, limit=120, codes=None):
    """Return what each rank reported; None for one that ended without, with a code of `codes`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    running = []
    for rank in range(ranks):
        command = [sys.executable, str(script), str(rank), str(ranks), str(folder), *arguments]
        errors = (folder / f"errors{rank}").open("w+")
        running.append((subprocess.Popen(command, env=environment, stderr=errors), errors))
    end = time.monotonic() + limit
    try:
        found = [process.wait(max(1, end - time.monotonic())) for process, _ in running]
    finally:
        for process, _ in running:
            process.kill()
    texts = []
    for _, errors in running:
        errors.seek(0)
        texts.append(errors.read()[-3000:])
        errors.close()
    assert found == (codes or [0] * ranks), "\n".join(texts)
    files = [folder / f"rank{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def main(cases, *, timeout=60):
    """Run in a script of `run_ranks`: the cases that it names, in one process group."""
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    outcome = {name: cases[name](rank, ranks) for name in sys.argv[4:]}
    (folder / f"rank{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()
