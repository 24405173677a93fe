"""What `accelerate` did to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """Layers by their names in the model.

    Attributes:
        replaced: BatchNorms that are `FusedBatchNorm2d` now, or `SplitBatchNorm2d` with `branches`.
        branches: of split BN; empty without.
        fused_relu: those that clamp at zero themselves.
        fused_add: those that add the residual themselves; most of them are in `fused_relu` too.
        skipped: why a layer was not replaced, or a module's BatchNorms not fused.
        channels_last: whether the parameters are channels-last now.
        precision: "fp32" or "bf16".
        compiled: whether the forward is compiled.
    """

    replaced: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    fused_relu: tuple[str, ...] = ()
    fused_add: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    channels_last: bool = False
    precision: str = "fp32"
    compiled: bool = False

    def __str__(self) -> str:
        both = len(set(self.fused_relu) & set(self.fused_add))
        lines = [
            f"{len(self.replaced)} BatchNorms replaced"
            + (f", branches {', '.join(self.branches)}" if self.branches else "")
            + f"; fused: {len(self.fused_relu) - both} with ReLU, {both} with addition and ReLU, "
            f"{len(self.fused_add) - both} with addition",
            f"channels-last {'on' if self.channels_last else 'off'}, {self.precision}, "
            f"{'compiled' if self.compiled else 'not compiled'}",
        ]
        names: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names.setdefault(reason, []).append(name)
        for reason, all_names in names.items():
            more = f" and {len(all_names) - 1} more" if len(all_names) > 1 else ""
            lines.append(f"skipped {all_names[0]}{more}: {reason}")
        return "\n".join(lines)
