"""Configuration: frozen dataclasses that are the single source of flags, recipes and a run's config.json.

The defaults are the ARAT paper's CIFAR-10 ResNet-18 setting. Values pass through `validated` however they
arrive (flag, YAML, JSON, code), so a range is written once, beside its field.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ConfigDict, PlainSerializer, TypeAdapter, ValidationError

from arat_fast import pixels
from arat_fast.errors import UserError, unknown_name


def _pixels_from_any(value: object) -> float:
    return pixels.parse_pixels(str(value))


# On the command line by pixels.Pixels, in YAML and JSON by the validator: "8/255" is accepted by both.
Pixels = Annotated[
    pixels.Pixels,
    BeforeValidator(_pixels_from_any),
    PlainSerializer(pixels.format_pixels, return_type=str, when_used="json"),
]
Count = Annotated[int, Ge(1)]
Optional = Annotated[int, Ge(0)]  # 0 switches the feature off
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class AttackConfig:
    """The attack of training. All pixel quantities are in units of [0, 1]; 8/255 may be written so."""

    __pydantic_config__ = _STRICT

    eps: Pixels = 8 / 255
    """Radius of the ball around the clean image."""
    alpha: Pixels = 2 / 255
    """Step size."""
    steps: Count = 10
    """Gradient steps."""
    norm: Literal["Linf", "L2"] = "Linf"
    """Norm of the ball."""
    warmup_epochs: Optional = 0
    """Epochs over which eps and alpha grow linearly to their values; 0: none."""
    loss: Literal["auto", "ce", "kl", "margin"] = "auto"
    """What the attack maximises: cross entropy, KL from the clean prediction, or the best wrong logit less
    the true one; auto: the method's published choice, which the run records.
    """
    start: Literal["auto", "uniform", "normal", "none"] = "auto"
    """Start: uniform in the ball (L2: a normal direction of uniform length) and in [0, 1], 0.001 normal noise
    (not clamped, as TRADES'), or the clean image; auto: the method's.
    """
    bn: Literal["auto", "batch", "running"] = "auto"
    """BatchNorm while attacking: the batch's statistics (updates the branch's running ones), or the running
    statistics; auto: the method's.
    """
    branch: Literal["adv", "clean"] = "adv"
    """BatchNorm branch that is attacked, where the method has two."""
    aliased_start: bool = False
    """As the authors' released code: the random start is added to the clean batch itself. Off is the paper's
    text.
    """


@dataclass(frozen=True)
class ARATConfig:
    """The ARAT loss and its ablations."""

    __pydantic_config__ = _STRICT

    gamma: Annotated[float, Ge(0)] = 30.0
    """Weight of the invariance term: 30 for ResNet-18, 100 for WRN-34-10."""
    invariance: Literal["stopgrad", "symmetric", "target-only", "two-sided", "none"] = "stopgrad"
    """Form of the invariance term; stopgrad is the method, symmetric the naive loss."""
    predictor: bool = True
    """Predictor MLP on the adversarial side."""
    split_bn: bool = True
    """A BatchNorm branch of their own for clean and adversarial images."""
    auto_balance: bool = True
    """Weigh the two cross entropies by the clean branch's accuracy; off: both weigh 1."""
    distance: Literal["cosine", "mse", "kl"] = "cosine"
    """Distance between the features."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Softmax temperature of the kl distance."""
    layers: tuple[str, ...] = ()
    """BatchNorm layers to tap; empty: the paper's choice for the model."""


@dataclass(frozen=True)
class TRADESConfig:
    """TRADES (Zhang et al. 2019)."""

    __pydantic_config__ = _STRICT

    beta: Annotated[float, Ge(0)] = 6.0
    """Weight of KL(p(x) || p(x'))."""
    duplicate_forward: bool = False
    """Forward the clean images a second time, as the published code does: the same loss, and one more update
    of the running statistics.
    """


@dataclass(frozen=True)
class MARTConfig:
    """MART (Wang et al. 2020)."""

    __pydantic_config__ = _STRICT

    beta: Annotated[float, Ge(0)] = 5.0
    """Weight of the regulariser: 5 for ResNet-18, 6 for WRN-34-10."""


