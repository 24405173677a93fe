"""Trained networks for other programs: plain weights with a model file, a program, a leaderboard entry."""

from .plain import PlainNetwork, from_file, from_run
from .robustbench import model_info
from .write import FORMATS, check_formats, write_export

__all__ = ["FORMATS", "PlainNetwork", "check_formats", "from_file", "from_run", "model_info", "write_export"]
