"""Reverse KL: Gu, Dong, Wei and Huang, "MiniLLM: Knowledge Distillation of Large Language Models" (ICLR 2024)."""

from typing import Any

import torch
from torch import Tensor

from distill._checks import check_positive, may_look
from distill._engine.blocks import block_by_autograd, redo
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import are_close, compare_rows, divergence_of_logits, harden, soften
from distill.topk import TopK

FAMILY = "divergences"


def _formula(student: Tensor, teacher: Tensor, *, dim: int, temperature: float) -> Tensor:
    return divergence_of_logits(student, teacher, dim=dim, temperature=temperature)


def _block(
    student: Tensor, teacher: Tensor, factors: Tensor | None, gradient: Tensor, spare: Tensor, *, temperature: float
) -> Tensor:
    if not may_look(student):  # on a GPU: to see how far the rows are apart would wait for it
        return block_by_autograd(_formula, student, teacher, factors, gradient, spare, temperature=temperature)
    d, q = gradient, spare
    _, mean, far = compare_rows(student, teacher, d, q, temperature=temperature)
    if factors is not None:  # T q (log q - log p - KL), where all but q is -d
        d.mul_(q).mul_(factors * -temperature)
    values = mean.clamp_min_(0.0).log1p_().mul_(temperature**2).squeeze(-1)
    return redo(far, values, _formula, student, teacher, factors, gradient, temperature=temperature)


def _few(student: Tensor, teacher: Tensor, factors: Any, *, temperature: float) -> tuple[Tensor, Tensor | None] | None:
    """Do what `_block` does in fewer operations, though with more exponentials; None for rows that are too close."""
    log_q = torch.log_softmax(soften(student, temperature), -1)
    log_p = torch.log_softmax(soften(teacher, temperature), -1)
    terms = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    values = terms.mul_(q).sum(-1)
    if are_close(values, student.shape[-1]):
        return None
    if factors is not None:  # T q (log q - log p - KL)
        terms.addcmul_(q, values.unsqueeze(1), value=-1).mul_(factors * temperature)
    return harden(values, temperature), terms


def _kernel() -> Any:
    from distill._engine.triton import reverse_kl  # only where there is a GPU

    return reverse_kl


_ROWS = Rows(_formula, block=_block, few=_few, kernel=_kernel, topk=True)


def reverse_kl_loss(
    student: Tensor, teacher: Tensor | TopK, *, temperature: float = 1.0, dim: int | None = None
) -> Tensor:
    """Reverse Kullback-Leibler divergence: of the teacher's distribution from the student's, one value per sample.

        p = softmax(t / T),  q = softmax(s / T)
        loss = T^2 * KL(q || p) = T^2 * sum_c q_c (log q_c - log p_c)

    The expectation is under the student, so a class that the student gives no probability costs nothing: the student
    may leave out modes of the teacher, where `kl_loss` makes it cover them all.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Or a `TopK`. Gets no gradient.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, never negative; infinite where a
        class has a probability of 0 for the teacher alone. float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, the temperature is not
            positive and finite, there is only one class, or `dim` is out of range or not given where there are four
            dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import reverse_kl_loss
        >>> student = torch.tensor([[0.25, 0.75]]).log()
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> reverse_kl_loss(student, teacher)  # 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5)
        tensor([0.1308])

    Notes:
        Published with weight 1 at temperature 1, where the factor T^2 is 1.

        Scale: The single-step term of the authors' code (`minillm/minillm/losses.py` of `microsoft/LMOps`), and
        `reverse_kl` of DistiLLM (Ko et al., 2024; `distillm/losses.py` of `jongwooko/distillm`): the sum over the
        vocabulary, averaged over the tokens.

        Caveat: MiniLLM minimises the divergence of whole sequences that the student samples, by policy gradient; this
        value is one term of its objective, no replacement for it. The factor T^2 is in neither code.

    Reference:
        Yuxian Gu, Li Dong, Furu Wei and Minlie Huang, "MiniLLM: Knowledge Distillation of Large Language Models",
        ICLR 2024 and arXiv 2306.08543, section 2.1.
    """
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, dim=dim, temperature=temperature)


@register_loss("reverse_kl")
class ReverseKLLoss(RowLoss):
    """Reverse divergence of the softened distributions, T^2 KL(student || teacher); see `reverse_kl_loss`.

    Args:
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If the temperature is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import ReverseKLLoss
        >>> loss = ReverseKLLoss(temperature=2.0)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits)
        tensor(0.)

    Notes:
        With large inputs the gradient is computed in the forward pass and kept, which costs one tensor of the student's
        size. So evaluate under `torch.no_grad()`.

        Do not change student, teacher or mask in place before backward. With large inputs this is an error, with small
        ones it may be one; it never gives a wrong gradient.
    """

    rows = _ROWS
    options = {"temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int | None = None) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.temperature = temperature
