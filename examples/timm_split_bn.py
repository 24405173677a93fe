"""A timm network with a BatchNorm for clean and one for adversarial images. Lines changed: 4.

    before                                        after
    model = convert_splitbn_model(model, 2)       model = convert_split_bn(model)
                                                  attack = PGD(model, branch="adv")
    x_adv = pgd(model.eval(), images, labels)     x_adv = attack(images, labels)
    model.train()                                 with use_branch(model, "both"):
    logits = model(cat([images, x_adv]))              logits = model(cat([images, x_adv]))

timm's layer knows its branches in train mode alone, so that the attack goes through the clean one; ours goes
through the branch asked for. Trains both ways and prints the losses; `--measure` prints images/s. Needs timm.
"""

import argparse
import copy

import torch
import torch.nn.functional as F

from arat_fast import PGD, convert_split_bn, use_branch
from arat_fast.benchmarks.before_after import before_after
from arat_fast.loaders.torchvision_import import torchvision  # noqa: F401  for a CPU build of torch, see there

import timm  # isort: skip


def pgd(model, images, labels, eps=8 / 255, alpha=2 / 255, steps=10):
    """Before: the usual attack by hand."""
    x_adv = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), labels), x_adv)
        x_adv = x_adv.detach() + alpha * gradient.sign()
        x_adv = (images + (x_adv - images).clamp(-eps, eps)).clamp(0, 1)
    return x_adv


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="resnet10t")
for name, default in (("--iterations", 20), ("--batch-size", 16), ("--size", 64)):
    parser.add_argument(name, type=int, default=default)
parser.add_argument("--measure", action="store_true")
options = parser.parse_args()
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
plain = timm.create_model(options.model, num_classes=10).to(device)
theirs = timm.layers.convert_splitbn_model(copy.deepcopy(plain), 2).to(device)
ours = convert_split_bn(plain)
attack = PGD(ours, branch="adv")
optimizers = {m: torch.optim.SGD(m.parameters(), 0.005, momentum=0.9) for m in (theirs, ours)}


def before():
    return step(theirs, pgd(theirs.eval(), images, labels))


def after():
    x_adv = attack(images, labels)
    with use_branch(ours, "both"):
        return step(ours, x_adv)


def step(model, x_adv):
    optimizers[model].zero_grad()
    loss = F.cross_entropy(model.train()(torch.cat([images, x_adv])), labels.repeat(2))
    loss.backward()
    optimizers[model].step()
    return loss.item()


for k in range(options.iterations):
    labels = torch.randint(0, 10, (options.batch_size,), device=device)
    images = torch.zeros(options.batch_size, 3, options.size, options.size, device=device)
    images += 0.1 * labels.view(-1, 1, 1, 1) + 0.05 * torch.rand_like(images)
    losses = before(), after()
    print("iteration {}: loss before {:.3f}, after {:.3f}".format(k + 1, *losses))
if options.measure:
    print(before_after(before, after, options.batch_size, device))
