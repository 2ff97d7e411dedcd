"""Every loss under `torch.compile`: whole graphs, two batch sizes, and where it is only traced two values of an option.

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

compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="needs a C++ compiler")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.compile, compiler])]


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Functions that are traced
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own imports, and what it calls
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning")
def test_compiles(stem, backend):
    cases = list(find_contracts(stem))
    assert cases, f"tests/losses/test_{stem}.py must have a test_contract"
    for case in cases[: 1 if backend == "inductor" else None]:
        # What is compiled for each size anew takes minutes: the other backend shows the second one.
        check(backend, (0,) if (stem, backend) == ("review", "inductor") else (0, 1), **case)


def check(backend, sizes, build, *, shape, teacher_shape=None, target=None, moves=True, **_):
    learned = contract.is_learned(build, moves)
    build, pair = contract.prepare(build, shape, teacher_shape, learned=learned)
    loss = build()
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)

    def results(call, less):
        student, teacher = pair(torch.float32, less=less)
        labels = None if target is None else target[: len(student)].clone()
        for tensor in (student, teacher, *([] if labels is None else [labels])):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # or the second batch size would be traced anew
        value = call(student, teacher, labels)
        wanted = [student, *(parameter for parameter in loss.parameters() if parameter.requires_grad)]
        return [value, *torch.autograd.grad(value, wanted)]

    for less in sizes:
        torch.testing.assert_close(results(compiled, less), results(loss, less), rtol=1e-4, atol=1e-5)
    if backend == "inductor":  # a new value is a new trace, which the other backend shows at a fraction of the cost
        return
    before = results(loss, 1)
    own = contract.inner(loss)
    numbers = [name for name in getattr(own, "options", ()) if isinstance(getattr(own, name), float)]
    fixed = {"mask_ratio", *getattr(own, "built", ())}  # with the first, mgd draws anew in each call
    for name in [name for name in numbers if name not in fixed][:1]:
        setattr(own, name, getattr(own, name) / 2 or 0.25)
        after = results(loss, 1)
        assert any(not torch.equal(new, old) for new, old in zip(after, before, strict=True)), f"{name} changes nothing"
        torch.testing.assert_close(results(compiled, 1), after, rtol=1e-4, atol=1e-5)
