"""What `losses.py` measures: every case is a loss, a shape and a dtype, and two or more ways to compute it.

A new loss needs one entry in `PLAIN`: its form in `plain_forms/`, and inputs where logits do not do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distill
from loss_report import COMPILED, EAGER, FIRST, FLOOR, LIGER, OURS, PUBLISHED
from plain_forms import embeddings, logits, maps, pixels, relations
from plain_forms.form import Form

Shape = tuple[int, ...]
Inputs = tuple[Any, ...]  # student and teacher, a tensor or a tuple of tensors each, and what else the loss takes
MakeInputs = Callable[[Shape, torch.dtype, torch.Generator], Inputs]


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
        with torch.random.fork_rng():
            torch.manual_seed(0)  # masks and negatives that are drawn from the global generator are the same for all
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

    table: str  # one of `TABLES`
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

SMALL_LOGITS, FEATURES, MAPS, TOKENS = (128, 100), (128, 64), (128, 64, 8, 8), (128, 49, 64)
SCORES, CHUNKS = (128, 32), (128, 16)  # candidates of a query, pieces of a text


def normal(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Make a standard normal tensor on the generator's device."""
    return torch.randn(shape, dtype=dtype, generator=generator, device=generator.device)


def pair(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Make student and teacher of one shape, independent standard normal."""
    return normal(shape, dtype, generator), normal(shape, dtype, generator)


def pair_and_labels(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Make logits and the classes."""
    labels = torch.randint(shape[-1], shape[:-1], generator=generator, device=generator.device)
    return (*pair(shape, dtype, generator), labels)


def log_likelihoods(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Make the logarithms of what both give to pieces of text."""
    student, teacher = pair(shape, dtype, generator)
    return -10 * student.abs(), -10 * teacher.abs()


def twice_as_wide(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Make a teacher with twice the student's channels."""
    teacher = (shape[0], 2 * shape[1], *shape[2:])
    return normal(shape, dtype, generator), normal(teacher, dtype, generator)


def wide_and_labels(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Make a teacher with twice the student's channels, and one of 100 classes."""
    labels = torch.randint(100, shape[:1], generator=generator, device=generator.device)
    return (*twice_as_wide(shape, dtype, generator), labels)


def wide_and_boxes(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Make a teacher with twice the student's channels, and eight boxes a picture."""
    corners = torch.rand(shape[0], 8, 2, 2, generator=generator, device=generator.device, dtype=dtype)
    first, size = 0.6 * corners[..., 0], 0.1 + 0.3 * corners[..., 1]
    return (*twice_as_wide(shape, dtype, generator), torch.cat([first, first + size], 2))


def wide_and_indices(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Make a teacher twice as wide, and where in the training set the samples stand."""
    indices = torch.randperm(_crd_sizes(shape)[0], generator=generator, device=generator.device)[: shape[0]]
    return (*twice_as_wide(shape, dtype, generator), indices)


def stages(shape: Shape, count: int) -> list[Shape]:
    """Give the shapes of a ResNet's stages: half the height and width, twice the channels of the one before."""
    n, channels, height, width = shape
    return [(n, channels << k, height >> k, width >> k) for k in range(count)]


def two_stages(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Make two maps on each side."""
    return tuple(tuple(normal(stage, dtype, generator) for stage in stages(shape, 2)) for _ in range(2))


def three_stages(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Make three maps and the pooled features on each side."""
    shapes = [*stages(shape, 3), (shape[0], shape[1] << 2)]
    return tuple(tuple(normal(stage, dtype, generator) for stage in shapes) for _ in range(2))


@dataclass(frozen=True)
class Plain:
    """The plain form of a registered loss, and what to try it on."""

    form: Callable[..., Any]
    shape: Shape = SMALL_LOGITS  # of the student's tensor, the first one if there are more
    inputs: MakeInputs = pair
    make: Callable[[Shape], nn.Module] | None = None  # where `create_loss(name)` lacks arguments
    learned: bool = False  # `form(module)` then gives the form, which shares the module's weights
    published: Callable[..., Any] | None = None  # what the authors' code does, where that takes far more memory
    random: bool = False  # draws from the global generator, of which a compiler makes other numbers


def _widths(kind: Callable[..., nn.Module]) -> Callable[[Shape], nn.Module]:
    return lambda shape: kind(shape[1], 2 * shape[1])


def _crd_sizes(shape: Shape) -> tuple[int, int]:
    """Give the samples in memory and the negatives: as published for CIFAR-100 at 128 samples, else in proportion."""
    return 50_000 * shape[0] // 128, 16_384 * shape[0] // 128


def _crd_module(shape: Shape) -> nn.Module:
    samples, negatives = _crd_sizes(shape)
    return distill.CRDLoss(shape[1], 2 * shape[1], samples, num_negatives=negatives)


def _ofd_module(shape: Shape) -> nn.Module:
    norm = nn.BatchNorm2d(2 * shape[1])
    return distill.OFDLoss(shape[1], 2 * shape[1], distill.ofd_margin(norm.weight, norm.bias))


def _review_module(shape: Shape) -> nn.Module:
    channels = [stage[1] for stage in stages(shape, 3)] + [shape[1] << 2]
    return distill.ReviewLoss(channels, channels)


def _linear_module(shape: Shape) -> nn.Module:
    return distill.LinearLogitLoss(nn.Linear(shape[1], 100), nn.Linear(2 * shape[1], 100).requires_grad_(False))


def _sdd_module(shape: Shape) -> nn.Module:
    heads = nn.Linear(shape[1], 100), nn.Linear(2 * shape[1], 100).requires_grad_(False)
    return distill.SDDLoss(distill.KLLoss(), *heads)


def _queue_module(shape: Shape) -> nn.Module:
    """Give a queue of the published 8192 at 128 samples, else in proportion; it is full."""
    module = distill.QueueKLLoss(shape[1], 2 * shape[1], queue_size=64 * shape[0])
    module.queue.copy_(F.normalize(torch.randn_like(module.queue), dim=1))
    module.entered.fill_(len(module.queue))
    return module


def _matryoshka_module(shape: Shape) -> nn.Module:
    return distill.MatryoshkaLoss(distill.CosineLoss(), embeddings.halved(shape[1]))


PLAIN: dict[str, Plain] = {
    "akl": Plain(logits.akl),
    "alm": Plain(logits.alm, CHUNKS, log_likelihoods),
    "alpha_beta": Plain(logits.alpha_beta, make=lambda _: distill.AlphaBetaLoss(*logits.AB)),
    "at": Plain(maps.at, MAPS),
    "cc": Plain(relations.cc, FEATURES),
    "cosine": Plain(embeddings.cosine, FEATURES),
    "crd": Plain(relations.crd, FEATURES, wide_and_indices, _crd_module,
                 learned=True, published=relations.crd_published, random=True),
    "ctkd": Plain(logits.ctkd, learned=True),
    "cwd": Plain(maps.cwd, MAPS),
    "dist": Plain(logits.dist),
    "dist_plus": Plain(maps.dist_plus, MAPS),
    "dkd": Plain(logits.dkd, inputs=pair_and_labels),
    "fgd": Plain(maps.fgd, MAPS, wide_and_boxes, _widths(distill.FGDLoss), learned=True),
    "fsp": Plain(maps.fsp, (128, 32, 16, 16), two_stages),
    "gram": Plain(maps.gram, TOKENS),
    "hint": Plain(maps.hint, MAPS, twice_as_wide, _widths(distill.HintLoss), learned=True),
    "ickd": Plain(maps.ickd, MAPS),
    "js": Plain(logits.js),
    "kl": Plain(logits.kl),
    "linear_logit": Plain(logits.linear_logit, FEATURES, twice_as_wide, _linear_module, learned=True),
    "logit": Plain(F.mse_loss),
    "logit_std": Plain(logits.logit_std),
    "margin_mse": Plain(embeddings.margin_mse, SCORES),
    "matryoshka": Plain(embeddings.matryoshka, FEATURES, make=_matryoshka_module),
    "mft": Plain(logits.mft, inputs=pair_and_labels),
    "mgd": Plain(maps.mgd, MAPS, twice_as_wide, _widths(distill.MGDLoss), learned=True, random=True),
    "nkd": Plain(logits.nkd, inputs=pair_and_labels),
    "nst": Plain(maps.nst, MAPS, published=maps.nst_published),
    "ofa": Plain(logits.ofa, inputs=pair_and_labels),
    "ofd": Plain(maps.ofd, MAPS, twice_as_wide, _ofd_module, learned=True),
    "pearson": Plain(maps.pearson, MAPS),
    "pkt": Plain(relations.pkt, FEATURES),
    "queue_kl": Plain(embeddings.queue_kl, FEATURES, twice_as_wide, _queue_module, learned=True),
    "review": Plain(maps.review, (128, 16, 32, 32), three_stages, _review_module, learned=True),
    "reverse_kl": Plain(logits.reverse_kl),
    "rkd": Plain(relations.rkd, FEATURES, published=relations.rkd_published),
    "sampled_reverse_kl": Plain(logits.sampled_reverse_kl, inputs=pair_and_labels),
    "score_kl": Plain(embeddings.score_kl, SCORES),
    "sdd": Plain(maps.sdd, MAPS, wide_and_labels, _sdd_module, learned=True),
    "sigmoid_kl": Plain(logits.sigmoid_kl),
    "skd": Plain(logits.skd),
    "skew_kl": Plain(logits.skew_kl),
    "skew_reverse_kl": Plain(logits.skew_reverse_kl),
    "sp": Plain(relations.sp, MAPS),
    "srd": Plain(relations.srd, FEATURES, twice_as_wide, _widths(distill.SRDLoss), learned=True),
    "todi": Plain(logits.todi),
    "token_similarity": Plain(maps.token_similarity, TOKENS),
    "ttm": Plain(logits.ttm),
    "tvd": Plain(logits.tvd),
    "uld": Plain(logits.uld),
    "vid": Plain(maps.vid, MAPS, twice_as_wide, _widths(distill.VIDLoss), learned=True),
    "wsld": Plain(logits.wsld, inputs=pair_and_labels),
    "wttm": Plain(logits.wttm),
}  # fmt: skip


SEGMENTATION = (2, 19, 512, 512)
PIXELS: dict[str, Plain] = {  # the vector of each position
    "kl": Plain(pixels.kl, SEGMENTATION, make=lambda _: distill.KLLoss(dim=1)),
    "reverse_kl": Plain(pixels.reverse_kl, SEGMENTATION, make=lambda _: distill.ReverseKLLoss(dim=1)),
    "js": Plain(pixels.js, SEGMENTATION, make=lambda _: distill.JSLoss(dim=1)),
    "tvd": Plain(pixels.tvd, SEGMENTATION, make=lambda _: distill.TVDLoss(dim=1)),
    "sigmoid_kl": Plain(pixels.sigmoid_kl, SEGMENTATION, make=lambda _: distill.SigmoidKLLoss(dim=1)),
    "cosine": Plain(pixels.cosine, (16, 128, 64, 64), make=lambda _: distill.CosineLoss(dim=1)),
}


def liger_kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Write the same with Liger-Kernel, which takes log-probabilities."""
    loss = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean", log_target=True)
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    value: Tensor = loss(log_q, log_p) * temperature**2
    return value


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
    plain = (PIXELS if case.table == "pixels" else PLAIN)[case.loss]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = (distill.create_loss(case.loss) if plain.make is None else plain.make(case.shape)).to(device)
    inputs = plain.inputs(case.shape, case.dtype, torch.Generator(device).manual_seed(0))
    student, teacher = (side if isinstance(side, tuple) else (side,) for side in inputs[:2])
    for tensor in student:
        tensor.requires_grad_()

    def bind(form: Form) -> Callable[[], Tensor]:
        return lambda: form(*inputs)

    eager, compiled = (plain.form(ours) if plain.learned else plain.form for _ in range(2))  # each with its own state
    forward = {OURS: bind(ours), EAGER: bind(eager), COMPILED: bind(torch.compile(compiled))}
    if plain.published is not None:
        forward[PUBLISHED] = bind(plain.published(ours) if plain.learned else plain.published)
    floor = partial(_move, [tensor.detach() for tensor in student], teacher)
    problem = Problem(forward, (*student, *_parameters(ours)), floor, other=(COMPILED,) if plain.random else ())
    if case.loss in LIGER_FORMS and case.table != "pixels":
        _add_liger(problem, lambda: LIGER_FORMS[case.loss](*inputs), device)
    return problem


def _parameters(loss: nn.Module) -> list[nn.Parameter]:
    """Give what trains: the loss's own parameters, and those of a head that it reads but leaves to the model."""
    modules = (loss, loss.student_head) if isinstance(loss, distill.LinearLogitLoss) else (loss,)
    found = [parameter for module in modules for parameter in module.parameters()]
    if isinstance(loss, distill.SDDLoss):
        found += [tensor for tensor in loss._heads.tensors()[:2] if isinstance(tensor, nn.Parameter)]
    return [parameter for parameter in found if parameter.requires_grad]


def _move(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Read both inputs and write as much as the gradient into memory that is fresh, as a gradient's is."""
    for tensor in student:
        torch.empty_like(tensor).copy_(tensor)
    for tensor in teacher:
        tensor.sum()


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
MEMORY = (2048, 32000)  # at which each other loss of rows is measured beside `logit` and `kl`
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
    # `dist` and `skd` compare samples, too, and `ctkd` has a temperature that learns: no rows, some at a time.
    others = ("logit", "kl", "dist", "skd", "ctkd")
    rows = [x for x, plain in PLAIN.items() if plain.shape == SMALL_LOGITS and x not in others]
    cases += [Case("logits", loss, MEMORY, torch.float32, False, build_loss) for loss in rows]
    cases += [
        Case("linear", heads, shape, dtype, shape in FULL, partial(build_linear, train_heads=heads == "trained"))
        for heads in ("trained", "frozen")
        for dtype, shapes in zip(dtypes, linear_shapes, strict=True)
        for shape in shapes
    ]
    return cases + [
        Case(table, loss, plain.shape, torch.float32, False, build_loss)
        for table, losses in (("pixels", PIXELS), ("losses", PLAIN))
        for loss, plain in losses.items()
    ]
