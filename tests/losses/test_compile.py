"""Every loss under `torch.compile`: whole graphs, two batch sizes, a mask, and a changed option.

What is compiled is what the loss's own test file gives the contract, in its functions `test_contract*`.
"""

import importlib.util
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import contract
import distill

FOLDER = Path(__file__).parent
STEMS = [stem for stem in distill.list_losses() if (FOLDER / f"test_{stem}.py").exists()]


def find_contracts(stem: str) -> Iterator[dict[str, Any]]:
    """The arguments of the first call of the contract in each of its tests."""
    spec = importlib.util.spec_from_file_location(f"twin_of_{stem}", FOLDER / f"test_{stem}.py")
    twin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(twin)
    for name, test in list(vars(twin).items()):
        if name.startswith("test_contract"):
            marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            for values in itertools.product(*(mark[1] for mark in marks)):
                calls: list[dict[str, Any]] = []
                twin.assert_loss_contract = lambda build, _calls=calls, **given: _calls.append(
                    {"build": build, **given}
                )
                test(**dict(zip((mark[0] for mark in marks), values, strict=True)))
                yield calls[0]


# Made of what the others show under inductor, which takes up to a minute for each of them.
TRACED = {"ctkd", "fgd", "gram", "ofa", "queue_kl", "sdd", "sigmoid_kl", "skd", "srd", "token_similarity"}
HAS_COMPILER = any(map(shutil.which, ("g++", "clang++", "cl")))


@pytest.fixture(autouse=True)
def _quick_code():
    """Code without vector instructions, which takes the C++ compiler half the time and means the same."""
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        yield


@pytest.mark.compile
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Functions that are traced
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own imports, and what it calls
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning")
def test_compiles(stem):
    first, *others = find_contracts(stem)
    loss = Compiled("inductor" if HAS_COMPILER and stem not in TRACED else "aot_eager", **first)
    for less in (0, 1):
        # What is compiled for each size anew takes minutes: the other backend shows the second one.
        if not (less and stem == "review"):
            loss.check(less)
    loss.backend = "aot_eager"  # shows a new trace at a fraction of the cost
    loss.change_an_option()
    loss.check(1, masked=True)
    for case in others:
        Compiled("aot_eager", **case).check(1)


class Compiled:
    """A loss with the arguments of its contract, compiled and not."""

    def __init__(self, backend, build, *, shape, teacher_shape=None, target=None, moves=True, **_):
        build, self.pair = contract.prepare(build, shape, teacher_shape, learned=contract.is_learned(build, moves))
        self.loss, self.target = build(), target
        self.backend = backend
        torch.compiler.reset()
        self.compiled = torch.compile(self.loss, fullgraph=True, backend=self.compile)

    def compile(self, *graph):
        return torch._dynamo.lookup_backend(self.backend)(*graph)

    def results(self, call, less, *, masked=False):
        student, teacher = self.pair(torch.float32, less=less)
        labels = None if self.target is None else self.target[: len(student)].clone()
        for tensor in (student, teacher, *([] if labels is None else [labels])):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # or the second batch size would be traced anew
        value = call(student, teacher, labels, mask=self.mask(student, teacher, labels) if masked else None)
        wanted = [student, *(parameter for parameter in self.loss.parameters() if parameter.requires_grad)]
        return [value, *torch.autograd.grad(value, wanted)]

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

    def check(self, less, *, masked=False):
        ours, theirs = (self.results(call, less, masked=masked) for call in (self.compiled, self.loss))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def change_an_option(self):
        before = self.results(self.loss, 0)
        own = contract.inner(self.loss)
        numbers = [name for name in getattr(own, "options", ()) if isinstance(getattr(own, name), float)]
        fixed = {"mask_ratio", *getattr(own, "built", ())}  # with the first, mgd draws anew in each call
        for name in [name for name in numbers if name not in fixed][:1]:
            setattr(own, name, getattr(own, name) / 2 or 0.25)
            after = self.results(self.loss, 0)
            same = all(map(torch.equal, after, before))
            assert not same, f"{name} changes nothing"
