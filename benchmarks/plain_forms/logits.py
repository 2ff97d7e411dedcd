"""Losses on logits, as one would write them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plain_forms.form import Form

AB = 0.2, 0.7  # alpha and beta of the alpha-beta divergence


def kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Write the soft-target loss as training scripts do."""
    log_q, p = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def js(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    of_teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    return (of_teacher + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)) / 2


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    return (F.softmax(student, -1) - F.softmax(teacher, -1)).abs().sum() / (2 * len(student))


def skew_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    q, p = F.softmax(student, -1), F.softmax(teacher, -1)
    return F.kl_div((alpha * p + (1 - alpha) * q).log(), p, reduction="batchmean")


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    log_q, p = F.log_softmax(student, -1), F.softmax(teacher, -1)
    log_m = ((1 - alpha) * p + alpha * log_q.exp()).log()
    return F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)


def alpha_beta(student: Tensor, teacher: Tensor, alpha: float = AB[0], beta: float = AB[1]) -> Tensor:
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    total = alpha + beta
    of_both = (alpha * log_p + beta * log_q).exp()
    terms = alpha / total * (total * log_p).exp() + beta / total * (total * log_q).exp() - of_both
    return terms.sum() / (alpha * beta * len(student))


def _without_target(logits: Tensor, target: Tensor) -> Tensor:
    """Give the target a logit that leaves it no probability, finite so that 0 times its logarithm is 0."""
    return logits.scatter(-1, target[:, None], -1000.0)


def dkd(student: Tensor, teacher: Tensor, target: Tensor, beta: float = 8.0, temperature: float = 4.0) -> Tensor:
    student, teacher = student / temperature, teacher / temperature
    q, p = F.softmax(student, -1).gather(-1, target[:, None]), F.softmax(teacher, -1).gather(-1, target[:, None])
    of_target = F.kl_div(torch.cat([q, 1 - q], 1).log(), torch.cat([p, 1 - p], 1), reduction="batchmean")
    log_q = F.log_softmax(_without_target(student, target), -1)
    of_others = F.kl_div(log_q, F.softmax(_without_target(teacher, target), -1), reduction="batchmean")
    return (of_target + beta * of_others) * temperature**2


def nkd(student: Tensor, teacher: Tensor, target: Tensor, gamma: float = 1.5) -> Tensor:
    index = target[:, None]
    of_target = F.softmax(teacher, -1).gather(-1, index) * F.log_softmax(student, -1).gather(-1, index)
    log_q = F.log_softmax(_without_target(student, target), -1)
    of_others = F.softmax(_without_target(teacher, target), -1) * log_q
    return -(of_target.sum() + gamma * of_others.sum()) / len(student)


def logit_std(student: Tensor, teacher: Tensor) -> Tensor:
    def standardise(logits: Tensor) -> Tensor:
        return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)

    return kl(standardise(student), standardise(teacher), 2.0)


