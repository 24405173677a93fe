"""The command line: `arat-fast COMMAND ...`."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version

from arat_fast.errors import StopRequested, TrainingError, UserError, unknown_name

# name -> (module, what it does); modules are imported when asked for, so that `--help` is quick.
COMMANDS = {
    "train": ("arat_fast.commands.train", "train a network: a recipe, a file, or flags"),
    "evaluate": ("arat_fast.commands.evaluate", "measure a run's accuracy: clean, PGD, AutoAttack"),
    "analyze": ("arat_fast.commands.analyze", "why a run does what it does: gradients, features, margins"),
    "compare": ("arat_fast.commands.compare", "runs side by side: accuracy, images/s, hours"),
    "export": ("arat_fast.commands.export", "write a trained network for programs without arat-fast"),
    "data": ("arat_fast.commands.data", "write .beton files for FFCV, or check them"),
    "bench": ("arat_fast.commands.bench", "measure kernels and loaders"),
    "runs": ("arat_fast.commands.runs", "list runs with their state and figures"),
    "env": ("arat_fast.commands.env", "show versions, processor and GPU"),
}


def usage() -> str:
    """The text of `arat-fast --help`."""
    lines = "\n".join(f"  {name:10}{what}" for name, (_, what) in COMMANDS.items())
    return (
        "usage: arat-fast COMMAND [OPTIONS]\n\n"
        "Fast adversarial training on one GPU: ARAT and the methods it is compared with.\n\n"
        f"commands:\n{lines}\n\n"
        "`arat-fast COMMAND --help` lists a command's options, `arat-fast --version` says which this is. "
        "First try:\n"
        "  arat-fast train --config digits\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 for a user's mistake, 1 for a failed run, 130 after
    Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"arat-fast {version('arat-fast')}")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
        module = importlib.import_module(COMMANDS[name][0])
        code: int = module.main(rest)
        return code
    except UserError as error:
        print(f"arat-fast: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"arat-fast: {error}", file=sys.stderr)
        return 1
    except StopRequested as stop:
        print(f"arat-fast: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("arat-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141


if __name__ == "__main__":
    sys.exit(main())
