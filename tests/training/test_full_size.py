"""The networks of the paper at full size: losses, gradients, statistics of a pass against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arat_fast import methods, reference
from arat_fast.config import ARATConfig, AttackConfig
from arat_fast.loaders.sources import load
from arat_fast.models import create_model
from arat_fast.nn import from_authors
from arat_fast.training.step import TrainStep


def reference_method(name: str, dtype: torch.dtype, state: dict[str, Tensor] | None = None) -> reference.ARAT:
    torch.manual_seed(0)
    method = reference.ARAT(reference.MODELS[name](), gamma=30.0).to(dtype)
    if state is not None:
        method.load_state_dict(state)
    return method.train()


def fast_step(name: str, method: reference.ARAT, precision: str) -> TrainStep:
    """The fast path with the method's weights; its optimizer leaves gradients and weights alone."""
    model = create_model(name)
    model.load_state_dict(from_authors(method.network.state_dict()))
    dims = {layer: model.get_submodule(layer).num_features for layer in model.invariance_layers}  # type: ignore[union-attr]
    ours = methods.ARAT(ARATConfig(gamma=30.0), dims)  # type: ignore[arg-type]
    ours.predictors.load_state_dict(method.predictors.state_dict())
    optimizer = torch.optim.SGD([*model.parameters(), *ours.parameters()], lr=0.0)
    return TrainStep(
        model,
        ours,
        optimizer,
        attack=AttackConfig(steps=1, start="none"),
        precision=precision,  # type: ignore[arg-type]
        compiled=False,
    )


def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(n, 3, 32, 32, generator=generator)
    x_adv = (x + 8 / 255 * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    return x, x_adv, torch.arange(n) % 10


def gradients(network: nn.Module) -> dict[str, Tensor]:
    state = {name: b.detach() for name, b in network.named_buffers()}
    state |= {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return from_authors(state)


def eager(method: reference.ARAT, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
    dtype = next(method.parameters()).dtype
    terms, _ = method.loss(x.to(dtype), x_adv.to(dtype), y)
    torch.stack(list(terms.values())).sum().backward()
    return {name: term.detach() for name, term in terms.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "n"), [("resnet18", 6), ("wrn-34-10", 3)])
def test_fp32_is_as_near_to_float64_as_eager_in_the_same_layout(name: str, n: int) -> None:
    x, x_adv, y = batch(n)
    exact = reference_method(name, torch.float64)
    state = {k: v.float() for k, v in exact.state_dict().items()}
    state = {k: v.long() if k.endswith("tracked") else v for k, v in state.items()}
    step = fast_step(name, reference_method(name, torch.float32, state), "fp32")
    plain = reference_method(name, torch.float32, state)
    plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    terms = eager(exact, x, x_adv, y)
    eager(plain, *(t.contiguous(memory_format=torch.channels_last) for t in (x, x_adv)), y)
    metrics = step(x, y, x_adv=x_adv.contiguous(memory_format=torch.channels_last))
    for term, value in terms.items():
        torch.testing.assert_close(metrics[term].double(), value, rtol=1e-5, atol=0, msg=term)
    true, yardstick = gradients(exact.network), gradients(plain.network)
    for parameter, value in step.model.named_parameters():
        assert value.grad is not None
        scale = true[parameter].norm()
        error = float((value.grad.double() - true[parameter]).norm() / scale)
        allowed = float((yardstick[parameter].double() - true[parameter]).norm() / scale)
        assert error <= 2 * allowed + 1e-4, (parameter, error, allowed)
    statistics = from_authors(exact.network.state_dict())
    for buffer, value in step.model.named_buffers():
        torch.testing.assert_close(
            value.double(), statistics[buffer].double(), rtol=1e-4, atol=1e-5, msg=buffer
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bf16_gradients_of_a_partly_trained_network_point_the_same_way(cifar_root: Path) -> None:
    """Cosine with the fp32 gradient at least 0.99 for every convolution and the classifier, on real images.

    (On noise, which has nothing to learn, it is 0.95 in the first layer: the gradient there nearly cancels.)
    """
    train, _ = load("cifar10", str(cifar_root))
    images = torch.from_numpy(train.images[:160]).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(train.labels[:160])
    generator = torch.Generator().manual_seed(0)
    noise = 8 / 255 * (2 * torch.rand(images.shape, generator=generator) - 1).sign()
    shifted = (images + noise).clamp(0, 1)
    method = reference_method("resnet18", torch.float32)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.02, momentum=0.9)
    for rows in torch.arange(128).split(16):
        reference.train_step(method, optimizer, images[rows], labels[rows], x_adv=shifted[rows])
    x, x_adv, y = images[128:], shifted[128:], labels[128:]
    exact = reference_method("resnet18", torch.float32, method.state_dict())
    step = fast_step("resnet18", method, "bf16")
    eager(exact, x, x_adv, y)
    step(x, y, x_adv=x_adv.contiguous(memory_format=torch.channels_last))
    true = gradients(exact.network)
    worst = {}
    for name, parameter in step.model.named_parameters():
        assert parameter.grad is not None
        if parameter.ndim == 4 or name == "linear.weight":
            worst[name] = float(
                torch.cosine_similarity(parameter.grad.flatten(), true[name].flatten(), dim=0)
            )
    assert min(worst.values()) >= 0.99, sorted(worst.items(), key=lambda item: item[1])[:5]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attack_reaches_the_references_loss(precision: str) -> None:
    """Strength: the loss that the fast attack reaches is within 2 % of the reference's on the same images."""
    x, _, y = batch(16)
    method = reference_method("resnet18", torch.float32)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)
    for _ in range(6):
        reference.train_step(method, optimizer, x, y, steps=1, random=False, x_adv=x)
    step = fast_step("resnet18", method, precision)
    step.attack.settings = AttackConfig(steps=5, start="none", loss="ce", bn="running")
    with torch.no_grad():
        step.twin.refresh()
    _, fast = step.attack(x.contiguous(memory_format=torch.channels_last), y)
    expected = reference.pgd(method.network, x, y, steps=5, batch_statistics=False)
    with reference.attack_mode(method.network, "adv", batch_statistics=False), torch.no_grad():
        reached, wanted, start = (
            float(nn.functional.cross_entropy(method.network(images), y)) for images in (fast, expected, x)
        )
    assert wanted > start
    assert abs(reached - wanted) <= 0.02 * wanted
