"""Direction of hidden states: Sanh, Debut, Chaumond and Wolf, "DistilBERT" (2019)."""

import torch
from torch import Tensor

from distill._checks import may_look
from distill._engine.blocks import block_by_autograd, redo
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._vectors import magnitude, normalize_each, not_ordinary

FAMILY = "embeddings"


def _formula(student: Tensor, teacher: Tensor, *, dim: int) -> Tensor:
    # For unit vectors 1 - cos is half the squared distance, which keeps its digits where it is small.
    values = (normalize_each(student, dim=dim) - normalize_each(teacher, dim=dim)).square().sum(dim) / 2
    zero = (magnitude(student, dim) == 0) | (magnitude(teacher, dim) == 0)
    return values.masked_fill(zero.squeeze(dim), 1.0)


def _block(student: Tensor, teacher: Tensor, factors: Tensor | float | None, gradient: Tensor, spare: Tensor) -> Tensor:
    if not may_look(student):  # on a GPU: to see how long the vectors are would wait for it
        return block_by_autograd(_formula, student, teacher, factors, gradient, spare)
    lengths = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (student, teacher)]
    direction = torch.div(student, lengths[0], out=gradient)
    difference = torch.sub(direction, torch.div(teacher, lengths[1], out=spare), out=spare)
    values = difference.square().sum(-1, keepdim=True).div_(2)  # a norm squared would not be exact at a right angle
    if factors is not None:  # (cos a - b) / |s| with the unit vectors a and b
        torch.addcmul(difference, direction, values, value=-1, out=gradient).mul_(factors / lengths[0])
    far = not_ordinary(*lengths)
    return redo(far, values.squeeze(-1), _formula, student, teacher, factors, gradient)


_ROWS = Rows(_formula, block=_block, transposed=True, softmax=False)


def cosine_loss(student: Tensor, teacher: Tensor, *, dim: int = -1) -> Tensor:
    """One minus the cosine of the angle between student and teacher, one value per sample, token or position.

        loss = 1 - sum_c s_c t_c / (|s| |t|)

    Only the direction counts: the length of either vector does not. A vector that is 0 everywhere has no direction: the
    cosine is taken as 0, so that the value is 1, and the gradient there is 0.

    Args:
        student: The student's vectors, `(..., C)`: hidden states `(B, T, C)`, embeddings `(N, C)`, or with `dim=1` maps
            `(N, C, H, W)`. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's vectors, same shape. Gets no gradient.
        dim: The dimension of the `C` values of a vector.

    Returns:
        One value per vector, shape `(...)`, from 0 to 2; float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, or `dim` is out of range.

    Examples:
        >>> import torch
        >>> from distill import cosine_loss
        >>> student = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-5.0, 0.0]])
        >>> cosine_loss(student, teacher)  # the same direction, a right angle, the opposite one
        tensor([0., 1., 2.])

    Notes:
        Published with weight 1 on the last hidden states, beside 5 times the divergence of the softened logits and 2
        times the cross-entropy of the masked tokens.

        Scale: `distiller.py` of the authors' code (`examples/research_projects/distillation` of
        `huggingface/transformers`): `nn.CosineEmbeddingLoss`, averaged over the tokens that are not padding. Weights as
        in the command of its README.

        Caveat: The paper gives no formula and no weights.

    Reference:
        Victor Sanh, Lysandre Debut, Julien Chaumond and Thomas Wolf, "DistilBERT, a distilled version of BERT: smaller,
        faster, cheaper and lighter", NeurIPS workshop on energy-efficient machine learning 2019 and arXiv 1910.01108,
        section 2 (the training loss).
    """
    return _ROWS.values(student, teacher, dim=dim)


@register_loss("cosine")
class CosineLoss(RowLoss):
    """One minus the cosine between student and teacher; see `cosine_loss` for the formula.

    The mean is over all vectors: samples, tokens or positions. Where the widths differ, give the `Term` an adapter that
    maps the student's to the teacher's, such as `student=torch.nn.Linear(384, 768)`.

    Args:
        reduction: Over vectors: `"mean"`, `"sum"` or `"none"` (one value per vector).
        dim: The dimension of the `C` values of a vector.

    Raises:
        ValueError: If the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import CosineLoss
        >>> hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])  # (B, T, C)
        >>> CosineLoss()(hidden, -hidden, mask=torch.tensor([[True, False]]))
        tensor(2.)
    """

    rows = _ROWS

    def __init__(self, *, reduction: Reduction = "mean", dim: int = -1) -> None:
        super().__init__(reduction=reduction, dim=dim)