@dataclass(frozen=True)
class MAILConfig:
    """MAIL (Wang et al. 2021): weights 3·sigmoid(slope·(margin + bias)) of the images' losses."""

    __pydantic_config__ = _STRICT

    slope: Annotated[float, Gt(0)] | None = None
    """Slope of the sigmoid; none: 10 for MAIL-AT, 2 for MAIL-TRADES, 1 for MAIL-MART, as the authors'."""
    bias: float | None = None
    """Shift of the margin; none: -0.5 for MAIL-AT, 0 for MAIL-TRADES, -1.5 for MAIL-MART."""
    beta: Annotated[float, Ge(0)] = 5.0
    """Weight of the KL or MART term of MAIL-TRADES and MAIL-MART."""
    start_epoch: Count = 77
    """First epoch (from 1) with weights: 77 in MAIL's code, 75 in EMR's."""
    warm_up: Literal["unweighted", "at"] = "unweighted"
    """Until then: the method with all weights 1, or plain adversarial training, which forwards x' alone."""


@dataclass(frozen=True)
class LBGATConfig:
    """LBGAT (Cui et al. 2021)."""

    __pydantic_config__ = _STRICT

    beta: Annotated[float, Ge(0)] = 0.0
    """Weight of the TRADES term: 0 on CIFAR-10."""
    teacher: str = "resnet18-lbgat"
    """Network of the teacher that is trained along on clean images; the authors' is a ResNet-18 whose second
    group keeps the images' size.
    """
    clean_statistics: bool = True
    """Without beta: let the clean images update the student's running statistics all the same, as in the
    published code.
    """


@dataclass(frozen=True)
class ARRESTConfig:
    """Distillation in the manner of ARREST (Suzuki et al. 2023), whose authors released no code: this form is
    ours.
    """

    __pydantic_config__ = _STRICT

    weight: Annotated[float, Ge(0)] = 10.0
    """Weight of 1 - cos(features of x', the teacher's features of x)."""
    teacher: str | None = None
    """Run directory of a standard-trained network: the frozen teacher, and the start of the student."""


@dataclass(frozen=True)
class EMRConfig:
    """Effective margin regularisation (Liu and Chan 2022), around any method that has adversarial images."""

    __pydantic_config__ = _STRICT

    coefficient: Annotated[float, Ge(0)] = 0.0
    """Weight per image, the authors' lambda over 128 (0.0234 for 3); falls with the learning rate; 0: off."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Softmax temperature of the class weights."""