def dist(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = F.softmax(student, -1), F.softmax(teacher, -1)

    def correlation(dim: int) -> Tensor:
        centred_q, centred_p = q - q.mean(dim, keepdim=True), p - p.mean(dim, keepdim=True)
        return F.cosine_similarity(centred_q, centred_p, dim).mean()

    return 2 - correlation(1) - correlation(0)


def wsld(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 2.0) -> Tensor:
    log_q, p = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    of_student = F.cross_entropy(student.detach(), target, reduction="none")
    weight = 1 - (-of_student / (F.cross_entropy(teacher, target, reduction="none") + 1e-7)).exp()
    return -(weight * (p * log_q).sum(-1)).mean() * temperature**2


def akl(student: Tensor, teacher: Tensor, mu: float = 0.5) -> Tensor:
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    q, (p, order) = log_q.exp(), log_p.exp().sort(-1, descending=True)
    gaps = (p - q.detach().gather(-1, order)).abs()
    head = p.cumsum(-1) <= mu
    head[:, 0] = True
    share = (gaps * head).sum(-1) / gaps.sum(-1)
    ratio = log_p - log_q
    return (share * (log_p.exp() * ratio).sum(-1) - (1 - share) * (q * ratio).sum(-1)).mean()


def todi(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    ratio = log_p - log_q
    weight = ratio.detach().sigmoid()
    return ((weight * log_p.exp() - (1 - weight) * log_q.exp()) * ratio).sum() / len(student)


def ttm(student: Tensor, teacher: Tensor, gamma: float = 0.1) -> Tensor:
    return F.kl_div(F.log_softmax(student, -1), F.softmax(gamma * teacher, -1), reduction="batchmean")


def wttm(student: Tensor, teacher: Tensor, gamma: float = 0.2) -> Tensor:
    power = F.softmax(teacher, -1) ** gamma
    total = power.sum(-1, keepdim=True)
    return (total * F.kl_div(F.log_softmax(student, -1), power / total, reduction="none")).sum() / len(student)


def ctkd(module: Any) -> Form:
    def form(student: Tensor, teacher: Tensor) -> Tensor:
        turned = 2 * module.raw.detach() - module.raw
        temperature = module.low + module.span * turned.sigmoid()
        log_q, p = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
        value: Tensor = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
        return value

    return form


def sigmoid_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(teacher, p, reduction="sum")
    return (F.binary_cross_entropy_with_logits(student, p, reduction="sum") - entropy) / len(student)


def ofa(student: Tensor, teacher: Tensor, target: Tensor, eps: float = 1.0) -> Tensor:
    label = F.one_hot(target, student.shape[-1])
    weights = (F.softmax(teacher, -1) + label) ** eps - label
    return -(weights * F.log_softmax(student, -1)).sum() / len(student)


def mft(student: Tensor, teacher: Tensor, target: Tensor, threshold: float = 0.2) -> Tensor:
    p, index = F.softmax(teacher, -1), target[:, None]
    of_label, largest = p.gather(-1, index), p.amax(-1, keepdim=True)
    of_right = (1 - of_label).clamp(max=threshold) / (1 - of_label)
    of_wrong = (largest - of_label + threshold) / (1 + largest - of_label)
    share = torch.where(of_label == largest, of_right, of_wrong)
    wanted = ((1 - share) * p).scatter_add(-1, index, share)
    return F.kl_div(F.log_softmax(student, -1), wanted, reduction="batchmean")


def skd(student: Tensor, teacher: Tensor, ridge: float = 0.1) -> Tensor:
    ours, theirs = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    difference = (ours @ ours.mT - theirs @ theirs.mT) / student.shape[1]
    covariance = torch.cov(difference.mT) + ridge * torch.eye(len(student), device=student.device)
    squares = (difference * torch.linalg.solve(covariance, difference.mT).mT).sum(1)
    value: Tensor = kl(student, teacher) + squares.sqrt().mean()
    return value


def uld(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (F.softmax(logits, -1).sort(-1, descending=True).values for logits in (student, teacher))
    return (q - p).abs().sum() / len(student)


def sampled_reverse_kl(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    of_token = log_q.gather(-1, target[:, None]).squeeze(-1)
    ratio = of_token.detach() - log_p.gather(-1, target[:, None]).squeeze(-1)
    of_all = (log_q.detach().exp() * (log_q.detach() - log_p)).sum(-1)
    return (ratio + (ratio - of_all) * (of_token - of_token.detach())).mean()


def alm(student: Tensor, teacher: Tensor, temperature: float = 100.0) -> Tensor:
    q, p = ((log_probs / temperature - 1e-6).exp() for log_probs in (student, teacher))
    return F.binary_cross_entropy(q, p)


def linear_logit(module: Any) -> Form:
    ours, theirs = module.student_head, module.teacher_head
    return lambda student, teacher: F.mse_loss(ours(student), theirs(teacher).detach())
