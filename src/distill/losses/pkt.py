"""Probabilistic transfer: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer"."""

from torch import Tensor
from typing_extensions import override

from distill._checks import without_autocast
from distill._registry import register_loss
from distill.losses._base import BatchLoss
from distill.losses._batches import hide_pairs, mean_of_pairs, select
from distill.losses._softened import not_negative
from distill.losses._vectors import normalize

FAMILY = "relations"

_EPS = 1e-7


def pkt_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Divergence of the probabilities of samples of a batch to be neighbours, in the teacher and in the student.

        q_ij = k(s_i, s_j) / sum_j k(s_i, s_j),  k(a, b) = (1 + cosine(a, b)) / 2;  p_ij alike for the teacher
        loss = 1/N^2 * sum_ij p_ij log((p_ij + 1e-7) / (q_ij + 1e-7))

    Args:
        student: The student's features, `(N, ...)`. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's, `(N, ...)` of the same N; its other dimensions are its own. Gets no gradient.
        mask: Bool or integers, `(N,)`: which samples count. None: all.

    Returns:
        A scalar in nats over N^2, not negative but for rounding; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none.
        ValueError: If N or the devices differ, an input has fewer than two dimensions, is empty or not floating-point,
            or the mask is not `(N,)` or holds weights.

    Examples:
        >>> import torch
        >>> from distill import pkt_loss
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # q = (2/3, 1/3) and (1/3, 2/3)
        >>> teacher = torch.tensor([[3.0], [3.0]])  # p = (1/2, 1/2) twice
        >>> pkt_loss(student, teacher)  # log(9/8) over N^2
        tensor(0.0294)

    Notes:
        Published with weight 30000 on pooled features (the CIFAR-100 benchmark of Tian, Krishnan and Isola,
        "Contrastive Representation Distillation", ICLR 2020).

        Scale: `distiller_zoo/PKT.py` of that benchmark (`HobbitLong/RepDistiller`), which is the authors' code: the
        mean over the N^2 pairs, each sample counted among its own neighbours, and the 1e-7. A sum over all pairs, as
        the divergence is defined, would be N^2 times this value.

        Caveat: That code adds 1e-7 to the norms of the features too, which is left out here: it changes the value in
        the seventh digit.

    Reference:
        Nikolaos Passalis and Anastasios Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
        ECCV 2018 (conditional probabilities with the cosine kernel).
    """
    student, teacher, kept = select(student, teacher, mask)
    with without_autocast(student):
        q, p = _neighbours(student, kept), _neighbours(teacher, kept)
    # -log((q + eps) / (p + eps)), without rounding the logarithms of small numbers before their difference is taken.
    return mean_of_pairs(-p * ((q - p) / (p + _EPS)).log1p(), kept)


def _neighbours(features: Tensor, kept: Tensor | None = None) -> Tensor:
    features = normalize(features, dim=1)
    # Rounding takes the cosine of opposite samples below -1.
    kernel = hide_pairs(not_negative(1 + features @ features.mT), kept)
    total = kernel.sum(1, keepdim=True)
    # Only a hidden sample has no neighbour: each is its own.
    return kernel / (total if kept is None else total.masked_fill(~kept[:, None], 1.0))


@register_loss("pkt")
class PKTLoss(BatchLoss):
    """Divergence of the probabilities of samples to be neighbours; see `pkt_loss` for the formula.

    It exists for a whole batch only, so it has no reduction, and its mask selects samples.

    Args:
        gather: Whether processes that train together compare the samples of all of them: the loss is that of the whole
            batch, and so is the mean of the processes' gradients (DDP, FSDP). Not in eval mode. False: each its own.

    Raises:
        ValueError: If `gather` is neither True nor False.

    Examples:
        >>> import torch
        >>> from distill import PKTLoss
        >>> features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]])
        >>> PKTLoss()(features, features)
        tensor(0.)
    """

    @override
    def whole(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        return pkt_loss(student, teacher, mask=mask)
