"""Losses on the logits or features of each position of a map `(N, C, H, W)`, as one would write them."""

from torch import Tensor
from torch.nn import functional as F


def _mean(terms: Tensor) -> Tensor:
    """Sum over the channels, and take the mean over the positions."""
    return terms.sum() * (terms.shape[1] / terms.numel())


def kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    log_q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return _mean(F.kl_div(log_q, p, reduction="none")) * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    return _mean(F.kl_div(log_p, log_q, reduction="none", log_target=True))


def js(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    return _mean(of_teacher + F.kl_div(log_m, log_q, reduction="none", log_target=True)) / 2


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    return _mean((F.softmax(student, 1) - F.softmax(teacher, 1)).abs()) / 2


def sigmoid_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(teacher, p)
    return (F.binary_cross_entropy_with_logits(student, p) - entropy) * student.shape[1]


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, 1).mean()
