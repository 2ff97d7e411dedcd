"""One call: how models are run, what of their results a term compares, and its value."""

import copy as copying
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from distill._distiller.guards import switch_to_eval
from distill._distiller.taps import Tap, run_with_taps
from distill._distiller.terms import (
    TASK,
    Adapter,
    Compared,
    TeacherOutput,
    adapted,
    takes,
    whole_output,
)
from distill._reduction import divide
from distill._values import Given, Versions, detached, may_train, tensors_in
from distill.topk import TopK

_MEANS = (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Run a model: a mapping is passed as keywords, a tuple as positions, anything else as it is."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):
        return model(*inputs)
    return model(inputs)


def find_tensor(result: Any, output: Callable[[Any], Any] | None) -> Any:
    """The tensor to compare in what a model returned: what `output` finds, the logits, or a teacher's `TopK`."""
    if isinstance(result, TopK):
        return result
    tensor = _logits(result) if output is None else output(result)
    if not isinstance(tensor, (Tensor, TopK)):
        what = "output= must give a tensor" if output else "a model's output must be a tensor or have .logits"
        found = tensor if output else result
        got = f"{type(found).__name__} of {[*found]}" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{what}, got {got}; output= takes a function that finds the tensor in it")
    return tensor


def _logits(result: Any) -> Any:
    """What a model returned as its logits, if anything: a tensor, or that under the name."""
    if isinstance(result, Mapping):
        return result.get("logits")
    return result if isinstance(result, Tensor) else getattr(result, "logits", None)


def ask_seen(
    name: str, loss: nn.Module, compared: Compared, inputs: Any, student: Any, teacher: Any, marks: tuple[Any, Any]
) -> None:
    """Give a loss of hidden states the logits that the models made of them, to check its heads; errors name the term.

    A side is given where the term taps one path without an adapter: then the loss sees what the model's head saw.

    Args:
        name: The term.
        loss: Its loss, asked if it has `check_seen`.
        compared: What it compares.
        inputs: What the student was called with.
        student: What is compared of the student, and what the student returned.
        teacher: The same of the teacher.
        marks: The term's target and mask.
    """
    check = getattr(loss, "check_seen", None)
    if check is None or torch.compiler.is_compiling():
        return
    tapped = isinstance(compared.student, str), isinstance(compared.teacher, str)
    adapters = compared.adapt_student, compared.adapt_teacher
    ours, theirs = (
        (seen, _logits(result)) if is_path and adapter is None else None
        for (seen, result), is_path, adapter in zip((student, teacher), tapped, adapters, strict=True)
    )
    try:
        check(inputs, ours, theirs, marked=any(mark is not None for mark in marks))
    except Exception as error:
        raise_named(error, f"term {name!r}")


def raise_named(error: Exception, where: str) -> NoReturn:
    """Raise an error of the same type that says where it was; one that is not made of a message gets a note."""
    try:
        twin = type(error)(f"{where}: {error}")
    except Exception:
        twin = None
    if twin is not None:
        raise twin from error
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(where)
    raise error


def run_teacher(
    teacher: Callable[..., Any], given: Any, taps: Sequence[Tap], inputs: Any, student: nn.Module | None
) -> tuple[Any, dict[Tap, Any]]:
    """Run the teacher in eval mode and without a graph.

    Args:
        teacher: The teacher, a module or function.
        given: What it is called with.
        taps: What must be heard in it.
        inputs: What the student is called with next.
        student: The student; None for a teacher that has no modes.

    Returns:
        What it returned, and what each tap has seen.

    Raises:
        ValueError: If the teacher changes in place, or takes away, what the student is given.
    """
    for_student = Given(inputs)
    shared = []
    if student is not None and isinstance(teacher, nn.Module):
        shared = switch_to_eval(teacher, student)
    try:
        with torch.no_grad():
            if isinstance(teacher, nn.Module):
                result, seen = run_with_taps(teacher, taps, lambda: call(teacher, given), side="teacher")
            else:
                result, seen = recorded(call(teacher, given), taps)
    finally:
        for module in shared:
            module.training = True
        if not torch.compiler.is_compiling():
            # A teacher may be a function that runs the student. In PyTorch 2.5 autocast then keeps the weights without
            # their gradient, and the student's own forward would take those.
            torch.clear_autocast_cache()
    if not for_student.is_left_alone():
        raise ValueError(
            "the teacher must leave its inputs as they are, which the student gets next, but it changed them in place "
            "(inplace=True, +=, another tensor in a list or object, a cache that it filled); teacher_inputs= takes a "
            "copy, or a cache of its own"
        )
    return result, seen


def sides_of(
    whose: str,
    names: Iterable[str],
    compared: Mapping[str, Compared],
    result: Any,
    seen: Mapping[Tap, Any],
    output: Callable[[Any], Any] | None,
    versions: Versions,
) -> dict[str, Any]:
    """What the terms compare of the `"student"` or the `"teacher"`, before their adapters; errors name term and side.

    Args:
        whose: The side.
        names: The terms.
        compared: By term, what it compares.
        result: What the model returned.
        seen: What its taps saw.
        output: The Distiller's `output`.
        versions: Notes what is found, by term.
    """
    found = {}
    for name in names:
        try:
            found[name] = _seen(getattr(compared[name], whose), result, seen, output, copy=compared[name].copy)
        except Exception as error:
            raise_named(error, f"term {name!r}, {whose} side")
        versions.note(name, found[name])
    return found


def check_unchanged(name: str, versions: Versions, before: Iterable[str]) -> None:
    """Raise ValueError if what a term compares was changed in place since it was found, by the terms before it."""
    if versions.changed(name):
        raise ValueError(
            f"what term {name!r} compares must stay as the models gave it, but a loss or adapter of the terms before "
            f"it, {[*before]}, or the student's forward, changed it in place (inplace=True, +=): clone it there"
        )


def seen_by_task(result: Any, output: Callable[[Any], Any] | None, task_output: Callable[[Any], Any] | None) -> Any:
    """What the task loss takes of what the student returned; errors name it."""
    try:
        return find_tensor(result, output) if task_output is None else task_output(result)
    except Exception as error:
        raise_named(error, f"term {TASK!r}, student side")


def _seen(side: Any, result: Any, seen: Mapping[Tap, Any], output: Callable[[Any], Any] | None, *, copy: bool) -> Any:
    if side is None:
        return None
    if side is whole_output:
        return find_tensor(result, output)
    if isinstance(side, str):
        return seen[Tap(side, copy)]
    if isinstance(side, tuple):
        return tuple(seen[Tap(path, copy)] for path in side)
    return side(result)


def recorded(output: Any, taps: Iterable[Tap]) -> tuple[Any, dict[Tap, Any]]:
    """What a teacher that was not run, or cannot be tapped, gives: its output and what its taps would see."""
    if not isinstance(output, TeacherOutput):
        output = TeacherOutput(output)
    missing = [tap.path for tap in taps if tap.path not in output.features]
    if missing:
        raise ValueError(
            f"the teacher's taps {missing} must see something, but there is no module to tap in this call: give "
            f"TeacherOutput(output, features={{path: tensor}}), got features of {list(output.features)}"
        )
    return output.output, {tap: output.features[tap.path] for tap in taps}


def adapted_side(name: str, whose: str, value: Any, adapter: Adapter | None) -> Any:
    """What the loss is given of one side; errors name the term and the side."""
    try:
        return adapted(value, adapter)
    except Exception as error:
        raise_named(error, f"term {name!r}, {whose} side")


def term_value(
    name: str,
    loss: nn.Module,
    compared: Compared,
    student: Any,
    teacher: Any,
    target: Any,
    mask: Any,
    denominator: float | Tensor | None,
) -> Tensor:
    """The value of a term; errors name it."""
    student = adapted_side(name, "student", student, compared.adapt_student)
    if compared.teacher is not None:
        with torch.no_grad():
            teacher = detached(adapted_side(name, "teacher", teacher, compared.adapt_teacher))
    try:
        options = {} if mask is None else {"mask": mask}
        if denominator is not None and has_mean(loss):
            if not takes(loss, "denominator"):
                raise ValueError(
                    f"a loss whose mean becomes a sum must take a keyword denominator, got {type(loss).__name__}"
                )
            options["denominator"] = denominator
        value = loss(student, teacher, target, **options)
    except Exception as error:
        raise_named(error, f"term {name!r}")
    return _check_scalar(name, value)


def task_value(
    loss: Any, arguments: tuple[Any, ...], mask: Any, denominator: float | Tensor | None, result: Any
) -> Tensor:
    """The value of the task loss for its arguments: what it compares, and the target if it takes one."""
    try:
        value, divisor = _task_value(loss, arguments, {} if mask is None else {"mask": mask}, denominator)
        if hasattr(loss, "check_seen") and not torch.compiler.is_compiling():
            loss.check_seen(None, (arguments[0], _logits(result)), None, marked=True)
    except Exception as error:
        raise_named(error, f"term {TASK!r}")
    return divide(_check_scalar(TASK, value), divisor)


def _task_value(
    loss: Any, arguments: tuple[Any, ...], options: dict[str, Any], denominator: float | Tensor | None
) -> tuple[Any, float | Tensor | None]:
    """What the task loss gives, and what that must still be divided by."""
    if isinstance(loss, nn.CrossEntropyLoss):
        _check_class_dim(*arguments)
    if denominator is None or getattr(loss, "reduction", None) == "sum":
        return loss(*arguments, **options), None
    if takes(loss, "denominator"):
        return loss(*arguments, denominator=denominator, **options), None
    # A subclass with a forward of its own may be no mean over samples.
    means = isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)) and type(loss).forward in _MEANS
    if not means or loss.weight is not None:
        raise ValueError(
            "a task loss whose mean becomes a sum must take a keyword denominator, or be nn.CrossEntropyLoss or "
            f"nn.NLLLoss without class weights (others are means over something else than samples), got {loss!r}"
        )
    summed = copying.copy(loss)
    summed.reduction = "sum"
    return summed(*arguments), denominator


