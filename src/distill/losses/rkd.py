"""Relational distillation: Park, Kim, Lu and Cho, "Relational Knowledge Distillation" (CVPR 2019)."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from distill._checks import check_not_negative, without_autocast
from distill._merged import exact
from distill._registry import register_loss
from distill.losses._base import BatchLoss
from distill.losses._batches import count, hide_pairs, mean_of_pairs, select

FAMILY = "relations"

# Angles held at a time: on a CPU what its cache holds, elsewhere what keeps the device busy.
_ANGLES_CPU, _ANGLES = 2**17, 2**24


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Difference between the distances and angles that student and teacher see between the samples of a batch.

        d_ij = |s_i - s_j| / mean of the positive |s_i - s_j|
        a_ijk = cosine of the angle at s_i between s_j and s_k, 0 where s_j or s_k equals s_i
        d', a' = the same of the teacher
        loss = distance_weight * mean_ij huber(d_ij - d'_ij) + angle_weight * mean_ijk huber(a_ijk - a'_ijk)

    with huber(x) = x^2 / 2 for |x| <= 1, else |x| - 1/2. The means are over all N^2 pairs and N^3 triples, also over
    those of a sample with itself. The angles are taken in blocks: memory grows with N^2, not with N^3.

    Args:
        student: The student's features, `(N, ...)`. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's, `(N, ...)` of the same N; its other dimensions are its own. Gets no gradient.
        distance_weight: Of the pairs, finite and not negative.
        angle_weight: Of the triples, finite and not negative.
        mask: Bool or integers, `(N,)`: which samples count. None: all.

    Returns:
        A scalar without unit, not negative; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none, or `distance_weight` or `angle_weight` is no number.
        ValueError: If N or the devices differ, an input has fewer than two dimensions, is empty or not floating-point,
            the mask is not `(N,)` or holds weights, or a weight is negative or not finite.

    Examples:
        >>> import torch
        >>> from distill import rkd_loss
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # an angle of 90 degrees and two of 45
        >>> rkd_loss(student, 4 * student + 1)
        tensor(0.)
        >>> teacher = torch.tensor([[0.0], [1.0], [2.0]])  # on a line: angles of 0, 180 and 0 degrees
        >>> rkd_loss(student, teacher, distance_weight=0.0, angle_weight=1.0)  # (1/2 + 1.2071 + 0.0429) * 2 / 27
        tensor(0.1296)

    Notes:
        Published with weight 1 on pooled features (the CIFAR-100 benchmark of Tian, Krishnan and Isola, "Contrastive
        Representation Distillation", ICLR 2020, at these defaults).

        Scale: `distiller_zoo/RKD.py` of that benchmark (`HobbitLong/RepDistiller`): the means over all pairs and
        triples.

        Caveat: Where two samples are the same, that code takes their distance as 1e-6 and counts it in the mean of the
        positive ones; here it is 0 and does not count.

    Reference:
        Wonpyo Park, Dongju Kim, Yan Lu and Minsu Cho, "Relational Knowledge Distillation", CVPR 2019 and arXiv
        1904.05068, section 3.2.
    """
    check_not_negative("distance_weight", distance_weight)
    check_not_negative("angle_weight", angle_weight)
    student, teacher, kept = select(student, teacher, mask)
    squares = _squared_distances(student, kept), _squared_distances(teacher, kept)
    loss = student.new_zeros(())
    if distance_weight or not angle_weight:  # with both 0 there is a gradient of 0
        ours, theirs = map(_relative_distances, squares)
        loss = loss + distance_weight * mean_of_pairs(_huber(ours - theirs), kept)
    if angle_weight:
        early = torch.is_grad_enabled() and squares[0].requires_grad
        angles, _ = _AngleLoss.apply(*squares, early)  # type: ignore[no-untyped-call]  # torch leaves it so
        loss = loss + angle_weight * (angles / (len(student) if kept is None else count(kept)) ** 3)
    return loss


def _squared_distances(features: Tensor, kept: Tensor | None = None) -> Tensor:
    """|x_i - x_j|^2 over the largest of them, from a product of matrices, exactly 0 for samples that are the same.

    A sample that does not count is 0 from all. In float64, since the terms cancel where samples are near each other,
    and since TF32 does not reach it. Neither distances over their mean nor angles know the scale, and with the largest
    at 1 no inverse leaves float32; what is nearer than 1e-15 of it counts as the same.
    """
    wide = exact(features)
    kept = None if kept is None else kept.to(wide.device)
    wide = wide - wide.sum(0) / (len(wide) if kept is None else count(kept))
    with without_autocast(wide):
        products = wide @ wide.mT
    norms = products.diagonal()
    norms = norms[:, None] + norms
    squares = hide_pairs(norms - 2 * products, kept)
    rounding = torch.finfo(torch.float64).eps * features.shape[1]
    largest = squares.detach().amax()
    # Asked so that NaN is not the same, but stays.
    same = (squares <= rounding * norms) | (squares <= 1e-30 * largest)
    return (squares.masked_fill(same, 0.0) / largest.masked_fill(largest <= 0, 1.0)).to(features)


