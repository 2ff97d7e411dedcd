"""Knowledge distillation losses for PyTorch, and one wrapper that runs teacher and student."""

from distill._distiller import Distiller, DistillerOutput, Term
from distill._registry import create_loss, list_losses, register_loss
from distill.losses.cc import CCLoss, cc_loss
from distill.losses.crd import CRDLoss, crd_loss
from distill.losses.kl import KLLoss, kl_loss
from distill.losses.logit import LogitLoss, logit_loss
from distill.losses.pkt import PKTLoss, pkt_loss
from distill.losses.rkd import RKDLoss, rkd_loss
from distill.losses.sp import SPLoss, sp_loss

__version__ = "0.1.0"

__all__ = [
    "CCLoss",
    "CRDLoss",
    "Distiller",
    "DistillerOutput",
    "KLLoss",
    "LogitLoss",
    "PKTLoss",
    "RKDLoss",
    "SPLoss",
    "Term",
    "cc_loss",
    "crd_loss",
    "create_loss",
    "kl_loss",
    "list_losses",
    "logit_loss",
    "pkt_loss",
    "register_loss",
    "rkd_loss",
    "sp_loss",
]
