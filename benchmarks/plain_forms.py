"""The losses as one would write them in a training script: for each the fastest such form that is known.

A form takes what the loss takes and gives its mean over the samples, at the loss's default options. Of a loss that
learns, the function takes the library's module and returns the form, which shares the module's weights.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Form = Callable[..., Tensor]
AB = 0.2, 0.7  # alpha and beta of the alpha-beta divergence


# --- logits ---------------------------------------------------------------------------------------------------------


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


def linear_logit(module: Any) -> Form:
    ours, theirs = module.student_head, module.teacher_head
    return lambda student, teacher: F.mse_loss(ours(student), theirs(teacher).detach())


# --- maps -----------------------------------------------------------------------------------------------------------


def hint(module: Any) -> Form:
    layer = module.regressor
    return lambda student, teacher: F.mse_loss(F.conv2d(student, layer.weight[:, :, None, None], layer.bias), teacher)


def at(student: Tensor, teacher: Tensor) -> Tensor:
    def attention(maps: Tensor) -> Tensor:
        return F.normalize(maps.square().mean(1).flatten(1), dim=1)

    return F.mse_loss(attention(student), attention(teacher))


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = F.normalize(student.flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b.mT).square().mean()

    return mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)


def nst_published(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = F.normalize(student.flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2).mean()  # N x C x C x HW

    return mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)


def fsp(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    def flow(first: Tensor, second: Tensor) -> Tensor:
        first = F.avg_pool2d(first, 2)
        return torch.bmm(first.flatten(2), second.flatten(2).mT) / second[0, 0].numel()

    return F.mse_loss(flow(*student), flow(*teacher))


def vid(module: Any) -> Form:
    def form(student: Tensor, teacher: Tensor) -> Tensor:
        variance = (F.softplus(module.raw_variance) + module.eps)[:, None, None]
        squares = (module.mean_network(student) - teacher).square()
        value: Tensor = 0.5 * (squares / variance + variance.log()).mean()
        return value

    return form


def ofd(module: Any) -> Form:
    def form(student: Tensor, teacher: Tensor) -> Tensor:
        student = module.connector(student)
        goal = torch.maximum(teacher, module.margin[:, None, None])
        counted = (student > goal) | (goal > 0)
        return (F.mse_loss(student, goal, reduction="none") * counted).sum() / len(student)

    return form


def review(module: Any) -> Form:
    def context(student: Tensor, teacher: Tensor) -> Tensor:
        value, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
        for size in (4, 2, 1):
            if size < student.shape[2]:
                weight /= 2
                total += weight
                pooled = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
                value = value + weight * F.mse_loss(*pooled)
        return value / total

    def form(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        total, deeper = student[0].new_zeros(()), None
        for level in reversed(range(len(student))):
            ours, theirs = (x[:, :, None, None] if x.ndim == 2 else x for x in (student[level], teacher[level]))
            here = module.inputs[level](ours)
            if deeper is not None:
                deeper = F.interpolate(deeper, here.shape[2:], mode="nearest")
                weights = module.attention[level](torch.cat([here, deeper], 1))
                here = weights[:, :1] * here + weights[:, 1:] * deeper
            deeper = here
            total = total + context(module.outputs[level](here), theirs)
        return total

    return form


def cwd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    log_q, p = F.log_softmax(student.flatten(2) / temperature, 2), F.softmax(teacher.flatten(2) / temperature, 2)
    return F.kl_div(log_q, p, reduction="sum") * (temperature**2 / student.shape[:2].numel())


def mgd(module: Any) -> Form:
    def form(student: Tensor, teacher: Tensor) -> Tensor:
        kept = torch.rand(len(student), 1, *student.shape[2:], device=student.device) >= module.mask_ratio
        generated = module.generation(module.align(student) * kept)
        squares = F.mse_loss(generated, teacher, reduction="sum")
        return squares * (float(module.alpha) / len(student))

    return form


def pearson(student: Tensor, teacher: Tensor) -> Tensor:
    def standardise(maps: Tensor) -> Tensor:  # by the deviation that divides by M, hence the factor below
        return F.batch_norm(maps, None, None, training=True, eps=1e-12)

    return F.mse_loss(standardise(student), standardise(teacher)) * (0.5 - 0.5 / student[:, 0].numel())


def ickd(student: Tensor, teacher: Tensor) -> Tensor:
    def correlation(maps: Tensor) -> Tensor:
        channels = maps.flatten(2)
        return F.normalize(torch.bmm(channels, channels.mT), dim=2)

    n, channels = student.shape[:2]
    return F.mse_loss(correlation(student), correlation(teacher), reduction="sum") / (channels * n**2)


# --- relations between samples --------------------------------------------------------------------------------------


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)
    same = torch.eye(n, dtype=torch.bool, device=student.device)

    def squared_distances(features: Tensor) -> Tensor:
        squares = features.square().sum(1)
        return (squares[:, None] + squares - 2 * features @ features.mT).clamp(min=1e-12)

    def relative(squares: Tensor) -> Tensor:
        distances = squares.sqrt().masked_fill(same, 0)
        return distances * (n * (n - 1)) / distances.sum()

    def angles(squares: Tensor) -> Tensor:  # N x N x N, by the law of cosines
        inverse = squares.rsqrt().masked_fill(same, 0)
        return (squares[:, :, None] + squares[:, None] - squares) * (inverse[:, :, None] * inverse[:, None] / 2)

    ours, theirs = squared_distances(student), squared_distances(teacher)
    of_distances = F.smooth_l1_loss(relative(ours), relative(theirs))
    return 25 * of_distances + 50 * F.smooth_l1_loss(angles(ours), angles(theirs))


def rkd_published(student: Tensor, teacher: Tensor) -> Tensor:
    def distances(features: Tensor) -> Tensor:
        squares = features.square().sum(1)
        products = (squares[:, None] + squares - 2 * features @ features.mT).clamp(min=1e-12).sqrt()
        products = products * ~torch.eye(len(features), dtype=torch.bool, device=features.device)
        return products / products[products > 0].mean()

    def angles(features: Tensor) -> Tensor:
        sides = F.normalize(features[None] - features[:, None], dim=2)  # N x N x D
        return torch.bmm(sides, sides.mT)

    of_distances = F.smooth_l1_loss(distances(student), distances(teacher))
    return 25 * of_distances + 50 * F.smooth_l1_loss(angles(student), angles(teacher))


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    def neighbours(features: Tensor) -> Tensor:
        features = F.normalize(features, dim=1)
        kernel = (features @ features.mT + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)

    q, p = neighbours(student), neighbours(teacher)
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    def similarities(maps: Tensor) -> Tensor:
        features = maps.flatten(1)
        return F.normalize(features @ features.mT, dim=1)

    return F.mse_loss(similarities(student), similarities(teacher))


def cc(student: Tensor, teacher: Tensor, gamma: float = 0.4) -> Tensor:
    def correlations(features: Tensor) -> Tensor:
        features = F.normalize(features, dim=1)
        cosines = features @ features.mT
        return math.exp(-2 * gamma) * (1 + 2 * gamma * cosines + 2 * gamma**2 * cosines.square())

    return F.mse_loss(correlations(student), correlations(teacher))


class _Memory:
    """What the plain forms of CRD keep: the memories, and the mean score of the first batch on each side."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.banks = module.student_memory.clone(), module.teacher_memory.clone()
        self.means: list[Tensor] = []

    def start(self, student: Tensor, teacher: Tensor, own: Tensor) -> tuple[list[Tensor], Tensor]:
        """Give the embeddings of both sides and the entries that each sample is compared with, its own first."""
        embed = self.module.student_embedding, self.module.teacher_embedding
        both = [F.normalize(layer(x), dim=1) for layer, x in zip(embed, (student, teacher), strict=True)]
        others = torch.randint(len(self.banks[0]) - 1, (len(own), self.module.num_negatives), device=own.device)
        return both, torch.cat([own[:, None], others + (others >= own[:, None])], 1)

    def mean(self, side: int, scores: Tensor) -> Tensor:
        """Give the mean of exp(score) of the side's first batch."""
        if len(self.means) == side:
            self.means.append(scores.detach().exp().mean())
        return self.means[side]

    def update(self, both: Sequence[Tensor], own: Tensor) -> None:
        """Move the entries of the batch towards its embeddings."""
        with torch.no_grad():
            for bank, embeddings in zip(self.banks, both, strict=True):
                bank[own] = F.normalize((bank[own] + embeddings) / 2, dim=1)


