"""The training protocol of "1-Lipschitz Layers Compared" (Prach et al., CVPR 2024)."""

from .checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from .config import TrainConfig
from .distributed import ProcessLost, World, distributed_from_env
from .graphed import GraphedStep
from .loss import margin_cross_entropy
from .memory import saved_for_backward_bytes
from .recipes import Recipe, recipe
from .schedule import one_cycle
from .trainer import CHECKPOINT_NAME, TrainingDiverged, TrainResult, train

__all__ = [
    "GraphedStep",
    "CHECKPOINT_NAME",
    "Checkpoint",
    "ProcessLost",
    "Recipe",
    "TrainConfig",
    "TrainResult",
    "TrainingDiverged",
    "World",
    "distributed_from_env",
    "load_checkpoint",
    "load_model",
    "margin_cross_entropy",
    "one_cycle",
    "recipe",
    "save_checkpoint",
    "saved_for_backward_bytes",
    "train",
]
