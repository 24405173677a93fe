"""The one place that imports torchvision.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its import fails with "operator
torchvision::nms does not exist", because its Python registers shape functions for operators that the
extension could not define (pytorch/vision issues 9077 and 9085). Defining the two schemas and importing again
is enough for datasets, models and transforms; `torchvision.io` and `torchvision.ops` stay unusable there, so
JPEG files are read with Pillow. A torchvision built for this torch defines them itself, and must: a second
definition ends the process.
"""

from __future__ import annotations

import sys

import torch

# Kept alive for the life of the process: a Library that is collected takes its definitions with it.
_FRAGMENT = torch.library.Library("torchvision", "FRAGMENT")

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[_name]
    for _name in ("nms", "qnms"):
        _FRAGMENT.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
