"""Knowledge distillation losses for PyTorch, and one wrapper that runs teacher and student."""

from distill._distiller import Distiller, DistillerOutput, Term
from distill._registry import create_loss, list_losses, register_loss
from distill.losses.at import ATLoss, at_loss
from distill.losses.cwd import CWDLoss, cwd_loss
from distill.losses.fsp import FSPLoss, fsp_loss
from distill.losses.hint import HintLoss, hint_loss
from distill.losses.ickd import ICKDLoss, ickd_loss
from distill.losses.kl import KLLoss, kl_loss
from distill.losses.logit import LogitLoss, logit_loss
from distill.losses.nst import NSTLoss, nst_loss
from distill.losses.pearson import PearsonLoss, pearson_loss

__version__ = "0.1.0"

__all__ = [
    "ATLoss",
    "CWDLoss",
    "Distiller",
    "DistillerOutput",
    "FSPLoss",
    "HintLoss",
    "ICKDLoss",
    "KLLoss",
    "LogitLoss",
    "NSTLoss",
    "PearsonLoss",
    "Term",
    "at_loss",
    "create_loss",
    "cwd_loss",
    "fsp_loss",
    "hint_loss",
    "ickd_loss",
    "kl_loss",
    "list_losses",
    "logit_loss",
    "nst_loss",
    "pearson_loss",
    "register_loss",
]
