"""Similarities to a queue: LightlyTrain (2025) and Fang et al., "SEED" (ICLR 2021)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_count, check_pair, check_positive, check_tensor, make_ready, without_autocast
from distill._reduction import Reduction, check_mask
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._layers import check_device
from distill.losses._memory import as_now, enter, make_ordinary
from distill.losses._sizes import EMBEDDINGS
from distill.losses._softened import divergence_of_logits
from distill.losses._vectors import normalize_each

FAMILY = "embeddings"


def queue_kl_loss(student: Tensor, teacher: Tensor, *, queue: Tensor, temperature: float = 0.07) -> Tensor:
    """Divergence between the similarities of each sample to the embeddings in a queue, one value per sample.

        p_j = softmax over j of cos(t, z_j) / T,  q_j = softmax over j of cos(s, z_j) / T,  z_j the queue
        loss = KL(p || q)

    The queue holds embeddings of the teacher, and takes the place of classes where there are no labels. `QueueKLLoss`
    has it, and the linear layer that brings the student to the teacher's width.

    Args:
        student: The student's embeddings, `(N, D)`, of any length. Any floating dtype; half and bfloat16 are computed
            in float32.
        teacher: The teacher's embeddings, same shape. Gets no gradient.
        queue: Embeddings of the teacher, `(K, D)`, of any length. A constant.
        temperature: What the cosines are divided by, positive and finite.

    Returns:
        One value per sample, `(N,)`, in nats, never negative; float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is not of two dimensions, empty or not floating-point, or the
            temperature is not positive and finite.

    Examples:
        >>> import torch
        >>> from distill import queue_kl_loss
        >>> queue = torch.eye(2)
        >>> queue_kl_loss(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), queue=queue, temperature=1.0)
        tensor([0.1109])

    Notes:
        Published with weight 1 as the only term, at temperature 0.07, with a queue of the last 8,192 embeddings, or
        fewer for small sets of images, for pretraining without labels.

        Scale: `distillation_loss.py` of the authors' code (`lightly-ai/lightly-train`, versions 1 and 3): the sum over
        the queue, averaged over the samples.

        Caveat: There is no paper of this form. That code's queue starts as zeros, which count as embeddings until they
        are overwritten; here what has not been filled counts nowhere. SEED has a cross-entropy in place of the
        divergence, a temperature of 1e-4 for the teacher, 65,536 embeddings that first are random, and the sample's own
        pair beside them; its code (`jacobswan1/SEED`) gathers the embeddings of all processes, which LightlyTrain's
        does not.

    Reference:
        LightlyTrain, "Distillation", https://docs.lightly.ai/train/stable/pretrain_distill/methods/distillation.html
        (2025), and Zhiyuan Fang, Jianfeng Wang, Lijuan Wang, Lei Zhang, Yezhou Yang and Zicheng Liu, "SEED:
        Self-supervised Distillation for Visual Representation", ICLR 2021 and arXiv 2101.04731, section 3.
    """
    check_positive("temperature", temperature)
    student, teacher = check_pair(student, teacher, dim=-1)
    check_tensor("queue", queue)
    if student.ndim != 2 or queue.ndim != 2 or queue.shape[1:] != student.shape[1:] or len(queue) == 0:
        raise ValueError(
            "student and teacher must be (N, D) and the queue (K, D) of the same D, "
            f"got {tuple(student.shape)} and {tuple(queue.shape)}"
        )
    if queue.device != student.device:
        raise ValueError(f"the queue must be on the device of the embeddings, {student.device}, got {queue.device}")
    return _compare(
        normalize_each(student, dim=1),
        normalize_each(teacher, dim=1),
        normalize_each(queue.detach(), dim=1),
        None,
        temperature,
    )


def _compare(student: Tensor, teacher: Tensor, queue: Tensor, filled: Tensor | None, temperature: float) -> Tensor:
    """The divergence for unit vectors; of the queue counts what is filled, or all where nothing is, which gives 0."""
    queue = queue.to(student.dtype)
    with without_autocast(student):
        ours, theirs = student @ queue.mT, teacher @ queue.mT
    if filled is not None:
        empty = ~filled & filled.any()
        ours, theirs = ours.masked_fill(empty, -math.inf), theirs.masked_fill(empty, -math.inf)
    return divergence_of_logits(theirs, ours, dim=1, temperature=temperature) / temperature**2


@register_loss("queue_kl")
class QueueKLLoss(SampleLoss):
    """Divergence of similarities to the last embeddings of the teacher; see `queue_kl_loss` for the formula.

    The student's embeddings go through a learned linear layer to the teacher's width. In training mode the teacher's
    embeddings of the batch first take the places of the oldest in the queue, and are compared with too; in eval mode
    the queue stays. What a mask hides, and an embedding that is not finite, does not enter: a NaN shows in the values
    of its batch alone. A queue in which nothing is yet gives 0. The queue is in `state_dict()`.

    Where several processes train together, the embeddings of all of them enter all queues, which stay the same: all
    must call the loss in each step, with as many samples as they have.

    Args:
        student_dim: Width of the student's embeddings.
        teacher_dim: Width of the teacher's embeddings.
        queue_size: How many embeddings the queue holds.
        temperature: What the cosines are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Attributes:
        projector: The learned layer, an `nn.Linear`, also where the widths agree.
        queue: The embeddings, `(queue_size, teacher_dim)`, of norm 1; 0 where there is none yet.
        entered: How many embeddings ever entered.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If a size is no positive integer, the temperature is not positive and finite, or the reduction is
            unknown.

    Examples:
        >>> import torch
        >>> from distill import QueueKLLoss
        >>> loss = QueueKLLoss(64, 384, queue_size=1024)
        >>> loss(torch.randn(8, 64), torch.randn(8, 384)).shape
        torch.Size([])
        >>> loss.entered
        tensor(8)
    """

    queue: Tensor
    entered: Tensor

    options = {  # noqa: RUF012 - declared in the base
        "student_dim": check_count,
        "teacher_dim": check_count,
        "queue_size": check_count,
        "temperature": check_positive,
    }
    built = ("student_dim", "teacher_dim", "queue_size")
    size = EMBEDDINGS

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        queue_size: int = 8192,
        temperature: float = 0.07,
        *,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.queue_size = queue_size
        self.temperature = temperature
        self.projector = nn.Linear(student_dim, teacher_dim)
        nn.init.trunc_normal_(self.projector.weight, std=0.02)
        self.register_buffer("queue", torch.zeros(queue_size, teacher_dim))
        self.register_buffer("entered", torch.zeros((), dtype=torch.int64))

    @override
    def values(self, student: Any, teacher: Any, target: Tensor | None, mask: Tensor | None) -> Tensor:
        check_tensor("student", student)
        check_tensor("teacher", teacher)
        if student.ndim != 2 or student.shape[:1] != teacher.shape[:1] or teacher.ndim != 2:
            raise ValueError(
                "student and teacher must be embeddings (N, D) of the same N, with the same shape but for D (nothing "
                f"is broadcast), got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        student, teacher = make_ready(student, teacher)
        for name, side, dim in (("student", student, self.student_dim), ("teacher", teacher, self.teacher_dim)):
            if side.shape[1] != dim:
                raise ValueError(f"{name} must have {dim} values per sample, got shape {tuple(side.shape)}")
        if mask is not None:
            check_mask(mask, student.shape[:1], student.device)
        check_device(self.projector, student)
        with without_autocast(student):
            weight, bias = self.projector.weight.to(student.dtype), self.projector.bias.to(student.dtype)
            projected = nn.functional.linear(student, weight, bias)
        theirs = normalize_each(teacher, dim=1)
        if self.training:
            make_ordinary(self)
            enter(self.queue, self.entered, theirs, None if mask is None else mask != 0)
        filled = torch.arange(self.queue_size, device=student.device) < as_now(self.entered)
        # What enters later must not change what backward needs.
        return _compare(normalize_each(projected, dim=1), theirs, as_now(self.queue.clone()), filled, self.temperature)
