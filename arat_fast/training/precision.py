"""Compute precision, and a twin of the model whose convolutions and classifier are in it."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from arat_fast.nn import SplitBatchNorm2d
from arat_fast.nn.bf16 import bf16_pays
from arat_fast.nn.following import follow_settings

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def resolve_precision(name: Precision, device: torch.device) -> Precision:
    """What "auto" stands for on the device: bf16 where it pays, fp16 on older GPUs, else fp32."""
    if name != "auto":
        return name
    if bf16_pays(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def set_float32_products(name: Precision) -> None:
    """Let this process's float32 products run as TF32 ("tf32") or in full ("fp32"); others change nothing."""
    if name in ("fp32", "tf32"):
        # Not the newer fp32_precision: once that is set, torch.export raises in the same process.
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        torch.backends.cudnn.allow_tf32 = name == "tf32"


_CASTABLE = (nn.Conv2d, nn.Linear, SplitBatchNorm2d)


def can_be_cast(model: nn.Module) -> bool:
    """Whether `LowPrecisionTwin` knows every layer that holds floats.

    A model with others, with a mean and deviation of its own, or with hooks of its parameters' gradients runs
    under autocast.
    """

    def holds_floats(layer: nn.Module) -> bool:
        own = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
        return any(tensor.is_floating_point() for tensor in own)

    # Hooks of a parameter's gradient are called for its own, which the copy's weights take the place of.
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()):
        return False
    return all(isinstance(layer, _CASTABLE) for layer in model.modules() if holds_floats(layer))


class LowPrecisionTwin:
    """The model with convolutions and linear layers in a low precision; everything else is the model's own.

    Master weights stay in the model; `refresh` casts them, once an iteration, and takes over which are
    trained and which layers are in train mode; `gather_gradients` brings the gradients back. BatchNorm
    modules are shared, so their parameters, statistics and choices of branch are the model's. With fp32 the
    twin is the model itself and both calls do nothing.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.module = model
        self._low: list[Tensor] = []
        self._master: list[nn.Parameter] = []
        self._copies: list[tuple[nn.Module, nn.Module]] = []
        # A model in float64 is an oracle: it stays as it is.
        if dtype is torch.float32 or any(p.dtype is torch.float64 for p in model.parameters()):
            return
        shared: dict[int, object] = {}
        for layer in model.modules():
            if isinstance(layer, SplitBatchNorm2d):
                shared[id(layer)] = layer
                shared[id(layer.state)] = layer.state
        self.module = copy.deepcopy(model, shared)
        masters = dict(model.named_modules())
        for name, layer in self.module.named_modules():
            if layer is not masters[name]:
                self._copies.append((layer, masters[name]))
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(dtype)
                pairs = zip(layer.parameters(), masters[name].parameters(), strict=True)
                for low, master in pairs:
                    self._low.append(low)
                    self._master.append(master)

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the master weights, one foreach call; take over the model's modes, settings and requires_grad.

        Gradients that an iteration which failed has left are dropped.
        """
        follow_settings(self._copies)
        for layer, model in self._copies:
            if layer.training != model.training:
                layer.training = model.training
        for low, master in zip(self._low, self._master, strict=True):
            low.grad = None
            if low.requires_grad != master.requires_grad:
                low.requires_grad_(master.requires_grad)
        if self._low:
            torch._foreach_copy_(self._low, list(self._master))

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Move the cast weights' gradients to the master weights', in their precision."""
        if not self._low:
            return
        for low, master in zip(self._low, self._master, strict=True):
            if low.grad is not None and master.grad is None:
                master.grad = torch.empty_like(master)
        have = [
            (lo.grad, ma.grad) for lo, ma in zip(self._low, self._master, strict=True) if lo.grad is not None
        ]
        torch._foreach_copy_([m for _, m in have if m is not None], [g for g, _ in have])
        for low in self._low:
            low.grad = None
