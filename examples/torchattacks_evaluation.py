"""Robust accuracy with torchattacks' PGD, and with ours in its place. Lines changed: 2.

    before                                                   after
    import torchattacks                                      from arat_fast import PGD
    attack = torchattacks.PGD(model, 8/255, 2/255, 20)       attack = PGD(model, 8/255, 2/255, 20)
    x_adv = attack(images, labels)                           x_adv = attack(images, labels)

Names, order and defaults of the arguments are torchattacks'. Prints both accuracies; `--measure` prints
images/s of both. Needs torchattacks.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from arat_fast import PGD
from arat_fast.benchmarks.before_after import before_after
from arat_fast.loaders.torchvision_import import torchvision  # noqa: F401  for a CPU build of torch, see there

import torchattacks  # isort: skip


def network(width=32):
    """Your network: images in [0, 1] to logits."""
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def robust_accuracy(model, attack, images, labels):
    """The evaluation, the same before and after."""
    return (model(attack(images, labels)).argmax(1) == labels).float().mean().item()


parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=128)
parser.add_argument("--size", type=int, default=32, help="side of the images")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--measure", action="store_true")
options = parser.parse_args()
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = network().to(device)
# Ten colours with noise, some of them less than 2 eps apart: learnt, and attacked with some success.
labels = torch.arange(options.images, device=device) % 10
images = torch.rand(10, 3, 1, 1, device=device)[labels].expand(-1, -1, options.size, options.size)
images = (0.3 + 0.4 * images + 0.05 * torch.randn_like(images)).clamp(0, 1)
optimizer = torch.optim.Adam(model.parameters(), 0.01)
for _ in range(60):
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
model.eval()

theirs = torchattacks.PGD(model, 8 / 255, 2 / 255, options.steps)
ours = PGD(model, 8 / 255, 2 / 255, options.steps)
clean = (model(images).argmax(1) == labels).float().mean().item()
before, after = (robust_accuracy(model, attack, images, labels) for attack in (theirs, ours))
print(f"accuracy: clean {clean:.3f}, under PGD-{options.steps} before {before:.3f}, after {after:.3f}")
if options.measure:
    evaluations = [lambda a=attack: robust_accuracy(model, a, images, labels) for attack in (theirs, ours)]
    print(before_after(*evaluations, len(images), device))
