"""Image data sets held as uint8 tensors, and a loader that augments them on the device."""

from .catalog import NAMES, load
from .dataset import Dataset, channel_mean
from .loader import AUGMENTATIONS, DeviceLoader

__all__ = ["AUGMENTATIONS", "NAMES", "Dataset", "DeviceLoader", "channel_mean", "load"]
