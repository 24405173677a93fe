"""A model made faster in place by named choices, and made plain again: `accelerate` and `revert`."""

from .model import accelerate, revert
from .report import Report

__all__ = ["Report", "accelerate", "revert"]
