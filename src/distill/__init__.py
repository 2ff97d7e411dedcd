"""Knowledge distillation losses for PyTorch, and one wrapper that runs teacher and student."""

import importlib
import typing

from distill import adapt
from distill._distiller.distiller import Distiller
from distill._distiller.terms import DistillerOutput, TeacherOutput, Term
from distill._reduction import Reduction
from distill._registry import create_loss, get_loss, list_losses, register_loss
from distill.language import align_tokens, chunk_log_probs, next_tokens
from distill.linear import LinearCrossEntropyLoss, LinearLoss
from distill.losses.akl import AKLLoss, akl_loss
from distill.losses.alm import ALMLoss, alm_loss
from distill.losses.alpha_beta import AlphaBetaLoss, alpha_beta_loss
from distill.losses.at import ATLoss, at_loss
from distill.losses.cc import CCLoss, cc_loss
from distill.losses.cosine import CosineLoss, cosine_loss
from distill.losses.crd import CRDLoss, crd_loss
from distill.losses.ctkd import CTKDLoss, ctkd_loss, ctkd_strength
from distill.losses.cwd import CWDLoss, cwd_loss
from distill.losses.dist import DISTLoss, dist_loss
from distill.losses.dist_plus import DISTPlusLoss, dist_plus_loss
from distill.losses.dkd import DKDLoss, dkd_loss
from distill.losses.fgd import FGDLoss, fgd_loss
from distill.losses.fsp import FSPLoss, fsp_loss
from distill.losses.gram import GramLoss, gram_loss
from distill.losses.hint import HintLoss, hint_loss
from distill.losses.ickd import ICKDLoss, ickd_loss
from distill.losses.js import JSLoss, js_loss
from distill.losses.kl import KLLoss, kl_loss
from distill.losses.linear_logit import LinearLogitLoss, linear_logit_loss
from distill.losses.logit import LogitLoss, logit_loss
from distill.losses.logit_std import LogitStdLoss, logit_std_loss
from distill.losses.margin_mse import MarginMSELoss, margin_mse_loss
from distill.losses.matryoshka import MatryoshkaLoss, matryoshka_loss
from distill.losses.mft import MFTLoss, mft_loss
from distill.losses.mgd import MGDLoss, mgd_loss
from distill.losses.nkd import NKDLoss, nkd_loss
from distill.losses.nst import NSTLoss, nst_loss
from distill.losses.ofa import OFALoss, ofa_loss
from distill.losses.ofd import OFDLoss, ofd_loss, ofd_margin
from distill.losses.pearson import PearsonLoss, pearson_loss
from distill.losses.pkt import PKTLoss, pkt_loss
from distill.losses.queue_kl import QueueKLLoss, queue_kl_loss
from distill.losses.reverse_kl import ReverseKLLoss, reverse_kl_loss
from distill.losses.review import ReviewLoss, review_loss
from distill.losses.rkd import RKDLoss, rkd_loss
from distill.losses.sampled_reverse_kl import SampledReverseKLLoss, sampled_reverse_kl_loss
from distill.losses.score_kl import ScoreKLLoss, score_kl_loss
from distill.losses.sdd import SDDLoss, sdd_loss
from distill.losses.sigmoid_kl import SigmoidKLLoss, sigmoid_kl_loss
from distill.losses.skd import SKDLoss, skd_loss
from distill.losses.skew_kl import SkewKLLoss, skew_kl_loss
from distill.losses.skew_reverse_kl import SkewReverseKLLoss, skew_reverse_kl_loss
from distill.losses.sp import SPLoss, sp_loss
from distill.losses.srd import SRDLoss, srd_loss
from distill.losses.todi import ToDiLoss, todi_loss
from distill.losses.token_similarity import TokenSimilarityLoss, token_similarity_loss
from distill.losses.ttm import TTMLoss, ttm_loss
from distill.losses.tvd import TVDLoss, tvd_loss
from distill.losses.uld import ULDLoss, uld_loss
from distill.losses.vid import VIDLoss, vid_loss
from distill.losses.wsld import WSLDLoss, wsld_loss
from distill.losses.wttm import WTTMLoss, wttm_loss
from distill.task import CrossEntropyLoss
from distill.teachers import Teachers
from distill.topk import TopK

if typing.TYPE_CHECKING:  # what few programs need is imported when it is first asked for
    from distill._store.files import StoreError
    from distill._store.fingerprint import fingerprint
    from distill._store.reader import StoredTeacher
    from distill._store.record import record
    from distill._store.writer import TeacherWriter
    from distill.balance import calibrate
    from distill.diagnostics import agreement, tap_shapes
    from distill.gradients import gradient_report
    from distill.pairing import pair_layers

