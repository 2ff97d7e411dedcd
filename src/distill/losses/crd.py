"""Contrastive distillation: Tian, Krishnan and Isola, "Contrastive Representation Distillation" (ICLR 2020)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import (
    check_count,
    check_fraction,
    check_positive,
    check_tensor,
    is_integer,
    may_look,
    without_autocast,
)
from distill._registry import register_loss
from distill.losses._base import BatchLoss
from distill.losses._batches import count, select
from distill.losses._memory import as_now, by_class, make_ordinary, move_entries
from distill.losses._random import drawing
from distill.losses._vectors import normalize_each

FAMILY = "relations"

_NUM_NEGATIVES, _MOMENTUM = 16384, 0.5


def crd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 0.07, mask: Tensor | None = None) -> Tensor:
    """Noise-contrastive loss that tells a sample's own pair from the pairs with the other samples of the batch.

        z_ij = s_i . t_j / T,  s_i and t_j with L2 norm 1
        h_ij = exp(z_ij) / (exp(z_ij) + (N - 1) * m),  m = mean_ij exp(z_ij), a constant in the gradient
        loss = -1/N * sum_i [2 log h_ii + sum_{j != i} (log(1 - h_ij) + log(1 - h_ji))]

    It is the paper's objective, the student as anchor and the teacher as anchor, with the batch in place of a memory
    of negatives. `CRDLoss` learns the embeddings that are compared, and has the memory.

    Args:
        student: The student's embeddings, `(N, ...)`, N at least 2. Any floating dtype; half and bfloat16 are computed
            in float32.
        teacher: The teacher's embeddings, `(N, ...)`, as many values per sample. Gets no gradient.
        temperature: What the cosines are divided by, positive and finite.
        mask: Bool or integers, `(N,)`: which samples count. None: all.

    Returns:
        A scalar in nats, positive, or 0 if the mask leaves fewer than two samples; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none, or `temperature` is no number.
        ValueError: If N, the values per sample or the devices differ, N is 1, an input has fewer than two dimensions,
            is empty or not floating-point, the mask is not `(N,)` or holds weights, or the temperature is not positive
            and finite.

    Examples:
        >>> import torch
        >>> from distill import crd_loss
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> crd_loss(teacher, teacher)  # every sample is nearest to its own pair
        tensor(0.8109)
        >>> crd_loss(teacher.flip(0), teacher) > 10
        tensor(True)

    Notes:
        Published weights (see `CRDLoss`) are for the form with the memory; this one has fewer negatives and none
        published.

    Reference:
        Yonglong Tian, Dilip Krishnan and Phillip Isola, "Contrastive Representation Distillation", ICLR 2020 and arXiv
        1910.10699.
    """
    check_positive("temperature", temperature)
    student, teacher, kept = select(student, teacher, mask)
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must have the same number of values per sample, "
            f"got {student.shape[1]} and {teacher.shape[1]}"
        )
    return _in_batch(normalize_each(student, dim=1), normalize_each(teacher, dim=1), kept, temperature)


def _in_batch(student: Tensor, teacher: Tensor, kept: Tensor | None, temperature: float) -> Tensor:
    n = len(student)
    if n < 2:
        raise ValueError("a batch without a memory must have at least 2 samples, got 1 (DataLoader: drop_last=True)")
    with without_autocast(student):
        scores = student @ teacher.mT / temperature
    # Column 0 is the own pair, the others are those with the next samples, round the end.
    own = torch.arange(n, device=scores.device)
    columns = (own[:, None] + own) % n
    counted = None
    if kept is not None:  # a pair with another sample counts if both do, and the own one if there is another
        counted = kept[:, None] & kept[columns] & (kept.sum() > 1)
    sides = [scores.gather(1, columns), scores.mT.gather(1, columns)]
    # Both sides have the same scores, and the same mean.
    log_mean = _log_mean(sides[0], counted)
    return _contrast(sides[0], log_mean, counted) + _contrast(sides[1], log_mean, counted)


def _contrast(scores: Tensor, log_mean: Tensor, counted: Tensor | None) -> Tensor:
    """-[log h of column 0 + sum of log(1 - h) of the others], averaged over the rows.

    With h = exp(z) / (exp(z) + K exp(log_mean)), both are log-sigmoids of what z exceeds the noise by. What is not
    counted, `(N, 1 + K)`, is no score; a row has as many others as are counted in it, and a row with none is no row.
    """
    if counted is None:
        excess = scores - log_mean - _log(scores.shape[1] - 1, scores)
        return -(F.logsigmoid(excess[:, 0]) + F.logsigmoid(-excess[:, 1:]).sum(1)).mean()
    others = counted[:, 1:].sum(1, keepdim=True)
    excess = scores - log_mean - others.clamp_min(1).to(scores.dtype).log()
    gains = torch.cat([F.logsigmoid(excess[:, :1]), F.logsigmoid(-excess[:, 1:])], 1)
    return -gains.masked_fill(~counted, 0.0).sum() / count(counted[:, 0])


def _log_mean(scores: Tensor, counted: Tensor | None = None) -> Tensor:
    scores = scores.detach()
    if counted is None:
        return scores.flatten().logsumexp(0) - _log(scores.numel(), scores)
    return scores.masked_fill(~counted, -math.inf).flatten().logsumexp(0) - count(counted).to(scores.dtype).log()


def _log(number: int, like: Tensor) -> float | Tensor:
    """The logarithm of a size; `math.log`, or `new_full` on PyTorch 2.5, would make a graph of this size alone."""
    return like.new_zeros(()).add(number).log() if torch.compiler.is_compiling() else math.log(number)


def _check_momentum(name: str, momentum: float) -> float:
    return check_fraction(name, momentum, zero=True)


@register_loss("crd")
class CRDLoss(BatchLoss):
    """Noise-contrastive loss of learned embeddings, against a memory of the embeddings of all training samples.

        s_i = embed_s(student_i), t_i = embed_t(teacher_i): linear, then divided by their L2 norm
        z_ij = s_i . memory_t_j / T over the sample's own entry and K drawn ones;  m = mean exp(z) of the first batch
        h_ij = exp(z_ij) / (exp(z_ij) + K m)
        loss = -1/N * sum_i [log h_ii + sum_{j drawn} log(1 - h_ij)], plus the same of t_i against memory_s

    With a memory, `target` is the index of each sample in the training set, integers `(N,)`. Or it is `(N, 2)`, with
    the indices in column 1 and something else, such as the labels of the task loss, in column 0. (The task loss of a
    Distiller then takes column 0 of its target too.) Samples that a mask hides neither count nor change the memory, and
    their indices may be anything; the generator advances as without a mask.

    Args:
        student_dim: Values per sample of the student.
        teacher_dim: Values per sample of the teacher.
        num_samples: Size of the training set, M, for the memory of M embeddings per side. None: no memory; the
            negatives are the other samples of the batch, as in `crd_loss`, and the options below temperature must be
            left as they are.
        dim: Width of the embeddings.
        temperature: What the cosines are divided by, positive and finite.
        num_negatives: Memory entries drawn for each sample, K, uniformly and with replacement, never its own.
        momentum: Of the memory, from 0 to less than 1.
        labels: Class of every training sample, `(M,)`; the negatives of a sample are then of other classes.
        generator: Where the memory's first entries and the negatives are drawn from, on any device; by default the
            global generator. A copy of the module, by `deepcopy` or `pickle`, gets a generator of its own in the same
            state.
        gather: Whether processes that train together compare the samples of all of them: the loss is that of the whole
            batch, and so is the mean of the processes' gradients (DDP, FSDP). Not in eval mode. False: each its own.

    Raises:
        TypeError: If `temperature` or `momentum` is no number.
        ValueError: If an option is out of its range, or belongs to the memory where there is none.

    Examples:
        >>> import torch
        >>> from distill import CRDLoss
        >>> loss = CRDLoss(64, 256, 50000, num_negatives=1024, generator=torch.Generator().manual_seed(0))
        >>> indices = torch.tensor([17, 4711, 31337, 0])  # where in the training set the samples of the batch stand
        >>> loss(torch.randn(4, 64), torch.randn(4, 256), indices).shape
        torch.Size([])

    Notes:
        After each training forward the entries of the batch become `momentum * entry + (1 - momentum) * embedding`,
        divided by their norm. In eval mode the memory and m stay. An entry that would not be finite stays as it was,
        and m is that of the first batch that has a finite one: a NaN affects the value of its batch only. With M
        samples, K m = K/M * Z of the paper's code, where Z = M m is its normalising constant.

        Train the parameters `student_embedding` and `teacher_embedding` with the student. Under DistributedDataParallel
        each process has its own memory: give it `broadcast_buffers=False`, or the memory of the first process is sent
        to all in every forward. With `gather` each process updates the entries of all samples, so the memories stay
        equal; give each process a generator in the same state, so that they draw the same negatives.

        Published with weight 0.8 on pooled features at these defaults, and with `labels` (the CIFAR-100 benchmark of
        the paper, whose negatives are samples of other classes).

        Scale: `crd/criterion.py` and `crd/memory.py` of that benchmark (`HobbitLong/RepDistiller`): the sum over the
        pair and the K negatives, averaged over the samples, for both sides together.

        Caveat: That code draws the negatives of a sample without replacement, and adds 1e-7 beside the noise, which is
        left out here: it changes the value in the seventh digit. The temperature 0.07 is the default of its options and
        no part of its command; Hu's Knowledge-Distillation-Zoo has 0.1, with weight 0.8 on CIFAR-100 and 0.2 on
        CIFAR-10.
    """

    student_memory: Tensor
    teacher_memory: Tensor
    log_means: Tensor
    order: Tensor
    excluded: Tensor

    uses_target = True

    options = {"temperature": check_positive, "num_negatives": check_count, "momentum": _check_momentum}  # noqa: RUF012 - declared in the base

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int | None = None,
        *,
        dim: int = 128,
        temperature: float = 0.07,
        num_negatives: int = _NUM_NEGATIVES,
        momentum: float = _MOMENTUM,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        sizes = {"student_dim": student_dim, "teacher_dim": teacher_dim, "dim": dim}
        for name, size in sizes.items():
            check_count(name, size)
        self.num_samples = num_samples
        self.temperature = temperature
        self.num_negatives = num_negatives
        self.momentum = momentum
        self.generator = generator
        self.student_embedding = nn.Linear(student_dim, dim)
        self.teacher_embedding = nn.Linear(teacher_dim, dim)
        if num_samples is None:
            left = num_negatives == _NUM_NEGATIVES and momentum == _MOMENTUM and labels is None and generator is None
            if not left:
                raise ValueError(
                    "num_negatives, momentum, labels and generator must be left as they are where there is no memory "
                    "(num_samples=None)"
                )
            return
        check_count("num_samples", num_samples, least=2)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, self._first_entries(num_samples, dim))
        # One for each side's anchors, NaN until the first batch.
        self.register_buffer("log_means", torch.full((2,), math.nan))
        self.by_class = labels is not None
        if labels is not None:
            order, excluded = by_class(num_samples, labels)
            self.register_buffer("order", order, persistent=False)
            self.register_buffer("excluded", excluded, persistent=False)

    @override
    def whole(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        student, teacher, kept = select(student, teacher, mask)
        ours = _embed(self.student_embedding, student, "student")
        theirs = _embed(self.teacher_embedding, teacher, "teacher")
        if self.num_samples is None:
            return _in_batch(ours, theirs, kept, self.temperature)
        make_ordinary(self)
        own = self._indices(target, student, kept)
        entries = torch.cat([own[:, None], self._negatives(own, kept)], 1)
        counted = None if kept is None else kept[:, None].expand_as(entries)
        total = ours.new_zeros(())
        sides = ((ours, self.teacher_memory), (theirs, self.student_memory))
        for side, (anchors, memory) in enumerate(sides):
            scores = _scores(anchors, memory, entries) / self.temperature
            stored = as_now(self.log_means[side].to(scores.dtype))
            log_mean = torch.where(stored.isnan(), _log_mean(scores, counted), stored)
            if self.training:
                self.log_means[side] = torch.where(log_mean.isfinite(), log_mean, stored)
            total = total + _contrast(scores, log_mean, counted)
        if self.training:
            move_entries(self.student_memory, own, ours, kept, self.momentum)
            move_entries(self.teacher_memory, own, theirs, kept, self.momentum)
        return total

    @override
    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        shown = f"num_samples={self.num_samples}, temperature={self.temperature}"
        if self.num_samples is not None:
            shown = f"{shown}, num_negatives={self.num_negatives}, momentum={self.momentum}"
        return f"{shown}, gather=True" if self.gather else shown

    def _first_entries(self, num_samples: int, dim: int) -> Tensor:
        # Uniform, of norm 1 on average: of variance 1 / dim.
        bound = math.sqrt(3 / dim)
        drawn = torch.rand(num_samples, dim, **drawing(self.generator, torch.get_default_device()))
        return (drawn * (2 * bound) - bound).cpu()

    def _indices(self, target: Tensor | None, student: Tensor, kept: Tensor | None) -> Tensor:
        n = len(student)
        if target is None:
            raise ValueError("CRD with a memory needs the indices of the samples as target, got None")
        check_tensor("target", target)
        if target.shape not in ((n,), (n, 2)) or not is_integer(target):
            raise ValueError(
                f"target must be the indices of the samples, integers ({n},) or ({n}, 2) with the indices in column 1, "
                f"got {target.dtype} {tuple(target.shape)}"
            )
        own = (target if target.ndim == 1 else target[:, 1]).to(student.device, torch.int64)
        if kept is not None:
            own = own.masked_fill(~kept, 0)
        if may_look(own):
            low, high = (int(value) for value in own.aminmax())
            if low < 0 or high >= len(self.student_memory):
                raise ValueError(
                    f"target must be indices from 0 to {len(self.student_memory) - 1}, got {low if low < 0 else high}"
                )
        return own

    def _negatives(self, own: Tensor, kept: Tensor | None = None) -> Tensor:
        """Draw entries of the memory, (N, K), none of the class (or, without labels, of the place) of the sample.

        What a sample draws does not depend on what is hidden before it.
        """
        shape = (len(own), self.num_negatives)
        bound = 2**62 if self.by_class else len(self.student_memory) - 1
        drawn = torch.randint(bound, shape, **drawing(self.generator, own.device)).to(own.device)
        if kept is not None:
            drawn = drawn[kept.cumsum(0) - 1]
        if not self.by_class:
            return drawn + (drawn >= own[:, None])
        start, alike = self.excluded[own].unbind(1)
        drawn = drawn % (len(self.order) - alike)[:, None]
        return self.order[torch.where(drawn >= start[:, None], drawn + alike[:, None], drawn)]


def _embed(embedding: nn.Linear, features: Tensor, side: str) -> Tensor:
    if features.shape[1] != embedding.in_features:
        raise ValueError(
            f"{side} must have {side}_dim={embedding.in_features} values per sample, got {features.shape[1]}"
        )
    dtype = torch.promote_types(features.dtype, embedding.weight.dtype)
    with without_autocast(features):
        return normalize_each(F.linear(features.to(dtype), embedding.weight.to(dtype), embedding.bias.to(dtype)), dim=1)


def _scores(anchors: Tensor, memory: Tensor, entries: Tensor) -> Tensor:
    """Inner products of each anchor with its own choice of entries, (N, d), (M, d), (N, 1 + K) -> (N, 1 + K)."""
    with without_autocast(anchors):
        if entries.numel() < len(memory):
            chosen = as_now(memory[entries].to(anchors.dtype))
            return (chosen @ anchors[:, :, None]).squeeze(2)
        # Fewer entries than choices: all products are less work than an entry gathered for each choice. The copy is for
        # backward, which comes when the memory has moved on.
        return (anchors @ as_now(memory.clone()).to(anchors.dtype).mT).gather(1, entries)
