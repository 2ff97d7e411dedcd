"""Losses on relations between samples, as one would write them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plain_forms.form import Form


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