def _relative_distances(squares: Tensor) -> Tensor:
    same = squares == 0
    # The root of 1 in place of that of 0, whose gradient is infinite.
    distances = squares.masked_fill(same, 1.0).sqrt().masked_fill(same, 0.0)
    positive = (~same).sum()
    mean = distances.sum() / positive.masked_fill(positive == 0, 1)
    return distances / mean.masked_fill(mean == 0, 1.0)


def _huber(difference: Tensor) -> Tensor:
    # Which side of 1 is a constant: no derivative rests on what clamp or max have at a tie.
    size = difference.abs()
    return torch.where(size <= 1, difference.square() / 2, size - 0.5)


def _slope(difference: Tensor) -> Tensor:
    """The derivative of Huber's function; it overwrites `difference` where nothing is to be derived again."""
    if not torch.is_grad_enabled():
        return difference.clamp_(-1, 1)  # a tenth of the time
    return torch.where(difference.abs() <= 1, difference, difference.detach().sign())


class _AngleLoss(torch.autograd.Function):
    """Sum of the Huber differences of all angles, a block of anchors at a time, from the squared distances alone.

    The cosine of the angle at i between j and k is (d_ij^2 + d_ik^2 - d_jk^2) / (2 d_ij d_ik). Plain autograd would
    keep several N x N x N tensors; here the gradient, N x N, is formed with the sum.
    """

    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(student: Tensor, teacher: Tensor, early: bool) -> tuple[Tensor, Tensor]:
        return _sum_and_slope(student, teacher) if early else (_sum(student, teacher), student.new_zeros(()))

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
        *pair, ctx.early = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*pair, output[1])

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, slope = ctx.saved_tensors
        if not ctx.early or torch.is_grad_enabled():  # it is to be differentiated again
            slope = _sum_and_slope(student, teacher)[1]
        return slope * gradient, None, None


def _sum(student: Tensor, teacher: Tensor) -> Tensor:
    total = student.new_zeros(())
    for _, ours, theirs, _ in _blocks(student, teacher):
        total = total + F.smooth_l1_loss(ours, theirs, reduction="sum")
    return total


def _sum_and_slope(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and its derivative for the student's squared distances."""
    inverse = _inverse_root(student).square()
    total, sides, across = student.new_zeros(()), [], torch.zeros_like(student)
    for anchors, ours, theirs, scale in _blocks(student, teacher):
        total = total + F.smooth_l1_loss(ours, theirs, reduction="sum")
        slope = _slope(ours - theirs)
        scaled = slope * scale
        # j and k are alike in the angle at i, so the side from i to j counts twice.
        sides.append(2 * scaled.sum(2) - inverse[anchors] * (slope * ours).sum(2))
        across = across - scaled.sum(0)
    return total, torch.cat(sides) + across


def _blocks(student: Tensor, teacher: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Anchors, the cosines (anchor, j, k) of student and teacher, and what the student's were multiplied by."""
    # Blocks that stay in cache. Not for a graph: it has each block once more, and a compiler keeps none of them whole.
    cached = student.device.type == "cpu" and not torch.compiler.is_compiling()
    angles = _ANGLES_CPU if cached else _ANGLES
    n = len(student)
    # Asked before anything is divided: as long as one block is enough, `torch.compile` needs one graph for all sizes.
    step = n if n * n * n <= angles else max(1, angles // n**2)
    inverses = _inverse_root(student), _inverse_root(teacher)
    for start in (0,) if step == n else range(0, n, step):
        anchors = slice(start, start + step)
        (ours, scale), (theirs, _) = map(_cosines, (student, teacher), inverses, (anchors, anchors))
        yield anchors, ours, theirs, scale


def _cosines(squares: Tensor, inverse: Tensor, anchors: slice) -> tuple[Tensor, Tensor]:
    sides = squares[anchors]
    scale = inverse[anchors, :, None] * (inverse[anchors, None, :] / 2)
    # In place: fresh memory costs more than the arithmetic.
    return (sides[:, :, None] + sides[:, None, :]).sub_(squares).mul_(scale), scale


def _inverse_root(squares: Tensor) -> Tensor:
    same = squares == 0
    return squares.masked_fill(same, 1.0).rsqrt().masked_fill(same, 0.0)


@register_loss("rkd")
class RKDLoss(BatchLoss):
    """Difference between distances and angles of the samples; see `rkd_loss` for the formula.

    It exists for a whole batch only, so it has no reduction, and its mask selects samples.

    Args:
        distance_weight: Of the pairs, finite and not negative. It may be changed between steps.
        angle_weight: Of the triples, finite and not negative. It may be changed between steps.
        gather: Whether processes that train together compare the samples of all of them: the loss is that of the whole
            batch, and so is the mean of the processes' gradients (DDP, FSDP). Not in eval mode. False: each its own.

    Raises:
        TypeError: If `distance_weight` or `angle_weight` is no number.
        ValueError: If a weight is negative or not finite, or `gather` is neither True nor False.

    Examples:
        >>> import torch
        >>> from distill import RKDLoss
        >>> features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]])
        >>> RKDLoss()(features, 2 * features)
        tensor(0.)
    """

    options = {"distance_weight": check_not_negative, "angle_weight": check_not_negative}  # noqa: RUF012 - declared in the base

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0, *, gather: bool = False) -> None:
        super().__init__(gather=gather)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    @override
    def whole(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        return rkd_loss(student, teacher, mask=mask, **self.given())
