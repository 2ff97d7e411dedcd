"""Similarity preservation: Tung and Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019)."""

from torch import Tensor
from typing_extensions import override

from distill._checks import without_autocast
from distill._registry import register_loss
from distill.losses._base import BatchLoss
from distill.losses._batches import mean_square_of_pairs, select
from distill.losses._vectors import similarities

FAMILY = "relations"


def sp_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Squared difference of the similarities that student and teacher see between the samples of a batch.

        G_s = S S^T with every row divided by its L2 norm, S = student flattened to (N, D); G_t alike
        loss = 1/N^2 * sum_ij (G_s - G_t)_ij^2

    It does not change when either side is rotated, reflected or scaled as a whole, so the widths of the two sides are
    free.

    Args:
        student: The student's maps or features, `(N, ...)`. Any floating dtype; half and bfloat16 are computed in
            float32.
        teacher: The teacher's, `(N, ...)` of the same N; its other dimensions are its own. Gets no gradient.
        mask: Bool or integers, `(N,)`: which samples count. None: all.

    Returns:
        A scalar without unit, from 0 to at most 4 / N; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none.
        ValueError: If N or the devices differ, an input has fewer than two dimensions, is empty or not floating-point,
            or the mask is not `(N,)` or holds weights.

    Examples:
        >>> import torch
        >>> from distill import sp_loss
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # the two samples have nothing in common
        >>> teacher = torch.tensor([[3.0], [3.0]])  # the two samples are the same
        >>> sp_loss(student, teacher)  # rows (1, 0) and (0, 1) against (0.71, 0.71) twice
        tensor(0.2929)

    Notes:
        Published with weight 3000 on the last feature maps (the CIFAR-100 benchmark of Tian, Krishnan and Isola,
        "Contrastive Representation Distillation", ICLR 2020).

        Scale: `distiller_zoo/SP.py` of that benchmark (`HobbitLong/RepDistiller`), which says that the paper's author
        verified it: the sum over N^2.

    Reference:
        Frederick Tung and Greg Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019 and arXiv 1907.09682.
    """
    student, teacher, kept = select(student, teacher, mask)
    with without_autocast(student):
        return mean_square_of_pairs(similarities(student), similarities(teacher), kept)


@register_loss("sp")
class SPLoss(BatchLoss):
    """Squared difference of the similarities between samples; see `sp_loss` for the formula.

    It exists for a whole batch only, so it has no reduction, and its mask selects samples.

    Args:
        gather: Whether processes that train together compare the samples of all of them: the loss is that of the whole
            batch, and so is the mean of the processes' gradients (DDP, FSDP). Not in eval mode. False: each its own.

    Raises:
        ValueError: If `gather` is neither True nor False.

    Examples:
        >>> import torch
        >>> from distill import SPLoss
        >>> features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]])
        >>> SPLoss()(features, 2 * features)
        tensor(0.)
    """

    @override
    def whole(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        return sp_loss(student, teacher, mask=mask)
