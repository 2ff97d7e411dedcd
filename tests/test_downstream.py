"""What the package is to those who build on it: a loss is added with two files. `types/calls.py` has their types."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.subprocess

LOSS = '''"""A loss that nobody published."""

from torch import Tensor

from distill._checks import check_pair, check_positive
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss

FAMILY = "maps"


def dummy_loss(student: Tensor, teacher: Tensor, *, power: float = 4.0) -> Tensor:
    """Mean power of the difference, one value per sample.

        loss = 1/C * sum_c (s_c - t_c)^power

    Args:
        student: What the student gives, `(..., C)`.
        teacher: What the teacher gives, same shape.
        power: An even number.

    Returns:
        `(...)`.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> import torch
        >>> from distill import dummy_loss
        >>> dummy_loss(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([1.])

    Notes:
        Published with weight 7.

        Scale: ours.

        Caveat: Nobody has tried it.

    Reference:
        Nobody, "Nothing", 2026.
    """
    student, teacher = check_pair(student, teacher, dim=-1)
    return ((student - teacher) ** power).mean(-1)


@register_loss("dummy")
class DummyLoss(SampleLoss):
    """Mean power of the difference, see `dummy_loss`.

    Args:
        power: An even number.
        reduction: Over the samples.

    Examples:
        >>> from distill import DummyLoss
        >>> DummyLoss(2.0)
        DummyLoss(power=2.0, reduction='mean')
    """

    options = {"power": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, power: float = 4.0, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        self.power = power

    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        """One value per sample."""
        return dummy_loss(student, teacher, **self.given())
'''

TWIN = '''"""DummyLoss, for the test of what a new loss takes."""

import distill
import losses_page
from contract import assert_loss_contract
from distill import DummyLoss, create_loss


def test_contract():
    assert_loss_contract(DummyLoss, shape=(6, 10))


def test_is_found_by_every_name():
    assert distill.__file__.endswith("here/src/distill/__init__.py")
    assert repr(create_loss("dummy", 2.0)) == "DummyLoss(power=2.0, reduction='mean')"
    assert "dummy" in distill.list_losses()
    assert distill.get_loss("dummy") is DummyLoss
    assert {"DummyLoss", "dummy_loss"} <= {*distill.__all__}
    assert "| {py:obj}`dummy <distill.DummyLoss>` |" in losses_page.table()
'''


def test_a_loss_is_added_with_two_files(tmp_path):
    """Its source and its test; the index is written by the script, and all that speaks of every loss still passes."""
    tree = tmp_path / "here"
    skipped = shutil.ignore_patterns("__pycache__", "results", ".*")
    for folder in ("src", "tests", "docs", "examples", "benchmarks"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=skipped)
    for name in ("conftest.py", "pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree)
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    (tree / "src/distill/losses/dummy.py").write_text(LOSS)
    (tree / "tests/losses/test_dummy.py").write_text(TWIN)

    environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*command: str) -> None:
        done = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run("docs/write_index.py")
    changed = {path.relative_to(tree).as_posix() for path, content in before.items() if path.read_bytes() != content}
    added = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file() and path not in before}
    assert changed == {"src/distill/__init__.py"}  # by the script
    assert added == {"src/distill/losses/dummy.py", "tests/losses/test_dummy.py"}  # by hand

    of_every_loss = ["tests/test_package.py", "tests/test_losses_page.py", "tests/test_imports.py"]
    pages = ["tests/test_docs.py", "tests/test_benchmarks.py", "tests/examples/test_cifar_losses.py"]
    names = "dummy or index or names or docstrings or loss_file or page or row or scale or imports_flow or of_losses"
    others = "code_on_the_page or outlives or command or links or every_public"
    run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not compile and not subprocess"),
        *("src/distill/losses/dummy.py", "tests/losses/test_dummy.py", "tests/losses/test_compile.py"),
        *(*of_every_loss, *pages),
        *("-k", f"({names}) and not ({others})"),
    )
