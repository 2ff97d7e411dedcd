"""Logit matching of linear heads without their logits: Vincent, de Brebisson and Bouthillier (NIPS 2015)."""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._engine.squared.gram import factorise, teacher_gram
from distill._engine.squared.heads import Problem, check_heads, check_vocabulary
from distill._engine.squared.kept import Kept, may_keep
from distill._engine.squared.plan import Plan, Size, cheapest
from distill._reduction import Reduction, divide
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._heads import HeadPair, check_positions, check_scale
from distill.losses._mean_squares import ROWS

FAMILY = "logits"

Method: TypeAlias = Literal["auto", "factor", "gram", "blocks", "logits"]
_METHODS = ("auto", "factor", "gram", "blocks", "logits")


def _check_method(name: str, value: Any) -> Any:
    if value not in _METHODS:
        raise ValueError(f"{name} must be 'auto', 'factor', 'gram', 'blocks' or 'logits', got {value!r}")
    return value


def linear_logit_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab_size: int | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    method: Method = "auto",
) -> Tensor:
    """`logit_loss` of two linear heads, from their hidden states, without large logits, one value per sample.

        s = a_s (W_s h_s + b_s),  t = a_t (W_t h_t + b_t)
        loss = 1/V * sum_v (s_v - t_v)^2
             = 1/V * (h_s G_ss h_s - 2 h_t G_ts h_s + h_t G_tt h_t),  G_xy = W_x^T W_y  (no biases, a = 1)

    Exact, not an approximation: what `logit_loss(s, t)` gives, with gradients for the student's hidden states, weight
    and bias. The published weights are those of `logit_loss`.

    Four forms give the same value. `"gram"` computes the formula above: O((N + V) d^2) time and O(N d + d^2) memory
    beside the gradients, instead of O(N V d) and O(N V). `"factor"`, for heads that are not trained, takes R from a QR
    factorisation of `[W_s, -W_t]` in float64 and gives `1/V * |R [h_s, h_t]|^2`, where the vocabulary is gone; it pays
    where R is kept, as `LinearLogitLoss` does. `"blocks"` forms the logits of some classes at a time, in the inputs'
    dtype and at least float32; if the head trains, it keeps up to 128 MB of their differences for backward, or forms
    them again. `"logits"` forms them all, for `logit_loss`: where they are small nothing is faster. `"auto"` takes the
    form whose estimated cost is lowest, as `LinearLogitLoss.plan` shows, and `"logits"` up to 2^23 of them (32 MB in
    float32) only.

    Args:
        student_hidden: What the student's head sees, `(..., d_s)`. Any floating dtype.
        student_weight: The student's head, `(V, d_s)`, as in `nn.Linear` and `nn.Embedding`.
        teacher_hidden: What the teacher's head sees, `(..., d_t)`; d_t may differ from d_s, the rest may not.
        teacher_weight: The teacher's head, `(V, d_t)`. The teacher's tensors are constants.
        student_bias: `(V,)`, or None for none.
        teacher_bias: `(V,)`, or None for none.
        vocab_size: Compare the first so many rows of both heads only, which must mean the same tokens: for vocabularies
            of which one continues the other, or weights padded to a multiple of 64. The mean is over these rows.
        student_scale: `a_s`, what the student's model multiplies its logits by after the head.
        teacher_scale: `a_t`, the same of the teacher.
        method: `"auto"`, `"factor"`, `"gram"`, `"blocks"` or `"logits"`.

    Returns:
        One value per sample, shape `(...)`, in squared units of the logits; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none.
        ValueError: If shapes, vocabularies or devices differ, an input is empty or not floating-point, a weight is
            sharded or quantised, `vocab_size` is not positive or larger than a head, a scale is not positive and
            finite, the method is unknown, `"factor"` is asked for while the student's head needs a gradient, or
            `"factor"` or `"gram"` on a device without float64.

    Examples:
        >>> import torch
        >>> from distill import linear_logit_loss, logit_loss
        >>> student_hidden, teacher_hidden = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0, 1.0]])
        >>> student_weight, teacher_weight = torch.ones(5, 2), torch.ones(5, 3)
        >>> linear_logit_loss(student_hidden, student_weight, teacher_hidden, teacher_weight)  # logits of 3 and 2
        tensor([1.])
        >>> logit_loss(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T)
        tensor([1.])

    Notes:
        The terms cancel as student and teacher agree. On a CPU, float32 inputs are computed in float32 where that is
        enough, and otherwise in float64, the values of `"gram"` if need be by `"factor"`. Down to logits that differ by
        1e-6 of their size, the error of values is below 1e-3 and that of gradients below 1e-4
        (benchmarks/agreement.py). On other devices and in traced code both compute in float64. `"blocks"` and
        `"logits"` have the error of logits. No value is negative.

        Differentiating twice and `torch.func` work, in memory for V times the hidden sizes (`"gram"`) or N times V
        (`"blocks"`, `"logits"`); `torch.compile` traces all forms.

        Scale: That of `logit_loss`, the mean over the classes.

    Reference:
        Pascal Vincent, Alexandre de Brebisson and Xavier Bouthillier, "Efficient Exact Gradient Update for training
        Deep Networks with Very Large Sparse Targets", NIPS 2015 (the squared error of a linear layer from W^T W), for
        the loss of Jimmy Ba and Rich Caruana, "Do Deep Nets Really Need to be Deep?", NIPS 2014 and arXiv
        1312.6184, section 2.2.
    """
    _check_method("method", method)
    problem = check_heads(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        vocab_size=vocab_size,
        scale=check_scale("student_scale", student_scale),
        teacher_scale=check_scale("teacher_scale", teacher_scale),
    )
    chosen: str = method
    if chosen == "auto":
        chosen = "logits" if problem.is_tiny() else cheapest(problem.size().costs())
    problem.check_possible(chosen)
    return ROWS.values(*problem.logits(), dim=-1) if chosen == "logits" else problem.loss(chosen)


