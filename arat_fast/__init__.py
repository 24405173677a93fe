"""Fast adversarial training on one GPU: ARAT and the methods it is compared with.

The public names, in three depths: functions (`pgd_step_`, `random_start`, `split_batch_norm`,
`random_crop_flip`), modules (`PGD`, `SplitBatchNorm2d`, `convert_split_bn`, `use_branch`, …) and the whole
loop (`accelerate`, `TrainStep`, `Trainer`). Each is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arat_fast.acceleration import accelerate as accelerate
    from arat_fast.acceleration import revert as revert
    from arat_fast.attacks import PGD as PGD
    from arat_fast.config import AttackConfig as AttackConfig
    from arat_fast.config import TrainConfig as TrainConfig
    from arat_fast.config import load_recipe as load_recipe
    from arat_fast.kernels.augment import random_crop_flip as random_crop_flip
    from arat_fast.kernels.pgd import pgd_step as pgd_step
    from arat_fast.kernels.pgd import pgd_step_ as pgd_step_
    from arat_fast.kernels.random_start import random_start as random_start
    from arat_fast.kernels.split_batch_norm import split_batch_norm as split_batch_norm
    from arat_fast.models import create_model as create_model
    from arat_fast.models.weights import load_weights as load_weights
    from arat_fast.nn import SplitBatchNorm2d as SplitBatchNorm2d
    from arat_fast.nn import bn_mode as bn_mode
    from arat_fast.nn import convert_split_bn as convert_split_bn
    from arat_fast.nn import revert_split_bn as revert_split_bn
    from arat_fast.nn import use_branch as use_branch
    from arat_fast.training.step import TrainStep as TrainStep
    from arat_fast.training.trainer import Trainer as Trainer

# name -> where it lives. Lazy: `--help` is quick, and the kernels alone need neither pydantic nor tyro.
_PUBLIC = {
    "AttackConfig": "arat_fast.config",
    "PGD": "arat_fast.attacks",
    "SplitBatchNorm2d": "arat_fast.nn",
    "TrainConfig": "arat_fast.config",
    "TrainStep": "arat_fast.training.step",
    "Trainer": "arat_fast.training.trainer",
    "accelerate": "arat_fast.acceleration",
    "bn_mode": "arat_fast.nn",
    "convert_split_bn": "arat_fast.nn",
    "create_model": "arat_fast.models",
    "load_recipe": "arat_fast.config",
    "load_weights": "arat_fast.models.weights",
    "pgd_step": "arat_fast.kernels.pgd",
    "pgd_step_": "arat_fast.kernels.pgd",
    "random_crop_flip": "arat_fast.kernels.augment",
    "random_start": "arat_fast.kernels.random_start",
    "revert": "arat_fast.acceleration",
    "revert_split_bn": "arat_fast.nn",
    "split_batch_norm": "arat_fast.kernels.split_batch_norm",
    "use_branch": "arat_fast.nn",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'arat_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
