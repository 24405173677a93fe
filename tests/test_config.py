"""Configuration: recipes, ranges, names, and the round trip through JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from arat_fast.config import (
    AttackConfig,
    TrainConfig,
    checked_attack,
    load_recipe,
    recipe_names,
    resolved,
    save_json,
    to_mapping,
    validated,
    with_published_choices,
)
from arat_fast.errors import UserError
from arat_fast.pixels import format_pixels, parse_pixels


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    save_json(config, tmp_path / "config.json")
    assert load_recipe(str(tmp_path / "config.json")) == config


def test_the_papers_eight_settings() -> None:
    for dataset in ("cifar10", "cifar100"):
        for model, gamma in (("resnet18", 30.0), ("wrn-34-10", 100.0)):
            for swa in (False, True):
                config = load_recipe(f"arat-{'swa-' if swa else ''}{dataset}-{model}")
                expected = dataclasses.replace(
                    TrainConfig(),
                    dataset=dataset,
                    model=model,
                    arat=dataclasses.replace(TrainConfig().arat, gamma=gamma),
                    averaging=dataclasses.replace(TrainConfig().averaging, swa_start=76 if swa else 0),
                )
                assert config == expected


def test_defaults_are_the_papers() -> None:
    config = TrainConfig()
    assert (config.attack.eps, config.attack.alpha, config.attack.steps) == (8 / 255, 2 / 255, 10)
    assert (config.epochs, config.batch_size, config.momentum, config.weight_decay) == (100, 128, 0.9, 5e-4)
    assert config.validation == config.limit_train == 0
    assert not config.attack.aliased_start
    attack = resolved(config).attack
    assert (attack.loss, attack.start, attack.bn) == ("ce", "uniform", "batch")


@pytest.mark.parametrize("text", ["8/255", "0.0314", "128/255", "0.12", "0", "0.5/255", "1e-3"])
def test_pixel_quantities_round_trip(text: str) -> None:
    value = parse_pixels(text)
    assert parse_pixels(format_pixels(value)) == value


@pytest.mark.parametrize("text", ["", "8/0", "8/", "eight", "nan", "inf", "-1/255", "1/2/3"])
def test_wrong_pixel_quantities(text: str) -> None:
    with pytest.raises(ValueError, match="is n"):
        parse_pixels(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"attack": {"epz": "8/255"}}, "did you mean 'attack.eps'"),
        ({"attack": {"eps": "big"}}, "attack.eps = 'big'"),
        ({"attack": {"eps": -1}}, "attack.eps"),
        ({"attack": 8}, "attack must map"),
        ({"epochs": 2.5}, "epochs = 2.5"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"epochs": "many"}, "epochs = 'many'"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"batch_size": 1}, "batch_size = 1"),
        ({"drops": [0]}, "drops.0"),
        ({"method": "arta"}, "method = 'arta'"),
        ({"arat": {"gamma": -1}}, "arat.gamma"),
        ({"momentum": 1.0}, "less than 1"),
        ({"seed": True}, "seed = True: expected no boolean"),
        ({"arat": {"gamma": False}}, "arat.gamma = False: expected no boolean"),
        ({"drops": [20, True]}, "expected no boolean"),
        ({"attack": {"eps": 8}}, "attack.eps = 8: pixels are in [0, 1]"),
        ({"evaluation": {"eps": "1.5"}}, "write 8/255"),
    ],
)
def test_wrong_values_name_the_key_and_what_was_expected(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=r"^mine\.yaml: ") as caught:
        validated(values, "mine.yaml")
    assert message in str(caught.value)


def test_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'arat-cifar10-resnet18'"):
        load_recipe("arat-cifar10-resnet-18")


def test_recipe_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_recipe(str(tmp_path / "absent.yaml"))
    (tmp_path / "broken.yaml").write_text("attack: [1, 2")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(str(tmp_path / "broken.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(UserError, match="must map names"):
        load_recipe(str(tmp_path / "list.yaml"))


@pytest.mark.parametrize("content", ["", "# a comment\n", "null", "{}"])
@pytest.mark.parametrize("name", ["mine.yaml", "config.json"])
def test_an_empty_file_is_not_the_defaults(content: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    message = "is not valid JSON" if "#" in content and name.endswith("json") else "is empty"
    with pytest.raises(UserError, match=message):
        load_recipe(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty-list.json", b"[]", "must map names"),
        ("twice.yaml", b"epochs: 3\nseed: 1\nepochs: 4\n", "'epochs' is given twice"),
        ("nested.yaml", b"attack:\n  steps: 3\n  steps: 4\n", "'steps' is given twice"),
        ("twice.json", b'{"epochs": 3, "epochs": 4}', "'epochs' is given twice"),
        ("cut.json", b'{"epochs": 3, "se', "is not valid JSON"),
        ("broken.yaml", b"attack: [1, 2", "is not valid YAML"),
        ("latin.yaml", b"model: r\xe9seau\n", "no UTF-8 text"),
        ("latin.json", b'{"model": "r\xe9seau"}', "no UTF-8 text"),
    ],
)
def test_damaged_files_get_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_an_l2_radius_may_exceed_one() -> None:
    assert validated({"attack": {"eps": 1.5, "norm": "L2"}}).attack.eps == 1.5
    with pytest.raises(ValueError, match=r"attack\.eps = 8"):
        checked_attack(AttackConfig(eps=8))


def test_another_method_gets_its_own_attack_and_margin() -> None:
    recorded = resolved(validated({"method": "mail-at", "attack": {"steps": 3}}))
    freed = dataclasses.replace(with_published_choices(recorded), method="mail-trades")
    assert resolved(freed) == resolved(validated({"method": "mail-trades", "attack": {"steps": 3}}))


def test_mapping_writes_pixels_as_fractions() -> None:
    assert to_mapping(TrainConfig())["attack"]["eps"] == "8/255"
