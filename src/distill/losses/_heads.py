"""What losses of linear heads ask of the heads: that they compute `W h + b`, and that the models still have them."""

import math
import weakref
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_numbers, is_integer, without_autocast
from distill._engine.products import Side, capped
from distill._engine.rows import Rows
from distill._engine.squared.heads import FEWER, check_vocabulary, check_whole
from distill._options import Options
from distill.losses._seen import SeenLogits, check_all_positions

# The size of the larger logits of the probe: caps far beyond it do not show. And what a vector may be multiplied by for
# that: half goes no further.
_LARGE = 1000.0
_LARGEST_FACTOR = 1e4
_WAYS_OUT = (
    "merge an adapter or give its base layer, dequantise the weight, give {side}_scale= for a constant factor (with "
    "LinearLoss {side}_softcap= for a soft cap), or compare formed logits"
)

AfterHeads: TypeAlias = tuple[float, float, float | None, float | None]  # both scales, both soft caps


class HeadPair:
    """The heads of student and teacher: referred to, not owned, and used as they are at each call.

    There may be no head of the teacher, where its log-probabilities are known.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None) -> None:
        self.student = student
        self.teacher: nn.Module = teacher  # type: ignore[assignment]  # None for `LinearLoss` alone
        self._checked: tuple[Any, ...] = ()
        self._modes: list[bool] = []
        self._places = _Places(), _Places()
        self._seen = SeenLogits(), SeenLogits()

    def out_of(self, loss: nn.Module) -> dict[str, Any]:
        """The state of a loss for a pickle or copy, with the two heads in this pair's place."""
        return {**loss.__dict__, "_heads": (self.student, self.teacher)}

    @classmethod
    def back_in(cls, state: dict[str, Any]) -> dict[str, Any]:
        """The state with a fresh pair of those heads."""
        return {**state, "_heads": cls(*state["_heads"])}

    def check(
        self,
        student_scale: float,
        teacher_scale: float,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
    ) -> None:
        """Raise ValueError as `check_head`; heads whose forward is the one that was checked before pass at once.

        Args:
            student_scale: What the loss multiplies the student's logits by.
            teacher_scale: What the loss multiplies the teacher's logits by.
            student_softcap: The soft cap that the loss puts on the student's logits, if any.
            teacher_softcap: The soft cap that the loss puts on the teacher's logits, if any.
        """
        student, teacher = self.student, self.teacher
        for name, head in (("student_head", student), ("teacher_head", teacher)):
            if hasattr(getattr(head, "weight", None), "full_tensor"):  # FSDP may have sharded it since
                check_whole(f"the weight of {name}", head.weight)  # pragma: no cover - in a process of the test's own
        now = _kind(student), _kind(teacher), student_scale, teacher_scale, student_softcap, teacher_softcap
        compiling = torch.compiler.is_compiling()  # a graph of its own for each mode is enough
        modes = self._modes if compiling else [head.training for head in (student, teacher) if head is not None]
        if now != self._checked or modes != self._modes:  # dropout of a head does something in one of them
            check_head("student_head", student, student_scale, student_softcap)
            if teacher is not None:
                check_head("teacher_head", teacher, teacher_scale, teacher_softcap)
            self._checked, self._modes = now, modes

    def tensors(self) -> tuple[Any, Any, Any, Any]:
        """The student's weight and bias, the teacher's weight and bias; None for no bias, or no head."""
        student, teacher = self.student, self.teacher
        theirs = getattr(teacher, "weight", None), getattr(teacher, "bias", None)
        return student.weight, getattr(student, "bias", None), *theirs

    def compared(self, size: int | None, rows: Rows) -> int:
        """How many rows of the heads a loss compares; raise ValueError if they do not fit, or are too few for it."""
        weight, _, teacher_weight, _ = self.tensors()
        found = check_vocabulary(len(weight), len(weight if teacher_weight is None else teacher_weight), size)
        if rows.softmax and found < rows.classes:
            raise ValueError(f"there must be at least {rows.classes} classes to compare, got {found}")
        return found

    def check_models(self, student: object, teacher: object) -> None:
        """Raise ValueError if a model had its head at its first check and has another module there now."""
        self._places[0].check("student_head", self.student, student)
        if self.teacher is not None:
            self._places[1].check("teacher_head", self.teacher, teacher)

    def check_seen(self, inputs: Any, student: Any, teacher: Any, options: AfterHeads, *, marked: bool) -> None:
        """Raise ValueError if a model does more to its logits than its head, or the heads saw one position of many.

        Args:
            inputs: What the student was called with.
            student: What the loss compares of the student, and what the student returned as its logits, if anything.
            teacher: The same of the teacher, or None.
            options: Both scales and both soft caps.
            marked: Whether there is a mask or labels.
        """
        if student is not None:
            check_all_positions(inputs, student[0], marked=marked)
        weight, bias, teacher_weight, teacher_bias = self.tensors()
        forms = (weight, bias, *options[::2]), (teacher_weight, teacher_bias, *options[1::2])
        for name, seen, form, pair in zip(("student", "teacher"), self._seen, forms, (student, teacher), strict=True):
            if form[0] is not None and pair is not None:
                seen.check(name, Side(form[0], *form), *pair)  # the hidden states are those of a row of the pair


