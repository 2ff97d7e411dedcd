"""What the tests of `Rows` share."""

from distill import LogitLoss
from distill._engine.rows import Rows
from distill.losses import _from_teacher, kl, reverse_kl

# What a loss with nothing but a formula gets; the options say that they reach it.
BY_AUTOGRAD = Rows(_from_teacher._formula)
LOSSES = {
    "logit": (LogitLoss.rows, {}),
    "kl": (kl._ROWS, {"temperature": 2.5}),
    "reverse_kl": (reverse_kl._ROWS, {"temperature": 2.5}),
    "by_autograd": (BY_AUTOGRAD, {"temperature": 2.5}),
}


def is_fused(value):
    return "Fused" in type(value.grad_fn).__name__
