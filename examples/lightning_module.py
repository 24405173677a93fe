"""A Lightning module whose `training_step` calls `TrainStep`: any method of this project in your Trainer.

    before                                          after
    net = Net()                                     net = accelerate(Net(), split_bn=("adv",))
                                                    self.automatic_optimization = False
                                                    def on_train_start(self): self.step = TrainStep(...)
    def training_step(self, batch, k):              def training_step(self, batch, k):
        return loss(self.net(pgd(self.net, *batch)))    self.log_dict(self.step(*batch))

Lines changed: 4. `TrainStep` updates the weights by itself, so that Lightning counts no optimizer steps: say
max_epochs, not max_steps. Prints the losses of both; `--measure` prints images/s. Needs lightning.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from arat_fast import AttackConfig, TrainStep, accelerate, reference
from arat_fast.benchmarks.before_after import before_after
from arat_fast.loaders.torchvision_import import torchvision  # noqa: F401  for a CPU build of torch, see there
from arat_fast.methods import AT

import lightning  # isort: skip


class Before(lightning.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def training_step(self, batch, k):
        loss = F.cross_entropy(self.net(reference.pgd(self.net, *batch)), batch[1])  # plain PyTorch
        self.log("loss", loss)
        return loss


class After(Before):
    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def on_train_start(self):
        optimizer, gpu = self.optimizers().optimizer, self.device.type == "cuda"
        self.step = TrainStep(self.net, AT(), optimizer, attack=AttackConfig(), compiled=gpu)

    def training_step(self, batch, k):
        self.log_dict(self.step(*batch))


parser = argparse.ArgumentParser()
for name, default in (("--batches", 30), ("--batch-size", 32), ("--size", 32)):
    parser.add_argument(name, type=int, default=default)
parser.add_argument("--measure", action="store_true")
options = parser.parse_args()
torch.manual_seed(0)
count = options.batches * options.batch_size
labels = torch.randint(0, 10, (count,))
images = 0.1 * labels.view(-1, 1, 1, 1) + 0.05 * torch.rand(count, 3, options.size, options.size)
loader = DataLoader(TensorDataset(images, labels), options.batch_size)


def fit(module):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, **quiet)
    trainer.fit(module, loader)
    return trainer.callback_metrics["loss"].item()


net = reference.resnet8(split_bn=False)  # your network: images in [0, 1] to logits
before, after = Before(copy.deepcopy(net)), After(accelerate(net, split_bn=("adv",)))
print(f"loss of the last batch: before {fit(before):.3f}, after {fit(after):.3f}")
if options.measure:
    print(before_after(lambda: fit(before), lambda: fit(after), count, before.device))
