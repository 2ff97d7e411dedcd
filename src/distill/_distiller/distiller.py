"""Runs teacher and student, taps them and adds the losses up."""

from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import is_function
from distill._distiller.evaluate import (
    ask_seen,
    call,
    check_tapped,
    check_unchanged,
    recorded,
    run_teacher,
    seen_by_task,
    sides_of,
    task_value,
    term_value,
)
from distill._distiller.guards import (
    apply_unplaced,
    ask_losses,
    check_disjoint,
    check_losses_in_step,
    check_masks,
    check_model,
    check_output,
    check_reached,
    check_trains,
    freeze,
    identities,
    switch_to_eval,
    update_average,
    with_idle,
)
from distill._distiller.taps import Tap, run_with_taps
from distill._distiller.terms import (
    TASK,
    Compared,
    DistillerOutput,
    Term,
    adapter_modules,
    by_name,
    check_paths,
    check_task_loss,
    named_terms,
    takes,
    taps_of,
)
from distill._distiller.weights import Weights
from distill._reduction import check_denominator
from distill._values import Versions
from distill.task import CrossEntropyLoss


class Distiller(nn.Module):
    """Runs a student and a frozen teacher on the same inputs, and adds up their losses.

        loss = task_weight * task_loss(student, target) + sum_k weight_k * loss_k(student_k, teacher_k, target)

    The teacher is in eval mode and frozen whatever `.train()` says, and runs under `no_grad`. It follows `.to()`,
    `.half()` (unless accelerate has placed it), `deepcopy` and `pickle`, but is neither in `parameters()` nor in
    `state_dict()`, so optimizers, checkpoints and DistributedDataParallel see the student and the losses' own weights.

    Args:
        student: The model that learns. `distiller.student` is this very module.
        teacher: The model to imitate: a module, any callable (an exported program, a function that asks a server), or
            `Teachers(...)`. None if every call brings `teacher_output=`, or all terms are losses of the student alone.
        losses: A loss, a `Term`, or a dict of them by name. A single one is named `"distillation"`.
        task_loss: Called as `task_loss(student_output, target)`, or without the target if it takes one argument only;
            gives a scalar. One that takes a keyword `mask` gets the mask of the call. None trains without labels.
        task_weight: What the task loss is multiplied by in the total, finite; 0 switches it off.
        output: A function of what a model returned: it finds the tensor for the terms without `at` and for the task
            loss. Not needed if models return a tensor, or an object or mapping with the tensor as `logits`.
        task_output: A function of what the student returned: it finds what the task loss takes, if that is something
            else (a detector's dict of losses, a model's own `.loss`).

    Attributes:
        weights: The weights by name, `"task"` among them: `distiller.weights["hint"] = 0.5` counts from the next call.
            Not in `state_dict()`: save `dict(distiller.weights)`, and restore with `distiller.weights.update(saved)`.

    Raises:
        ValueError: If a path names no module, student and teacher share a parameter or buffer, there is no loss at
            all, or an argument is malformed.
        TypeError: If the student is no module, the teacher cannot be called, or a weight is no number.

    Examples:
        >>> import torch
        >>> from distill import Distiller, LogitLoss
        >>> student, teacher = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
        >>> distiller = Distiller(student, teacher, LogitLoss())
        >>> optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
        >>> out = distiller(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
        >>> out.loss.backward()
        >>> sorted(out.terms)
        ['distillation', 'task']
    """

    __module__ = "distill"

    student: nn.Module
    teacher: Any

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Callable[..., Any] | None,
        losses: nn.Module | Term | Mapping[str, nn.Module | Term],
        *,
        task_loss: Callable[..., Tensor] | None = CrossEntropyLoss(),  # noqa: B008 - it has no state
        task_weight: float = 1.0,
        output: Callable[[Any], Tensor] | None = None,
        task_output: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        terms = named_terms(losses)
        if task_loss is None and not terms:
            raise ValueError("a Distiller needs a loss, got task_loss=None and no terms")
        if task_loss is None and (task_weight != 1.0 or task_output is not None):
            what = f"task_weight={task_weight!r}" if task_output is None else "task_output"
            raise ValueError(f"{what.split('=')[0]} needs a task_loss, got {what} and task_loss=None")
        for name, function in (("output", output), ("task_output", task_output)):
            check_output(name, function)
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a module, got {type(student).__name__}")
        if teacher is not None and not is_function(teacher):
            must = "a module, a function or None, or Teachers(...) for several"
            raise TypeError(f"teacher must be {must}, got {type(teacher).__name__}")
        self._task_takes_target, with_mask = check_task_loss(task_loss, there=task_loss is not None)
        self.student = student
        self.losses = nn.ModuleDict({name: term.loss for name, term in terms.items()})
        self.adapters = nn.ModuleDict(
            {name: nn.ModuleList(found) for name, term in terms.items() if (found := adapter_modules(term.student))}
        )
        self.task_loss, self.output, self.task_output = task_loss, output, task_output
        self._weights = Weights({name: term.weight for name, term in terms.items()})
        if task_loss is not None:
            self._weights.add(TASK, task_weight)
        trained = {*self.modules()}
        self._compared = {name: Compared.of(term).apart_from(trained) for name, term in terms.items()}
        self._takes_mask = {name: takes(term.loss, "mask") for name, term in terms.items()} | {TASK: with_mask}
        check_paths(student, (compared.student for compared in self._compared.values()), side="student")
        if isinstance(teacher, nn.Module):
            check_paths(teacher, (compared.teacher for compared in self._compared.values()), side="teacher")
            check_disjoint(self, teacher)
        for module in self._constants():
            module.eval().requires_grad_(False)
        # Kept past nn.Module's attribute registration: a submodule would be trained, saved and sent by DDP.
        self.__dict__["teacher"] = teacher
        self._has_modes = freeze(teacher, student)
        ask_losses([task_loss, *self.losses.values()], student=student, teacher=teacher)
        # What was found in order before, so that it is looked at again only where it changed.
        self._known_tensors: list[int] = []
        self._known_model = 0
        self._averaged_outside = False  # whether a trainer averages the gradients of what learns in the losses

    if TYPE_CHECKING:

        @override
        def __call__(
            self,
            inputs: Any,
            target: Any = None,
            *,
            mask: Tensor | Mapping[str, Tensor] | None = None,
            denominator: float | Tensor | None = None,
            student: Callable[..., Any] | None = None,
            teacher_inputs: Any = None,
            teacher_output: Any = None,
        ) -> DistillerOutput: ...

    @property
    def weights(self) -> MutableMapping[str, float]:
        """The weights of the terms by name, `"task"` among them; set an entry to change it."""
        return self._weights

    @override
    def forward(
        self,
        inputs: Any,
        target: Any = None,
        *,
        mask: Tensor | Mapping[str, Tensor] | None = None,
        denominator: float | Tensor | None = None,
        student: Callable[..., Any] | None = None,
        teacher_inputs: Any = None,
        teacher_output: Any = None,
    ) -> DistillerOutput:
        """Run both models and compute the losses.

        Args:
            inputs: For the models: a tensor is passed as `model(x)`, a tuple as `model(*x)`, a mapping as
                `model(**x)`, anything else (a list, a namedtuple) as `model(x)`.
            target: Labels for the task loss and for the losses that use them; or a mapping by name, with `"task"`.
            mask: Bool or weights, shaped like the per-sample values, for every term and the task; or a mapping by name.
            denominator: Every mean over samples becomes a sum divided by this number, so that the gradients of
                micro-batches or processes add up to that of the whole batch. Losses without a reduction do not change.
            student: The student as you have wrapped it (DDP, FSDP, `torch.compile`, a trainer's model), run instead.
            teacher_inputs: For the teacher, where it sees something else than the student.
            teacher_output: What the teacher would return, computed before; it is then not run. With what its taps
                would see: `TeacherOutput(output, features)`.

        Returns:
            The total loss, both models' outputs and the terms.

        Raises:
            ValueError: If an argument is missing or of no use, a tap is not reached or carries no gradient, the student
                gets no gradient at all, a model's output has no tensor to compare, or a loss refuses its inputs or
                gives no scalar.
            TypeError: If a loss is given what is no tensor.
            KeyError: If a mapping has a name that is no term.
        """
        names = [name for name in self.losses if self._weights[name] != 0]
        on = [*names, TASK] if self._weights.get(TASK, 0.0) != 0 else names
        if not on:
            raise ValueError(f"a term must be on, but all weights are 0: {dict(self._weights)}")
        check_denominator(denominator, "mean")
        targets, masks = by_name("target", target, on, self._weights), by_name("mask", mask, on, self._weights)
        check_masks(masks, self._takes_mask)
        if TASK in on and targets[TASK] is None and self._task_takes_target:
            raise ValueError(
                "the task loss needs a target, got None; distiller.weights['task'] = 0 switches it off, for example to "
                "evaluate without labels, and task_loss=None builds without"
            )
        model = self.student if student is None else check_model(student)
        trains = self.training and torch.is_grad_enabled()
        self._check_models(names, model, trains)

        # What is compared is found before any loss runs: a loss may change it in place.
        theirs, theirs_seen = self._run_teacher(names, inputs, teacher_inputs, teacher_output)
        versions = Versions()
        teachers = sides_of("teacher", names, self._compared, theirs, theirs_seen, self.output, versions)
        taps = taps_of((self._compared[name].student, self._compared[name].copy) for name in names)
        ours, ours_seen = run_with_taps(self.student, taps, lambda: call(model, inputs), side="student", runs=model)
        if trains:
            check_tapped(ours_seen)
        students = sides_of("student", names, self._compared, ours, ours_seen, self.output, versions)

        losses: dict[str, Tensor] = {}
        if TASK in on:
            students[TASK] = seen_by_task(ours, self.output, self.task_output)
            given = (students[TASK], targets[TASK]) if self._task_takes_target else (students[TASK],)
            losses[TASK] = task_value(self.task_loss, given, masks[TASK], denominator, ours)
        for name in names:
            compared, sides = self._compared[name], (students[name], teachers[name])
            check_unchanged(name, versions, losses)
            losses[name] = term_value(
                name, self.losses[name], compared, *sides, targets[name], masks[name], denominator
            )
            seen = (sides[0], ours), (sides[1], theirs)
            ask_seen(name, self.losses[name], compared, inputs, *seen, (targets[name], masks[name]))
        first, *rest = (self._weights[name] * value for name, value in losses.items())
        total = sum(rest, first)
        if trains:
            check_trains(self.student, students.values(), losses)
            self._check_reached(total, model)
            total = with_idle(total, self, on)
        return DistillerOutput(total, ours, theirs, {name: value.detach() for name, value in losses.items()}, losses)

    def update_teacher(self, decay: float) -> None:
        """Move an averaged teacher towards the student: `teacher = decay * teacher + (1 - decay) * student`.

        For a teacher that started as `copy.deepcopy(student)`; call it after the optimizer's step. Buffers are copied.
        The teacher is not in `state_dict()`: save `distiller.teacher.state_dict()` beside it, and load it there.

        Args:
            decay: The teacher's share, from 0 to 1; 0.999 or more is usual.

        Raises:
            ValueError: If the decay is out of range, or the teacher has not the student's parameters and buffers.
        """
        update_average(self.teacher, self.student, decay)

    @override
    def extra_repr(self) -> str:
        """Show the teacher's class and the weights in `repr`."""
        return f"teacher={type(self.teacher).__name__}, weights={dict(self._weights)}"

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":
            raise AttributeError("a Distiller keeps its teacher for life; build a new Distiller for another one")
        if name == "task_loss" and "_weights" in self.__dict__:  # another one than it was built with
            self._task_takes_target, self._takes_mask[TASK] = check_task_loss(value, there=TASK in self._weights)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:  # plain values, so that no pickle names a module of ours that may move
        compared = {name: compared.plain() for name, compared in self._compared.items()}
        return {**self.__dict__, "_weights": dict(self._weights), "_compared": compared}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        compared = {name: Compared.from_plain(plain) for name, plain in state["_compared"].items()}
        super().__setstate__({**state, "_weights": Weights(state["_weights"]), "_compared": compared})  # type: ignore[no-untyped-call]

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        """Let the teacher and its adapters follow `.to()`, `.half()`, `.cuda()` and the like."""
        super()._apply(fn, recurse=False)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        teacher = [self.teacher] if isinstance(self.teacher, nn.Module) else []
        for module in (*(self.children() if recurse else ()), *teacher, *self._constants()):
            apply_unplaced(module, fn, recurse=recurse)
        return self

    def _constants(self) -> list[nn.Module]:
        """The teacher's adapters."""
        return [module for compared in self._compared.values() for module in adapter_modules(compared.adapt_teacher)]

    def _check_models(self, names: list[str], model: Any, trains: bool) -> None:
        """What may have changed in the models since the last call."""
        if torch.compiler.is_compiling():
            return  # pragma: no cover - traced
        ask_losses([self.task_loss, *(self.losses[name] for name in names)], student=self.student, teacher=self.teacher)
        if not trains:
            return
        if not self._averaged_outside:
            check_losses_in_step(self, model)
        if isinstance(self.teacher, nn.Module):
            now = identities(self, self.teacher)
            if now != self._known_tensors:
                check_disjoint(self, self.teacher)
                self._known_tensors = now

    def _run_teacher(
        self, names: list[str], inputs: Any, teacher_inputs: Any, teacher_output: Any
    ) -> tuple[Any, dict[Tap, Any]]:
        if teacher_output is not None and teacher_inputs is not None:
            raise ValueError("teacher_inputs or teacher_output must be given, got both")
        taps = taps_of((self._compared[name].teacher, self._compared[name].copy) for name in names)
        if all(self._compared[name].teacher is None for name in names):
            return None, {}
        for part in self._constants():
            switch_to_eval(part, self.student)
        if teacher_output is not None:
            return recorded(teacher_output, taps)
        if self.teacher is None:
            raise ValueError(
                f"the terms {names} must have a teacher to compare with, got teacher=None and no teacher_output"
            )
        given = inputs if teacher_inputs is None else teacher_inputs
        return run_teacher(self.teacher, given, taps, inputs, self.student if self._has_modes else None)

    def _check_reached(self, total: Tensor, model: Any) -> None:
        """Raise ValueError if another model than the student was run."""
        if model is not self.student and not torch.compiler.is_compiling() and self._known_model != id(model):
            check_reached(total, self.student, model)
            self._known_model = id(model)
