"""How the training weights of a whole model are built: in batches, or shared between processes."""

from .fuse import fuse, is_fused, unfuse
from .shard import shard, unshard

__all__ = ["fuse", "is_fused", "shard", "unfuse", "unshard"]
