"""Two tokenizers: Minixhofer, Vulic and Ponti, "Approximate Likelihood Matching" (2025)."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from distill._checks import check_inputs, check_positive, ordinary, widen
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._softened import expm1

FAMILY = "language models"

_EPS = 1e-6  # what the authors take off, so that a chunk of which the student is sure has a finite loss


def alm_loss(student: Tensor, teacher: Tensor, *, temperature: float = 100.0) -> Tensor:
    """Cross-entropy of the probabilities that student and teacher give to the same text, one value per chunk.

        P = exp(t / T - 1e-6),  Q = exp(s / T - 1e-6)
        loss = -P log Q - (1 - P) log(1 - Q)

    A chunk is a piece of text at whose ends tokens of both networks end; t and s are the logarithms of what each gives
    it: the sums over its tokens. So the tokenizers may differ in every way. `align_tokens` finds the chunks,
    `chunk_log_probs` adds up the tokens' logarithms: minus the cross-entropy with a reduction of `"none"`, also that of
    `LinearCrossEntropyLoss`, which forms no logits. The smallest value is where s equals t, and is not 0 but the
    entropy of P. At a temperature of 100 the likelihoods of unlikely chunks are not all near 0.

    Args:
        student: The logarithms of the student's likelihoods, `(...)`, one per chunk, at most 0: what is above by
            rounding counts as 0. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The logarithms of the teacher's, same shape. Gets no gradient.
        temperature: What the logarithms are divided by, positive and finite.

    Returns:
        One value per chunk, in nats, positive; infinite where the student alone gives a likelihood of 0. float32, or
        float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, or the temperature is not
            positive and finite.

    Examples:
        >>> import torch
        >>> from distill import alm_loss
        >>> student, teacher = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
        >>> alm_loss(student, teacher, temperature=1.0)  # log 2, whatever the teacher says
        tensor([0.6931])

    Notes:
        Published with weight 1 at temperature 100, as the only term.

        Scale: `compute_alm_loss` of the authors' code (`tokenkit/training/losses.py` of `bminixhofer/tokenkit`) with
        the distance `binary_ce`, the 1e-6 included: averaged over the chunks.

        Caveat: By default that code joins chunks whose end is biased by a tokenizer, and adds the probability that a
        word ends there. Here the chunks are the shortest ones, as in its notebook
        `docs/pytorch_alm_from_scratch.ipynb`.

    Reference:
        Benjamin Minixhofer, Ivan Vulic and Edoardo Maria Ponti, "Cross-Tokenizer Distillation via Approximate
        Likelihood Matching", arXiv 2503.20083 (2025).
    """
    check_positive("temperature", temperature)
    dtype = check_inputs(student, teacher, dim=-1)
    student, teacher = widen(student, dtype), widen(ordinary(teacher.detach()), dtype)
    log_q, log_p = (x.clamp(max=0) / temperature - _EPS for x in (student, teacher))
    p = log_p.exp()
    return -p * log_q.masked_fill(p == 0, 0.0) + expm1(log_p) * _log_of_rest(log_q)


def _log_of_rest(log_q: Tensor) -> Tensor:
    """Compute log(1 - q) for q below 1; each half of the range has the form that keeps its digits."""
    likely = log_q > -math.log(2)
    of_likely = (-expm1(log_q.masked_fill(~likely, -1.0))).log()
    of_others = torch.log1p(-log_q.masked_fill(likely, -1.0).exp())
    return torch.where(likely, of_likely, of_others)


@register_loss("alm")
class ALMLoss(SampleLoss):
    """Cross-entropy of the likelihoods of the same pieces of text; see `alm_loss` for the formula.

    Args:
        temperature: What the logarithms of the likelihoods are divided by, positive and finite. It may be changed
            between steps.
        reduction: Over chunks: `"mean"`, `"sum"` or `"none"` (one value per chunk).

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If the temperature is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from distill import ALMLoss, align_tokens, chunk_log_probs, next_tokens
        >>> student_offsets = torch.tensor([[[0, 0], [0, 2], [2, 5], [5, 9]]])  # the first token begins the sequence
        >>> teacher_offsets = torch.tensor([[[0, 0], [0, 5], [5, 6], [6, 9]]])
        >>> chunks = align_tokens(student_offsets, teacher_offsets)
        >>> def likelihoods(logits, ids, chunks):
        ...     target, mask = next_tokens(ids)
        ...     log_probs = -F.cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=-100)
        ...     return chunk_log_probs(log_probs, chunks, mask, num_chunks=4)
        >>> student, whole = likelihoods(torch.randn(1, 4, 50), torch.tensor([[1, 7, 8, 9]]), chunks[0])
        >>> teacher, whole_too = likelihoods(torch.randn(1, 4, 80), torch.tensor([[1, 60, 61, 62]]), chunks[1])
        >>> whole & whole_too  # two chunks: 0 to 5 and 5 to 9
        tensor([[ True,  True, False, False]])
        >>> ALMLoss()(student, teacher, mask=whole & whole_too).shape
        torch.Size([])
    """

    options = {"temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, temperature: float = 100.0, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        self.temperature = temperature

    @override
    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return alm_loss(student, teacher, **self.given())