@dataclass(frozen=True)
class AveragingConfig:
    """Averages of the weights, kept beside them in the checkpoint."""

    __pydantic_config__ = _STRICT

    swa_start: Optional = 0
    """First epoch (from 1) of the stochastic weight average; 0: none. The paper's is 76."""
    swa_every: Count = 500
    """A snapshot at every step number divisible by this."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Decay of the exponential moving average a step; 0: none."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The attack of evaluation, always on running statistics and the inference branch."""

    __pydantic_config__ = _STRICT

    eps: Pixels = 8 / 255
    """Radius of the ball."""
    alpha: Pixels = 2 / 255
    """Step size of PGD."""
    steps: Count = 20
    """Steps of the PGD that ends a training run."""
    norm: Literal["Linf", "L2"] = "Linf"
    """Norm of the ball."""
    batch_size: Count = 250
    """Images a batch."""
    limit: Optional = 0
    """Test images that are used at the end of training; 0: all, or as many as --limit-train."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run."""

    __pydantic_config__ = _STRICT

    method: Literal[
        "arat",
        "standard",
        "at",
        "trades",
        "mart",
        "mail-at",
        "mail-trades",
        "mail-mart",
        "lbgat",
        "arrest",
    ] = "arat"
    """Training method."""
    model: str = "resnet18"
    """Network: resnet8, resnet18, wrn-34-10, resnet18-lbgat; for photos resnet18-imagenet, resnet50-imagenet;
    torchvision/NAME or timm/NAME.
    """
    dataset: str = "cifar10"
    """Data set: digits (bundled with scikit-learn), cifar10, cifar100, svhn, tiny-imagenet, imagenette, or
    folder (photos in class folders).
    """
    data_root: str | None = None
    """Folder of the data set: the one that holds cifar-10-batches-py, cifar-10-batches-bin and so on."""
    epochs: Count = 100
    """Passes over the training images."""
    batch_size: Annotated[int, Ge(2)] = 128
    """Images a batch; the last, smaller one is kept."""
    learning_rate: Annotated[float, Gt(0)] = 0.1
    """Learning rate of SGD."""
    first_epoch_learning_rate: Annotated[float, Gt(0)] | None = 0.02
    """Learning rate of the first epoch, if another."""
    drops: tuple[Count, ...] = (77, 92)
    """Epochs (from 1) from whose start on the learning rate is a tenth of what it was."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    """Weight decay, on every parameter."""
    padding: Annotated[int, Ge(0), Le(16)] = 4
    """Zero padding of the random crop, in pixels; 0: no crop."""
    flip: bool = True
    """Flip images horizontally at random."""
    validation: Optional = 0
    """Training images held out for validation, chosen by the seed; 0: none, as the paper."""
    limit_train: Optional = 0
    """Use only the first N training images; of the test images at the end as many, unless
    --evaluation.limit says how many; 0: all."""
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0
    """Seed of weights, batches, crops and attack starts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU where there is one."""
    threads: Optional = 0
    """CPU threads; 0: torch's choice. Small networks run best on one, above all on a busy machine."""
    engine: Literal["fast", "reference"] = "fast"
    """What runs an iteration: the fused, compiled fast path, or the plain reference (arat, standard)."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Of the fast engine's convolutions; auto: bf16 where it is fast (GPUs from Ampere on, CPUs with AMX or
    AVX512-BF16), fp16 with a loss scaler on older GPUs, else fp32.
    """
    compile: bool = True
    """Compile the fast engine's passes where that pays: on a GPU, or a CPU with bf16 matrix units."""
    capture: bool = True
    """On a GPU, replay the fast engine's iteration as one CUDA graph."""
    batch_per_process: bool = False
    """With several processes: batch_size is each one's, and the learning rate is multiplied by their number;
    off: batch_size is that of all together, and nothing depends on their number.
    """
    sync_bn: bool = False
    """With several processes: BatchNorm over the images of all of them; off: each normalises its own."""
    loader: Literal["auto", "ffcv", "resident", "torchvision"] = "auto"
    """Where batches come from; auto: resident where the data set fits the device, else ffcv, torchvision."""
    workers: Optional = 0
    """Worker processes of the loader, threads of ffcv's; resident needs none."""
    image_size: Optional = 0
    """Side of photos' random crops in pixels; 0: 160 for imagenette, 224 for folder."""
    analysis_every: Optional = 0
    """Measure gradient conflict every N iterations, into analysis.jsonl; 0: never."""
    arat: ARATConfig = field(default_factory=ARATConfig)
    trades: TRADESConfig = field(default_factory=TRADESConfig)
    mart: MARTConfig = field(default_factory=MARTConfig)
    mail: MAILConfig = field(default_factory=MAILConfig)
    lbgat: LBGATConfig = field(default_factory=LBGATConfig)
    arrest: ARRESTConfig = field(default_factory=ARRESTConfig)
    emr: EMRConfig = field(default_factory=EMRConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


_ADAPTER = TypeAdapter(TrainConfig)

# What the methods' authors attack with: (loss, start, BatchNorm). Named in the run's config.json.
_KL_ATTACK = ("kl", "normal", "running")
_MART_ATTACK = ("ce", "normal", "running")
PUBLISHED_ATTACKS: dict[str, tuple[str, str, str]] = {
    "trades": _KL_ATTACK,
    "lbgat": _KL_ATTACK,
    "mail-trades": _KL_ATTACK,
    "mart": _MART_ATTACK,
    "mail-at": _MART_ATTACK,
    "mail-mart": _MART_ATTACK,
}
# (slope, bias): the MAIL authors' commands; for MART, where they print none, their program's defaults.
PUBLISHED_MARGINS = {"mail-at": (10.0, -0.5), "mail-trades": (2.0, 0.0), "mail-mart": (1.0, -1.5)}


_ATTACK_ADAPTER = TypeAdapter(AttackConfig)


def checked_attack(attack: AttackConfig) -> AttackConfig:
    """The attack, its names and ranges checked as a run's are. Raises ValueError naming the field."""
    try:
        checked = _ATTACK_ADAPTER.validate_python(dataclasses.asdict(attack))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"attack.{name} is {first['input']!r}: {first['msg']}") from None
    _check_radius("attack", checked)
    return checked


def _check_radius(name: str, attack: AttackConfig | EvaluationConfig) -> None:
    """Raise ValueError for a Linf ball that holds every image: a radius in units of 1/255, most likely."""
    if attack.norm == "Linf" and attack.eps > 1:
        raise ValueError(
            f"{name}.eps = {attack.eps:g}: pixels are in [0, 1], and a Linf radius is at most 1; write 8/255 "
            "for 8 of 255"
        )


def resolved_attack(attack: AttackConfig, method: str) -> AttackConfig:
    """The attack with its "auto" choices replaced by what the method's authors attack with."""
    published = PUBLISHED_ATTACKS.get(method, ("ce", "uniform", "batch"))
    chosen: dict[str, Any] = {
        name: value
        for name, value in zip(("loss", "start", "bn"), published, strict=True)
        if getattr(attack, name) == "auto"
    }
    return dataclasses.replace(attack, **chosen)


