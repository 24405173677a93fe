"""Neural-network modules: split batch normalisation and what goes with it."""

from .branches import bind_branches, bn_mode, convert_split_bn, revert_split_bn, use_branch
from .checkpoints import from_authors, from_timm, single_branch, to_authors, to_timm
from .folding import FoldedModel
from .split_batch_norm import SplitBatchNorm2d
from .synchronised import synchronise_batch_norm

__all__ = [
    "FoldedModel",
    "SplitBatchNorm2d",
    "bind_branches",
    "bn_mode",
    "convert_split_bn",
    "from_authors",
    "from_timm",
    "revert_split_bn",
    "single_branch",
    "synchronise_batch_norm",
    "to_authors",
    "to_timm",
    "use_branch",
]
