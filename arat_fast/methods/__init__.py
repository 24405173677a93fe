"""Training methods on the fast path, one objective a file."""

from arat_fast.methods.arat import ARAT
from arat_fast.methods.base import Method, Outputs
from arat_fast.methods.standard import Standard

__all__ = ["ARAT", "Method", "Outputs", "Standard"]
