"""Weights of a file, ours or another program's, into a model: read safely, checked entry by entry."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arat_fast.errors import UserError
from arat_fast.nn import SplitBatchNorm2d, single_branch
from arat_fast.nn.foreign import split_branches, under_our_names

__all__ = ["fit_weights", "load_weights", "read_weights"]

# Where training programs put the weights, beside epoch and optimizer.
_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "net", "model", "network")


def read_weights(path: Path | str, key: str | None = None) -> dict[str, Tensor]:
    """The state_dict in a .pt, .pth or .safetensors file, under the file's own names; on the CPU.

    key: where in the file, for one that holds several or keeps it at an unusual place.

    Raises UserError for a file that is missing or damaged, that holds pickled code, or no weights (at `key`).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file of weights at {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if key is not None and not (isinstance(content, Mapping) and key in content):
        raise UserError(f"{path} has no {key!r}: {_described(content)}")
    state = _weights_in(content if key is None else content[key])
    if state is not None:
        return state
    if key is not None:
        raise UserError(f"{path} holds no weights at {key!r}: {_described(content[key])}")
    places = [str(k) for k, v in content.items() if _weights_in(v)] if isinstance(content, Mapping) else []
    if places:
        raise UserError(
            f"{path} holds weights at {', '.join(places)}; say which, load_weights(model, file, "
            f"key={places[-1]!r})"
        )
    raise UserError(
        f"{path} holds no weights: {_described(content)}; expected a state_dict, or one under "
        f"{', '.join(_CONTAINERS)}"
    )


def _described(content: object) -> str:
    inside = f" with {', '.join(sorted(map(str, content))[:5])}" if isinstance(content, Mapping) else ""
    return f"a {type(content).__name__}{inside}"


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path} needs safetensors: pip install 'arat-fast[export]'") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of foreign bytes the unpickler makes anything, IndexError included
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise UserError(
                f"{path} holds pickled objects, which are not loaded because loading runs their code; save "
                "model.state_dict() where it was written"
            ) from None
        known = isinstance(error, pickle.UnpicklingError)
        reason = "not one of torch.save" if known else str(error).split("\n")[0]
        raise UserError(f"{path} is not a readable checkpoint ({reason})") from None


def _numpy_scalars() -> list[Any]:
    """What NumPy's numbers are unpickled by, under the names of NumPy 1 and 2: accuracies beside weights."""
    scalar = np.float64().__reduce__()[0]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]


def _weights_in(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(value, Tensor) for value in content.values()):
        return {str(key): value for key, value in content.items()}
    if "format" in content and isinstance(content.get("method"), Mapping):  # `arat-fast train`'s own
        prefix = "network."
        return {k: v for k, v in content["method"].items() if k.startswith(prefix)} or None
    for name in _CONTAINERS:
        if (found := _weights_in(content.get(name))) is not None:
            return found
    return None


def load_weights(
    model: nn.Module, path: Path | str, branch: str = "adv", key: str | None = None
) -> nn.Module:
    """Load a file's weights into `model`, and return it.

    Reads what `arat-fast` wrote, the ARAT authors' checkpoints, timm's (split BN with `aux_bn`, or plain) and
    plain CIFAR networks of the usual names. Weights with single BatchNorms fill every branch of a model with
    split ones.

    Args:
        model: as `create_model` builds it, or any other; of a wrapped one (DataParallel, a Sequential of
            normalisation and network) weights saved without the wrapper fill the network inside.
        path: .pt, .pth or .safetensors.
        branch: of split weights, for a model with single BatchNorms: clean or adv.
        key: where in the file the state_dict is; the usual names are found without.

    Raises:
        UserError: what `read_weights` raises; weights of another network, of other shapes or of another
            number of classes, named with both. The model is unchanged then.
    """
    fit_weights(model, read_weights(path, key), branch, str(path))
    return model


def _unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and inside it what holds all its parameters: a wrapper's network, and so on."""
    while True:
        yield model
        holders = [child for child in model.children() if any(True for _ in child.parameters())]
        if len(holders) != 1 or model._parameters:
            return
        model = holders[0]


def _named_alike(model: nn.Module, state: Mapping[str, Tensor]) -> int:
    """How many entries have the model's names."""
    wanted = model.state_dict().keys()
    return len(wanted & under_our_names(state, wanted).keys())


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], branch: str, source: str) -> None:
    """Load a state_dict of any known layout; see `load_weights`. `source` is named in errors."""
    try:
        model = max(_unwrapped(model), key=lambda inside: _named_alike(inside, state))
        wanted = model.state_dict()
        state = under_our_names(state, wanted.keys())
        count = split_branches(state)
        layers = [m for m in model.modules() if isinstance(m, SplitBatchNorm2d)]
        if count == 1:  # a run of a method with one branch
            state, count = single_branch(state, "adv", ("adv",)), 0
        elif count and (not layers or len(layers[0].branches) == 1):
            state, count = single_branch(state, branch, ("clean", "adv")), 0
    except ValueError as error:
        raise UserError(f"{source} cannot be read: {error}") from None
    _check_fit(model, state, source, count)
    model.load_state_dict(dict(state))


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str, split: int) -> None:
    wanted = model.state_dict()
    name = type(model).__name__
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted]
    if missing or extra:
        lacks = f"has no {missing[0]} ({len(missing)} of {len(wanted)} entries missing)" if missing else ""
        more = f"has {extra[0]} that the model lacks ({len(extra)} such)" if extra else ""
        raise UserError(
            f"{source} is of another network than {name}: it {' and '.join(filter(None, (lacks, more)))}"
        )
    # A single BatchNorm's entries fill each branch of ours.
    stacked = set() if split else {n for n, m in model.named_modules() if isinstance(m, SplitBatchNorm2d)}
    shapes = {k: v.shape[1:] if k.rpartition(".")[0] in stacked else v.shape for k, v in wanted.items()}
    wrong = {k: v for k, v in state.items() if v.shape != shapes[k]}
    if not wrong:
        return
    key, value = next(iter(wrong.items()))
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1:]
    if {k.rpartition(".")[0] for k in wrong} == set(last) and value.shape[1:] == shapes[key][1:]:
        raise UserError(
            f"{source} is for {value.shape[0]} classes ({key} is {tuple(value.shape)}); "
            f"the model has {shapes[key][0]}"
        )
    raise UserError(
        f"{source} does not fit {name}: {key} is {tuple(value.shape)}, expected {tuple(shapes[key])}"
    )
