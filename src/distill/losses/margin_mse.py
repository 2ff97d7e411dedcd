"""Margins of scores: Hofstaetter et al., "Improving Efficient Neural Ranking Models" (2020)."""

from torch import Tensor

from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss

FAMILY = "embeddings"


def _formula(student: Tensor, teacher: Tensor, *, dim: int) -> Tensor:
    others = student.shape[dim] - 1
    if others < 1:
        raise ValueError(
            f"there must be a positive and at least one negative score along dim {dim}, "
            f"got shape {tuple(student.shape)}"
        )
    difference = student - teacher
    margins = difference.narrow(dim, 0, 1) - difference.narrow(dim, 1, others)
    return margins.square().mean(dim)


_ROWS = Rows(_formula, softmax=False)


def margin_mse_loss(student: Tensor, teacher: Tensor, *, dim: int = -1) -> Tensor:
    """Mean squared difference of the margins between a positive and its negatives, one value per query.

        loss = 1/(K - 1) * sum_{k > 0} [(s_0 - s_k) - (t_0 - t_k)]^2

    The first of the K scores of a query is that of the positive document, the others are those of the negatives. What a
    network adds to all scores of a query does not count, so that student and teacher may score on different levels.

    Args:
        student: The student's scores, `(N, K)` or `(..., K)`: a query's positive first, then its negatives; all finite.
            Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's scores, same shape. Gets no gradient.
        dim: The dimension of the `K` scores of a query.

    Returns:
        One value per query, shape `(...)`, in squared units of the scores; float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, a query has fewer than two
            scores, or `dim` is out of range.

    Examples:
        >>> import torch
        >>> from distill import margin_mse_loss
        >>> student = torch.tensor([[0.9, 0.4]])  # a margin of 0.5
        >>> teacher = torch.tensor([[12.0, 10.0]])  # a margin of 2
        >>> margin_mse_loss(student, teacher)
        tensor([2.2500])

    Notes:
        Published with weight 1, as the only term, with one negative a query.

        Scale: `matchmaker/losses/msmargin.py` of the authors' code (`sebastian-hofstaetter/matchmaker`): the mean over
        the queries of the squared difference. `MarginMSELoss` of sentence-transformers takes the mean over the
        negatives too.

    Reference:
        Sebastian Hofstaetter, Sophia Althammer, Michael Schroeder, Mete Sertkan and Allan Hanbury, "Improving Efficient
        Neural Ranking Models with Cross-Architecture Knowledge Distillation", arXiv 2010.02666 (2020).
    """
    return _ROWS.values(student, teacher, dim=dim)


@register_loss("margin_mse")
class MarginMSELoss(RowLoss):
    """Mean squared difference of margins of scores; see `margin_mse_loss` for the formula.

    Args:
        reduction: Over queries: `"mean"`, `"sum"` or `"none"` (one value per query).
        dim: The dimension of the `K` scores of a query.

    Raises:
        ValueError: If the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import MarginMSELoss
        >>> query, documents = torch.randn(4, 16), torch.randn(4, 3, 16)
        >>> scores = (query[:, None] * documents).sum(-1)  # of one positive and two negatives
        >>> MarginMSELoss()(scores + 7, scores) < 1e-10
        tensor(True)
    """

    rows = _ROWS

    def __init__(self, *, reduction: Reduction = "mean", dim: int = -1) -> None:
        super().__init__(reduction=reduction, dim=dim)
