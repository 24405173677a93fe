"""What the reference promises beyond the golden figures: recipe, counts, invariants, ablations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.config import load_recipe
from arat_fast.training.schedule import learning_rate


def small_network(split_bn: bool = True) -> reference.ResNet:
    torch.manual_seed(0)
    return reference.ResNet((8, 16), (1, 1), num_classes=10, split_bn=split_bn)


def batch(n: int = 12, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, size, size, generator=generator), torch.arange(n) % 10


def sgd(method: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def test_learning_rate_of_each_epoch() -> None:
    config = load_recipe("arat-cifar10-resnet18")
    expected = [0.02] + [0.1] * 75 + [0.01] * 15 + [0.001] * 9
    assert [learning_rate(config, e) for e in range(1, 101)] == pytest.approx(expected, rel=1e-12)


def test_statistics_are_updated_eleven_times_in_the_adv_branch_and_once_in_the_clean_one() -> None:
    method = reference.ARAT(small_network())
    images, labels = batch()
    reference.train_step(method, sgd(method), images, labels, steps=10)
    counts = {n: int(b) for n, b in method.network.named_buffers() if n.endswith("num_batches_tracked")}
    assert {c for n, c in counts.items() if ".adv." in n} == {11}
    assert {c for n, c in counts.items() if ".clean." in n} == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attack_stays_in_ball_and_range(dtype: torch.dtype) -> None:
    network = small_network().to(dtype)
    images, labels = batch()
    images = (1.5 * images - 0.25).clamp(0, 1).to(dtype)  # with pixels at 0 and at 1
    start = reference.random_start(images, 8 / 255, "Linf", torch.Generator().manual_seed(0))
    x_adv = reference.pgd(network, images, labels, start=start)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    above = torch.nextafter(images + 8 / 255, torch.tensor(2.0, dtype=dtype))
    below = torch.nextafter(images - 8 / 255, torch.tensor(-1.0, dtype=dtype))
    assert ((x_adv <= above) & (x_adv >= below)).all()


def test_l2_attack_stays_in_ball_and_survives_a_zero_gradient() -> None:
    images, labels = batch()
    eps = 128 / 255
    start = reference.random_start(images, eps, "L2", torch.Generator().manual_seed(0))
    lengths = start.flatten(1).norm(dim=1)
    assert (lengths <= eps * (1 + 1e-6)).all()
    assert lengths.std() > 0.05  # uniform in length, not on the sphere
    options = {"eps": eps, "alpha": 32 / 255, "norm": "L2"}
    x_adv = reference.pgd(small_network(), images, labels, start=start, **options)
    assert (x_adv - images).flatten(1).norm(dim=1).max() <= eps * (1 + 1e-6)
    dead = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    nn.init.zeros_(dead[1].weight)
    assert torch.equal(reference.pgd(dead, images, labels, **options), images)


def test_attack_leaves_everything_else_alone() -> None:
    network = small_network().eval()
    network.layer1.train()  # a mixture of modes must come back as it was
    reference.use_branch(network, "clean")
    images, labels = batch()
    images_before = images.clone()
    buffers = {n: b.clone() for n, b in network.named_buffers()}
    modes = [m.training for m in network.modules()]
    x_adv = reference.pgd(network, images, labels, steps=3)
    assert not x_adv.requires_grad
    assert torch.equal(images, images_before)
    assert not images.requires_grad
    assert all(p.grad is None for p in network.parameters())
    assert [m.training for m in network.modules()] == modes
    branches = {m.branch for m in network.modules() if isinstance(m, reference.SplitBatchNorm2d)}
    assert branches == {"clean"}
    changed = {n for n, b in network.named_buffers() if not torch.equal(b, buffers[n])}
    assert changed
    assert all(".adv." in n for n in changed)
    buffers = {n: b.clone() for n, b in network.named_buffers()}
    for options in ({"batch_statistics": False}, {"update_statistics": False}):
        reference.pgd(network, images, labels, steps=3, **options)
        assert all(torch.equal(b, buffers[n]) for n, b in network.named_buffers())


def test_running_statistics_attack_is_another_attack() -> None:
    network, (images, labels) = small_network(), batch()
    with_batch = reference.pgd(network, images, labels, steps=3, update_statistics=False)
    with_running = reference.pgd(network, images, labels, steps=3, batch_statistics=False)
    assert not torch.equal(with_batch, with_running)


def test_margin_loss_is_the_best_wrong_logit_less_the_true_one() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0], [2.0, 0.0, -1.0]])
    labels = torch.tensor([1, 2])
    assert reference.attack_loss(logits, labels, "margin").tolist() == [-2.0, 3.0]
    with pytest.raises(ValueError, match="dlr"):
        reference.attack_loss(logits, labels, "dlr")


def test_regulariser_is_about_gamma_at_initialisation() -> None:
    torch.manual_seed(0)
    method = reference.ARAT(reference.resnet18(), gamma=30.0)
    images, labels = batch(16, 32)
    terms, _ = method.loss(images, (images + 0.03).clamp(0, 1), labels)
    assert float(terms["invariance"].detach()) == pytest.approx(30, abs=1.5)


def test_tapped_layers_of_the_wide_network() -> None:
    with torch.device("meta"):
        method = reference.ARAT(reference.wrn_34_10())
    dims = [h[0].in_features for h in method.predictors]
    assert dims == [320] + [640] * 10


def test_taps_are_pooled_rectified_batch_norm_outputs() -> None:
    network, (images, _) = small_network().eval(), batch()
    with reference.tapped(network, ["layer2.0.bn2"]) as features:
        network(images)
    x = F.relu(network.bn1(network.conv1(images)))
    block = network.layer2[0]
    x = network.layer1(x)
    before_the_add = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(features["layer2.0.bn2"], F.relu(before_the_add).mean((2, 3)))


def direct_invariance(form: str, h: nn.Module, adv: Tensor, clean: Tensor) -> Tensor:
    """The five forms of the paper's ablation, written once more from their definition."""

    def dist(a: Tensor, b: Tensor) -> Tensor:
        return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()

    return {
        "symmetric": lambda: dist(h(adv), clean),
        "stopgrad": lambda: dist(h(adv), clean.detach()),
        "target-only": lambda: dist(h(adv.detach()), clean),
        "two-sided": lambda: 0.5 * (dist(h(adv), clean.detach()) + dist(clean, adv.detach())),
    }[form]()


