"""Logit standardisation: Sun, Ren, Li, Wang and Cao, "Logit Standardization in Knowledge Distillation" (CVPR 2024)."""

import math

import torch
from torch import Tensor

from distill._checks import check_positive, may_look
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._blocks import ordinary_rows
from distill.losses._softened import compare_rows, divergence_of_logits

FAMILY = "logits"

_EPS = 1e-7
_LARGE = 1e15  # its square, summed over any number of classes, is finite in float32


def _formula(student: Tensor, teacher: Tensor, *, dim: int, temperature: float) -> Tensor:
    z_student, z_teacher = _standardise(student, dim), _standardise(teacher, dim)
    return divergence_of_logits(z_teacher, z_student, dim=dim, temperature=temperature)


def _standardise(logits: Tensor, dim: int) -> Tensor:
    if may_look(logits):
        std, mean = torch.std_mean(logits, dim, keepdim=True)
        least, most = std.detach().aminmax()
        if least > 0 and most < _LARGE:
            return (logits - mean) / (std + _EPS)
    # A class at -inf has no probability and is none of those that are standardised.
    none = logits == -math.inf
    logits = logits.masked_fill(none, 0.0)
    count = logits.shape[dim] - none.sum(dim, keepdim=True)
    # A constant that the result does not depend on, but for the share of the 1e-7: so that no square overflows.
    logits = logits / (logits.detach().abs().amax(dim, keepdim=True) / _LARGE).clamp(min=1.0)
    centred = (logits - logits.sum(dim, keepdim=True) / count).masked_fill(none, 0.0)
    variance = centred.square().sum(dim, keepdim=True) / (count - 1).clamp(min=1)
    # Where all are equal the square root has no derivative, but what is divided by it is 0: it does not matter there.
    equal = variance == 0
    std = variance.masked_fill(equal, 1.0).sqrt().masked_fill(equal, 0.0)
    return (centred / (std + _EPS)).masked_fill(none, -math.inf)


def _block(
    student: Tensor, teacher: Tensor, factors: Tensor | None, gradient: Tensor, spare: Tensor, *, temperature: float
) -> Tensor:
    z, more = torch.empty_like(spare), torch.empty_like(spare)
    of_student, of_teacher = _standardise_rows(student, out=z), _standardise_rows(teacher, out=more)
    p = spare
    d = gradient
    v, mean, _ = compare_rows(more, z, d, p, temperature=temperature)  # q is p exp(d) / (1 + mean)
    value = mean.log1p()
    if factors is not None:
        against = torch.addcmul(v, p, d.sub_(mean), out=gradient)  # (q - p) (1 + mean)
        # What would only stretch or shrink the student's logits does not count.
        along = torch.mul(against, z, out=more).sum(-1, keepdim=True) / (z.shape[-1] - 1) * (1 + _EPS / of_student)
        against.sub_(z.mul_(along)).mul_(factors * temperature / (of_student + _EPS) / (1 + mean))
    ordinary = (of_student > 0) & (of_student < _LARGE) & (of_teacher > 0) & (of_teacher < _LARGE)
    return torch.where(ordinary, temperature**2 * value, math.nan).squeeze(-1)


def _standardise_rows(logits: Tensor, out: Tensor) -> Tensor:
    torch.sub(logits, logits.mean(-1, keepdim=True), out=out)
    std: Tensor = torch.linalg.vector_norm(out, dim=-1, keepdim=True) / math.sqrt(out.shape[-1] - 1)
    out.mul_(1 / (std + _EPS))
    return std


_ROWS = Rows(_formula, block=ordinary_rows(_formula, _block))


def logit_std_loss(student: Tensor, teacher: Tensor, *, temperature: float = 2.0, dim: int | None = None) -> Tensor:
    """Divergence of the softened distributions of standardised logits, one value per sample.

        z(x) = (x - mean(x)) / (std(x) + 1e-7),  mean and unbiased standard deviation over the classes
        p = softmax(z(t) / T),  q = softmax(z(s) / T)
        loss = T^2 * KL(p || q)

    The student need not match the range of the teacher's logits, only how they compare: shifting or stretching either
    side's logits changes nothing.

    A class at -inf has probability 0 and is not standardised: mean and standard deviation are those of the finite
    logits. (A large negative number is a logit like any other. It counts in both, and next to it all other logits are
    the same: mask classes with -inf.)

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape. Gets no gradient.
        temperature: What the standardised logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, not negative; float32, or float64 if
        an input is. It is infinite where the student gives no probability and the teacher does.

    Raises:
        TypeError: If student or teacher is no tensor, or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, there are fewer than two
            classes, the temperature is not positive and finite, or `dim` is out of range or not given where there are
            four dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import logit_std_loss
        >>> student = torch.tensor([[-1.0, 1.0]])
        >>> teacher = torch.tensor([[3.0, -3.0]])
        >>> logit_std_loss(student, teacher)  # z is -+ 0.7071 and +- 0.7071
        tensor([0.9603])

    Notes:
        Published with weight 9 at temperature 2 on CIFAR-100, at temperature 3 for some pairs of networks.

        Scale: `mdistiller/distillers/KD.py` of the authors' code (`sunshangquan/logit-standardization-KD`), which also
        fixes the standard deviation, that divides by C - 1, and the 1e-7.

        Caveat: The weight of the cross-entropy beside it. The authors' `mdistiller/engine/cfg.py` has 1 in an early
        version and 0.1 in a later one (quoted in their issue 25).

    Reference:
        Shangquan Sun, Wenqi Ren, Jingzhi Li, Rui Wang and Xiaochun Cao, "Logit Standardization in Knowledge
        Distillation", CVPR 2024 and arXiv 2403.01427.
    """
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, dim=dim, temperature=temperature)


@register_loss("logit_std")
class LogitStdLoss(RowLoss):
    """Divergence of the softened distributions of standardised logits; see `logit_std_loss` for the formula.

    Args:
        temperature: What the standardised logits are divided by, positive and finite. It may be changed between
            steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If the temperature is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import LogitStdLoss
        >>> loss = LogitStdLoss()
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, 10 * logits + 5) < 1e-6  # the range of the logits does not count
        tensor(True)
    """

    rows = _ROWS
    options = {"temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, temperature: float = 2.0, *, reduction: Reduction = "mean", dim: int | None = None) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.temperature = temperature