def published_mail(mail: MAILConfig, method: str) -> MAILConfig:
    """The settings with the authors' slope and bias for the method where none are given."""
    slope, bias = PUBLISHED_MARGINS.get(method, (None, None))
    return dataclasses.replace(
        mail,
        slope=slope if mail.slope is None else mail.slope,
        bias=bias if mail.bias is None else mail.bias,
    )


def with_published_choices(config: TrainConfig) -> TrainConfig:
    """The configuration with attack and margin back at "auto" and None, for `resolved` to choose them for
    another method.
    """
    return dataclasses.replace(
        config,
        attack=dataclasses.replace(config.attack, loss="auto", start="auto", bn="auto"),
        mail=dataclasses.replace(config.mail, slope=None, bias=None),
    )


def resolved(config: TrainConfig) -> TrainConfig:
    """The configuration with attack and margin resolved for its method: what a run records."""
    return dataclasses.replace(
        config,
        attack=resolved_attack(config.attack, config.method),
        mail=published_mail(config.mail, config.method),
    )


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """Plain JSON values, nested as the dataclasses are; pixel quantities as text (`8/255`)."""
    mapping: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return mapping


def validated(values: Mapping[str, Any] | TrainConfig, source: str = "configuration") -> TrainConfig:
    """A TrainConfig of the given (possibly partial) values, checked for names, types and ranges.

    Raises UserError that names `source`, the key, what it holds and what was expected.
    """
    if isinstance(values, TrainConfig):
        values = dataclasses.asdict(values)
    _check_names(TrainConfig, values, source)
    try:
        config = _ADAPTER.validate_python(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in e['loc'])} = {e['input']!r}: {e['msg']}" for e in error.errors()
        ]
        raise UserError(f"{source}: " + "; ".join(problems)) from None
    try:
        _check_radius("attack", config.attack)
        _check_radius("evaluation", config.evaluation)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    return config


def _check_names(cls: type, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: {prefix.rstrip('.') or 'the file'} must map names to values")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            error = unknown_name("key", f"{prefix}{key}", (prefix + name for name in fields))
            raise UserError(f"{source}: {error}")
        nested = fields[key].default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            _check_names(nested, value, source, f"{prefix}{key}.")
        elif fields[key].type != "bool" and _holds_bool(value):  # pydantic would take `true` for 1
            raise UserError(
                f"{source}: {prefix}{key} = {value!r}: expected no boolean (in YAML, yes and on are)"
            )


def _holds_bool(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_bool, value)))


def recipe_names() -> list[str]:
    """Names that `--config` takes, sorted."""
    folder = resources.files("arat_fast") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings give a key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        _check_unique([str(key.value) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_unique([key for key, _ in pairs])
    return dict(pairs)


def _check_unique(keys: list[str]) -> None:
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} is given twice")


def _parsed(text: str, name: str) -> Any:
    """The values of a YAML or JSON text. Raises UserError that names the file and its format."""
    is_json = name.endswith(".json")
    try:
        if is_json:
            return json.loads(text, object_pairs_hook=_unique_pairs)
        return yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} is not valid {'JSON' if is_json else 'YAML'}: {reason}") from None


def load_recipe(name_or_file: str) -> TrainConfig:
    """The configuration of a bundled recipe, a YAML file, or a run's config.json.

    Raises UserError for an unknown name (with the nearest known one), or a file that is no valid
    configuration.
    """
    if name_or_file in recipe_names():
        text = (resources.files("arat_fast") / "recipes" / f"{name_or_file}.yaml").read_text()
    elif Path(name_or_file).suffix in (".yaml", ".yml", ".json"):
        try:
            text = Path(name_or_file).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read the recipe file {name_or_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{name_or_file} is no UTF-8 text: save it as UTF-8, or restore a copy") from None
    else:
        raise unknown_name("recipe", name_or_file, recipe_names())
    values = None if not text.strip() else _parsed(text, name_or_file)
    if values is None or values == {}:  # not the defaults of another data set and network
        raise UserError(f"{name_or_file} is empty: name at least the method, or restore a copy of the file")
    return validated(values, name_or_file)


def save_json(config: TrainConfig, path: Path) -> None:
    """Write the configuration; `load_recipe` reads it back to an equal one."""
    path.write_text(json.dumps(to_mapping(config), indent=2) + "\n")
