"""Checkpoints of other programs into our networks: ARAT's authors, timm, plain ones; what is refused."""

from __future__ import annotations

import copy
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.errors import UserError
from arat_fast.models import create_model
from arat_fast.models.cifar import WideResNet
from arat_fast.models.weights import load_weights, read_weights
from arat_fast.nn import bind_branches, convert_split_bn, from_authors, to_timm, use_branch

State = dict[str, Tensor]


def authors_network(seed: int = 0, **options: int) -> nn.Module:
    """In the authors' layout, a BatchNorm2d a branch, whose branches differ."""
    torch.manual_seed(seed)
    network = reference.resnet8(**options)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if "tracked" not in name and (".clean." in name or ".adv." in name):
                value.copy_(torch.rand(value.shape) + 0.5)
    return network


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def assert_same_logits(ours: nn.Module, theirs: nn.Module) -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for branch in ("clean", "adv"):
        reference.use_branch(theirs, branch)
        use_branch(ours, branch)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "packed",
    [
        lambda s: s,
        lambda s: prefixed(s, "model."),  # inside the authors' feature extractor
        lambda s: {"state_dict": prefixed(s, "module.model."), "epoch": 3},  # and DataParallel
        lambda s: {"net": prefixed(s, "module."), "acc": 0.5, "epoch": 3},
        lambda s: prefixed(s, "module.") | {"n_averaged": torch.tensor(7)},  # torch's AveragedModel
        lambda s: {"model": prefixed(s, "_orig_mod.")},
        # The first release called the branches base and base_adv.
        lambda s: {k.replace(".clean.", ".base.").replace(".adv.", ".base_adv."): v for k, v in s.items()},
        lambda s: {"format": 1, "method": prefixed(s, "network.") | {"a": torch.ones(())}, "epoch": 2},
    ],
)
def test_the_authors_checkpoints(packed: Callable[[State], object], tmp_path: Path) -> None:
    theirs = authors_network()
    torch.save(packed(theirs.state_dict()), tmp_path / "model_last.pt")
    ours = load_weights(create_model("resnet8"), tmp_path / "model_last.pt")
    assert_same_logits(ours, theirs)


def test_the_wide_networks_names(tmp_path: Path) -> None:
    """`block1.layer.0.convShortcut` and `fc`, as in the authors' WideResNet and TRADES'."""
    torch.manual_seed(0)
    theirs = reference.WideResNet(10, 1, num_classes=10)
    state = {
        name.replace(".0.", ".layer.0.")
        .replace(".shortcut.", ".convShortcut.")
        .replace("linear.", "fc."): value
        for name, value in theirs.state_dict().items()
    }
    assert {"block1.layer.0.bn1.clean.weight", "block2.layer.0.convShortcut.weight", "fc.bias"} <= set(state)
    state["sub_block1.layer.0.conv1.weight"] = torch.zeros(1)  # never called by TRADES' forward
    torch.save(state, tmp_path / "wrn.pt")
    ours = WideResNet(10, 1, num_classes=10)
    bind_branches(ours)
    ours.to(memory_format=torch.channels_last)
    assert_same_logits(load_weights(ours, tmp_path / "wrn.pt"), theirs)


def test_a_plain_network_fills_every_branch(tmp_path: Path) -> None:
    """pytorch-cifar's names: the shortcut is a Sequential of convolution and BatchNorm."""
    torch.manual_seed(0)
    theirs = reference.resnet8(split_bn=False)
    state = {
        name.replace(".shortcut.", ".shortcut.0.").replace(".shortcut_bn.", ".shortcut.1."): value
        for name, value in theirs.state_dict().items()
    }
    assert "layer2.0.shortcut.1.running_var" in state
    torch.save(state, tmp_path / "plain.pth")
    for branches in (("clean", "adv"), ("adv",)):
        ours = load_weights(create_model("resnet8", branches=branches), tmp_path / "plain.pth")
        x = torch.rand(2, 3, 16, 16)
        for branch in branches:
            use_branch(ours, branch)
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_one_branch_of_split_weights(tmp_path: Path) -> None:
    theirs = authors_network()
    torch.save(theirs.state_dict(), tmp_path / "split.pt")
    x = torch.rand(2, 3, 16, 16)
    for branch in ("clean", "adv"):
        ours = load_weights(create_model("resnet8", branches=("adv",)), tmp_path / "split.pt", branch=branch)
        reference.use_branch(theirs, branch)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="branch is 'both'"):
        load_weights(create_model("resnet8", branches=("adv",)), tmp_path / "split.pt", branch="both")


def test_timms_split_batch_norm(tmp_path: Path) -> None:
    from arat_fast.loaders import torchvision_import  # noqa: F401  (timm imports torchvision)

    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", num_classes=4, in_chans=3).eval()
    theirs = timm.layers.convert_splitbn_model(copy.deepcopy(plain), 2)
    theirs.train()(torch.rand(4, 3, 32, 32))  # each half of the batch moves its own statistics
    theirs.eval()
    torch.save({"state_dict": theirs.state_dict(), "arch": "resnet10t"}, tmp_path / "timm.pth.tar")
    ours = load_weights(convert_split_bn(copy.deepcopy(plain)), tmp_path / "timm.pth.tar").eval()
    x = torch.rand(2, 3, 32, 32)
    use_branch(ours, "clean")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    first, second = ours.get_submodule("conv1.1").running_mean
    assert not torch.equal(first, second)
    assert torch.equal(second, theirs.get_submodule("conv1.1").aux_bn[0].running_mean)
    # A plain timm checkpoint fills both.
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    load_weights(ours, tmp_path / "plain.pth")
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)


