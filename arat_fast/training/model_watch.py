"""What somebody does to a model between two iterations, which copies and recordings of it would not see."""

from __future__ import annotations

from torch import nn

from arat_fast.nn import SplitBatchNorm2d
from arat_fast.nn.following import settings


class ModelWatch:
    """Looks at a model's layers, weights, modes and settings; reads no device value.

    Some 20 µs an iteration for a ResNet-18.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers, self.weights = list(model.modules()), list(model.parameters())
        self._norms = [m for m in self.layers if isinstance(m, nn.BatchNorm2d | SplitBatchNorm2d)]
        self._parts = [
            (own, name, part)
            for layer in self.layers
            for own in (layer._modules, layer._parameters)
            for name, part in own.items()
        ]
        self._addresses: list[int] = []
        self._modes: list[bool] = []
        self._settings: list[tuple[dict[str, object], str, object]] = []

    def refuse(self) -> None:
        """ValueError for what an iteration cannot follow: a replaced layer, or a BatchNorm in eval mode in a
        model in train mode, whose statistics would not stay.
        """
        for own, name, part in self._parts:
            if own.get(name) is not part:
                raise ValueError(
                    f"{name!r} of the model was replaced after this TrainStep was made; make a new one, with "
                    "an optimizer that holds the new parameters"
                )
        if self.model.training and not all(norm.training for norm in self._norms):
            frozen = {id(norm) for norm in self._norms if not norm.training}
            name = next(name for name, module in self.model.named_modules() if id(module) in frozen)
            raise ValueError(
                f"BatchNorm {name} is in eval mode in a model that trains; an iteration always normalises by "
                "the batch and moves the statistics. Call model.train(); weights are frozen by "
                "requires_grad_(False)"
            )

    def moved(self) -> bool:
        """Whether a weight lies elsewhere than at the last call, as after `.data =`; True at the first."""
        before, self._addresses = self._addresses, [weight.data_ptr() for weight in self.weights]
        return self._addresses != before

    def remember(self) -> None:
        """Note modes and settings: a recording holds for these."""
        self._modes = [layer.training for layer in self.layers]
        self._settings = [(vars(m), *setting) for m in self.layers for setting in settings(m)]

    def changed(self) -> bool:
        """Whether a mode or setting is another than when they were noted."""
        return self._modes != [layer.training for layer in self.layers] or any(
            own.get(name) != value for own, name, value in self._settings
        )
