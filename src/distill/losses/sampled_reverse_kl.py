"""Tokens that the student wrote: Oh et al., "On-Policy Distillation with Control Variate Baseline" (2026)."""

import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_flag, check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import divergence, harden, soften

FAMILY = "language models"


def _formula(
    student: Tensor, teacher: Tensor, labels: Tensor, *, dim: int, baseline: bool, temperature: float
) -> Tensor:
    log_q, log_p = (F.log_softmax(soften(x, temperature), dim) for x in (student, teacher))
    of_token = log_q.gather(dim, labels).squeeze(dim)
    ratio = of_token.detach() - log_p.gather(dim, labels).squeeze(dim)
    advantage = ratio
    if baseline:
        of_all = divergence(log_q.detach(), log_p, dim)
        advantage = ratio - of_all.masked_fill(of_all.isinf(), 0.0)
    # The value is the ratio; added to it is 0, with the gradient that is wanted.
    return harden(ratio + advantage.masked_fill(advantage.isinf(), 0.0) * (of_token - of_token.detach()), temperature)


_ROWS = Rows(_formula, labels=True)


def sampled_reverse_kl_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    baseline: bool = True,
    temperature: float = 1.0,
    dim: int | None = None,
) -> Tensor:
    """Reverse divergence, estimated from one token that the student sampled, one value per token.

        p = softmax(t / T),  q = softmax(s / T),  y the token, sampled from q
        loss = T^2 * (log q_y - log p_y)
        its gradient: T^2 * (log q_y - log p_y - b) * grad log q_y  with  b = KL(q || p), or 0 without the baseline

    Over the draws of y the value is on average `KL(q || p)`, and the gradient that of it: the token is made less likely
    by how much worse it is than the student's tokens are on average. To differentiate the value itself would be wrong,
    since that gradient is 0 on average. The baseline changes nothing on average; where student and teacher are far
    apart it takes away spread. Where the divergence is infinite nothing is taken off. If you have all logits of both,
    `reverse_kl` has no spread at all; use this loss to compare with published results, and in recipes that weight
    single tokens.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits of the same tokens, likewise, same shape. Gets no gradient.
        target: The token that the student sampled at each position, integers from 0 to `C - 1`, `(...)`. It must come
            from the student as it is, at this temperature and without top-k or top-p, or the loss is off on average.
            The loss class takes any other label where its mask is 0.
        baseline: Whether the closed form of the divergence is taken off.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per token, shape `(...)`, in nats times the squared temperature, of either sign; infinite, with a
        gradient of 0, where the teacher gives the token no probability. float32, or float64 if an input is.

    Raises:
        TypeError: If student, teacher or target is no tensor, or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, there are fewer than two
            classes, the target is missing, no integer per token or no class, `baseline` is not True or False, the
            temperature is not positive and finite, or `dim` is out of range or not given where there are four
            dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import sampled_reverse_kl_loss
        >>> student = torch.tensor([[0.5, 0.5]]).log()
        >>> teacher = torch.tensor([[0.25, 0.75]]).log()
        >>> sampled_reverse_kl_loss(student, teacher, torch.tensor([0]))  # log 2
        tensor([0.6931])

    Notes:
        Published with weight 1 at temperature 1, where the factor T^2 is 1, as the only term.

        Scale: One value per token, averaged over the tokens.

        Caveat: No code of the authors was seen. `compute_sampled_token_self_distillation_loss` of Hugging Face TRL
        (`trl/experimental/sdft/loss_utils.py`) has the gradient without the baseline, and another value, which is no
        estimate of the divergence.

    Reference:
        Minjae Oh, Sangjun Song, Gyubin Choi, Yunho Choi and Yohan Jo, "KL for a KL: On-Policy Distillation with Control
        Variate Baseline", arXiv 2605.07865 (2026).
    """
    check_flag("baseline", baseline)
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, target, dim=dim, baseline=baseline, temperature=temperature)


@register_loss("sampled_reverse_kl")
class SampledReverseKLLoss(RowLoss):
    """Reverse divergence of one sampled token; see `sampled_reverse_kl_loss` for the formula.

    Args:
        baseline: Whether the closed form of the divergence is taken off.
        temperature: What both logits are divided by, positive and finite: that at which the tokens were sampled.
        reduction: Over tokens: `"mean"`, `"sum"` or `"none"` (one value per token).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If `baseline` is not True or False, the temperature is not positive and finite, or the reduction is
            unknown.

    Examples:
        >>> import torch
        >>> from distill import SampledReverseKLLoss
        >>> student, teacher = torch.randn(2, 7, 50, requires_grad=True), torch.randn(2, 7, 50)
        >>> tokens = torch.distributions.Categorical(logits=student).sample()
        >>> SampledReverseKLLoss()(student, teacher, tokens).backward()
    """

    rows = _ROWS
    options = {"baseline": check_flag, "temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(
        self, baseline: bool = True, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int | None = None
    ) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.baseline = baseline
        self.temperature = temperature
