"""Knowledge distillation losses for PyTorch, and one wrapper that runs teacher and student."""

from distill._distiller import Distiller, DistillerOutput, Term
from distill._registry import create_loss, list_losses, register_loss
from distill.losses.kl import KLLoss, kl_loss
from distill.losses.linear_logit import LinearLogitLoss, linear_logit_loss
from distill.losses.logit import LogitLoss, logit_loss

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "DistillerOutput",
    "KLLoss",
    "LinearLogitLoss",
    "LogitLoss",
    "Term",
    "create_loss",
    "kl_loss",
    "linear_logit_loss",
    "list_losses",
    "logit_loss",
    "register_loss",
]
