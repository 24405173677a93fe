"""Errors that a user can act on, and the nearest known name for one that was mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong; the message says what, what was expected, and what to do next."""


class TrainingError(Exception):
    """A run failed while it ran (non-finite loss, full disk); what was saved is named in the message."""


class StopRequested(Exception):
    """The run was asked to stop; its state is saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """UserError for an unknown `name`, with the nearest of the `known` ones first."""
    choices = sorted(known)
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return UserError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(choices)}")
