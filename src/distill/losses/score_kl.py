"""Distributions over candidates: Lin, Yang and Lin, "Tightly-Coupled Teachers" (2020)."""

from torch import Tensor

from distill._checks import check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import divergence_of_logits, soften

FAMILY = "embeddings"


def _formula(
    student: Tensor,
    teacher: Tensor,
    *,
    dim: int,
    student_temperature: float,
    teacher_temperature: float,
    mean: bool = False,
) -> Tensor:
    sides = soften(teacher, teacher_temperature), soften(student, student_temperature)
    return divergence_of_logits(*sides, dim=dim, temperature=1.0, mean=mean)


_ROWS = Rows(_formula, mean=True)


def score_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    dim: int | None = None,
) -> Tensor:
    """Divergence of the student's distribution over candidates from the teacher's, each with its own temperature.

        p = softmax(t / T_t),  q = softmax(s / T_s)
        loss = KL(p || q) = sum_k p_k (log p_k - log q_k)

    The candidates are the documents of a query, the other samples of a batch, or the entries of a queue. Scores of two
    networks differ in size (a cosine is at most 1, a cross-encoder's score is not bounded), which is why each has a
    temperature. There is no factor: with one temperature T for both, T^2 times this value is `kl_loss`.

    Args:
        student: The student's scores, `(N, K)` or `(..., K)`; -inf is a probability of 0, as for a candidate that is
            padding. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's scores, likewise, same shape. Gets no gradient.
        student_temperature: What the student's scores are divided by, positive and finite.
        teacher_temperature: What the teacher's scores are divided by, positive and finite.
        dim: The dimension of the `K` candidates; None: the last, of at most three.

    Returns:
        One value per query, shape `(...)`, in nats, never negative; infinite where a candidate has a probability of 0
        for the student alone. float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `student_temperature` or `teacher_temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, a temperature is not positive
            and finite, there is only one candidate, or `dim` is out of range or not given where there are four
            dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import score_kl_loss
        >>> student = torch.tensor([[0.8, 0.6]])  # cosines
        >>> teacher = torch.tensor([[8.0, 6.0]])  # scores of a cross-encoder
        >>> score_kl_loss(student, teacher, student_temperature=0.1)  # 0.2 / 0.1 = 2 / 1
        tensor([0.])

    Notes:
        Published with weight 1, both temperatures 1, as the only term (`DistillKLDivLoss` of sentence-transformers).

        Scale: That file: the sum over the candidates, averaged over the queries. At a temperature T of both it has a
        factor T^2.

        Caveat: No code of the authors was found. That file names their paper and has one temperature.

    Reference:
        Sheng-Chieh Lin, Jheng-Hong Yang and Jimmy Lin, "Distilling Dense Representations for Ranking using
        Tightly-Coupled Teachers", arXiv 2010.11386 (2020).
    """
    check_positive("student_temperature", student_temperature)
    check_positive("teacher_temperature", teacher_temperature)
    return _ROWS.values(
        student,
        teacher,
        dim=dim,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )


@register_loss("score_kl")
class ScoreKLLoss(RowLoss):
    """Divergence of distributions over candidates, a temperature for each side; see `score_kl_loss` for the formula.

    Args:
        student_temperature: What the student's scores are divided by, positive and finite. It may be changed between
            steps.
        teacher_temperature: What the teacher's scores are divided by, positive and finite. It may be changed between
            steps.
        reduction: Over queries: `"mean"`, `"sum"` or `"none"` (one value per query).
        dim: The dimension of the `K` candidates; None: the last, of at most three.

    Raises:
        TypeError: If `student_temperature` or `teacher_temperature` is no number.
        ValueError: If a temperature is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import ScoreKLLoss
        >>> loss = ScoreKLLoss(student_temperature=0.05)
        >>> queries, documents = torch.randn(4, 16), torch.randn(4, 16)
        >>> scores = queries @ documents.T  # every document of the batch is a candidate
        >>> loss(0.05 * scores, scores) < 1e-6
        tensor(True)
    """

    rows = _ROWS
    options = {"student_temperature": check_positive, "teacher_temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(
        self,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        *,
        reduction: Reduction = "mean",
        dim: int | None = None,
    ) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
