"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lipfast
from lipfast.data import DeviceLoader
from lipfast.nn.convergence import warn_of_unconverged_layers
from lipfast.weights.shard_group import answers_expected

from .checkpoint import Checkpoint, check_same, load_checkpoint, restore_model, save_checkpoint
from .config import TrainConfig
from .distributed import sharded
from .loss import margin_cross_entropy
from .progress import ProgressBar
from .schedule import one_cycle

CHECKPOINT_NAME = "last.safetensors"


class TrainingDiverged(RuntimeError):
    """The loss or the weights became NaN or Inf.

    Attributes:
        epoch, step: where, both counted from 1; the step is that of the epoch.
        lr: the learning rate of that step.
    """

    def __init__(self, epoch: int, step: int, lr: float, what: str, advice: str) -> None:
        super().__init__(
            f"training diverged: {what} in epoch {epoch}, step {step}, at learning rate {lr:.4g}; "
            f"{advice}"
        )
        self.epoch, self.step, self.lr = epoch, step, lr


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a training run, resumed parts included.

    Args:
        losses: mean loss of every epoch.
        seconds: wall time of the epochs, without checkpoints and `on_epoch`.
        epochs: number of epochs.
        peak_memory_bytes: highest memory that torch allocated on the GPU; None on a CPU (see
            `saved_for_backward_bytes`).
    """

    losses: list[float]
    seconds: float
    epochs: int
    peak_memory_bytes: int | None

    @property
    def seconds_per_epoch(self) -> float:
        """Mean wall time of an epoch."""
        return self.seconds / self.epochs


def train(
    model: nn.Module,
    loader: DeviceLoader,
    config: TrainConfig,
    *,
    checkpoint_dir: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    on_epoch: Callable[[int, float], None] | None = None,
    shard_weights: bool = False,
) -> TrainResult:
    """Train a model with SGD, momentum and a one-cycle learning rate; leave it in eval mode.

    Neither uses nor changes torch's global random state. The same model, loader and config give the
    same weights, as far as the device's kernels are deterministic; a resumed run too. The host
    waits for the device at the end of an epoch only, where it also warns of layers whose iteration
    has not converged.

    When torch.distributed is initialised, every process calls this with a loader of its own rank;
    the gradient is that of the whole global batch, also when the slices have different sizes. Only
    rank 0 writes checkpoints, shows progress and calls `on_epoch`; on resume all ranks read.

    Args:
        model: maps (b, c, h, w) to scores (b, k); is moved to `config.device`.
        loader: training batches; its batch size, seed and device must be those of `config`.
        config: hyperparameters.
        checkpoint_dir: folder (created when missing) whose `last.safetensors` is replaced after
            every epoch.
        resume: continue from `last.safetensors`. Everything in config but the device must be as it
            was.
        progress: show a progress bar.
        on_epoch: called after every epoch with its number, from 1, and its mean loss.
        shard_weights: `lipfast.shard` the model; the result is the same, to rounding.

    Raises:
        TrainingDiverged: the loss or the weights are NaN or Inf; the last good checkpoint stays.
        ProcessLost: another process ended, or did not answer within the process group's timeout.
        FileNotFoundError: nothing to resume from.
        ValueError: loader, process group, checkpoint and config do not fit together.
    """
    device = torch.device(config.device)
    _check(loader, config, device)
    if resume and checkpoint_dir is None:
        raise ValueError("resume needs checkpoint_dir, the folder of the checkpoint, got None")
    path = None if checkpoint_dir is None else Path(checkpoint_dir) / CHECKPOINT_NAME
    model.to(device)
    run = _Run(model, loader, config)
    if resume and path is not None:
        run.restore(path)
    main = loader.rank == 0
    if path is not None and main:
        path.parent.mkdir(parents=True, exist_ok=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        sharded(model) if shard_weights else nullcontext(),
        ProgressBar(len(loader), config.epochs, len(run.losses))
        if progress and main
        else nullcontext() as bar,
    ):
        for epoch in range(len(run.losses), config.epochs):
            with answers_expected(None) if loader.world_size > 1 else nullcontext():
                loss = run.epoch(epoch, bar, path)
            if main:
                warn_of_unconverged_layers(model)
            if path is not None and main:
                run.save(path)
            if on_epoch is not None and main:
                on_epoch(epoch + 1, loss)
    model.eval()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return TrainResult(list(run.losses), run.seconds, config.epochs, peak)


class _Run:
    """Model, optimizer and history of one run."""

    def __init__(self, model: nn.Module, loader: DeviceLoader, config: TrainConfig) -> None:
        self.model, self.loader, self.config = model, loader, config
        self.losses: list[float] = []
        self.seconds = 0.0
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.SGD(
            self.parameters.values(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.network: nn.Module = model
        if loader.world_size > 1:
            self.network = DistributedDataParallel(model)

    def epoch(self, epoch: int, bar: ProgressBar | None, path: Path | None) -> float:
        """Train for one epoch, counted from 0, and return its mean loss."""
        start = time.perf_counter()
        self.model.train()
        self.loader.set_epoch(epoch)
        steps = len(self.loader)
        losses = torch.zeros(steps + 1, device=self.loader.device)
        for step, (x, y) in enumerate(self.loader):
            size = self.loader.global_batch_size(step)
            try:
                losses[step] = self._step(x, y, epoch * steps + step, size)
            except ValueError:  # on a CPU the layers refuse weights that are not finite
                if not self._is_broken():
                    raise
                break
            if bar is not None:
                bar.advance()
        losses[steps] = self._is_broken()
        if self.loader.world_size > 1:
            dist.all_reduce(losses)
        *step_losses, broken = losses.double().cpu().unbind()
        self._raise_if_diverged(epoch, torch.stack(step_losses), bool(broken), path)
        sizes = [self.loader.global_batch_size(step) for step in range(steps)]
        weighted = torch.stack(step_losses) * torch.tensor(sizes, dtype=torch.float64)
        self.losses.append(float(weighted.sum()) / sum(sizes))
        self.seconds += time.perf_counter() - start
        if bar is not None:
            bar.show_loss(self.losses[-1])
        return self.losses[-1]

    @torch.no_grad()
    def _is_broken(self) -> Tensor:
        """Whether a trained weight is NaN or Inf, on the device."""
        finite = [p.isfinite().all() for p in self.parameters.values()]
        return torch.stack(finite).logical_not().any()

    def _step(self, x: Tensor, y: Tensor, step: int, global_size: int) -> Tensor:
        """One update; returns this rank's share of the mean loss over the global batch."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = one_cycle(step, config.epochs * len(self.loader), config.lr)
        self.optimizer.zero_grad(set_to_none=True)
        idle = len(y) == 0
        if idle:
            # Every rank has to take part, and not every layer of torch takes an empty batch.
            x, y = x.new_zeros(1, *x.shape[1:]), y.new_zeros(1)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=config.autocast):
            scores = self.network(x)
        total = margin_cross_entropy(
            scores, y, offset=config.offset, temperature=config.temperature, reduction="sum"
        )
        share = total * (0 if idle else 1 / global_size)
        # DistributedDataParallel divides the sum of the gradients by the number of ranks.
        (share * self.loader.world_size).backward()
        self.optimizer.step()
        return share.detach()

    def _raise_if_diverged(
        self, epoch: int, losses: Tensor, broken: bool, path: Path | None
    ) -> None:
        steps = len(losses)
        bad = (~losses.isfinite()).nonzero()
        if len(bad) == 0 and not broken:
            return
        step = int(bad[0]) if len(bad) > 0 else steps - 1
        what = f"the loss is {losses[step]:.0f}" if len(bad) > 0 else "a weight is NaN or Inf"
        advice = "lower the learning rate"
        if path is not None and epoch > 0:
            advice += f"; {path} holds the last good epoch, {epoch}"
        lr = one_cycle(epoch * steps + step, self.config.epochs * steps, self.config.lr)
        raise TrainingDiverged(epoch + 1, step + 1, lr, what, advice)

    def save(self, path: Path) -> None:
        momentum = {
            name: self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.parameters.items()
            if self.optimizer.state[parameter].get("momentum_buffer") is not None
        }
        metadata = {
            "version": lipfast.__version__,
            "epoch": len(self.losses),
            "step": len(self.losses) * len(self.loader),
            "losses": self.losses,
            "seconds": self.seconds,
            **self._identity(),
        }
        save_checkpoint(path, Checkpoint(self.model.state_dict(), momentum, metadata))

    def restore(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        metadata = checkpoint.metadata
        for part, own in self._identity().items():
            check_same(path, part, own, metadata.get(part))
        restore_model(self.model, checkpoint, path)
        for name, buffer in checkpoint.momentum.items():
            if name not in self.parameters:
                raise ValueError(f"{path} has trained {name}, which is frozen in this run")
            parameter = self.parameters[name]
            self.optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device)
        self.losses, self.seconds = list(metadata["losses"]), metadata["seconds"]

    def _identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that resumes from it, as JSON has it."""
        data = self.loader.dataset
        identity = {
            "model": getattr(self.model, "config", None),
            "config": asdict(self.config),
            "data": {"name": data.name, "images": len(data), "augment": self.loader.augment},
        }
        return json.loads(json.dumps(identity))


def _check(loader: DeviceLoader, config: TrainConfig, device: torch.device) -> None:
    if not loader.train:
        raise ValueError("loader must be a training loader (train=True), got train=False")
    for name in ("batch_size", "seed"):
        if getattr(loader, name) != getattr(config, name):
            raise ValueError(
                f"loader.{name} must be config.{name}, {getattr(config, name)}, got "
                f"{getattr(loader, name)}"
            )
    if _placed(loader.device) != _placed(device):
        raise ValueError(f"loader.device must be config.device, {device}, got {loader.device}")
    distributed = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank() if distributed else 0
    world_size = dist.get_world_size() if distributed else 1
    if (loader.rank, loader.world_size) != (rank, world_size):
        raise ValueError(
            f"loader must have rank {rank} of world_size {world_size}, as this process, got rank "
            f"{loader.rank} of {loader.world_size}"
        )


def _placed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
