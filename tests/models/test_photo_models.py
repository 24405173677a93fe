"""Networks for photos: ours and the libraries' against their plain twins, and in a run on real photos."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from image_files import SHARED
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.commands import evaluate, train
from arat_fast.config import ARATConfig, AttackConfig, TrainConfig
from arat_fast.errors import UserError
from arat_fast.loaders.torchvision_import import torchvision
from arat_fast.models import create_model
from arat_fast.models.library import create_library_model
from arat_fast.models.plain import check_model, plain_network
from arat_fast.nn import SplitBatchNorm2d, from_authors, to_authors, use_branch
from arat_fast.training.build import build_fast
from arat_fast.training.cost import iteration_cost
from arat_fast.training.engine import build_engine
from arat_fast.training.step import TrainStep
from arat_fast.training.taps import TapHooks

CPU = torch.device("cpu")
BOTH = ("clean", "adv")


def images(count: int = 3, side: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(  # type: ignore[return-value]
        torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64).contiguous(
            memory_format=torch.channels_last
        )
        for _ in BOTH
    )


def pair(name: str, split: bool = True) -> tuple[nn.Module, nn.Module]:
    """Ours and the plain twin, equal, branches apart from each other; float64."""
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = plain_network(name, 10, 3, split).double()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    ours = create_model(name, 10, 3, BOTH if split else ("adv",)).double()
    state = plain.state_dict()
    ours.load_state_dict(from_authors(state) if split else state)
    return ours, plain


@pytest.mark.parametrize(
    "name", ["resnet18-imagenet", "resnet50-imagenet", "torchvision/resnet18", "timm/resnet26"]
)
def test_fast_equals_plain(name: str) -> None:
    """Logits, taps, every gradient and statistic of a [clean; adv] batch."""
    ours, plain = pair(name)
    layers: tuple[str, ...] = ours.invariance_layers  # type: ignore[assignment]
    assert layers == plain.invariance_layers
    parts = dict(zip(BOTH, images(), strict=True))
    use_branch(ours, "both")
    logits, taps = TapHooks(ours.train(), layers)(torch.cat(list(parts.values())))
    total = logits.square().mean() + sum(t.square().mean() for t in taps.values())
    total.backward()
    expected = torch.zeros((), dtype=torch.float64)
    plain.train()
    for k, (branch, part) in enumerate(parts.items()):
        reference.use_branch(plain, branch)
        with reference.tapped(plain, layers) as features:
            found = plain(part)
        torch.testing.assert_close(logits.chunk(2)[k], found, rtol=1e-9, atol=1e-9)
        for layer in layers:
            torch.testing.assert_close(taps[layer].chunk(2)[k], features[layer], rtol=1e-9, atol=1e-9)
        expected = expected + (found.square().mean() + sum(f.square().mean() for f in features.values())) / 2
    expected.backward()
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    scale = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    stacked = from_authors({n: p.grad for n, p in plain.named_parameters()} | dict(plain.named_buffers()))
    for parameter, gradient in gradients.items():
        assert gradient is not None
        assert float((gradient - stacked[parameter]).abs().max()) < 1e-9 * scale, parameter
    for buffer, value in ours.named_buffers():
        torch.testing.assert_close(value, stacked[buffer], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet18-imagenet", "resnet50-imagenet"])
def test_torchvisions_weights_load_into_every_branch(name: str) -> None:
    torch.manual_seed(3)
    theirs = torchvision.models.get_model(name.removesuffix("-imagenet"), num_classes=7).eval()
    ours = create_model(name, 7, 3).eval()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = images(2, 48)[0].float()
    for branch in BOTH:
        use_branch(ours, branch)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    taps: dict[str, Tensor] = {"": x}
    logits = ours(x, taps)
    torch.testing.assert_close(ours.get_submodule("fc")(taps[""]), logits)


@pytest.mark.parametrize("name", ["resnet18-imagenet", "torchvision/resnet18"])
@pytest.mark.parametrize(("method", "engine"), [("arat", "fast"), ("arat", "reference"), ("at", "fast")])
def test_engines_hand_the_same_network_to_evaluation(name: str, method: str, engine: str) -> None:
    config = TrainConfig(
        model=name,
        method=method,  # type: ignore[arg-type]
        engine=engine,  # type: ignore[arg-type]
        precision="fp32",
        compile=False,
        device="cpu",
        attack=AttackConfig(steps=1, start="uniform", loss="ce", bn="batch"),
    )
    built = build_engine(config, 3, 10, CPU)
    plain = built.plain_network().eval()
    assert type(plain) is torchvision.models.ResNet
    network = built.network.eval()
    if engine == "fast":
        use_branch(network, "adv")
    x = images(2, 32)[0].float()
    torch.testing.assert_close(plain(x), network(x), rtol=1e-4, atol=1e-4)
    other = build_engine(config, 3, 10, CPU)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state(built.state())
    torch.testing.assert_close(other.plain_network().eval()(x), plain(x))


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/regnetx_002", "resnet18-imagenet"])
@pytest.mark.parametrize("method", ["trades", "arat"])
def test_training_steps_with_folded_batch_norm(name: str, method: str) -> None:
    """An attack by running statistics folds BatchNorm; ARAT taps the layers that fuse otherwise."""
    if name.startswith("timm"):
        pytest.importorskip("timm")
    config = TrainConfig(
        model=name,
        method=method,  # type: ignore[arg-type]
        attack=AttackConfig(steps=2, loss="kl", start="normal", bn="running"),
        arat=ARATConfig(layers=("s4.b1.conv1.bn",) if "regnet" in name else ()),
        learning_rate=0.02,
    )
    network, objective = build_fast(config, 3, 10)
    optimizer = torch.optim.SGD([*network.parameters(), *objective.parameters()], lr=0.02)
    step = TrainStep(
        network, objective, optimizer, attack=config.attack, precision="fp32", compiled=False, capture=False
    )
    x, y = images(4, 32)[0].float(), torch.arange(4)
    losses = [float(step(x, y)["loss"]) for _ in range(4)]
    assert all(p.grad is not None for p in network.parameters())
    assert losses[-1] < losses[0]
    assert step.attack.folded is not None
    assert step.attack.folded.folded > 10


def test_grey_images_where_they_can_be() -> None:
    x = torch.rand(2, 1, 32, 32).contiguous(memory_format=torch.channels_last)
    plain = plain_network("resnet18-imagenet", 10, 1, True)
    ours = create_model("resnet18-imagenet", 10, 1)
    ours.load_state_dict(from_authors(plain.state_dict()))
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="takes images of 3 channels, not 1"):
        create_model("torchvision/resnet18", 10, 1)


@pytest.mark.parametrize("build", [create_model, lambda name: plain_network(name, 10, 3, True)])
def test_unknown_names(build: object) -> None:
    assert callable(build)
    for name, near in {
        "resnet18-imagnet": "did you mean 'resnet18-imagenet'",
        "torchvision/resnet19": "nearest are .*torchvision/resnet18",
        "torchvison/resnet18": "Known: .*torchvision/NAME",
    }.items():
        with pytest.raises(UserError, match=near):
            build(name)
    check_model("torchvision/anything")  # looked up when it is built
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"nearest are .*timm/resnet26"):
        build("timm/resnet27")


def test_a_network_without_batch_norm() -> None:
    name = "torchvision/vit_b_16"
    for build in (lambda: create_model(name), lambda: plain_network(name, 10, 3, True)):
        with torch.device("meta"), pytest.raises(UserError, match="has no BatchNorm2d to split"):
            build()
    with torch.device("meta"):
        model = create_library_model(name, 10, 3, ("adv",))
    assert not any(isinstance(m, SplitBatchNorm2d) for m in model.modules())


def test_library_networks_and_arrest() -> None:
    config = TrainConfig(model="torchvision/resnet18", method="arrest")
    with pytest.raises(UserError, match="arrest compares what enters the classifier"):
        build_fast(config, 3, 10, {})


def test_arat_without_layers_to_tap_is_refused() -> None:
    """It would train without its invariance term, and nobody would know."""
    config = TrainConfig(model="torchvision/mobilenet_v2")
    with torch.device("meta"), pytest.raises(UserError, match="names no invariance_layers"):
        build_fast(config, 3, 10)
    chosen = dataclasses.replace(config, arat=ARATConfig(layers=("features.18.1",)))
    with torch.device("meta"):
        assert build_fast(chosen, 3, 10)[1].taps == ("features.18.1",)


@pytest.mark.parametrize(
    ("name", "gflop", "parameters"),
    [("resnet18-imagenet", 3.63, 11_689_512), ("resnet50-imagenet", 8.18, 25_557_032)],
)
def test_arithmetic_of_an_image(name: str, gflop: float, parameters: int) -> None:
    """Twice the multiply-adds that torchvision documents: 1.81 and 4.09 GFLOP at 224 pixels."""
    config = TrainConfig(model=name, method="standard", arat=ARATConfig(split_bn=False))
    cost = iteration_cost(config, (224, 224, 3), 1000)
    assert cost.forward_flop / 1e9 == pytest.approx(gflop, abs=0.02)
    assert cost.parameters == parameters


def test_split_state_has_the_authors_names() -> None:
    with torch.device("meta"):
        state = create_model("resnet50-imagenet", 10).state_dict()
        plain = plain_network("resnet50-imagenet", 10, 3, True).state_dict()
    assert set(to_authors(state)) == set(plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18-imagenet", "timm/resnet10t"])
def test_a_run_on_real_photos(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = SHARED / "photos_sign_digits"
    if not photos.exists():
        pytest.skip(f"the photos are not at {photos}")
    if name.startswith("timm"):
        pytest.importorskip("timm")
    run = tmp_path / "run"
    flags = f"""--dataset folder --data-root {photos} --model {name} --image-size 32 --epochs 1
        --batch-size 16 --limit-train 32 --attack.steps 1 --evaluation.steps 1 --evaluation.limit 20
        --device cpu --threads 1 --learning-rate 0.01 --run-dir {run}"""
    assert train.main(flags.split()) == 0
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["epoch"] == 1
    assert line["loss"] > 0
    assert {"ce_adv", "ce_clean", "invariance"} <= set(line)
    capsys.readouterr()
    assert evaluate.main([str(run), "--attacks", "clean,pgd2", "--limit", "20", "--device", "cpu"]) == 0
    assert "PGD-2" in capsys.readouterr().out
