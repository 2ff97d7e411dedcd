"""Every loss under `torch.compile`: whole graphs, two batch sizes, a mask, and a changed option.

What is compiled is what the loss's own test file gives the contract, in its functions `test_contract*`. Several losses
are compiled as one graph, which the C++ compiler sees once; what fails or differs is named by its loss.
"""

import itertools

import pytest
import torch
from torch import nn

import contract
from compilers import HAS_COMPILER, needs_compiler, one_library
from twins import STEMS, find_contracts

GROUPS = [STEMS[i::6] for i in range(6)]

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Functions that are traced
    pytest.mark.filterwarnings("ignore:.torch.jit"),  # inductor's own imports, and what it calls
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning"),
]


@needs_compiler
@pytest.mark.parametrize("stems", GROUPS, ids=[f"{group[0]}-to-{group[-1]}" for group in GROUPS])
def test_inductor(stems):
    together = Together(stems, [next(find_contracts(stem)) for stem in stems], "inductor")
    with one_library():
        together.check(0)
        together.check(1)
    assert together.traces == 1, "a batch size is compiled anew"


@pytest.mark.parametrize("stem", STEMS)
def test_mask_and_a_changed_option(stem):
    first, *others = find_contracts(stem)
    alone = Together([stem], [first], "aot_eager")
    if not HAS_COMPILER:
        alone.check(0)
        alone.check(1)
        assert alone.traces == 1 or torch.__version__ < "2.6", "a batch size is compiled anew"
    alone.check(1, masked=True)
    alone.backend = "eager"  # it is the tracing that must notice
    if alone.change_options():
        alone.check(1, masked=True)
    for case in others:
        Together([stem], [case], "aot_eager").check(1)


class Case:
    """A loss with the arguments of its contract."""

    def __init__(self, build, *, shape, teacher_shape=None, target=None, moves=True, **_):
        build, self.pair = contract.prepare(build, shape, teacher_shape, learned=contract.is_learned(build, moves))
        self.loss, self.target = build(), target
        self.learned = [parameter for parameter in self.loss.parameters() if parameter.requires_grad]

    def arguments(self, less, *, masked):
        student, teacher = self.pair(torch.float32, less=less)
        labels = None if self.target is None else self.target[: len(student)].clone()
        for tensor in (student, teacher, *([] if labels is None else [labels])):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # or the second batch size would be traced anew
        return student, teacher, labels, self.mask(student, teacher, labels) if masked else None

    def mask(self, *given):
        """All samples but the second one."""
        own = contract.inner(self.loss)
        shape = given[0].shape[:1]
        if hasattr(own, "reduction"):
            own.reduction = "none"
            shape = self.loss(*given).shape
            own.reduction = "mean"
        elif getattr(own, "dim", None) is not None:
            shape = given[0].movedim(own.dim, -1).shape[:-1]
        kept = torch.ones(shape, dtype=torch.bool)
        kept[1] = False
        return kept

    def option(self):
        """The first option that is a number, and another value for it."""
        own = contract.inner(self.loss)
        fixed = {"mask_ratio", *getattr(own, "built", ())}  # with the first, mgd draws anew in each call
        for name in getattr(own, "options", ()):
            if name not in fixed and isinstance(getattr(own, name), float):
                return own, name, getattr(own, name) / 2 or 0.25
        return None


class Together:
    """Losses in one graph, compiled and not."""

    def __init__(self, stems, contracts, backend):
        self.stems, self.backend, self.traces = stems, backend, 0
        self.cases = [Case(**given) for given in contracts]
        torch.compiler.reset()
        self.compiled = torch.compile(Losses(self.cases), fullgraph=True, backend=self.compile)

    def compile(self, *graph):
        self.traces += 1
        return torch._dynamo.lookup_backend(self.backend)(*graph)

    def check(self, less, *, masked=False):
        ours, theirs = (self.results(call, less, masked=masked) for call in (self.compiled, Losses(self.cases)))
        for stem, one, other in zip(self.stems, ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, stem=stem: f"{stem}: {text}")

    def results(self, call, less, *, masked):
        """Of each loss its value and its gradients."""
        given = [case.arguments(less, masked=masked) for case in self.cases]
        values = call(given)
        wanted = [[student, *case.learned] for (student, *_), case in zip(given, self.cases, strict=True)]
        slopes = iter(torch.autograd.grad(sum(values), list(itertools.chain(*wanted))))
        return [[value, *itertools.islice(slopes, len(of_it))] for value, of_it in zip(values, wanted, strict=True)]

    def change_options(self):
        """Each loss gets another value of an option, which changes its result; return whether one has an option."""
        before = self.results(Losses(self.cases), 0, masked=False)
        options = [case.option() for case in self.cases]
        for option in filter(None, options):
            setattr(*option)
        after = self.results(Losses(self.cases), 0, masked=False)
        for stem, option, old, new in zip(self.stems, options, before, after, strict=True):
            assert option is None or not all(map(torch.equal, old, new)), f"{stem}: {option[1]} changes nothing"
        return any(options)


class Losses(nn.Module):
    def __init__(self, cases):
        super().__init__()
        self.losses = nn.ModuleList(case.loss for case in cases)

    def forward(self, given):
        return [
            loss(student, teacher, target, mask=mask)
            for loss, (student, teacher, target, mask) in zip(self.losses, given)  # noqa: B905 - strict is not traced
        ]
