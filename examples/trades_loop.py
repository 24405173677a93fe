"""A TRADES loop (Zhang et al. 2019) with our attack. Lines changed: 2, and the attack by hand is gone.

    before                                      after
    model = Net()                               model = accelerate(Net())
                                                attack = PGD(model, 0.031, 0.007, 10, loss="kl",
                                                             start="normal")
    x_adv = kl_attack(model, images, labels)    x_adv = attack(images, labels)

The published attack forwards the clean images anew in each step; ours, once. Trains both ways and prints the
losses; `--measure` prints images/s of both.
"""

import argparse
import copy
from functools import partial

import torch
import torch.nn.functional as F

from arat_fast import PGD, accelerate, reference
from arat_fast.benchmarks.before_after import before_after


def kl(logits, clean_logits):
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(clean_logits, 1), reduction="batchmean")


def kl_attack(model, images, labels, eps=0.031, alpha=0.007, steps=10):
    """Before: as published, with running statistics and a start 0.001 away."""
    model.eval()
    x_adv = images + 0.001 * torch.randn_like(images)
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(kl(model(x_adv), model(images)), x_adv)
        x_adv = x_adv.detach() + alpha * gradient.sign()
        x_adv = (images + (x_adv - images).clamp(-eps, eps)).clamp(0, 1)
    model.train()
    return x_adv


parser = argparse.ArgumentParser()
for name, default in (("--iterations", 30), ("--batch-size", 32), ("--size", 32)):
    parser.add_argument(name, type=int, default=default)
parser.add_argument("--measure", action="store_true")
options = parser.parse_args()
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = reference.resnet8(split_bn=False).to(device)  # your network: images in [0, 1] to logits
faster = accelerate(copy.deepcopy(model))
attack = PGD(faster, 0.031, 0.007, 10, loss="kl", start="normal")
optimizers = {m: torch.optim.SGD(m.parameters(), 0.02, momentum=0.9) for m in (model, faster)}


def iteration(model, attack, beta=6.0):
    x_adv = attack(images, labels)
    optimizers[model].zero_grad()
    logits = model(images)
    loss = F.cross_entropy(logits, labels) + beta * kl(model(x_adv), logits)
    loss.backward()
    optimizers[model].step()
    return loss.item()


before = partial(iteration, model, partial(kl_attack, model))
after = partial(iteration, faster, attack)
for k in range(options.iterations):
    labels = torch.randint(0, 10, (options.batch_size,), device=device)
    images = torch.zeros(options.batch_size, 3, options.size, options.size, device=device)
    images += 0.1 * labels.view(-1, 1, 1, 1) + 0.05 * torch.rand_like(images)
    losses = before(), after()
    print("iteration {}: loss before {:.3f}, after {:.3f}".format(k + 1, *losses))
if options.measure:
    print(before_after(before, after, options.batch_size, device))
