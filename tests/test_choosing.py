"""The page for choosing: each loss has its row, names are names, and the recipes do what they say."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import distill
from distill.losses._base import BatchLoss

PAGE = (Path(__file__).parents[1] / "docs/choosing.md").read_text()
PROSE = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
OURS = [name for name in distill.list_losses() if distill.get_loss(name).__module__.startswith("distill.losses.")]


def test_every_loss_has_one_row():
    tables = re.findall(r"^\| loss \| take it when \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = [name for table in tables for name in re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)]
    assert sorted(rows) == sorted(OURS)


def test_names_only_what_there_is():
    named = set(re.findall(r"`([a-z_]+)`", PROSE))
    assert named <= {*OURS, *distill.__all__}


def test_says_which_losses_take_a_top_k():
    (sentence,) = re.findall(r"where the teacher's logits go, in (.*?)\.", PROSE, re.DOTALL)
    takes = {name for name in OURS if getattr(getattr(distill.get_loss(name), "rows", None), "topk", False)}
    assert set(re.findall(r"`(\w+)`", sentence)) == takes


def test_says_which_losses_are_of_a_whole_batch():
    (sentence,) = re.findall(r"One value for the whole batch:\*\* (.*?) have a mask", PROSE, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == {
        name for name in OURS if issubclass(distill.get_loss(name), BatchLoss)
    }


@pytest.fixture(scope="module")
def names():
    """What the page's code leaves."""
    found = {"__name__": "page"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
            exec(block, found)
    return found


def test_recipes_are_the_formulas_that_they_name(names):
    student, teacher, images, labels = (names[name] for name in ("student", "teacher", "images", "labels"))
    ours, theirs = student[0](images), teacher[0](images).detach()
    # CAT-KD: the mean of a class's map is its logit.
    maps = names["class_maps"](teacher[3])(theirs)
    torch.testing.assert_close(maps.mean((2, 3)), teacher(images))
    # SimKD: the mean squared error of all elements, and the teacher's classifier behind the projector.
    teacher.eval()
    with torch.no_grad():
        wanted = F.mse_loss(names["projector"](ours), teacher[0](images))
        torch.testing.assert_close(names["simkd"](images).loss, wanted)
        assert names["deployed"].eval()(images).shape == (4, 10)
    # SRRL: nothing of the teacher is trained, and its logits are those of the copy.
    torch.testing.assert_close(names["reused"](teacher[:3](images)), teacher(images))
    assert not any(parameter.requires_grad for parameter in names["reused"].parameters())
    # Standardised logits: `logit_std` is the same before `kl`.
    logits = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    standardised = [names["standardise"](side) for side in logits]
    torch.testing.assert_close(distill.kl_loss(*standardised, temperature=2.0), distill.logit_std_loss(*logits))
    # ViTKD: the weights are those of sums over tokens and channels.
    term = names["vitkd"]["block0"]
    tokens = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(1))
    target = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(2))
    of_sums = 3e-5 * F.mse_loss(term.loss.regressor(tokens), target, reduction="sum") / 4
    torch.testing.assert_close(term.weight * term.loss(tokens, target), of_sums)
    assert term.loss(tokens, target, labels) > 0