def crd(module: Any) -> Form:
    memory = _Memory(module)

    def form(student: Tensor, teacher: Tensor, own: Tensor) -> Tensor:
        both, entries = memory.start(student, teacher, own)
        total = student.new_zeros(())
        for side in (0, 1):
            scores = (both[side] @ memory.banks[1 - side].clone().mT).gather(1, entries) / module.temperature
            excess = scores - (memory.mean(side, scores) * module.num_negatives).log()
            total = total - (F.logsigmoid(excess[:, 0]).sum() + F.logsigmoid(-excess[:, 1:]).sum()) / len(own)
        memory.update(both, own)
        return total

    return form


def crd_published(module: Any) -> Form:
    memory = _Memory(module)

    def form(student: Tensor, teacher: Tensor, own: Tensor) -> Tensor:
        both, entries = memory.start(student, teacher, own)
        total = student.new_zeros(())
        for side in (0, 1):
            chosen = memory.banks[1 - side][entries.flatten()].view(*entries.shape, -1)  # N x (1 + K) x width
            scores = torch.bmm(chosen, both[side][:, :, None]).squeeze(2) / module.temperature
            odds = scores.exp() / (memory.mean(side, scores) * module.num_negatives)
            total = total - ((odds[:, 0] / (odds[:, 0] + 1)).log().sum() - (odds[:, 1:] + 1).log().sum()) / len(own)
        memory.update(both, own)
        return total

    return form
