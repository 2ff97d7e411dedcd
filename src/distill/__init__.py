"""Knowledge distillation losses for PyTorch, and one wrapper that runs teacher and student."""

from distill._distiller import Distiller, DistillerOutput, Term
from distill._registry import create_loss, list_losses, register_loss
from distill.losses.kl import KLLoss, kl_loss
from distill.losses.logit import LogitLoss, logit_loss
from distill.losses.mgd import MGDLoss, mgd_loss
from distill.losses.ofd import OFDLoss, ofd_loss, ofd_margin
from distill.losses.review import ReviewLoss, review_loss
from distill.losses.vid import VIDLoss, vid_loss

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "DistillerOutput",
    "KLLoss",
    "LogitLoss",
    "MGDLoss",
    "OFDLoss",
    "ReviewLoss",
    "Term",
    "VIDLoss",
    "create_loss",
    "kl_loss",
    "list_losses",
    "logit_loss",
    "mgd_loss",
    "ofd_loss",
    "ofd_margin",
    "register_loss",
    "review_loss",
    "vid_loss",
]
