"""What an attack is given, refused at its entry with the argument named."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from arat_fast.errors import unknown_name

__all__ = [
    "check_batch",
    "check_labels_fit",
    "check_name",
    "check_pixels",
    "largest_label",
    "logits_of",
    "span",
]


def check_name(kind: str, name: object, known: Iterable[str]) -> None:
    """ValueError with the nearest known name unless `name` is one."""
    choices = list(known)
    if not isinstance(name, str):
        raise TypeError(f"{kind} is a {type(name).__name__}; expected one of {', '.join(choices)}")
    if name not in choices:
        raise ValueError(str(unknown_name(kind, name, choices)))


def check_pixels(name: str, value: object) -> float:
    """`value` as a float. TypeError unless it is a number, ValueError unless finite and at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number in units of [0, 1] pixels")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value}; expected a finite number of at least 0, such as 8/255")
    return float(value)


def span(low: float, high: float) -> str:
    """`[low, high]` in four digits, in fp32's nine where four would round what is above 1 to it."""
    return f"[{low:.4g}, {high:.9g}]" if 1 < high < 1.0005 else f"[{low:.4g}, {high:.4g}]"


def check_batch(model: nn.Module, images: object, labels: object) -> None:
    """Dtypes, shapes and devices of a batch, from metadata alone."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images are {given}; expected a float tensor with pixels in [0, 1]")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels are {given}; expected an int64 tensor of class numbers")
    if images.ndim < 2:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, C, H, W)")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected ({len(images)},), one class number an image"
        )
    device = next((t.device for t in (*model.parameters(), *model.buffers())), images.device)
    for name, tensor in (("images", images), ("labels", labels)):
        if tensor.device != device:
            raise ValueError(f"{name} are on {tensor.device}; expected {device}, where the model is")


def largest_label(images: Tensor, labels: Tensor) -> int:
    """The largest label. ValueError for pixels outside [0, 1], NaN or a negative label: one read-back."""
    limits = [t.to(torch.float64) for t in (*torch.aminmax(images), *torch.aminmax(labels))]
    low, high, first, last = torch.stack(limits).tolist()
    if math.isnan(low) or math.isnan(high):
        raise ValueError("images contain NaN; expected pixels in [0, 1]")
    if low < 0 or high > 1:
        remedy = "A model that wants other values normalises inside: nn.Sequential(normalise, model)"
        if low > -0.01 and high < 1.01:
            remedy = "What rounding or resizing left outside: images.clamp(0, 1)"
        raise ValueError(f"images span {span(low, high)}; expected pixels in [0, 1]. {remedy}")
    if first < 0:
        raise ValueError(f"labels contain {int(first)}; expected class numbers from 0")
    return int(last)


def logits_of(output: object, count: int) -> Tensor:
    """`output` where it is logits (count, classes). TypeError or ValueError where it is not."""
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returned a {type(output).__name__}; expected logits (N, classes)")
    if output.ndim != 2 or output.shape[0] != count:
        raise ValueError(
            f"the model returned shape {tuple(output.shape)} for {count} images; "
            f"expected logits ({count}, classes)"
        )
    return output


def check_labels_fit(largest: int, classes: int) -> None:
    """ValueError for a label that the model has no class for."""
    if largest >= classes:
        raise ValueError(f"labels reach {largest}; the model has {classes} classes, 0 to {classes - 1}")
