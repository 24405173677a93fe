"""A network trained by arat-fast, in plain PyTorch: needs torch and this file alone.

    model = load_model("model.safetensors")     # eval mode
    logits = model(images)                      # images (N, C, H, W), float32 in [0, 1]; logits (N, classes)

Architecture and number of classes are in the weights' metadata. Pixels go in as they are. Training works as
with any module: BatchNorms are `nn.BatchNorm2d`. Networks named torchvision/… or timm/… are those packages'
own, and need them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "PHOTO_MODELS", "ResNet", "WideResNet", "build", "load_model", "read_safetensors"]

_DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}


class BasicBlock(nn.Module):
    """Post-activation residual block: 3x3 - BN - ReLU - 3x3 - BN, add, ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        residual = x if self.shortcut is None else self.shortcut_bn(self.shortcut(x))
        return F.relu(out + residual)


class ResNet(nn.Module):
    """CIFAR residual network: 3x3 stem, no max-pool, groups of basic blocks, each group after the first
    `full_size` ones of stride 2.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        num_classes: int,
        in_channels: int,
        full_size: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        self.groups = [f"layer{g + 1}" for g in range(len(widths))]
        for g, (name, width, count) in enumerate(zip(self.groups, widths, blocks, strict=True)):
            group = nn.Sequential()
            for b in range(count):
                group.append(BasicBlock(channels, width, 2 if g >= full_size and b == 0 else 1))
                channels = width
            self.add_module(name, group)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W) in [0, 1]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.groups:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class WideBlock(nn.Module):
    """Pre-activation residual block: BN - ReLU - 3x3 - BN - ReLU - 3x3, add."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(out)
        sum_: Tensor = residual + self.conv2(F.relu(self.bn2(self.conv1(out))))
        return sum_


class WideResNet(nn.Module):
    """Wide residual network of three groups (Zagoruyko and Komodakis 2016)."""

    def __init__(self, depth: int, widen: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        channels = 16
        for g in range(3):
            group = nn.Sequential()
            for b in range((depth - 4) // 6):
                group.append(WideBlock(channels, 16 * 2**g * widen, 2 if g > 0 and b == 0 else 1))
                channels = 16 * 2**g * widen
            self.add_module(f"block{g + 1}", group)
        self.bn1 = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W) in [0, 1]."""
        x = self.conv1(x)
        for name in ("block1", "block2", "block3"):
            x = self.get_submodule(name)(x)
        logits: Tensor = self.linear(F.relu(self.bn1(x)).mean((2, 3)))
        return logits


MODELS: dict[str, Any] = {
    "resnet8": lambda classes, channels: ResNet((16, 32, 64), (1, 1, 1), classes, channels),
    "resnet18": lambda classes, channels: ResNet((64, 128, 256, 512), (2, 2, 2, 2), classes, channels),
    "resnet18-lbgat": lambda classes, channels: ResNet(
        (64, 128, 256, 512), (2, 2, 2, 2), classes, channels, full_size=2
    ),
    "wrn-34-10": lambda classes, channels: WideResNet(34, 10, classes, channels),
}


PHOTO_MODELS = {"resnet18-imagenet": "torchvision/resnet18", "resnet50-imagenet": "torchvision/resnet50"}


def build(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """The named network with single BatchNorms and fresh weights. Raises ValueError for an unknown name."""
    network: nn.Module
    library, _, rest = PHOTO_MODELS.get(name, name).partition("/")
    if name in MODELS:
        network = MODELS[name](num_classes, in_channels)
    elif library == "torchvision":
        import torchvision

        side = {"aux_logits": False} if rest in ("googlenet", "inception_v3") else {}
        network = torchvision.models.get_model(rest, weights=None, num_classes=num_classes, **side)
        if in_channels != 3 and name in PHOTO_MODELS:
            network.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
    elif library == "timm":
        import timm

        network = timm.create_model(rest, num_classes=num_classes, in_chans=in_channels)
    else:
        raise ValueError(f"model is {name!r}; expected one of {sorted({*MODELS, *PHOTO_MODELS})}")
    return network


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file: 8 bytes of header size, a JSON header, then the tensors' bytes.

    The safetensors package reads the same; this spares its installation.
    """
    data = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if (end - begin) != math.prod(shape) * dtype.itemsize or start + end > len(data):
            raise ValueError(f"{path} is damaged: {name} has {end - begin} bytes for {dtype} {shape}")
        if end == begin:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        one = torch.frombuffer(data, dtype=torch.uint8, count=end - begin, offset=start + begin)
        tensors[name] = one.clone().view(dtype).reshape(shape)
    return tensors, metadata


def load_model(path: str | Path = "model.safetensors") -> nn.Module:
    """The network of an exported file, in eval mode, on the CPU. Raises ValueError for another file."""
    tensors, metadata = read_safetensors(path)
    if "model" not in metadata:
        raise ValueError(f"{path} does not say which network it is for; expected a file of arat-fast export")
    model = build(metadata["model"], int(metadata["num_classes"]), int(metadata["in_channels"]))
    model.load_state_dict(tensors)
    return model.eval()
