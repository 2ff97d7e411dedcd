"""Similarities of an image's tokens: the third distillation of LightlyTrain (2026)."""

from torch import Tensor
from typing_extensions import override

from distill._checks import check_positive
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._softened import divergence_of_logits
from distill.losses._tokens import token_cosines

FAMILY = "maps"


def token_similarity_loss(student: Tensor, teacher: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Divergence between the similarities of each token to the tokens of its image, one value per sample.

        p_i = softmax over j of cos(t_i, t_j) / T,  q_i = softmax over j of cos(s_i, s_j) / T
        loss = 1/L * sum_i KL(p_i || q_i)

    Tokens are compared within each network, so their widths are free, and a rotation of all tokens changes nothing. The
    squared form, without a softmax, is `gram`.

    Args:
        student: The student's tokens, `(N, L, D)`, without class and register tokens. Any floating dtype; half and
            bfloat16 are computed in float32.
        teacher: The teacher's tokens, `(N, L, D')`, at the same positions. Gets no gradient.
        temperature: What the cosines are divided by, positive and finite.

    Returns:
        One value per sample, `(N,)`, in nats, never negative; float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `temperature` is no number.
        ValueError: If the inputs are no tokens, N, L or the devices differ, there is only one token, an input is empty
            or not floating-point, or the temperature is not positive and finite.

    Examples:
        >>> import torch
        >>> from distill import token_similarity_loss
        >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # two tokens that have nothing in common
        >>> token_similarity_loss(3 * teacher.flip(-1), teacher)
        tensor([0.])
        >>> token_similarity_loss(torch.ones(1, 2, 5), teacher, temperature=1.0)  # two tokens that are the same
        tensor([0.1109])

    Notes:
        Published with weight 1 at temperature 0.07, beside the divergence of similarities to a queue (`queue_kl`), for
        pretraining without labels.

        Scale: `distillationv3_loss.py` of the authors' code (`lightly-ai/lightly-train`): the sum over the tokens j,
        averaged over the tokens i and the samples.

        Caveat: There is no paper. Their student first goes through a linear layer and is resized to the teacher's
        positions; the layer changes the similarities, and is left to an adapter.

    Reference:
        LightlyTrain, "Distillation", https://docs.lightly.ai/train/stable/pretrain_distill/methods/distillation.html
        (2026), version 3, the local part.
    """
    check_positive("temperature", temperature)
    ours, theirs = token_cosines(student, teacher)
    values = divergence_of_logits(theirs, ours, dim=-1, temperature=temperature) / temperature**2
    return values.mean(1)


@register_loss("token_similarity")
class TokenSimilarityLoss(SampleLoss):
    """Divergence between the similarities of an image's tokens; see `token_similarity_loss` for the formula.

    Args:
        temperature: What the cosines are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If the temperature is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import TokenSimilarityLoss
        >>> tokens = torch.randn(2, 49, 192, generator=torch.Generator().manual_seed(0))
        >>> TokenSimilarityLoss()(tokens, tokens)
        tensor(0.)
    """

    options = {"temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, temperature: float = 0.07, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        self.temperature = temperature

    @override
    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return token_similarity_loss(student, teacher, temperature=self.temperature)