@pytest.mark.parametrize("form", ["symmetric", "stopgrad", "target-only", "two-sided"])
def test_invariance_forms_send_gradients_where_they_should(form: str) -> None:
    method = reference.ARAT(small_network(), invariance=form, layers=("layer2.0.bn2",)).double()
    generator = torch.Generator().manual_seed(0)
    features = [torch.rand(6, 16, generator=generator, dtype=torch.float64).requires_grad_() for _ in "ab"]
    h = method.predictors[0]
    ours = method._invariance_term(features[0], features[1], h)
    direct = direct_invariance(form, h, *features)
    torch.testing.assert_close(ours, direct)
    gradients = [torch.autograd.grad(v, features, allow_unused=True) for v in (ours, direct)]
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)
    assert (gradients[0][0] is None) == (form == "target-only")
    assert (gradients[0][1] is None) == (form == "stopgrad")


def test_distances() -> None:
    a, b = torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[2.0, 1.0, 2.0]])
    assert float(reference.distance(a, b, "cosine")) == pytest.approx(1 - 8 / 9)
    assert float(reference.distance(a, b, "mse")) == pytest.approx(2 / 3)
    t, p = F.softmax(b / 2, 1), F.softmax(a / 2, 1)
    expected = float((t * (t / p).log()).sum() * 4)
    assert float(reference.distance(a, b, "kl", temperature=2.0)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="euclid"):
        reference.distance(a, b, "euclid")


