"""Logit matching of linear heads without their logits: Vincent, de Brebisson and Bouthillier (NIPS 2015)."""

import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._engine.squared.gram import factorise, teacher_gram
from distill._engine.squared.heads import Problem, check_heads, check_vocabulary
from distill._engine.squared.plan import Plan, Size, cheapest
from distill._reduction import Reduction, check_reduction
from distill._registry import register_loss
from distill.losses.logit import _ROWS

FAMILY = "logits"

Method: TypeAlias = Literal["auto", "factor", "gram", "blocks", "logits"]
_METHODS = ("auto", "factor", "gram", "blocks", "logits")


def linear_logit_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab_size: int | None = None,
    method: Method = "auto",
) -> Tensor:
    """`logit_loss` of two linear heads' logits, which are not formed unless that is cheapest, one value per sample.

        s = W_s h_s + b_s,  t = W_t h_t + b_t
        loss = 1/V * sum_v (s_v - t_v)^2
             = 1/V * (h_s G_ss h_s - 2 h_t G_ts h_s + h_t G_tt h_t),  G_xy = W_x^T W_y  (without biases)

    Exact, not an approximation: what `logit_loss(s, t)` gives, with gradients for the student's hidden states, weight
    and bias. The published weights are those of `logit_loss`.

    Scale: that of `logit_loss`, the mean over the classes.

    Doubt: none beside that of `logit_loss`.

    Four forms give the same value. `"gram"` computes the formula above: O((N + V) d^2) time and O(N d + d^2) memory
    beside the gradients, instead of O(N V d) and O(N V). `"factor"`, for heads that are not trained, takes R from a QR
    factorisation of `[W_s, -W_t]` in float64 and gives `1/V * |R [h_s, h_t]|^2`, where the vocabulary is gone; it pays
    where R is kept, as `LinearLogitLoss` does. `"blocks"` forms the logits of some classes at a time, in the inputs'
    dtype and at least float32; if the head trains, it keeps up to 128 MB of their differences for backward, or forms
    them again. `"logits"` forms them all, for `logit_loss`: where they are small nothing is faster. `"auto"` takes the
    form whose estimated cost is lowest, as `LinearLogitLoss.plan` shows, and `"logits"` up to 2^23 of them (32 MB in
    float32) only.

    The terms cancel as student and teacher agree. On a CPU, float32 inputs are computed in float32 as long as that is
    enough, and otherwise in float64, values of `"gram"` in the last resort by `"factor"`: down to logits that differ by
    1e-6 of their size, values err by less than 1e-3 and gradients by less than 1e-4 (benchmarks/agreement.py). On other
    devices and in traced code both compute in float64. `"blocks"` and `"logits"` err as formed logits do. No value is
    negative.

    Differentiating twice and `torch.func` work, in memory for V times the hidden sizes (`"gram"`) or N times V
    (`"blocks"`, `"logits"`); `torch.compile` traces all forms.

    Args:
        student_hidden: What the student's head sees, `(..., d_s)`. Any floating dtype.
        student_weight: The student's head, `(V, d_s)`, as in `nn.Linear` and `nn.Embedding`.
        teacher_hidden: What the teacher's head sees, `(..., d_t)`; d_t may differ from d_s, the rest may not.
        teacher_weight: The teacher's head, `(V, d_t)`. The teacher's tensors are constants.
        student_bias: `(V,)`, or None for none.
        teacher_bias: `(V,)`, or None for none.
        vocab_size: Compare the first so many rows of both heads only, which must mean the same tokens: for vocabularies
            of which one continues the other, or weights padded to a multiple of 64. The mean is over these rows.
        method: `"auto"`, `"factor"`, `"gram"`, `"blocks"` or `"logits"`.

    Returns:
        One value per sample, shape `(...)`, in squared units of the logits; float32, or float64 if an input is.

    Raises:
        ValueError: If shapes, vocabularies or devices differ, an input is empty or not floating-point, `vocab_size` is
            not positive or larger than a head, the method is unknown, `"factor"` is asked for while the student's head
            needs a gradient, or `"factor"` or `"gram"` on a device without float64.

    Examples:
        >>> import torch
        >>> from distill import linear_logit_loss, logit_loss
        >>> student_hidden, teacher_hidden = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0, 1.0]])
        >>> student_weight, teacher_weight = torch.ones(5, 2), torch.ones(5, 3)
        >>> linear_logit_loss(student_hidden, student_weight, teacher_hidden, teacher_weight)  # logits of 3 and 2
        tensor([1.])
        >>> logit_loss(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T)
        tensor([1.])

    Reference:
        Pascal Vincent, Alexandre de Brebisson and Xavier Bouthillier, "Efficient Exact Gradient Update for training
        Deep Networks with Very Large Sparse Targets", NIPS 2015 (the squared error of a linear layer from W^T W), for
        the loss of Jimmy Ba and Rich Caruana, "Do Deep Nets Really Need to be Deep?", NIPS 2014 and arXiv
        1312.6184, section 2.2.
    """
    _check_method(method)
    problem = check_heads(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, vocab_size
    )
    chosen: str = method
    if chosen == "auto":
        chosen = "logits" if problem.is_tiny() else cheapest(problem.size().costs())
    problem.check_possible(chosen)
    return _ROWS.values(*problem.logits(), dim=-1) if chosen == "logits" else problem.loss(chosen)


