"""What must hold of a call and the models: masks of use, nothing shared, the student trained, losses in step."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill._checks import as_constant, check_number, is_function
from distill._distiller.terms import TASK
from distill._values import may_train, tensors_in


def ask_losses(losses: Iterable[Any], *, student: nn.Module, teacher: Any) -> None:
    """Let losses that refer to a part of the models, such as a head, say whether it is still there."""
    for loss in losses:
        check = getattr(loss, "check_models", None)
        if check is not None:
            check(student, teacher)


def check_masks(masks: Mapping[str, Any], takes_mask: Mapping[str, bool]) -> None:
    """Raise ValueError if a term of the call is given a mask that it cannot use."""
    unable = [name for name, mask in masks.items() if mask is not None and not takes_mask[name]]
    if unable:
        able = [name for name in masks if takes_mask[name]]
        hint = f"mask={{{able[0]!r}: mask}} gives it to {able[0]!r} alone" if able else "no term takes one"
        raise ValueError(f"a mask must be of use to every term it is given to, but {unable} take none; {hint}")


def check_model(student: Any) -> Any:
    """Return what a call was given as its student if it can be run, else raise TypeError."""
    if not is_function(student):
        raise TypeError(f"student must be the student as you have wrapped it, a module or function, got {student!r}")
    return student


def check_output(name: str, function: Any) -> None:
    """Raise ValueError unless what finds a tensor in a model's result is a function or None."""
    if function is not None and not is_function(function):
        raise ValueError(f"{name} must be a function of what a model returns, got {function!r}")


