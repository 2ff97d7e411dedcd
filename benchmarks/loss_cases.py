"""What `losses.py` measures: every case is a loss, a shape and a dtype, and two or more ways to compute it.

A new loss needs one entry in `PLAIN`: the best plain PyTorch form that is known, and inputs where logits do not do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distill
from loss_report import COMPILED, EAGER, FIRST, FLOOR, LIGER, OURS

Shape = tuple[int, ...]
Inputs = tuple[Tensor, ...]  # student, teacher and what else the loss takes
MakeInputs = Callable[[Shape, torch.dtype, torch.Generator], Inputs]
Form = Callable[..., Tensor]


@dataclass
class Problem:
    """The ways to compute one loss on the same inputs."""

    forward: dict[str, Callable[[], Tensor]]  # by name of the way; gives the loss
    leaves: tuple[Tensor, ...]  # whose gradients are wanted
    floor: Callable[[], object] | None = None  # moves the bytes that any way must move
    other: tuple[str, ...] = ()  # ways that compute something else, for comparison, so that values may differ
    notes: dict[str, str] = field(default_factory=dict)  # by name of a way: which form it takes, or why it is not there

    def steps(self) -> dict[str, Callable[[], object]]:
        """Return forward and backward of every way, and the floor."""
        steps: dict[str, Callable[[], object]] = {name: partial(self._step, name) for name in self.forward}
        return steps if self.floor is None else steps | {FLOOR: self.floor}

    def result(self, name: str) -> tuple[float, float]:
        """Return the loss and the norm of all gradients, to compare the ways."""
        value = self.forward[name]()
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradients = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32).item() for gradient in gradients]
        self.forget()
        return value.item(), sum(norm**2 for norm in norms) ** 0.5

    def _step(self, name: str) -> None:
        self.forward[name]().backward()  # type: ignore[no-untyped-call]
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves:
            leaf.grad = None


@dataclass(frozen=True)
class Case:
    """One row of a table."""

    table: str  # "logits", "linear" or "losses"
    loss: str  # as the table shows it
    shape: Shape
    dtype: torch.dtype
    full: bool  # measured with --full only
    build: Callable[[Case, torch.device], Problem]

    @property
    def name(self) -> str:
        """What `--only` selects, such as `logits/kl/1024x32000/float32`."""
        return "/".join((self.table, self.loss, "x".join(map(str, self.shape)), str(self.dtype).partition(".")[2]))


# --- one loss against its plain form --------------------------------------------------------------------------------


def logits(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Make student and teacher logits, independent standard normal."""
    student = torch.randn(shape, dtype=dtype, generator=generator, device=generator.device)
    return student, torch.randn(shape, dtype=dtype, generator=generator, device=generator.device)


def plain_kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Write the soft-target loss as training scripts do."""
    log_q, p = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


@dataclass(frozen=True)
class Plain:
    """The plain form of a registered loss, and what to try it on."""

    form: Form
    shape: Shape = (256, 1000)
    inputs: MakeInputs = logits
    make: Callable[[Shape], nn.Module] | None = None  # where `create_loss(name)` lacks arguments


PLAIN: dict[str, Plain] = {
    "kl": Plain(plain_kl),
    "logit": Plain(F.mse_loss),
}


def liger_kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Write the same with Liger-Kernel, which takes log-probabilities."""
    loss = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean", log_target=True)
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    value: Tensor = loss(log_q, log_p) * temperature**2
    return value


ELSEWHERE = {"linear_logit"}  # registered losses that a table of their own shows

LIGER_FORMS: dict[str, Form] = {"kl": liger_kl}


def why_no_liger(device: torch.device) -> str:
    """Say why Liger-Kernel cannot run here; empty if it can."""
    if device.type != "cuda":
        return "its kernels need a GPU"
    try:
        importlib.import_module("liger_kernel.transformers")
    except ImportError as error:
        return f"it does not import: {error}"
    return ""


def build_loss(case: Case, device: torch.device) -> Problem:
    """Build a registered loss beside its plain form, eager and compiled, and the floor."""
    plain = PLAIN[case.loss]
    ours = (distill.create_loss(case.loss) if plain.make is None else plain.make(case.shape)).to(device)
    inputs = plain.inputs(case.shape, case.dtype, torch.Generator(device).manual_seed(0))
    student, teacher = inputs[0].requires_grad_(), inputs[1]
    compiled = torch.compile(plain.form)
    forward: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ours(*inputs),
        EAGER: lambda: plain.form(*inputs),
        COMPILED: lambda: compiled(*inputs),
    }
    problem = Problem(forward, (student, *ours.parameters()), partial(_move, student.detach(), teacher))
    if case.loss in LIGER_FORMS:
        _add_liger(problem, lambda: LIGER_FORMS[case.loss](*inputs), device)
    return problem


