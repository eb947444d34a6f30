"""One process of the distributed tests: trains the cases and writes rank<i>.json."""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch
from torch import nn

from lipfast.data import Dataset, DeviceLoader, channel_mean
from lipfast.models import ConvNet
from lipfast.training import TrainConfig, TrainingDiverged, distributed_from_env, train

# 45 samples in batches of 15 (8 and 7 per rank); 33 in batches of 16, the last with one sample.
CASES = {
    "uneven": ("plain", 45, 15),
    "tail-of-one": ("plain", 33, 16),
    "cpl": ("cpl", 45, 15),
    "soc": ("soc", 33, 16),
    "sharded": ("lot", 33, 16),
}


def make_dataset(n):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 4, 4), generator=generator).byte()
    return Dataset("noise", images, torch.arange(n) % 3, ("a", "b", "c"))


def make_model(kind):
    torch.manual_seed(3)
    if kind == "plain":
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    return ConvNet(kind, None, width=4, layers_per_block=1, input_size=(1, 4, 4), n_classes=3)


def fit(world, folder, kind, n, batch_size, **options):
    data, model, seen = make_dataset(n), make_model(kind), []
    loader = DeviceLoader(
        data,
        batch_size,
        mean=channel_mean(data),
        train=True,
        augment="crop-flip",
        rank=world.rank,
        world_size=world.world_size,
    )
    config = TrainConfig(epochs=3, lr=0.1, weight_decay=1e-3, batch_size=batch_size)
    result = train(
        model,
        loader,
        config,
        checkpoint_dir=folder,
        on_epoch=options.pop("on_epoch", lambda epoch, loss: seen.append(epoch)),
        progress=False,
        **options,
    )
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return {"losses": result.losses, "weights": digest.hexdigest(), "epochs_seen": seen}


def diverge(world, folder):
    """Only rank 1 gets NaN, in the first step of epoch 2."""
    model = make_model("plain")
    steps = 0

    def poison(module, inputs, output):
        nonlocal steps
        steps += 1
        return output * math.nan if steps == 4 and world.rank == 1 else output

    model.register_forward_hook(poison)
    data = make_dataset(45)
    loader = DeviceLoader(
        data,
        15,
        mean=channel_mean(data),
        train=True,
        augment=None,
        rank=world.rank,
        world_size=world.world_size,
    )
    config = TrainConfig(epochs=3, lr=0.1, weight_decay=0, batch_size=15)
    try:
        train(model, loader, config, checkpoint_dir=folder, progress=False)
    except TrainingDiverged as error:
        return {"diverged": str(error)}
    return {"diverged": None}


def resume(world, folder):
    """Stop both ranks after the first epoch, then resume."""
    case = CASES["uneven"]
    from lipfast.training import trainer

    whole = trainer._Run.epoch

    def limited(self, epoch, *arguments):
        if epoch == 1:
            raise KeyboardInterrupt
        return whole(self, epoch, *arguments)

    trainer._Run.epoch = limited
    try:
        fit(world, folder, *case)
    except KeyboardInterrupt:
        pass
    finally:
        trainer._Run.epoch = whole
    torch.distributed.barrier()
    return fit(world, folder, *case, resume=True)


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with distributed_from_env("cpu") as world:
        if sys.argv[2:] == ["diverge"]:
            outcome = diverge(world, folder / "diverge")
        else:
            outcome = {
                name: fit(world, folder / name, *case, shard_weights=name == "sharded")
                for name, case in CASES.items()
            }
            outcome["resumed"] = resume(world, folder / "resumed")
        (folder / f"rank{world.rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
