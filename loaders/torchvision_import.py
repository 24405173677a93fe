"""The one place that imports torchvision.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its import fails with "operator
torchvision::nms does not exist", because its Python registers shape functions for operators that the
extension could not define (pytorch/vision issues 9077 and 9085). Defining the two schemas first is enough
for datasets, models and transforms; `torchvision.io` and `torchvision.ops` stay unusable there, so JPEG
files are read with Pillow.
"""

from __future__ import annotations

import torch

# Kept alive for the life of the process: a Library that is collected takes its definitions with it.
_FRAGMENT = torch.library.Library("torchvision", "FRAGMENT")
if torch.version.cuda is None and torch.version.hip is None:
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _FRAGMENT.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402

__all__ = ["torchvision"]