def _move(student: Tensor, teacher: Tensor) -> None:
    """Read both inputs and write as much as the gradient into memory that is fresh, as a gradient's is."""
    torch.empty_like(student).copy_(student)
    teacher.sum()


def _add_liger(problem: Problem, form: Callable[[], Tensor], device: torch.device) -> None:
    if reason := why_no_liger(device):
        problem.notes[LIGER] = reason
    else:
        problem.forward[LIGER] = form


# --- linear heads against formed logits -----------------------------------------------------------------------------


def formed_logits(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """Form both logits and take the mean squared difference."""
    with torch.no_grad():
        wanted = F.linear(teacher, teacher_weight)
    return F.mse_loss(F.linear(student, student_weight), wanted)


def build_linear(case: Case, device: torch.device, *, train_heads: bool) -> Problem:
    """Build `LinearLogitLoss` beside formed logits; the shape is samples, classes, student's and teacher's width."""
    samples, classes, student_width, teacher_width = case.shape
    generator = torch.Generator(device).manual_seed(0)
    make = partial(torch.randn, generator=generator, device=device, dtype=case.dtype)
    heads = [nn.Linear(width, classes, bias=False, device="meta") for width in (student_width, teacher_width)]
    for head, width in zip(heads, (student_width, teacher_width), strict=True):
        head.weight = nn.Parameter(make(classes, width) / width**0.5, requires_grad=False)
    student_head, teacher_head = heads
    student_head.requires_grad_(train_heads)
    student, teacher = make(samples, student_width).requires_grad_(), make(samples, teacher_width)
    ours, compiled = distill.LinearLogitLoss(student_head, teacher_head), torch.compile(formed_logits)
    inputs = (student, student_head.weight, teacher, teacher_head.weight)
    forward: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ours(student, teacher),
        EAGER: lambda: formed_logits(*inputs),
        COMPILED: lambda: compiled(*inputs),
    }
    if not train_heads:
        forward[FIRST] = lambda: distill.LinearLogitLoss(student_head, teacher_head)(student, teacher)
    problem = Problem(forward, (student, student_head.weight) if train_heads else (student,), other=(LIGER,))
    problem.notes[OURS] = ours.plan(samples).method
    _add_liger(problem, lambda: _liger_linear(*inputs), device)
    return problem


def _liger_linear(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """Liger-Kernel has no squared error on linear heads; its divergence of the same logits is the nearest."""
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.0)
    value: Tensor = loss(student, student_weight, teacher, teacher_weight, None)
    return value


# --- the list -------------------------------------------------------------------------------------------------------

SWEEP = (10, 100, 1000, 10000, 32000, 128256)  # classes at 1024 samples, for the picture
LOGITS = ((128, 10), *((1024, classes) for classes in SWEEP), (2048, 32000), (4096, 128256))
LINEAR = (*((1024, classes, 256, 512) for classes in SWEEP),
          (2048, 1000, 768, 1024), (2048, 32000, 256, 512), (2048, 50257, 768, 1024))  # fmt: skip
LINEAR_SMALL = ((32, 10, 64, 64), (128, 10, 64, 64), (128, 100, 64, 256), (128, 1000, 512, 2048), (256, 1000, 256, 512),
                (512, 4096, 256, 512))  # fmt: skip
LINEAR_BFLOAT16 = ((2048, 32000, 256, 512),)
CUDA_LOGITS = ((8192, 128256),)
CUDA_LINEAR = ((16384, 128256, 2048, 4096),)
PICTURE_ONLY = {(1024, classes) for classes in (10, 100, 10000, 32000)}
FULL = PICTURE_ONLY | {(4096, 128256), *LINEAR[: len(SWEEP)], *LINEAR_SMALL}


def list_cases(device: torch.device) -> list[Case]:
    """Return all cases in the order of the tables.

    Args:
        device: On CUDA there are larger ones beside the others.
    """
    cuda = device.type == "cuda"
    logit_shapes = LOGITS + CUDA_LOGITS * cuda
    linear_shapes = LINEAR_SMALL + LINEAR + CUDA_LINEAR * cuda, LINEAR_BFLOAT16 + CUDA_LINEAR * cuda
    dtypes = (torch.float32, torch.bfloat16)
    cases = [
        Case("logits", loss, shape, dtype, shape in FULL, build_loss)
        for loss in ("logit", "kl")
        for dtype in dtypes
        for shape in logit_shapes
        if dtype == torch.float32 or shape not in PICTURE_ONLY
    ]
    cases += [
        Case("linear", heads, shape, dtype, shape in FULL, partial(build_linear, train_heads=heads == "trained"))
        for heads in ("trained", "frozen")
        for dtype, shapes in zip(dtypes, linear_shapes, strict=True)
        for shape in shapes
    ]
    return cases + [
        Case("losses", loss, plain.shape, torch.float32, False, build_loss) for loss, plain in PLAIN.items()
    ]