def test_weights_of_the_cross_entropies() -> None:
    images, labels = batch()
    x_adv = (images + 0.02).clamp(0, 1)
    torch.manual_seed(0)
    method = reference.ARAT(small_network(), invariance="none")
    method.a.fill_(0.3)
    terms, logits = method.loss(images, x_adv, labels)
    assert set(terms) == {"ce_adv", "ce_clean"}
    torch.testing.assert_close(terms["ce_adv"], 0.3 * F.cross_entropy(logits["adv"], labels))
    torch.testing.assert_close(terms["ce_clean"], 0.7 * F.cross_entropy(logits["clean"], labels))
    method.auto_balance = False
    terms, logits = method.loss(images, x_adv, labels)
    torch.testing.assert_close(terms["ce_clean"], F.cross_entropy(logits["clean"], labels))


def test_balance_is_eval_mode_accuracy_of_the_clean_branch() -> None:
    method, (images, labels) = reference.ARAT(small_network()), batch(20)
    before = {n: b.clone() for n, b in method.network.named_buffers()}
    a = method.balance([(images[:8], labels[:8]), (images[8:], labels[8:])])
    assert all(torch.equal(b, before[n]) for n, b in method.network.named_buffers())
    method.network.eval()
    reference.use_branch(method.network, "clean")
    expected = float((method.network(images).argmax(1) == labels).float().mean())
    assert a == pytest.approx(expected)
    assert float(method.a) == pytest.approx(expected)


@pytest.mark.parametrize("aliased", [False, True])
def test_aliased_start_noises_the_clean_images_and_moves_the_ball(aliased: bool) -> None:
    method, (images, labels) = reference.ARAT(small_network()), batch()
    seen: list[Tensor] = []
    method.network.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].detach().clone()))
    generator = torch.Generator().manual_seed(3)
    eps = 8 / 255
    reference.train_step(
        method, sgd(method), images, labels, eps=eps, aliased_start=aliased, generator=generator
    )
    clean, adv = seen[-2:]
    assert torch.equal(clean, images) != aliased
    reach = float((adv - images).abs().max())
    if aliased:
        assert float((clean - images).abs().max()) == pytest.approx(eps, rel=0.01)
        assert eps * 1.5 < reach <= 2 * eps + 1e-6
        assert clean.min() < 0  # not clamped, as in the authors' code
    else:
        assert reach <= eps + 1e-6


def test_single_batch_norm_ablation_shares_statistics() -> None:
    method = reference.ARAT(small_network(split_bn=False))
    images, labels = batch()
    reference.train_step(method, sgd(method), images, labels, steps=4)
    counts = {int(b) for n, b in method.network.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts == {4 + 2}


def test_training_lowers_the_loss_and_the_attack_raises_it() -> None:
    method, (images, labels) = reference.ARAT(small_network(), gamma=1.0), batch(24)
    optimizer = sgd(method)
    first = reference.train_step(method, optimizer, images, labels, steps=3)
    for _ in range(15):
        last = reference.train_step(method, optimizer, images, labels, steps=3)
    assert last["loss"] < first["loss"]
    network = method.network.eval()
    x_adv = reference.pgd(network, images, labels, steps=5, batch_statistics=False)
    assert F.cross_entropy(network(x_adv), labels) > F.cross_entropy(network(images), labels)
    assert math.isfinite(float(last["loss"]))


def test_standard_method_is_plain_training() -> None:
    method = reference.Standard(small_network(split_bn=False))
    images, labels = batch()
    metrics = reference.train_step(method, sgd(method), images, labels)
    assert set(metrics) == {"loss", "ce_clean", "accuracy_clean"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reference.use_branch(small_network(), "both"), "both"),
        (lambda: reference.ARAT(small_network(), invariance="one-sided"), "one-sided"),
        (lambda: reference.ARAT(nn.Sequential(nn.Flatten())), "invariance_layers"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