def _check_class_dim(output: Any, target: Any) -> None:
    """Name the loss that fits where the classes come last, before torch complains about shapes."""
    tensors = isinstance(output, Tensor) and isinstance(target, Tensor)
    if tensors and output.ndim > 2 and output.shape[:-1] == target.shape and output[:, 0].shape != target.shape:
        raise ValueError(
            f"nn.CrossEntropyLoss wants the classes in dimension 1, got logits {tuple(output.shape)} and labels "
            f"{tuple(target.shape)}: distill.CrossEntropyLoss() takes them last"
        )


def check_tapped(seen: Mapping[Tap, Any]) -> None:
    """Raise ValueError if what a tap saw of the student carries no gradient."""
    for tap, value in seen.items():
        tensors = tensors_in(value)
        if tensors and not any(may_train(tensor) for tensor in tensors):
            raise ValueError(
                f"the student's tap {tap.path!r} must carry a gradient in training, but it has none: nothing before it "
                "is trained (a copy of a frozen teacher is frozen too: requires_grad_(True)), or it lies inside "
                "reentrant activation checkpointing (use_reentrant=False keeps it)"
            )


def has_mean(loss: Any) -> bool:
    """Whether a loss is a mean over samples; one without a reduction is of a batch, one that gathers of all batches."""
    inner = loss.module if isinstance(loss, nn.parallel.DistributedDataParallel) else loss
    return getattr(inner, "reduction", None) == "mean" and not getattr(inner, "gather", False)


def _check_scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 0 or value.is_complex():
        got = type(value).__name__ if not isinstance(value, Tensor) else f"shape {tuple(value.shape)}"
        got = str(value.dtype) if isinstance(value, Tensor) and value.is_complex() else got
        raise ValueError(f"term {name!r} must be a scalar tensor (reduction='mean' or 'sum'), real, got {got}")
    return value