@register_loss("linear_logit")
class LinearLogitLoss(SampleLoss):
    """`LogitLoss` of two linear heads, without large logits; see `linear_logit_loss` for the formula.

    It compares what the heads see: as a `Term` at the module before them (`at="model.norm"`), also in models that need
    not run their heads at all, or at the heads' inputs (`at="lm_head:input"`). Where a model runs its head at some
    positions only (`logits_to_keep=1`), the head's input has those alone: tap the module before it.

    The heads are `nn.Linear`, `nn.Embedding` (tied or not), or another module that computes `W h + b` with a `weight`
    of V rows and possibly a `bias`, both used as they are at each call. They are referred to, not owned: they are in no
    `parameters()` and no `state_dict()` of the loss, and moving the loss does not move them. So put the student's own
    head in, which the student trains, saves and moves. A copy or pickle of a Distiller refers to the head of the copied
    student; a copy of the loss alone has copies of the heads.

    Args:
        student_head: The student's head, (V, d_s).
        teacher_head: The teacher's head, (V, d_t); never trained by this loss.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        vocab_size: Compare the first so many rows of both heads only; None compares all, of which there must be
            equally many.
        student_scale: What the student's model multiplies its logits by after the head.
        teacher_scale: What the teacher's model multiplies its logits by after the head.
        method: `"auto"`, or the form to take whatever it costs: `"factor"`, `"gram"`, `"blocks"` or `"logits"`.

    Raises:
        ValueError: If a head has no matrix as `weight`, does not compute `W h + b`, or is sharded or quantised, the
            vocabularies differ, or an option is unknown or out of range.

    Examples:
        >>> import torch
        >>> from distill import LinearLogitLoss, LogitLoss
        >>> student_head, teacher_head = torch.nn.Linear(4, 1000), torch.nn.Linear(8, 1000)
        >>> loss = LinearLogitLoss(student_head, teacher_head)
        >>> student_hidden, teacher_hidden = torch.randn(2, 16, 4), torch.randn(2, 16, 8)
        >>> value = loss(student_hidden, teacher_hidden)
        >>> torch.allclose(value, LogitLoss()(student_head(student_hidden), teacher_head(teacher_hidden)))
        True

    Notes:
        A head that does more than `W h + b` is refused when the loss is built: an adapter, a soft cap, a quantised
        weight. What a *model* does to its logits after the head cannot be seen from the head. Give a constant factor (a
        `logit_scale`, or one over `logits_scaling`) as `student_scale` or `teacher_scale`. Where a model caps its
        logits, compare the logits with `LogitLoss`. A head that a model gets later (`resize_token_embeddings`,
        `model.lm_head = ...`) is another module: build a new loss with it. `check_models` raises an error for an old
        one.

        While nothing in the student's head needs a gradient, the factor of both heads is kept between calls; with a
        head that trains, the teacher's Gram matrix. Each call reads the weights, and computes both again if a number
        changed, whatever changed it. On a GPU this waits for the device. Nothing is kept inside `torch.compile`,
        `torch.func` and CUDA graphs; `forget()` frees what is kept.

        With `"blocks"` a mean or sum computes the gradients in the forward pass, as in `LogitLoss`, and keeps no
        differences: evaluate under `torch.no_grad()`.
    """

    options = {  # noqa: RUF012 - declared in the base
        "method": _check_method,
        "student_scale": check_scale,
        "teacher_scale": check_scale,
    }

    def __init__(
        self,
        student_head: nn.Module,
        teacher_head: nn.Module,
        *,
        reduction: Reduction = "mean",
        vocab_size: int | None = None,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        method: Method = "auto",
    ) -> None:
        super().__init__(reduction=reduction)
        self.method = method
        self.student_scale = student_scale
        self.teacher_scale = teacher_scale
        self.vocab_size = vocab_size
        self._heads = HeadPair(student_head, teacher_head)
        self._heads.check(student_scale, teacher_scale)
        weight, _, teacher_weight, _ = self._heads.tensors()
        check_vocabulary(len(weight), len(teacher_weight), vocab_size)
        self._kept = Kept()

    @property
    def student_head(self) -> nn.Module:
        """The student's head, not a submodule."""
        return self._heads.student

    @property
    def teacher_head(self) -> nn.Module:
        """The teacher's head, not a submodule."""
        return self._heads.teacher

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
            student: What the student's head sees, `(..., d_s)`.
            teacher: What the teacher's head sees, `(..., d_t)`. A constant.
            target: Not used. Labels of another number of positions are refused: the heads then saw not all of them.
            mask: Bool or weights, `(...)`, shaped like the per-sample values. What a 0 hides counts nowhere, also where
                it is NaN or infinite.
            denominator: A mean becomes the sum divided by this number, such as the tokens of all micro-batches.

        Returns:
            A scalar, or with `reduction="none"` one value per sample, `(...)`.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: As `linear_logit_loss`, and if mask or labels have another shape than the per-sample values, or
                a head has come to do more than `W h + b`.
        """
        if not torch.compiler.is_compiling():
            self._heads.check(self.student_scale, self.teacher_scale)
        tensors = self._heads.tensors()
        problem = self._problem(student, teacher, tensors)
        check_positions(target, student.shape[:-1])
        reduction = self.reduction_over(denominator)
        value = self._value(problem, tensors, reduction, mask)
        return divide(value, denominator)

    def _value(self, problem: Problem, tensors: tuple[Any, ...], reduction: Reduction, mask: Tensor | None) -> Tensor:
        if mask is not None:
            problem = problem.without_hidden(mask)
        chosen: str = self.method
        if chosen == "auto":
            chosen = "logits" if problem.is_tiny() else cheapest(self._size(problem, tensors).costs())
        problem.check_possible(chosen)
        if chosen == "logits":
            return ROWS.reduced(*problem.logits(), dim=-1, reduction=reduction, mask=mask)
        factor = theirs = None
        if chosen == "factor":
            weights = problem.weight, problem.bias, problem.teacher_weight, problem.teacher_bias
            scales = self.student_scale, self.teacher_scale
            factor = self._kept.get("factor", weights, lambda: factorise(problem.heads()), *scales)
        elif chosen == "gram":
            theirs = self._kept.get("gram", [problem.teacher_weight], lambda: teacher_gram(problem.teacher_weight))
        return problem.loss(chosen, reduction, mask, factor=factor, theirs=theirs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self._heads.out_of(self), "_kept": None}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**HeadPair.back_in(state), "_kept": Kept()})  # type: ignore[no-untyped-call]

    def plan(self, samples: int) -> Plan:
        """Tell which form a call takes in the present state of the heads and of grad mode, and why.

        Args:
            samples: How many hidden states a call has, N.

        Returns:
            A tuple of `method`, `costs` (of the possible forms, in 10^9 float32 multiply-adds) and `reason` in words.

        Raises:
            ValueError: If `samples` is not positive, or the method cannot be taken in this state.
        """
        if samples < 1:
            raise ValueError(f"samples must be positive, got {samples!r}")
        self._heads.check(self.student_scale, self.teacher_scale)
        tensors = self._heads.tensors()
        nothing = tensors[0].new_empty(1)
        hidden, teacher_hidden = (nothing.expand(samples, weight.shape[1]) for weight in tensors[::2])
        problem = self._problem(hidden, teacher_hidden, tensors)
        plan = self._size(problem, tensors).explain()
        if self.method != "auto":
            problem.check_possible(self.method)
            return Plan(self.method, plan.costs, f"as asked for; by cost it would be {plan.reason}")
        return plan

    def check_models(self, student: Any, teacher: Any) -> None:
        """Raise ValueError if a model has another module now where it had its head; a Distiller asks at every call.

        A model without the head passes, since the head may lie outside the part that runs, and so does what is no
        module.
        """
        if not torch.compiler.is_compiling():
            self._heads.check_models(student, teacher)

    def check_seen(self, inputs: Any, student: Any, teacher: Any, *, marked: bool) -> None:
        """Raise ValueError if a model does more to its logits than this loss; a Distiller asks at every call."""
        scales = self.student_scale, self.teacher_scale, None, None
        self._heads.check_seen(inputs, student, teacher, scales, marked=marked)

    def forget(self) -> None:
        """Free what is kept between calls; the next call computes it again."""
        self._kept.clear()

    @override
    def extra_repr(self) -> str:
        """Show the options and the heads' sizes in `repr`."""
        weight, _, teacher_weight, _ = self._heads.tensors()
        return (
            f"{super().extra_repr()}, vocab_size={self.vocab_size}, "
            f"student_head={tuple(weight.shape)}, teacher_head={tuple(teacher_weight.shape)}"
        )

    def _problem(self, hidden: Tensor, teacher_hidden: Tensor, tensors: tuple[Any, ...]) -> Problem:
        ours, theirs = (hidden, *tensors[:2]), (teacher_hidden, *tensors[2:])
        scale, teacher_scale = self.student_scale, self.teacher_scale
        return check_heads(*ours, *theirs, vocab_size=self.vocab_size, scale=scale, teacher_scale=teacher_scale)

    def _size(self, problem: Problem, tensors: tuple[Any, ...]) -> Size:
        weight, bias, teacher_weight, teacher_bias = tensors
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        keeps_teacher = may_keep([teacher_weight])
        may_factor = frozen and keeps_teacher and may_keep([weight, bias, teacher_bias])
        return problem.size(reduction=self.reduction, may_factor=may_factor, keeps_teacher=keeps_teacher)
