"""Features of tapped BatchNorm layers: from our networks by their `taps` argument, from others by hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.models.cifar import pooled


class TapHooks:
    """`logits, features = taps(batch)`: a forward of `module` that collects features (N, C) by layer name.

    A feature is the average-pooled ReLU of the layer's output. A network whose forward takes `taps` fills
    them itself; otherwise hooks do, for layers whose output is normalised only: a BatchNorm fused with a
    residual or a ReLU of another meaning cannot be tapped from outside.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        self.module, self.layers = module, tuple(layers)
        self.inside = "taps" in inspect.signature(module.forward).parameters
        self._found: dict[str, Tensor] = {}
        self._collecting = False
        if not self.inside:
            for name in self.layers:
                module.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            if self._collecting:
                self._found[name] = pooled(F.relu(output))

        return record

    def __call__(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, classes) and the features."""
        if not self.layers:
            return self.module(batch), {}
        if self.inside:
            taps = dict.fromkeys(self.layers, batch)
            return self.module(batch, taps), taps
        self._collecting = True
        logits = self.module(batch)
        self._collecting = False
        features = {name: self._found[name] for name in self.layers}
        self._found.clear()
        return logits, features
