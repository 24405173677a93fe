"""Each loss, values and gradients in both logits, against plain floats; weights, phases, constants."""

from __future__ import annotations

from collections.abc import Callable

import plain_losses as plain
import pytest
import torch
from torch import Tensor

from arat_fast.config import MAILConfig, MARTConfig, TRADESConfig
from arat_fast.methods import AT, MAIL, MART, TRADES, Method, Outputs

LABELS = [0, 3, 2, 4, 1]


def logits(seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(5, 5, generator=generator, dtype=torch.float64)


def value_and_gradients(
    method: Method, clean: Tensor, adv: Tensor, labels: list[int]
) -> tuple[Tensor, Tensor | None, Tensor]:
    clean, adv = clean.clone().requires_grad_(), adv.clone().requires_grad_()
    outputs = Outputs(clean=clean if "clean" in method.plan else None, adv=adv)
    total = torch.stack(list(method.loss(outputs, torch.tensor(labels)).values())).sum()
    of_clean, of_adv = torch.autograd.grad(total, (clean, adv), allow_unused=True)
    return total.detach(), of_clean, of_adv


def mail(kind: str, epoch: int = 9, **settings: object) -> MAIL:
    method = MAIL(kind, MAILConfig(start_epoch=5, **settings))  # type: ignore[arg-type]
    method.on_epoch_start(epoch, 1.0)
    return method


def weights(adv: Tensor, slope: float, bias: float) -> list[float]:
    return [plain.mail_weight(z, y, slope, bias) for z, y in zip(adv.tolist(), LABELS, strict=True)]


CASES: dict[str, tuple[Callable[[], Method], Callable[[Tensor], plain.Loss]]] = {
    "at": (AT, lambda _: plain.of_at(LABELS)),
    "trades": (lambda: TRADES(TRADESConfig(beta=6)), lambda _: plain.of_trades(LABELS, 6)),
    "mart": (lambda: MART(MARTConfig(beta=5)), lambda _: plain.of_mart(LABELS, 5)),
    "mail-at": (lambda: mail("at"), lambda adv: plain.of_mail_at(LABELS, weights(adv, 10, -0.5))),
    "mail-trades": (lambda: mail("trades"), lambda adv: plain.of_trades(LABELS, 5, weights(adv, 2, 0))),
    "mail-mart": (lambda: mail("mart"), lambda adv: plain.of_mart(LABELS, 5, weights(adv, 1, -1.5))),
    "mail-at, given": (
        lambda: mail("at", slope=30.0, bias=-0.07),
        lambda adv: plain.of_mail_at(LABELS, weights(adv, 30, -0.07)),
    ),
    "mail-trades, unweighted": (lambda: mail("trades", 4), lambda _: plain.of_trades(LABELS, 5)),
    "mail-mart, unweighted": (lambda: mail("mart", 4), lambda _: plain.of_mart(LABELS, 5)),
    "mail-trades, warm-up by at": (lambda: mail("trades", 4, warm_up="at"), lambda _: plain.of_at(LABELS)),
    "mail-mart, warm-up by at": (lambda: mail("mart", 1, warm_up="at"), lambda _: plain.of_at(LABELS)),
    "mail-trades, after warm-up by at": (
        lambda: mail("trades", 5, warm_up="at"),
        lambda adv: plain.of_trades(LABELS, 5, weights(adv, 2, 0)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_in_float64(case: str) -> None:
    make, expected_of = CASES[case]
    clean, adv = logits(1), logits(2)
    expected = expected_of(adv)
    total, of_clean, of_adv = value_and_gradients(make().double(), clean, adv, LABELS)
    assert float(total) == pytest.approx(expected(clean.tolist(), adv.tolist()), rel=1e-12)
    by_clean, by_adv = plain.gradient(expected, clean.tolist(), adv.tolist())
    torch.testing.assert_close(of_adv, torch.tensor(by_adv, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    by_clean_tensor = torch.tensor(by_clean, dtype=torch.float64)
    got = torch.zeros_like(clean) if of_clean is None else of_clean
    torch.testing.assert_close(got, by_clean_tensor, rtol=1e-6, atol=1e-8)


def test_mail_weighs_the_wrong_more_than_the_right_and_lets_no_gradient_through() -> None:
    method = mail("at").double()
    adv = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 0, 0]], dtype=torch.float64, requires_grad=True)
    w = method.weights(adv, torch.tensor([0, 0, 0]))
    assert not w.requires_grad
    right, wrong, undecided = (float(v) for v in w)
    # Margins -1, 1 and 0, bias -0.5, slope 10: 3 sigmoid(-15), 3 sigmoid(5), 3 sigmoid(-5).
    assert right == pytest.approx(9.2e-7, rel=0.02)
    assert wrong == pytest.approx(2.9799, rel=1e-3)
    assert undecided == pytest.approx(0.020079, rel=1e-3)


def test_phases_are_tensors_changed_in_place() -> None:
    """A captured graph holds the tensor, so it must stay the same one; a checkpoint need not hold it."""
    method = mail("trades", 1)
    phase = method.phase
    assert float(phase) == 0
    method.on_epoch_start(5, 1.0)
    assert method.phase is phase
    assert float(phase) == 1
    assert not method.state_dict()


@pytest.mark.parametrize("case", ["mart", "mail-mart", "trades", "mail-trades"])
def test_bf16_logits_are_widened_before_anything_else(case: str) -> None:
    make, _ = CASES[case]
    clean, adv = logits(1).bfloat16(), logits(2).bfloat16()
    low = value_and_gradients(make(), clean, adv, LABELS)
    full = value_and_gradients(make(), clean.float(), adv.float(), LABELS)
    assert low[0].dtype == torch.float32
    assert torch.equal(low[0], full[0])
    assert low[1] is not None
    assert torch.equal(low[1], full[1].bfloat16())  # type: ignore[union-attr]
    assert torch.equal(low[2], full[2].bfloat16())


def test_marts_constants_survive_bf16_logits() -> None:
    """p_y(x) = 1 and p_k(x') = 0 to the last bit: 1.0000001 - 1 is not 0, and log(0 + 1e-12) is finite."""
    clean = torch.tensor([[60.0, 0, 0]], dtype=torch.bfloat16)
    adv = torch.tensor([[-200.0, 200.0, 0]], dtype=torch.bfloat16)
    terms = MART(MARTConfig(beta=5)).loss(Outputs(clean=clean, adv=adv), torch.tensor([0]))
    # 1.0000001 is 1 + 2^-23 in fp32; log 1e-12 = -27.63; wrong class certain: -log(1e-4) = 9.21 over CE 400.
    assert float(terms["kl"]) == pytest.approx(5 * 2**-23 * 27.631, rel=1e-3)
    assert float(terms["bce"]) == pytest.approx(400 + 9.21, rel=1e-3)
    one = torch.tensor(1.0, dtype=torch.bfloat16)
    assert float(torch.tensor(1.0000001, dtype=torch.bfloat16) - one) == 0  # what fp32 is for


def test_saturated_logits_give_finite_gradients() -> None:
    clean, adv = (torch.tensor([[s * 300.0, 0, 0]]) for s in (1, -1))
    for make, _ in CASES.values():
        total, of_clean, of_adv = value_and_gradients(make(), clean, adv, [0])
        assert bool(torch.isfinite(total))
        assert of_clean is None or bool(torch.isfinite(of_clean).all())
        assert bool(torch.isfinite(of_adv).all())