def test_timms_layout_of_our_network(tmp_path: Path) -> None:
    theirs = authors_network()
    torch.save(to_timm(from_authors(theirs.state_dict())), tmp_path / "timm.pt")
    assert_same_logits(load_weights(create_model("resnet8"), tmp_path / "timm.pt"), theirs)


def test_safetensors_files(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    theirs = authors_network()
    save_file(dict(theirs.state_dict()), tmp_path / "model.safetensors")
    assert_same_logits(load_weights(create_model("resnet8"), tmp_path / "model.safetensors"), theirs)
    (tmp_path / "model.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        read_weights(tmp_path / "model.safetensors")


class Pickled:
    """An object of somebody's program."""


class Centred(nn.Module):
    """A wrapper with constants of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x - self.mean)
        return logits


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda network: nn.Sequential(nn.Identity(), network),
        lambda network: nn.DataParallel(Centred(network)),
    ],
)
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    theirs = authors_network()
    for saved in (theirs.state_dict(), prefixed(theirs.state_dict(), "module.")):
        torch.save(saved, tmp_path / "plain.pt")
        ours = create_model("resnet8")
        wrapped = wrap(ours)
        assert load_weights(wrapped, tmp_path / "plain.pt") is wrapped
        assert_same_logits(ours, theirs)
    torch.save(wrapped.state_dict(), tmp_path / "wrapped.pt")
    again = create_model("resnet8")
    load_weights(wrap(again), tmp_path / "wrapped.pt")
    assert_same_logits(again, theirs)
    torch.save(theirs.state_dict() | {"linear.weight": torch.zeros(7, 64)}, tmp_path / "plain.pt")
    with pytest.raises(UserError, match=r"linear.weight is \(7, 64\)"):
        load_weights(wrapped, tmp_path / "plain.pt")
    assert_same_logits(ours, theirs)


def test_weights_at_a_key(tmp_path: Path) -> None:
    last, best = authors_network(), authors_network(1)
    file = tmp_path / "file.pth"
    torch.save({"last": last.state_dict(), "best": {"net": best.state_dict()}, "epoch": 3}, file)
    ours = load_weights(create_model("resnet8"), file, key="best")
    assert_same_logits(ours, best)
    for key, message in [
        (None, r"holds weights at last, best; say which, load_weights\(model, file, key='best'\)"),
        ("worst", "has no 'worst': a dict with best, epoch, last"),
        ("epoch", "holds no weights at 'epoch': a int"),
    ]:
        with pytest.raises(UserError, match=message):
            load_weights(ours, file, key=key)


def test_numpys_numbers_beside_the_weights(tmp_path: Path) -> None:
    theirs = authors_network()
    numbers = {"test_robust_acc": np.float64(0.5), "epoch": np.int64(3), "best": np.bool_(True)}
    file = tmp_path / "file.pth"
    torch.save({"state_dict": theirs.state_dict(), **numbers}, file)
    assert_same_logits(load_weights(create_model("resnet8"), file), theirs)
    named = pickle.dumps(np.float64(0.5), 2)
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    assert new in named or old in named
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:  # as the other NumPy would have written it
        for name, content in entries.items():
            swapped = content.replace(new, old) if new in named else content.replace(old, new)
            archive.writestr(name, swapped if name.endswith("data.pkl") else content)
    assert_same_logits(load_weights(create_model("resnet8"), file), theirs)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file of weights at"):
        read_weights(tmp_path / "absent.pt")
    file = tmp_path / "file.pt"
    torch.save({"model": Pickled()}, file)
    with pytest.raises(UserError, match="holds pickled objects, which are not loaded"):
        read_weights(file)
    for content in (b"", b"text, not weights", file.read_bytes()[:200]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is not a readable checkpoint"):
            read_weights(file)
    torch.save({"epoch": 3, "optimizer": {}}, file)
    with pytest.raises(
        UserError, match=r"holds no weights: a dict with epoch, optimizer; expected a state_dict"
    ):
        read_weights(file)
    torch.save([torch.zeros(1)], file)
    with pytest.raises(UserError, match="holds no weights: a list"):
        read_weights(file)


def test_what_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"

    def refused(state: State, match: str) -> None:
        torch.save(state, file)
        ours = create_model("resnet8")
        before = {name: value.clone() for name, value in ours.state_dict().items()}
        with pytest.raises(UserError, match=match):
            load_weights(ours, file)
        assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())

    refused(
        authors_network(num_classes=100).state_dict(),
        r"is for 100 classes \(linear.weight is \(100, 64\)\); the model has 10",
    )
    refused(
        authors_network(in_channels=1).state_dict(),
        r"does not fit ResNet: conv1.weight is \(16, 1, 3, 3\), expected \(16, 3, 3, 3\)",
    )
    plain = reference.resnet8(split_bn=False).state_dict()
    refused(plain | {"bn1.bias": torch.zeros(3)}, r"bn1.bias is \(3,\), expected \(16,\)")
    refused(
        {"features.0.weight": torch.zeros(3)},
        r"is of another network than ResNet: it has no conv1.weight \(\d+ of \d+ entries missing\) and has "
        r"features.0.weight that the model lacks \(1 such\)",
    )
    del plain["linear.bias"]
    refused(plain, r"has no linear.bias \(1 of \d+ entries missing\)$")
    broken = authors_network().state_dict()
    del broken["bn1.adv.bias"]
    refused(broken, r"cannot be read: state_dict has no bn1\.adv\.bias")
