"""Whatever a Term, a Distiller or a call gets: it works, or ours is the error, with what must hold and what was got.

`FUZZ=2000 python -m pytest tests/distiller/test_bad_calls.py` tries that many calls.
"""

import os
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import distill
from distill import Distiller, HintLoss, KLLoss, LogitLoss, Teachers, Term

EXAMPLES = int(os.environ.get("FUZZ", "150"))
SOURCE = Path(distill.__file__).parent
JUNK = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "2.5": 2.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "1j": 1j,
    "text": "nowhere",
    "no text": "",
    "bytes": b"fc",
    "list": [1, 2],
    "empty list": [],
    "dict": {"nowhere": 1},
    "empty dict": {},
    "tuple": ("0", "0", "0"),
    "empty tuple": (),
    "set": {1},
    "object": object(),
    "class": nn.Linear,
    "module": nn.Linear(3, 3),
    "array": np.ones(3),
    "number": torch.tensor(1.0),
    "vector": torch.ones(3),
    "integers": torch.arange(4),
    "complex": torch.ones(4, 5, dtype=torch.complex64),
    "meta": torch.ones(4, device="meta"),
    "loss": KLLoss(),
    "losses": [KLLoss()],
    "pair of terms": (Term(LogitLoss()), Term(LogitLoss())),
    "Teachers": Teachers,
    "dtype": torch.float32,
}
CALLED = {"module", "loss"}  # these can be called, and say themselves what they do not take
PLACES = [
    *(("term", name) for name in ("loss", "at", "weight", "student", "teacher", "copy")),
    *(
        ("build", name)
        for name in ("student", "teacher", "losses", "task_loss", "task_weight", "output", "task_output")
    ),
    *(
        ("call", name)
        for name in (
            "target",
            "mask",
            "denominator",
            "student",
            "teacher_output",
        )  # what models see is theirs to refuse
    ),
]


def make(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5))


def attempt(changes):
    """Build and call with some arguments replaced."""
    given = {"term": {}, "build": {}, "call": {}}
    for (where, name), value in changes.items():
        given[where][name] = value
    term = Term(**{"loss": HintLoss(4, 4), "at": "1", **given["term"]})
    build = {"student": make(0), "teacher": make(1), "losses": {"kl": KLLoss(), "hint": term}, **given["build"]}
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    out = Distiller(**build)(**{"inputs": inputs, "target": torch.arange(4), **given["call"]})
    assert out.loss.shape == ()
    out.loss.backward()


def fault(error):
    """What is wrong with an error, or nothing: its kind, where it was raised, and what it says."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, (ValueError, TypeError, KeyError)):
        return "of no kind that is promised"
    if SOURCE not in Path(last.filename).parents:
        return f"raised in {last.filename}:{last.lineno}"
    text = str(error)
    if not any(word in text for word in ("must", "needs", "no module")) or "got" not in text:
        return "says not what must hold and what was got"
    return None


def test_a_bad_argument_is_named():
    faults = []

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.dictionaries(st.sampled_from(PLACES), st.sampled_from(sorted(JUNK)), min_size=1, max_size=2))
    def check(chosen):
        try:
            attempt({place: JUNK[name] for place, name in chosen.items()})
        except Exception as error:
            wrong = fault(error)
            if wrong and not CALLED.intersection(chosen.values()):
                faults.append(f"{chosen}: {type(error).__name__}: {str(error)[:150]}: {wrong}")

    check()
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("place", [("term", "copy"), ("call", "student")])
def test_what_is_of_another_kind_is_refused_and_not_obeyed(place):
    with pytest.raises((TypeError, ValueError), match=rf"{place[1]} must be .*, got 'nowhere'"):
        attempt({place: "nowhere"})


def test_what_is_right_works():
    attempt({})
