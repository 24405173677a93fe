"""Running-statistics BN folded into convolutions: exact, kept up to date, leaving the model alone."""

from __future__ import annotations

import pytest
import torch
from small_models import small_model
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.nn import FoldedModel, SplitBatchNorm2d, bn_mode, convert_split_bn, use_branch


def logits_and_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    return y.detach(), torch.autograd.grad(y.logsumexp(1).sum(), leaf)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


@pytest.mark.parametrize("branch", ["clean", "adv"])
def test_exact_on_resnet18(branch: str) -> None:
    """Errors are those of rounding: logits a few 1e-7, the median image's gradient a few 1e-6.

    Not every image's: an activation near zero may round to the other sign, which moves a gradient by 1e-3.
    """
    torch.manual_seed(0)
    model = convert_split_bn(reference.resnet18(split_bn=False))
    x = torch.rand(5, 3, 32, 32)
    use_branch(model, "both")
    model(torch.cat([x, x + 0.1]))
    model.eval()
    folded = FoldedModel(model, branch, x)
    assert folded.folded == 20
    use_branch(model, branch)
    y, g = logits_and_gradient(model, x)
    y_folded, g_folded = logits_and_gradient(folded.module, x)
    assert relative(y_folded, y) < 1e-6
    assert sorted(relative(one, other) for one, other in zip(g_folded, g, strict=True))[2] < 4e-6
    double = FoldedModel(model.double(), branch, x.double())
    y, g = logits_and_gradient(model, x.double())
    y_folded, g_folded = logits_and_gradient(double.module, x.double())
    assert relative(y_folded, y) < 1e-13
    assert relative(g_folded, g) < 1e-13


def test_follows_the_model_after_refresh() -> None:
    torch.manual_seed(0)
    model = convert_split_bn(small_model())
    x = torch.rand(4, 3, 8, 8)
    folded = FoldedModel(model, "adv", x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    use_branch(model, "adv")
    model(x).square().sum().backward()  # moves statistics
    optimizer.step()  # and weights
    stale = folded.module(x)
    folded.refresh()
    with bn_mode(model, "running"):
        y, g = logits_and_gradient(model, x)
    y_folded, g_folded = logits_and_gradient(folded.module, x)
    assert relative(y_folded, y) < 1e-6
    assert relative(g_folded, g) < 4e-6
    assert relative(stale, y) > 1e-3


def test_leaves_the_model_alone_and_needs_no_weight_gradients() -> None:
    model = convert_split_bn(small_model())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = FoldedModel(model, "clean", torch.rand(4, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model[1].bn1.state.branch == "adv"
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in folded.module.parameters())
    assert folded.module[5].weight.data_ptr() == model[5].weight.data_ptr()


def test_what_no_convolution_precedes_stays_a_batch_norm() -> None:
    """Pre-activation: a block's first BN takes a sum, or the stem's output that its residual takes too."""
    torch.manual_seed(0)
    model = convert_split_bn(reference.WideResNet(10, 1, num_classes=4, split_bn=False)).double().eval()
    x = torch.rand(2, 3, 16, 16).double()
    folded = FoldedModel(model, "adv", x)
    left = [m for m in folded.module.modules() if isinstance(m, SplitBatchNorm2d)]
    assert (folded.folded, len(left)) == (3, 4)  # bn2 of the three blocks; bn1 of each and the last stay
    y, g = logits_and_gradient(model, x)
    y_folded, g_folded = logits_and_gradient(folded.module, x)
    assert relative(y_folded, y) < 1e-12
    assert relative(g_folded, g) < 1e-12


def test_plain_batch_norm_and_convolution_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    x = torch.rand(2, 3, 6, 6)
    folded = FoldedModel(model, None, x)
    torch.testing.assert_close(folded.module(x), model(x))


def test_compiles_without_a_graph_break() -> None:
    model = convert_split_bn(small_model()).eval()
    x = torch.rand(4, 3, 8, 8)
    folded = FoldedModel(model, "adv", x)
    compiled = torch.compile(folded.module, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x), folded.module(x))


class Twice(nn.Module):
    """A convolution whose output is used beside its BN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.bn(out) + out


def test_what_cannot_be_folded_stays() -> None:
    x = torch.rand(2, 3, 6, 6)
    for model in (Twice(), nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))):
        norm = next(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
        nn.init.constant_(norm.running_var, 3.0)
        folded = FoldedModel(model, None, x)
        norm.running_mean.fill_(0.5)  # read as it is now
        folded.refresh()
        assert folded.folded == 0
        assert torch.equal(folded.module(x), model.eval()(x))


def test_a_wrong_branch_is_refused() -> None:
    x = torch.rand(2, 3, 6, 6)
    split = convert_split_bn(small_model())
    with pytest.raises(ValueError, match="branch is 'both'"):
        FoldedModel(split, "both", x)
    with pytest.raises(ValueError, match="branch is None"):
        FoldedModel(split, None, x)
    with pytest.raises(ValueError, match="expected None"):
        FoldedModel(small_model(), "adv", x)