class LossOfHeads(Options):
    """What losses of hidden states are: heads that the models own, and what happens to the logits after them."""

    _heads: HeadPair  # not a module, so that nn.Module finds no submodules

    def _after_heads(self) -> AfterHeads:
        """Both scales and both soft caps."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return self._heads.out_of(self)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(HeadPair.back_in(state))  # type: ignore[no-untyped-call]

    def check_models(self, student: object, teacher: object) -> None:
        """Raise ValueError if a model has another head now than this loss; the Distiller asks at every call."""
        self._heads.check_models(student, teacher)

    def check_seen(self, inputs: Any, student: Any, teacher: Any, *, marked: bool) -> None:
        """Raise ValueError if a model does more to its logits than this loss; the Distiller asks at every call."""
        self._heads.check_seen(inputs, student, teacher, self._after_heads(), marked=marked)


def check_softcap(name: str, value: Any) -> Any:
    """Return a soft cap of logits if it is None, or a positive and finite number, else raise ValueError."""
    return None if value is None else check_scale(name, value)


def check_scale(name: str, value: Any) -> Any:
    """Return a factor of logits if it is a positive and finite number, else raise ValueError that names the option."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive and finite number, got {value!r}")
    return value


def check_positions(target: Any, samples: torch.Size) -> None:
    """Raise ValueError for labels of other positions than the hidden states have."""
    if not isinstance(target, Tensor) or not is_integer(target) or target.ndim != len(samples):
        return
    if target.shape != samples:
        raise ValueError(
            f"labels must be shaped like the per-sample values, {tuple(samples)}, got {tuple(target.shape)}{FEWER}"
        )


def check_head(name: str, head: nn.Module, scale: float, softcap: float | None = None) -> None:
    """Raise ValueError if a head is not known to compute `W h + b`, or what a loss makes of that.

    A head whose class computes as `nn.Linear` or looks up as `nn.Embedding` is told by its class; any other one is
    asked for the logits of two vectors.

    Args:
        name: `"student_head"` or `"teacher_head"`.
        head: The head.
        scale: What the loss multiplies its logits by.
        softcap: The soft cap that the loss puts on them then, if any.
    """
    weight, bias = (getattr(head, attribute, None) for attribute in ("weight", "bias"))
    what = f"{name} must be a module with a matrix as weight, as nn.Linear and nn.Embedding, got "
    if not (isinstance(head, nn.Module) and isinstance(weight, Tensor)):
        raise ValueError(f"{what}{type(head).__name__}")
    check_whole(f"the weight of {name}", weight)
    if weight.ndim != 2:
        raise ValueError(f"{what}{head!r}")
    if bias is not None and not isinstance(bias, Tensor):
        raise ValueError(f"{name} must have a tensor or None as bias, got {type(bias).__name__}")
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(
                f"{name} must have a floating-point {what}, got {tensor.dtype} in {type(head).__name__}: dequantise it"
            )
        if tensor is not None:
            check_numbers(f"the {what} of {name}", tensor)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name} must have a bias of one number a row, {len(weight)}, got shape {tuple(bias.shape)}")
    if "weight" in head.__dict__ and head._forward_pre_hooks:
        raise ValueError(
            f"{name} must have a weight of its own, got one that is made anew before each forward (weight_norm, "
            "spectral_norm or prune of torch.nn.utils): make it permanent, or use torch.nn.utils.parametrizations"
        )
    if not _computes_as_linear(head):
        _probe(name, head, weight, bias, scale, softcap)


def _kind(head: nn.Module | None) -> tuple[Any, ...]:
    """What tells cheaply that a head has come to compute something else: its class, forward and hooks."""
    if head is None:
        return ()
    return type(head), head.__dict__.get("forward"), *head._forward_hooks.values(), *head._forward_pre_hooks.values()


def _computes_as_linear(head: nn.Module) -> bool:
    if isinstance(head, nn.Embedding):  # looks up tokens: what a model does there says nothing of its logits
        return True
    forward = type(head).forward
    has_none = forward is nn.Module.forward  # a module that only holds a weight
    return has_none or (
        forward is nn.Linear.forward
        and "forward" not in head.__dict__
        and not head._forward_hooks
        and not head._forward_pre_hooks
    )


