"""One process of a training run in which rank 1 ends, or hangs, in the third step of epoch 2."""

import os
import sys
import time
from pathlib import Path

import ddp_worker
import processes
import torch.distributed as dist

from lipfast.data import DeviceLoader, channel_mean
from lipfast.training import ProcessLost, TrainConfig, train

STEPS = 3  # per epoch


def run(how, shard_weights):
    def case(rank, ranks):
        folder = Path(sys.argv[3]) / how
        dataset = ddp_worker.make_dataset(45)
        loader = DeviceLoader(
            dataset,
            15,
            mean=channel_mean(dataset),
            train=True,
            augment=None,
            rank=rank,
            world_size=ranks,
        )
        model, step = ddp_worker.make_model("soc"), 0
        start = 0.0

        def count(module, args):
            nonlocal step, start
            step += 1
            if step < STEPS + 3:
                return
            start = time.monotonic()
            if rank == 1 and how == "ends":
                os._exit(3)
            if rank == 1:
                time.sleep(5)

        model.linear.register_forward_pre_hook(count)
        config = TrainConfig(epochs=3, lr=0.1, weight_decay=0.0, batch_size=15)
        try:
            train(
                model,
                loader,
                config,
                checkpoint_dir=folder,
                progress=False,
                shard_weights=shard_weights,
            )
        except ProcessLost as error:
            return {"error": str(error), "seconds": time.monotonic() - start, "step": step}
        return None

    return case


if __name__ == "__main__":
    cases = {
        f"{how} {kind}": run(how, kind == "sharded")
        for how in ("ends", "hangs")
        for kind in ("sharded", "plain")
    }
    processes.main(cases, timeout=3)
    assert not dist.is_initialized()
