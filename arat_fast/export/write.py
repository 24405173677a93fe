"""The files of an export, each read back and compared with the network that was exported."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from arat_fast.errors import TrainingError, UserError, unknown_name
from arat_fast.evaluation.record import write_json
from arat_fast.export import standalone
from arat_fast.export.plain import PlainNetwork
from arat_fast.export.robustbench import model_info

__all__ = ["FORMATS", "check_formats", "snippet", "write_export"]

FORMATS = ("safetensors", "torch-export", "robustbench")
WEIGHTS, MODEL, PROGRAM, ENTRY = "model.safetensors", "model.py", "model.pt2", "robustbench.json"
# fp32 rounding of the same operations, in another order at most; the networks' logits are of the order of 1.
TOLERANCE = 1e-5


def check_formats(formats: Sequence[str]) -> None:
    """Raise UserError for none, or for an unknown format with the nearest known one."""
    for name in formats:
        if name not in FORMATS:
            raise unknown_name("format", name, FORMATS)
    if not formats:
        raise UserError(f"--format is empty; expected some of {', '.join(FORMATS)}")


def write_export(network: PlainNetwork, out: Path, formats: Sequence[str] = FORMATS) -> dict[Path, float]:
    """Write the formats and a README.md into `out`; files of an earlier export there are replaced.

    Returns the files that hold the network, each with the largest difference of its logits from the
    original's. Raises UserError for an unknown format, without safetensors where it is needed, or where
    `out` cannot be written; TrainingError when a file does not give the original's logits.
    """
    check_formats(formats)
    try:
        out.mkdir(parents=True, exist_ok=True)
        files: dict[Path, Callable[[Tensor], Tensor]] = {}
        if "safetensors" in formats:
            files[out / WEIGHTS] = _write_safetensors(network, out)
        if "torch-export" in formats:
            files[out / PROGRAM] = _write_program(network, out / PROGRAM)
        if "robustbench" in formats:
            write_json(out / ENTRY, model_info(network))
        (out / "README.md").write_text(_readme(network, formats))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; give another --out") from None
    return {path: _difference(network, path, load) for path, load in files.items()}


def _metadata(network: PlainNetwork) -> dict[str, str]:
    version = importlib.metadata.version("arat-fast")
    return {
        "format": "pt",
        "model": network.name,
        "num_classes": str(network.num_classes),
        "in_channels": str(network.in_channels),
        "image_size": "x".join(map(str, network.image_size)),
        "pixels": "[0, 1]",
        "branch": network.branch,
        "written_by": f"arat-fast {version}",
    } | network.about


def _write_safetensors(network: PlainNetwork, out: Path) -> Callable[[Tensor], Tensor]:
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("--format safetensors needs safetensors: pip install 'arat-fast[export]'") from None
    tensors = {name: tensor.contiguous() for name, tensor in network.model.state_dict().items()}
    content = save(tensors, _metadata(network))  # save_file makes a file that only its owner can read
    _replaced(out / WEIGHTS, lambda path: path.write_bytes(content))
    (out / MODEL).write_text(Path(standalone.__file__).read_text())
    return standalone.load_model(out / WEIGHTS)


def _write_program(network: PlainNetwork, path: Path) -> Callable[[Tensor], Tensor]:
    _agree_on_tf32()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network.model, (_images(network, 2),), dynamic_shapes=({0: batch},))
    _replaced(path, lambda temporary: torch.export.save(program, temporary))
    return torch.export.load(path).module()


def _agree_on_tf32() -> None:
    """Make cuDNN's flags readable as a whole, as torch.export reads them.

    After `cudnn.conv.fp32_precision = "ieee"`, which a training run in this process sets, reading raises
    until the older flag says the same (pytorch issue 179445).
    """
    try:
        _ = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _replaced(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f"new-{path.name}")  # torch.export.save insists on the suffix
    write(temporary)
    temporary.replace(path)


def _images(network: PlainNetwork, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, network.in_channels, *network.image_size, generator=generator)


@torch.no_grad()
def _difference(network: PlainNetwork, path: Path, load: Callable[[Tensor], Tensor]) -> float:
    images = _images(network, 3)
    expected = network.original(images)
    worst = float((load(images) - expected).abs().max())
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not worst <= limit:
        raise TrainingError(f"{path} gives other logits than the original: by {worst:.1e}; do not use it")
    return worst


def snippet(network: PlainNetwork, formats: Sequence[str]) -> str:
    """Python that loads the export, run in its folder."""
    shape = (1, network.in_channels, *network.image_size)
    lines = ["import torch"]
    if "safetensors" in formats:
        lines += [f"from model import load_model  # model.py here; it needs {_needs(network.name)}", ""]
        lines += [f'model = load_model("{WEIGHTS}")']
    else:
        lines += ["", f'model = torch.export.load("{PROGRAM}").module()']
    lines += [f"logits = model(torch.rand{shape})  # images in [0, 1]"]
    return "\n".join(lines)


def _needs(name: str) -> str:
    if name in standalone.MODELS:
        return "torch alone"
    return f"torch and {standalone.PHOTO_MODELS.get(name, name).partition('/')[0]}"


def _readme(network: PlainNetwork, formats: Sequence[str]) -> str:
    rows = {k: v for k, v in _metadata(network).items() if k != "format"}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    texts = {
        "safetensors": f"- `{WEIGHTS}`: weights of the network with single BatchNorms; `{MODEL}` defines it.",
        "torch-export": f"- `{PROGRAM}`: the same as a `torch.export` program, of any batch size: "
        f'`torch.export.load("{PROGRAM}").module()`. It runs in eval mode alone.',
        "robustbench": f"- `{ENTRY}`: RobustBench's fields; what is null is to be filled in.",
    }
    listed = "\n".join(texts[name] for name in FORMATS if name in formats)
    code = ""
    if "safetensors" in formats or "torch-export" in formats:
        code = f"\n```python\n{snippet(network, formats)}\n```\n"
    return f"# {network.name}\n\n{listed}\n{code}\n| | |\n|---|---|\n{table}\n"
