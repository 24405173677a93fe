"""Foreign state_dicts: the ARAT authors', timm's split BN, and the plain model that one branch is."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import small_model
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.nn import (
    convert_split_bn,
    from_authors,
    from_timm,
    single_branch,
    to_authors,
    to_timm,
    use_branch,
)


def trained() -> nn.Module:
    model = convert_split_bn(small_model())
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if "tracked" not in name else torch.tensor([3, 5]))
    return model


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_authors_names_and_back() -> None:
    ours = dict(trained().state_dict())
    theirs = to_authors(ours)
    assert {
        "1.bn1.clean.weight",
        "1.bn1.adv.running_var",
        "1.bn2.adv.num_batches_tracked",
        "0.weight",
    } <= set(theirs)
    assert theirs["1.bn1.adv.num_batches_tracked"].tolist() == 5
    assert torch.equal(theirs["2.bn2.clean.bias"], ours["2.bn2.bias"][0])
    assert_same(from_authors(theirs), ours)


def test_a_model_in_the_authors_layout_gives_the_same_logits() -> None:
    """`arat_fast.reference` keeps a BatchNorm2d a branch, as the authors do."""
    torch.manual_seed(0)
    theirs = reference.resnet8()
    plain = reference.resnet8(split_bn=False)
    ours = convert_split_bn(plain)
    ours.load_state_dict(from_authors(theirs.state_dict()))
    x = torch.rand(2, 3, 32, 32)
    for branch in ("clean", "adv"):
        reference.use_branch(theirs, branch)
        use_branch(ours, branch)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_timm_names_and_back() -> None:
    ours = dict(trained().state_dict())
    theirs = to_timm(ours)
    assert torch.equal(theirs["1.bn1.weight"], ours["1.bn1.weight"][0])
    assert torch.equal(theirs["1.bn1.aux_bn.0.weight"], ours["1.bn1.weight"][1])
    assert_same(from_timm(theirs), ours)


def test_one_branch_is_a_plain_model() -> None:
    split = trained()
    x = torch.rand(2, 3, 8, 8)
    for branch in ("clean", "adv"):
        plain = small_model().eval()
        plain.load_state_dict(single_branch(split.state_dict(), branch))
        use_branch(split, branch)
        torch.testing.assert_close(plain(x), split.eval()(x))


def test_a_checkpoint_file_holds_tensors_alone(tmp_path: object) -> None:
    file = f"{tmp_path}/model.pt"
    split = trained()
    torch.save(split.state_dict(), file)
    other = convert_split_bn(small_model(1))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(dict(other.state_dict()), dict(split.state_dict()))


def test_other_layouts_are_refused() -> None:
    plain = small_model().state_dict()
    for convert in (from_authors, from_timm, to_authors, to_timm, lambda s: single_branch(s, "adv")):
        with pytest.raises(ValueError, match="state_dict has no"):
            convert(plain)
    theirs = to_authors(trained().state_dict())
    missing = copy.copy(theirs)
    del missing["1.bn1.adv.bias"]
    with pytest.raises(ValueError, match=r"state_dict has no 1\.bn1\.adv\.bias"):
        from_authors(missing)
    with pytest.raises(ValueError, match="branch is 'both'"):
        single_branch(trained().state_dict(), "both")
    with pytest.raises(ValueError, match="has 2 branches; expected 3"):
        to_authors(trained().state_dict(), ("clean", "adv", "third"))
