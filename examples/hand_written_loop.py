"""A hand-written loop of PGD adversarial training (Madry et al. 2018), made faster. Lines changed: 3.

    before                                  after
    model = Net()                           model = accelerate(Net())
                                            attack = PGD(model, bn="batch", update_statistics=True)
    x_adv = pgd(model, images, labels)      x_adv = attack(images, labels)

`bn="batch", update_statistics=True` is what attacking in train mode does. Trains both ways and prints the
losses; `--measure` prints images/s of both.
"""

import argparse
import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from arat_fast import PGD, accelerate
from arat_fast.benchmarks.before_after import before_after


class Net(nn.Module):
    """Your network: images in [0, 1] to logits."""

    def __init__(self, width=32):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(F.relu(self.bn2(self.conv2(x)) + x).mean((2, 3)))


def pgd(model, images, labels, eps=8 / 255, alpha=2 / 255, steps=10):
    """Before: `backward()` computes the weights' gradients too, in each of the steps, for nothing."""
    delta = torch.empty_like(images).uniform_(-eps, eps).requires_grad_()
    for _ in range(steps):
        F.cross_entropy(model((images + delta).clamp(0, 1)), labels).backward()
        delta.data = (delta + alpha * delta.grad.sign()).clamp(-eps, eps)
        delta.grad = None
    return (images + delta).clamp(0, 1).detach()


parser = argparse.ArgumentParser()
for name, default in (("--iterations", 30), ("--batch-size", 32), ("--size", 32)):
    parser.add_argument(name, type=int, default=default)
parser.add_argument("--measure", action="store_true")
options = parser.parse_args()
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = Net().to(device)
faster = accelerate(copy.deepcopy(model))
attack = PGD(faster, bn="batch", update_statistics=True)
optimizers = {m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, faster)}


def iteration(model, attack):
    x_adv = attack(images, labels)
    optimizers[model].zero_grad()
    loss = F.cross_entropy(model(x_adv), labels)
    loss.backward()
    optimizers[model].step()
    return loss.item()


before = partial(iteration, model, partial(pgd, model))
after = partial(iteration, faster, attack)
classes = torch.rand(10, 3, options.size, options.size, device=device)
for k in range(options.iterations):
    labels = torch.randint(0, 10, (options.batch_size,), device=device)
    images = (classes[labels] + 0.1 * torch.randn_like(classes[labels])).clamp(0, 1)
    losses = before(), after()
    print("iteration {}: loss before {:.3f}, after {:.3f}".format(k + 1, *losses))
if options.measure:
    print(before_after(before, after, options.batch_size, device))