def _probe(
    name: str, head: nn.Module, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> None:
    side, kind = name.removesuffix("_head"), type(head).__name__
    ways = _WAYS_OUT.format(side=side)
    more = [path for path, tensor in head.named_parameters() if tensor is not weight and tensor is not bias]
    if more:
        raise ValueError(
            f"{name} must compute W h + b with its weight and bias alone, got {kind} with {', '.join(more[:3])} beside "
            f"them: {ways}"
        )
    if any(map(_quantises, head.modules())):  # before observers see the large vector, and also while they are off
        raise ValueError(
            f"{name} must compute W h + b, got {kind} with fake quantisation or an observer: leave the head out of the "
            "quantisation, or compare formed logits"
        )
    if weight.is_meta:
        return
    try:
        got, expected = _outputs(head, weight, bias)
    except Exception as error:
        raise ValueError(
            f"{name} must be callable as nn.Linear is, got {kind}, which raised {type(error).__name__}: {error}; put "
            "its weight into an nn.Linear and give that"
        ) from error
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"{name} must give logits {tuple(expected.shape)}, got {shape} from {kind}: {ways}")
    tolerance = max(1e-4, 4 * torch.finfo(weight.dtype).eps)
    scaled = scale * expected
    if any(_close(got, logits, tolerance) for logits in (expected, scaled, capped(scaled, softcap))):
        return
    factor = ((got * expected).sum() / expected.square().sum()).item()
    hint = f", {factor:.6g} times that" if _close(got, factor * expected, tolerance) else ""
    raise ValueError(f"{name} must compute W h + b, got {kind}, which gives other numbers{hint}: {ways}")


def _quantises(part: nn.Module) -> bool:
    """Whether a part of a head is an observer or a fake quantisation, of PyTorch or of torchao."""
    return hasattr(part, "calculate_qparams") or "fakequant" in type(part).__name__.lower()


def _outputs(head: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the head gives for a vector and for one with large logits, and what `W h + b` is."""
    devices = [weight.device] if weight.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices), without_autocast(weight):  # dropout draws numbers
        vectors = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        size = F.linear(vectors[1:], weight).abs().max().float()
        if size > 0:
            vectors[1] *= (_LARGE / size).clamp(max=_LARGEST_FACTOR)
        got = head(vectors)
        expected = F.linear(vectors, weight, bias).double()
    return got.double() if isinstance(got, Tensor) else got, expected


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two pairs of outputs agree, each within a part of its size."""
    return bool(((got - expected).abs().amax(-1) <= tolerance * expected.abs().amax(-1)).all())


class _Places:
    """Where models had a head when they were first seen, so that a head that was replaced is noticed."""

    def __init__(self) -> None:
        self._paths: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()

    def check(self, name: str, head: nn.Module, model: object) -> None:
        """Raise ValueError if a model had the head and has another module there now, or has a copy of it.

        A model that never had it passes: heads may lie outside the part that runs. A copy is told by its numbers, once.

        Args:
            name: `"student_head"` or `"teacher_head"`.
            head: The head.
            model: The model; what is no module passes.
        """
        if not isinstance(model, nn.Module):
            return
        paths = self._paths.get(model)
        if paths is None:
            modules = list(model.named_modules(remove_duplicate=False))
            self._paths[model] = [path for path, module in modules if module is head]
            if not self._paths[model]:
                for path in (path for path, module in modules if _copied(head, module)):
                    raise ValueError(
                        f"{name} must be the head that the model has, but {type(model).__name__} has a copy of it at "
                        f"{path!r}: build the loss with that one"
                    )
            for path in self._paths[model]:
                if path.rpartition(".")[2] in ("base_layer", "original_module"):
                    raise ValueError(
                        f"{name} must be what the model's head computes, but {type(model).__name__} has it at "
                        f"{path!r}, inside an adapter: merge the adapter, or leave the head out of it (target_modules, "
                        "modules_to_save)"
                    )
            return
        for path in paths:
            if _at(model, path) is not head:
                raise ValueError(
                    f"{name} must be the head that the model has, but {type(model).__name__} has another module at "
                    f"{path!r} now: build the loss anew with that one"
                )


def _copied(head: nn.Module, module: nn.Module) -> bool:
    """Whether a module is of the head's class and has a weight of its own with the same numbers."""
    ours, theirs = getattr(head, "weight", None), getattr(module, "weight", None)
    if type(module) is not type(head) or not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return False
    return (
        type(theirs) is type(ours)
        and theirs.shape == ours.shape
        and (theirs.dtype, theirs.device) == (ours.dtype, ours.device)
        and theirs.device.type != "meta"
        and theirs.data_ptr() != ours.data_ptr()
        and torch.equal(theirs, ours)
    )


def _at(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module
