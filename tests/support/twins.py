"""What the test file of each loss gives the contract, for tests that go through all losses."""

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distill

FOLDER = Path(__file__).parents[1] / "losses"
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
