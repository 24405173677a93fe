"""Training methods on the fast path, one objective a file."""

from arat_fast.methods.arat import ARAT
from arat_fast.methods.arrest import ARREST
from arat_fast.methods.at import AT
from arat_fast.methods.base import Method, Outputs
from arat_fast.methods.create import METHODS, branches_of, create_method
from arat_fast.methods.emr import EMR
from arat_fast.methods.lbgat import LBGAT
from arat_fast.methods.mail import MAIL
from arat_fast.methods.mart import MART
from arat_fast.methods.standard import Standard
from arat_fast.methods.trades import TRADES

__all__ = [
    "ARAT",
    "ARREST",
    "AT",
    "EMR",
    "LBGAT",
    "MAIL",
    "MART",
    "METHODS",
    "TRADES",
    "Method",
    "Outputs",
    "Standard",
    "branches_of",
    "create_method",
]