__version__ = "0.2.0"

__all__ = [
    "AKLLoss",
    "ALMLoss",
    "ATLoss",
    "AlphaBetaLoss",
    "CCLoss",
    "CRDLoss",
    "CTKDLoss",
    "CWDLoss",
    "CosineLoss",
    "CrossEntropyLoss",
    "DISTLoss",
    "DISTPlusLoss",
    "DKDLoss",
    "Distiller",
    "DistillerOutput",
    "FGDLoss",
    "FSPLoss",
    "GramLoss",
    "HintLoss",
    "ICKDLoss",
    "JSLoss",
    "KLLoss",
    "LinearCrossEntropyLoss",
    "LinearLogitLoss",
    "LinearLoss",
    "LogitLoss",
    "LogitStdLoss",
    "MFTLoss",
    "MGDLoss",
    "MarginMSELoss",
    "MatryoshkaLoss",
    "NKDLoss",
    "NSTLoss",
    "OFALoss",
    "OFDLoss",
    "PKTLoss",
    "PearsonLoss",
    "QueueKLLoss",
    "RKDLoss",
    "Reduction",
    "ReverseKLLoss",
    "ReviewLoss",
    "SDDLoss",
    "SKDLoss",
    "SPLoss",
    "SRDLoss",
    "SampledReverseKLLoss",
    "ScoreKLLoss",
    "SigmoidKLLoss",
    "SkewKLLoss",
    "SkewReverseKLLoss",
    "StoreError",
    "StoredTeacher",
    "TTMLoss",
    "TVDLoss",
    "TeacherOutput",
    "TeacherWriter",
    "Teachers",
    "Term",
    "ToDiLoss",
    "TokenSimilarityLoss",
    "TopK",
    "ULDLoss",
    "VIDLoss",
    "WSLDLoss",
    "WTTMLoss",
    "adapt",
    "agreement",
    "akl_loss",
    "align_tokens",
    "alm_loss",
    "alpha_beta_loss",
    "at_loss",
    "calibrate",
    "cc_loss",
    "chunk_log_probs",
    "cosine_loss",
    "crd_loss",
    "create_loss",
    "ctkd_loss",
    "ctkd_strength",
    "cwd_loss",
    "dist_loss",
    "dist_plus_loss",
    "dkd_loss",
    "fgd_loss",
    "fingerprint",
    "fsp_loss",
    "get_loss",
    "gradient_report",
    "gram_loss",
    "hint_loss",
    "ickd_loss",
    "js_loss",
    "kl_loss",
    "linear_logit_loss",
    "list_losses",
    "logit_loss",
    "logit_std_loss",
    "margin_mse_loss",
    "matryoshka_loss",
    "mft_loss",
    "mgd_loss",
    "next_tokens",
    "nkd_loss",
    "nst_loss",
    "ofa_loss",
    "ofd_loss",
    "ofd_margin",
    "pair_layers",
    "pearson_loss",
    "pkt_loss",
    "queue_kl_loss",
    "record",
    "register_loss",
    "reverse_kl_loss",
    "review_loss",
    "rkd_loss",
    "sampled_reverse_kl_loss",
    "score_kl_loss",
    "sdd_loss",
    "sigmoid_kl_loss",
    "skd_loss",
    "skew_kl_loss",
    "skew_reverse_kl_loss",
    "sp_loss",
    "srd_loss",
    "tap_shapes",
    "todi_loss",
    "token_similarity_loss",
    "ttm_loss",
    "tvd_loss",
    "uld_loss",
    "vid_loss",
    "wsld_loss",
    "wttm_loss",
]

# What stands in a private module has its public name in a pickle, so that the pickle outlives a move.
for _name in __all__:
    if "._" in getattr(globals().get(_name), "__module__", ""):
        globals()[_name].__module__ = __name__

_LATER = {
    "StoreError": "distill._store.files",
    "StoredTeacher": "distill._store.reader",
    "TeacherWriter": "distill._store.writer",
    "agreement": "distill.diagnostics",
    "calibrate": "distill.balance",
    "fingerprint": "distill._store.fingerprint",
    "gradient_report": "distill.gradients",
    "pair_layers": "distill.pairing",
    "record": "distill._store.record",
    "tap_shapes": "distill.diagnostics",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
