"""Losses on feature maps and tokens, as one would write them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plain_forms.form import Form


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


def dist_plus(student: Tensor, teacher: Tensor) -> Tensor:
    def correlation(ours: Tensor, theirs: Tensor, dim: int) -> Tensor:
        ours, theirs = ours - ours.mean(dim, keepdim=True), theirs - theirs.mean(dim, keepdim=True)
        return F.cosine_similarity(ours, theirs, dim).mean()

    return 2 - correlation(student, teacher, 1) - correlation(student.sum(1), teacher.sum(1), 0)


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
