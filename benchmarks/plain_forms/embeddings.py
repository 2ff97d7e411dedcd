"""Losses on embeddings and scores, as one would write them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plain_forms.form import Form


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
