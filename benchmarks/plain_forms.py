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


# --- embeddings and scores ------------------------------------------------------------------------------------------


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, -1).mean()


def matryoshka(student: Tensor, teacher: Tensor) -> Tensor:
    parts = [cosine(student[:, :d], teacher[:, :d]) for d in halved(student.shape[1])]
    return torch.stack(parts).sum()


def halved(width: int) -> tuple[int, ...]:
    """Give the widths at which `matryoshka` is measured."""
    return width, width // 2, width // 4, width // 8


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student[:, :1] - student[:, 1:], teacher[:, :1] - teacher[:, 1:])


def score_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean")


def queue_kl(module: Any) -> Form:
    queue, entered = module.queue.clone(), module.entered.clone()

    def form(student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = F.normalize(module.projector(student), dim=1), F.normalize(teacher, dim=1)
        place = (entered + torch.arange(len(theirs), device=theirs.device)) % len(queue)
        queue.index_copy_(0, place, theirs)
        entered.add_(len(theirs))
        log_q = F.log_softmax(ours @ queue.mT / module.temperature, 1)
        return F.kl_div(log_q, F.softmax(theirs @ queue.mT / module.temperature, 1), reduction="batchmean")

    return form


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


def token_similarity(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    ours, theirs = (
        torch.bmm(x, x.mT) / temperature for x in (F.normalize(student, dim=2), F.normalize(teacher, dim=2))
    )
    divergence = F.kl_div(F.log_softmax(ours, 2), F.softmax(theirs, 2), reduction="sum")
    return divergence / student.shape[:2].numel()


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = F.normalize(student, dim=2), F.normalize(teacher, dim=2)
    return F.mse_loss(torch.bmm(ours, ours.mT), torch.bmm(theirs, theirs.mT))


def sdd(module: Any) -> Form:
    def form(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
        weight, bias, their_weight, their_bias = module._heads.tensors()

        def regions(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            pooled = [F.adaptive_avg_pool2d(maps, scale).flatten(2) for scale in module.scales]
            return F.linear(torch.cat(pooled, 2).mT, weight, bias)

        ours, theirs = regions(student, weight, bias), regions(teacher, their_weight, their_bias).detach()
        log_q, p = F.log_softmax(ours / temperature, 2), F.softmax(theirs / temperature, 2)
        right = theirs.argmax(2) == target[:, None]
        counts = torch.where(right == right[:, :1], 1.0, module.complementary)
        return (F.kl_div(log_q, p, reduction="none").sum(2) * counts).mean() * temperature**2

    return form


def fgd(module: Any) -> Form:
    def attention(maps: Tensor) -> tuple[Tensor, Tensor]:
        size = maps.abs()
        where = F.softmax(size.mean(1).flatten(1) / module.temperature, 1) * maps[0, 0].numel()
        which = F.softmax(size.mean((2, 3)) / module.temperature, 1) * maps.shape[1]
        return where.view_as(maps[:, 0]), which

    def inside(boxes: Tensor, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        first = (boxes[..., :2] * boxes.new_tensor([width, height])).floor()
        last = (boxes[..., 2:] * boxes.new_tensor([width, height])).ceil()
        columns, rows = (torch.arange(size, device=maps.device) for size in (width, height))
        along = (columns >= first[..., :1]) & (columns <= last[..., :1])
        down = (rows >= first[..., 1:]) & (rows <= last[..., 1:])
        share = 1 / (last + 1 - first).prod(2)
        return (down[..., :, None] & along[..., None, :]).mul(share[..., None, None]).amax(1)

    def relate(side: int, maps: Tensor) -> Tensor:
        attended = F.softmax(module.attention[side](maps).flatten(2), 2)
        value: Tensor = maps + module.context[side]((maps.flatten(2) * attended).sum(2)[..., None, None])
        return value

    def form(student: Tensor, teacher: Tensor, boxes: Tensor) -> Tensor:
        student = module.align(student)
        (where, which), (their_where, their_which) = attention(student), attention(teacher)
        objects = inside(boxes, student)
        others = (objects == 0).float()
        others = others / others.sum((1, 2), keepdim=True).clamp(min=1)
        squares = ((student - teacher).square() * their_which[:, :, None, None]).sum(1) * their_where
        value = (squares * (module.alpha * objects + module.beta * others)).sum()
        value = value + module.gamma * ((where - their_where).abs().sum() + (which - their_which).abs().sum())
        relations = F.mse_loss(relate(0, student), relate(1, teacher), reduction="sum")
        total: Tensor = (value + module.delta * relations) / len(student)
        return total

    return form


# --- relations between samples --------------------------------------------------------------------------------------


def srd(module: Any) -> Form:
    def form(student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = (
            F.batch_norm(x, None, None, training=True, eps=1e-4) for x in (module.projector(student), teacher)
        )
        return (1e-5 + (ours - theirs).square().square().sum()).log()

    return form


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
