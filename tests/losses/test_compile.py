"""Every loss under `torch.compile`: whole graphs, two batch sizes, changed options, a mask.

What is compiled is what the loss's own test file gives the contract, in its functions `test_contract*`. Several losses
are compiled as one graph, which the C++ compiler sees once; what fails or differs is named by its loss.
"""

import itertools

import pytest
import torch
from torch import nn

import contract
from compilers import HAS_COMPILER, one_library
from twins import STEMS, find_contracts

# A graph has no symbol for an exponent: when that has changed, it is traced twice, with all that stands beside it.
ALONE = ["srd"]
TOGETHER = [stem for stem in STEMS if stem not in ALONE]
GROUPS = [*(TOGETHER[i::7] for i in range(7)), ALONE]

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Functions that are traced
    pytest.mark.filterwarnings("ignore:.torch.jit"),  # inductor's own imports, and what it calls
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning"),
]


@pytest.mark.parametrize("stems", GROUPS, ids=[f"{group[0]}-to-{group[-1]}" for group in GROUPS])
def test_every_loss(stems):
    """Two batch sizes through inductor; every option that is changed is noticed; then both with a mask."""
    together = Together(stems, [next(find_contracts(stem)) for stem in stems], "inductor")
    if not HAS_COMPILER:
        together.backend = "aot_eager"
    with one_library():
        together.check(0)
        together.check(1)
        assert together.traces == 1, "a batch size is compiled anew"
        together.check_each_option()
        together.change_options()
        together.backend, traces = "aot_eager", together.traces
        together.check(0, masked=True)
        assert together.traces - traces <= 1 + (stems == ALONE), "an option is no symbol: compiled anew for each value"
        traces = together.traces
        together.check(1, masked=True)
        assert together.traces == traces, "a batch size is compiled anew with a mask"


def test_what_else_a_loss_gives_the_contract():
    """Maps of one dimension and sizes that differ. (The methods of LinearLogitLoss: test_linear_logit_masked.py.)"""
    others = [
        (stem, given)
        for stem in STEMS
        if stem != "linear_logit"
        for given in itertools.islice(find_contracts(stem), 1, None)
    ]
    Together(*zip(*others, strict=True), "aot_eager").check(1)


class Case:
    """A loss with the arguments of its contract."""

    def __init__(self, build, *, shape, teacher_shape=None, target=None, moves=True, **_):
        build, self.pair = contract.prepare(build, shape, teacher_shape, learned=contract.is_learned(build, moves))
        self.loss, self.target = build(), target
        self.learned = [parameter for parameter in self.loss.parameters() if parameter.requires_grad]

    def arguments(self, less, *, masked):
        student, teacher = self.pair(torch.float32, less=less)
        labels = None if self.target is None else self.target[: len(student)].clone()
        given = student, teacher, labels, self.mask(student, teacher, labels) if masked else None
        for tensor in given:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # or the second batch size would be traced anew
        return given

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

    def options(self):
        """Each option that is a number, and another value for it."""
        own = contract.inner(self.loss)
        fixed = {"mask_ratio", *getattr(own, "built", ())}  # with the first, mgd draws anew in each call
        names = [name for name in getattr(own, "options", ()) if name not in fixed]
        found = [(name, getattr(own, name)) for name in names if isinstance(getattr(own, name), float)]
        # Not 1: a loss may leave it out of the graph, which then has no symbol for the option.
        return [(own, name, value * 0.4 or 0.25) for name, value in found]


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

    def check_each_option(self):
        """What is compiled must notice that an option has changed, or give what eager mode gives."""
        for option in itertools.chain(*(case.options() for case in self.cases)):
            own, name, _ = option
            before = getattr(own, name)
            setattr(*option)
            try:
                with torch._dynamo.config.patch(error_on_recompile=True):
                    self.check(0)
            except torch._dynamo.exc.RecompileError:  # to notice is enough: tracing again would take all the time
                pass
            setattr(own, name, before)
            with torch._dynamo.config.patch(error_on_recompile=True):
                self.check(0)  # or the next one would be noticed for this one

    def change_options(self):
        """Change one option of each loss, which changes its result."""
        before = self.results(Losses(self.cases), 0, masked=False)
        options = [next(iter(case.options()), None) for case in self.cases]
        for option in filter(None, options):
            setattr(*option)
        after = self.results(Losses(self.cases), 0, masked=False)
        for stem, option, old, new in zip(self.stems, options, before, after, strict=True):
            assert option is None or not all(map(torch.equal, old, new)), f"{stem}: {option[1]} changes nothing"


class Losses(nn.Module):
    def __init__(self, cases):
        super().__init__()
        self.losses = nn.ModuleList(case.loss for case in cases)

    def forward(self, given):
        return [
            loss(student, teacher, target, mask=mask)
            for loss, (student, teacher, target, mask) in zip(self.losses, given)  # noqa: B905 - strict is not traced
        ]
