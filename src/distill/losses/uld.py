"""Two vocabularies: Boizard et al., "Towards Cross-Tokenizer Distillation" (2024)."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from distill._checks import check_positive, is_integer
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import add_up, soften

FAMILY = "language models"


def _formula(student: Tensor, teacher: Tensor, *, dim: int, temperature: float, mean: bool = False) -> Tensor:
    q, p = (torch.softmax(soften(x, temperature), dim).sort(dim=dim, descending=True)[0] for x in (student, teacher))
    difference = q - p
    # The sign as a constant chooses the gradient where both are equal: 0, in the middle of what it may be.
    return add_up(difference * difference.detach().sign(), dim, mean=mean)


_ROWS = Rows(_formula, mean=True)


def uld_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, dim: int | None = None) -> Tensor:
    """Distance of the sorted probabilities, for vocabularies that differ, one value per token.

        p = softmax(t / T),  q = softmax(s / T),  both sorted in descending order, the shorter one filled up with 0
        loss = sum_k |q_(k) - p_(k)|

    It asks how the probability is spread over the tokens, not over which ones, so that the vocabularies need have
    nothing in common. It is the Wasserstein distance of two distributions if every token is as far from each other one.
    It lies between 0 and 2, and has no factor T^2.

    The two sides must have corresponding positions. The authors compare the k-th token of the student's answer with the
    k-th of the teacher's, and cut the longer one. Give logits that are cut in this way, or better those of positions
    where tokens of both end at the same place (`align_tokens`).

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, likewise, of the same shape but for its own number of classes. Gets no gradient.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the classes; None: the last, of at most three.

    Returns:
        One value per token, shape `(...)`, from 0 to 2; float32, or float64 if an input is. Where the vocabularies
        differ in size the logits of the smaller one are copied.

    Raises:
        TypeError: If an input is no tensor, or `temperature` is no number.
        ValueError: If shapes differ in more than the classes, devices differ, an input is empty or not floating-point,
            the temperature is not positive and finite, one has fewer than two classes, or `dim` is out of range or not
            given where there are four dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import uld_loss
        >>> student = torch.tensor([[0.2, 0.8]]).log()
        >>> teacher = torch.tensor([[0.1, 0.3, 0.6]]).log()
        >>> uld_loss(student, teacher)  # |0.8 - 0.6| + |0.2 - 0.3| + |0 - 0.1|
        tensor([0.4000])

    Notes:
        Published with weight 1.5 at temperature 1, beside the cross-entropy.

        Scale: `models/distillation_model.py` of the authors' code (`Nicolas-BZRD/llm-recipes`), with the option of its
        README: the sum over the vocabulary, averaged over the tokens of a sample and then over the samples.

        Caveat: Here the mean is over all tokens at once, so that long answers count for more.

    Reference:
        Nicolas Boizard, Kevin El Haddad, Celine Hudelot and Pierre Colombo, "Towards Cross-Tokenizer Distillation: the
        Universal Logit Distillation Loss for LLMs", arXiv 2402.12030 (2024).
    """
    check_positive("temperature", temperature)
    return _ROWS.values(*_fill_up(student, teacher, dim), dim=dim, temperature=temperature)


def _fill_up(student: Tensor, teacher: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """Give both the same number of classes: those that one side lacks have a probability of 0."""
    along = -1 if dim is None else dim
    tensors = isinstance(student, Tensor) and isinstance(teacher, Tensor)
    if not tensors or student.shape == teacher.shape or not -student.ndim <= along < student.ndim:
        return student, teacher  # what does not fit is refused where the loss is computed
    rest = [[size for d, size in enumerate(x.shape) if d != along % student.ndim] for x in (student, teacher)]
    if student.ndim != teacher.ndim or rest[0] != rest[1] or min(x.shape[along] for x in (student, teacher)) < 2:
        raise ValueError(
            "student and teacher must have at least 2 classes each and otherwise the same shape "
            f"(nothing is broadcast), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    size = max(student.shape[along], teacher.shape[along])
    return _pad(student, along, size), _pad(teacher, along, size)


def _pad(logits: Tensor, dim: int, size: int) -> Tensor:
    shape = list(logits.shape)
    shape[dim] = size - shape[dim]
    fill = 0 if is_integer(logits) else -math.inf  # integers are refused where the loss is computed
    return torch.cat([logits, logits.new_full(shape, fill)], dim) if shape[dim] else logits


@register_loss("uld")
class ULDLoss(RowLoss):
    """Distance of the sorted probabilities, for vocabularies that differ; see `uld_loss` for the formula.

    Args:
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over tokens: `"mean"`, `"sum"` or `"none"` (one value per token).
        dim: The dimension of the classes; None: the last, of at most three.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If the temperature is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import ULDLoss
        >>> student, teacher = torch.randn(2, 7, 50, requires_grad=True), torch.randn(2, 7, 80)
        >>> ULDLoss()(student, teacher, mask=torch.rand(2, 7) > 0.3).backward()
    """

    rows = _ROWS
    options = {"temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int | None = None) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.temperature = temperature

    @override
    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: The student's logits, `(..., C)`, or with the `C` classes along `dim`.
            teacher: The teacher's logits, of the same shape but for its own number of classes. A constant.
            target: Not used.
            mask: Bool or weights, `(...)`. What a 0 hides counts nowhere, also where it is NaN or infinite.
            denominator: A mean becomes the sum divided by this number, such as the tokens of all micro-batches.

        Returns:
            A scalar, or with `reduction="none"` one value per token, `(...)`.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: As `uld_loss`, and if the mask has another shape than the per-token values.
        """
        return super().forward(*_fill_up(student, teacher, self.dim), target, mask=mask, denominator=denominator)