def check_disjoint(trained: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError if a parameter or buffer of the teacher is trained as well."""
    ours = {_storage(tensor): name for name, tensor in _named_tensors(trained)}
    for name, tensor in _named_tensors(teacher):
        shared = ours.get(_storage(tensor))
        if shared is not None:
            raise ValueError(
                "student, losses and teacher must share no parameter or buffer (the teacher would be trained), got "
                f"the teacher's {name!r} in {shared!r}. Give the teacher weights of its own (copy.deepcopy(teacher)); "
                "where the teacher is the base of an adapter-tuned student, build with teacher=None and give "
                "teacher_output=, computed under torch.no_grad(), in eval mode and with the adapters off"
            )


def identities(*modules: nn.Module) -> list[int]:
    """What changes when a parameter or buffer is replaced: cheap enough for every step."""
    found: list[int] = []
    stack: list[nn.Module | None] = [*modules]
    while stack:
        module = stack.pop()
        if module is not None:
            found.extend(map(id, module._parameters.values()))
            found.extend(map(id, module._buffers.values()))
            stack.extend(module._modules.values())
    return found


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _storage(tensor: Tensor) -> tuple[str, int]:
    """What tells whether two tensors are the same memory; tensors without memory of their own are told by identity."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"
    plain = plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # as in torch.func.grad
    pointer = tensor.untyped_storage().data_ptr() if plain else 0
    return ("storage", pointer) if pointer else ("object", id(tensor))


def check_reached(loss: Tensor, student: nn.Module, model: Any) -> None:
    """Raise ValueError if the graph of a loss ends in no parameter of the student: another model was run.

    Args:
        loss: The total.
        student: The Distiller's student.
        model: What was run in its place: the student, wrapped.
    """
    parameters = list(student.parameters())
    modules = model.modules() if isinstance(model, nn.Module) else student.modules()
    hidden = any(type(module).__name__ == "FullyShardedDataParallel" for module in modules)
    if hidden or any(type(parameter) is not nn.Parameter for parameter in parameters):
        return  # what the graph ends in are the wrapper's own tensors
    wanted = {id(parameter) for parameter in parameters}
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted or "Checkpoint" in node.name():
            return
        stack.extend(function for function, _ in node.next_functions)
    raise ValueError(
        "student= must run the Distiller's own student, wrapped, but no parameter of that student gets a gradient; "
        "another model was given, or its forward ran under no_grad"
    )


def check_trains(student: nn.Module, sides: Iterable[Any], losses: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the student gets no gradient, whatever learns beside it, or a term has none to give.

    Args:
        student: The student.
        sides: All that is compared of it.
        losses: The values of the terms.
    """
    if any(may_train(tensor) for value in sides for tensor in tensors_in(value)):
        for name, value in losses.items():
            if not may_train(value):
                raise ValueError(
                    f"term {name!r} must carry a gradient in training, but it has none: its loss detached what it was "
                    "given, counts something, or compares what nothing before it trains"
                )
        return
    parameters = list(student.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            "the student must have a parameter to train, but none requires a gradient (another Distiller may have "
            "frozen it or the model that it was copied from): student.requires_grad_(True), or distiller.eval()"
        )
    raise ValueError(
        "the student must get a gradient in training, but nothing that is compared carries one: its forward ran under "
        "no_grad, or detached its output"
    )


def check_losses_in_step(distiller: Any, model: Any) -> None:
    """Raise ValueError if learned losses get no gradients from the other processes.

    Where the student alone is wrapped, or sharded in place, DDP and FSDP synchronise its gradients and no others.

    Args:
        distiller: The Distiller.
        model: What is run as its student: the student, or the student wrapped.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() < 2:
        return
    if model is distiller.student and not _sharded_alone(distiller):
        return
    for name, part in _learning(distiller):
        if any(parameter.requires_grad and type(parameter) is nn.Parameter for parameter in _own_parameters(part)):
            raise ValueError(
                f"the learned part of term {name!r} must get the gradients of all processes, but only the student is "
                "wrapped (student=) or sharded: wrap the whole Distiller (DistributedDataParallel(distiller)), or that "
                "loss (Term(DistributedDataParallel(loss)), fully_shard(loss))"
            )


def _sharded_alone(distiller: Any) -> bool:
    """Whether FSDP has sharded layers of the student in place, but not the Distiller around them."""
    fsdp = "set_requires_gradient_sync"
    return not hasattr(distiller, fsdp) and any(hasattr(module, fsdp) for module in distiller.student.modules())


def _own_parameters(loss: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that no wrapper synchronises."""
    if isinstance(loss, nn.parallel.DistributedDataParallel):
        return
    yield from loss.parameters(recurse=False)
    for child in loss.children():
        yield from _own_parameters(child)


def apply_unplaced(module: nn.Module, function: Callable[[Tensor], Tensor], *, recurse: bool) -> None:
    """Apply a function to a module's tensors as `.to()` does, but for parts whose devices accelerate manages.

    Those are where they must be: spread over devices, or on meta between their forwards (`device_map=`, `cpu_offload`).

    Raises:
        ValueError: If the function gives such a part another dtype.
    """
    if not any(hasattr(part, "_hf_hook") for part in module.modules()):
        module._apply(function, recurse)  # type: ignore[no-untyped-call]
        return
    if not hasattr(module, "_hf_hook"):
        module._apply(function, recurse=False)  # type: ignore[no-untyped-call]
        for child in module.children() if recurse else ():
            apply_unplaced(child, function, recurse=True)
        return
    for dtype in {parameter.dtype for parameter in module.parameters()}:
        asked = function(torch.empty(0, dtype=dtype)).dtype
        if asked != dtype:
            raise ValueError(
                f"a model whose devices accelerate manages must have its dtype before, got {asked} for "
                f"{type(module).__name__} with {dtype}"
            )


def switch_to_eval(teacher: nn.Module, student: nn.Module) -> list[nn.Module]:
    """Put a teacher in eval mode; return what of it the student has too, to be put back in training: one dropout, say.

    Args:
        teacher: The teacher, or an adapter of its side.
        student: The student.
    """
    switched = [module for module in teacher.modules() if module.training]
    if switched:
        teacher.eval()
    return [module for module in switched if any(module is own for own in student.modules())]


def freeze(teacher: Any, student: nn.Module) -> bool:
    """Put a teacher in eval mode and freeze it; return whether it has modes at all (an exported program has none).

    Args:
        teacher: The teacher.
        student: The student. What both have stays in training.

    Raises:
        ValueError: If its fake quantisation would go on to change with each batch.
    """
    if not isinstance(teacher, nn.Module):
        return False
    for path, part in teacher.named_modules():
        if _observes(part):
            # Each of the two leaves the other's parts alone.
            home = "torchao.quantization.pt2e" if "torchao" in type(part).__module__ else "torch.ao.quantization"
            raise ValueError(
                f"the teacher must stay as it is, but the fake quantisation at {path!r} fits its range to each batch, "
                f"in eval mode too: teacher.apply({home}.disable_observer), once it is calibrated"
            )
    for parameter in teacher.parameters():  # `requires_grad_` of the module is refused by torch.jit
        parameter.requires_grad_(False)
    try:
        for module in switch_to_eval(teacher, student):
            module.training = True
    except NotImplementedError:  # exported programs: what they do was fixed when they were exported
        return False
    return True


def _observes(part: nn.Module) -> bool:
    flag = getattr(part, "observer_enabled", None)
    fixed = type(part).__name__.startswith("FixedQParams")  # has the flag and no range to fit
    return isinstance(flag, Tensor) and not fixed and not flag.is_meta and bool(flag.any())


def update_average(teacher: Any, student: nn.Module, decay: float) -> None:
    """Move the teacher's parameters towards the student's, and copy the buffers."""
    check_number("decay", decay)
    decay = as_constant("decay", decay)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay!r}")
    if not isinstance(teacher, nn.Module):
        raise ValueError(f"an averaged teacher must be a module, got {type(teacher).__name__}")
    with torch.no_grad():
        for kind, ours, theirs in (
            ("parameters", dict(student.named_parameters()), dict(teacher.named_parameters())),
            ("buffers", dict(student.named_buffers()), dict(teacher.named_buffers())),
        ):
            wrong = {name for name in ours.keys() | theirs.keys() if _shape(ours, name) != _shape(theirs, name)}
            if wrong:
                raise ValueError(
                    f"an averaged teacher must have the student's {kind} (copy.deepcopy(student)), got a difference in "
                    f"{sorted(wrong)[:3]}"
                )
        for name, parameter in teacher.named_parameters():
            learns = student.get_parameter(name).requires_grad  # a frozen base makes no steps
            if learns and parameter.dtype.itemsize < 4 and parameter.is_floating_point():
                raise ValueError(
                    f"an averaged teacher must be float32 or wider, got {parameter.dtype} in {name!r}: small steps "
                    "would be rounded away"
                )
        for name, parameter in teacher.named_parameters():
            learner = student.get_parameter(name)
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.lerp_(learner.to(parameter.dtype), 1 - decay)
            else:  # quantised weights have no mean
                parameter.copy_(learner)
        for name, buffer in teacher.named_buffers():
            if name.rpartition(".")[2] != "observer_enabled":  # a student's fake quantisation may observe
                buffer.copy_(student.get_buffer(name))


def _shape(tensors: dict[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def with_idle(total: Tensor, distiller: Any, on: Iterable[str]) -> Tensor:
    """Keep what learns in terms that are off in the graph, with a gradient of 0: DDP waits for each.

    Args:
        total: The total.
        distiller: The Distiller.
        on: The terms that count.
    """
    for name, part in _learning(distiller):
        for parameter in () if name in on and part is not distiller.output else part.parameters():
            if parameter.requires_grad and type(parameter) is nn.Parameter and not parameter.is_meta:
                nothing = parameter.flatten()[:0].sum()
                total = total + (nothing.real if nothing.is_complex() else nothing).to(total)
    return total


def _learning(distiller: Any) -> Iterator[tuple[str, nn.Module]]:
    """What may learn beside the student, with the name of its term."""
    yield from distiller.losses.items()
    yield from distiller.adapters.items()
    for part in (distiller.task_loss, distiller.task_output, distiller.output):
        learns = isinstance(part, nn.Module) and len(list(part.parameters())) > 0
        if learns and not any(part is module for module in distiller.student.modules()):  # such as its second head
            yield TASK, part