@register_loss("linear_logit")
class LinearLogitLoss(nn.Module):
    """`LogitLoss` of two linear heads, without large logits; see `linear_logit_loss` for the formula.

    It compares what the heads see: as a `Term` at the heads' inputs (`at="lm_head:input"`), or at the module before
    them in models that then need not run their heads at all.

    The heads are `nn.Linear`, `nn.Embedding` (tied or not), or another module with a matrix `weight` of V rows and
    possibly a `bias`, used as they are at each call. They are referred to, not owned: they are in no `parameters()` and
    no `state_dict()` of the loss, and moving the loss does not move them. So put the student's own head in, which the
    student trains, saves and moves. A copy or pickle of a Distiller refers to the head of the copied student; a copy of
    the loss alone has copies of the heads.

    While nothing in the student's head needs a gradient, the factor of both heads is kept between calls; with a head
    that trains, the teacher's own Gram matrix. Either is computed again when a weight has changed: replaced, moved,
    cast, or written by an optimizer, `copy_` or `load_state_dict`, which PyTorch counts. Writes that it does not count
    (through a `.data`, a NumPy view or another process) cannot be seen: call `forget()` after them. Nothing is kept
    inside `torch.compile`, nor for weights that are no `nn.Parameter` or are inference tensors.

    With `"blocks"` a mean or sum forms the gradients already in the forward, as in `LogitLoss`, and keeps no
    differences: evaluate under `torch.no_grad()`.

    Args:
        student_head: The student's head, (V, d_s).
        teacher_head: The teacher's head, (V, d_t); never trained by this loss.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        vocab_size: Compare the first so many rows of both heads only; None compares all, of which there must be
            equally many.
        method: `"auto"`, or the form to take whatever it costs: `"factor"`, `"gram"`, `"blocks"` or `"logits"`.

    Raises:
        ValueError: If a head has no matrix as `weight`, the vocabularies differ, or an option is unknown.

    Examples:
        >>> import torch
        >>> from distill import LinearLogitLoss, LogitLoss
        >>> student_head, teacher_head = torch.nn.Linear(4, 1000), torch.nn.Linear(8, 1000)
        >>> loss = LinearLogitLoss(student_head, teacher_head)
        >>> student_hidden, teacher_hidden = torch.randn(2, 16, 4), torch.randn(2, 16, 8)
        >>> value = loss(student_hidden, teacher_hidden)
        >>> torch.allclose(value, LogitLoss()(student_head(student_hidden), teacher_head(teacher_hidden)))
        True
        >>> [loss.plan(samples).method for samples in (32, 2**20)]
        ['logits', 'gram']
    """

    def __init__(
        self,
        student_head: nn.Module,
        teacher_head: nn.Module,
        *,
        reduction: Reduction = "mean",
        vocab_size: int | None = None,
        method: Method = "auto",
    ) -> None:
        super().__init__()
        self.reduction = check_reduction(reduction)
        self.vocab_size = vocab_size
        self.method = _check_method(method)
        for name, head in (("student_head", student_head), ("teacher_head", teacher_head)):
            _check_head(name, head)
        # In a tuple, where nn.Module does not look for submodules: the models own their heads.
        self._heads = (student_head, teacher_head)
        student_weight, _, teacher_weight, _ = self._tensors()
        check_vocabulary(len(student_weight), len(teacher_weight), vocab_size)
        self._kept: dict[str, tuple[list[Callable[[], Any]], Any, Any]] = {}

    @property
    def student_head(self) -> nn.Module:
        """The student's head, not a submodule."""
        return self._heads[0]

    @property
    def teacher_head(self) -> nn.Module:
        """The teacher's head, not a submodule."""
        return self._heads[1]

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: What the student's head sees, `(..., d_s)`.
            teacher: What the teacher's head sees, `(..., d_t)`.
            target: Not used; every loss is called alike.
            mask: Bool or weights, `(...)`, shaped like the per-sample values.

        Returns:
            A scalar, or with `reduction="none"` one value per sample, `(...)`.

        Raises:
            ValueError: As `linear_logit_loss`, and if the mask has another shape than the per-sample values.
        """
        problem = self._problem(student, teacher)
        chosen: str = self.method
        if chosen == "auto":
            chosen = "logits" if problem.is_tiny() else cheapest(self._size(problem).costs())
        problem.check_possible(chosen)
        factor = own = None
        if chosen == "logits":
            return _ROWS.reduced(*problem.logits(), dim=-1, reduction=self.reduction, mask=mask)
        if chosen == "factor":
            factor = self._keep("factor", self._tensors(), lambda: factorise(problem.heads()))
        elif chosen == "gram":
            own = self._keep("teacher", self._tensors()[2:3], lambda: teacher_gram(problem.teacher_weight))
        return problem.loss(chosen, self.reduction, mask, factor=factor, own=own)

    def plan(self, samples: int) -> Plan:
        """Tell which form a call takes in the present state of the heads and of grad mode, and why.

        Args:
            samples: How many hidden states a call has, N.

        Returns:
            A tuple: `method`, which is `"factor"`, `"gram"`, `"blocks"` or `"logits"`; `costs`, estimates for the
            possible forms in 10^9 float32 multiply-adds; and `reason`, the same in words.

        Raises:
            ValueError: If `samples` is not positive, or the method cannot be taken in this state.
        """
        if samples < 1:
            raise ValueError(f"samples must be positive, got {samples!r}")
        weight, _, teacher_weight, _ = self._tensors()
        nothing = weight.new_empty(1)
        states = (nothing.expand(samples, matrix.shape[1]) for matrix in (weight, teacher_weight))
        problem = self._problem(*states)
        plan = self._size(problem).explain()
        if self.method != "auto":
            problem.check_possible(self.method)
            return Plan(self.method, plan.costs, f"as asked for; by cost it would be {plan.reason}")
        return plan

    def forget(self) -> None:
        """Drop what is kept between calls, after a write to a weight that PyTorch does not count."""
        self._kept.clear()

    @override
    def extra_repr(self) -> str:
        """Show the options and the heads' sizes in `repr`."""
        student, _, teacher, _ = self._tensors()
        return (
            f"reduction={self.reduction!r}, vocab_size={self.vocab_size}, method={self.method!r}, "
            f"student_head={tuple(student.shape)}, teacher_head={tuple(teacher.shape)}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # a copy refers to other heads

    def _tensors(self) -> list[Any]:
        return [getattr(head, name, None) for head in self._heads for name in ("weight", "bias")]

    def _problem(self, student: Tensor, teacher: Tensor) -> Problem:
        weight, bias, teacher_weight, teacher_bias = self._tensors()
        return check_heads(student, weight, bias, teacher, teacher_weight, teacher_bias, self.vocab_size)

    def _size(self, problem: Problem) -> Size:
        weight, bias, teacher_weight, teacher_bias = self._tensors()
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        keeps_teacher = _can_keep([teacher_weight])
        may_factor = frozen and keeps_teacher and _can_keep([weight, bias, teacher_bias])
        return problem.size(reduction=self.reduction, may_factor=may_factor, keeps_teacher=keeps_teacher)

    def _keep(self, name: str, tensors: list[Any], compute: Callable[[], Any]) -> Any:
        """What `compute` gives, from the last call if the tensors are what they were then."""
        if not _can_keep(tensors):
            return compute()
        state = [self.vocab_size, *map(_state, tensors)]
        references, last, value = self._kept.get(name, ([], None, None))
        if last != state or any(ref() is not tensor for ref, tensor in zip(references, tensors, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                value = compute()
            self._kept[name] = (
                [weakref.ref(tensor) if tensor is not None else _nothing for tensor in tensors],
                state,
                value,
            )
        return value


def _check_method(method: Method) -> Method:
    if method not in _METHODS:
        raise ValueError(f"method must be 'auto', 'factor', 'gram', 'blocks' or 'logits', got {method!r}")
    return method


def _check_head(name: str, head: nn.Module) -> None:
    weight, bias = (getattr(head, attribute, None) for attribute in ("weight", "bias"))
    if not (isinstance(head, nn.Module) and isinstance(weight, Tensor) and weight.ndim == 2):
        raise ValueError(
            f"{name} must be a module with a matrix as weight, as nn.Linear and nn.Embedding, got {head!r}"
        )
    if bias is not None and not isinstance(bias, Tensor):
        raise ValueError(f"{name} must have a tensor or None as bias, got {type(bias).__name__}")


def _can_keep(tensors: list[Any]) -> bool:
    """Whether a later change of the tensors can be noticed."""
    return not torch.compiler.is_compiling() and all(
        tensor is None or (isinstance(tensor, nn.Parameter) and not tensor.is_inference()) for tensor in tensors
    )


def _state(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape)


def _nothing() -> None:
    """Stands in for the reference to a bias that is not there."""
