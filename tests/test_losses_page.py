"""What the pages say of each loss comes from the registry and the docstrings, and leaves none out."""

import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

import distill
import losses_page
from distill import _registry

ROOT = Path(__file__).parents[1]


def page(name):
    return SimpleNamespace(file=SimpleNamespace(src_uri=name))


def rows():
    return dict(re.findall(r"^\| \[`(\w+)`\]\[distill\.(\w+)\] \| `loss = .* \|$", losses_page.render(), re.MULTILINE))


def test_the_page_has_the_mark_once_and_mkdocs_the_hook():
    text = (ROOT / "docs/losses.md").read_text()
    assert text.count(losses_page.MARK) == 1
    assert "\nhooks: [docs/losses_page.py]\n" in (ROOT / "mkdocs.yml").read_text()
    written = losses_page.on_page_markdown(text, page=page("losses.md"), config=None, files=None)
    assert written == text.replace(losses_page.MARK, losses_page.render())
    assert losses_page.on_page_markdown(text, page=page("why.md"), config=None, files=None) == text


def test_every_loss_has_its_row_and_every_public_name_its_entry():
    assert set(rows()) == {name for name, cls in _registry._registered.items() if cls.__module__.startswith("distill.")}
    for name, cls in rows().items():
        assert getattr(distill, cls) is _registry._registered[name]
    shown = re.findall(r"^::: distill\.(\w+)$", losses_page.render(), re.MULTILINE)
    homes = {name: getattr(getattr(distill, name), "__module__", "") for name in distill.__all__}
    assert sorted(shown) == sorted(name for name, home in homes.items() if home.startswith("distill.losses."))


def test_a_row_says_what_the_docstrings_say():
    text = losses_page.render()
    assert (
        "| [`kl`][distill.KLLoss] | `loss = T^2 * KL(p || q) = T^2 * sum_c p_c (log p_c - log q_c)` "
        "| *student:* The student's logits, `(..., C)`; -inf is a probability of 0"
        "<br>*teacher:* The teacher's logits, same shape; -inf is a probability of 0 "
        "| weight 0.9 at temperature 4, beside 0.1 times the cross-entropy (the CIFAR-100 benchmark of Tian, Krishnan "
        'and Isola, "Contrastive Representation Distillation", ICLR 2020)'
        "<br>*Scale:* `distiller_zoo/KD.py` of that benchmark (`HobbitLong/RepDistiller`): T^2 times the sum over the "
        "classes, averaged over the samples<br>*Doubt:* none known "
        '| Geoffrey Hinton, Oriol Vinyals and Jeff Dean, "Distilling the Knowledge in a Neural Network", NIPS deep '
        "learning workshop 2014 and [arXiv 1503.02531](https://arxiv.org/abs/1503.02531) (2015) |\n"
    ) in text
    assert re.search(r"<br>\*target:\* The class of every sample, .* \| weight 1 beside the cross-entropy", text)
    assert "q_c^(alpha + beta) - p_c^alpha q_c^beta]` |" in text  # a formula of more than one line
    assert "published" not in text.split("| [`crd`]")[1].splitlines()[0]  # found in the class's docstring
    assert "weight 0.8 on pooled features" in text.split("| [`crd`]")[1].splitlines()[0]


def test_every_loss_says_which_file_fixed_its_scale_and_what_is_not_certain():
    lines = {name: line for line in losses_page.render().splitlines() for name in re.findall(r"^\| \[`(\w+)`\]", line)}
    silent = {name for name, line in lines.items() if not re.search(r"<br>\*Scale:\* .+<br>\*Doubt:\* .+ \|", line)}
    assert lines.keys() == rows().keys()
    assert not silent
    for name, line in lines.items():
        assert len(re.sub(r"`[^`]*`", "", line).split("|")) == 7, name  # five cells: no stray bar ends one


def test_says_nothing_twice():
    text = (ROOT / "docs/losses.md").read_text().replace(losses_page.MARK, losses_page.render())
    for kind in (r"^## .+", r"^::: .+", r"^- \*\*\w+\.?\*\*"):
        found = re.findall(kind, text, re.MULTILINE)
        assert sorted(set(found)) == sorted(found)


def test_changes_with_the_docstring(monkeypatch):
    monkeypatch.setattr(distill.sp_loss, "__doc__", distill.sp_loss.__doc__.replace("weight 3000", "weight 3"))
    assert "weight 3 on the last feature maps" in losses_page.render()


def test_a_loss_stands_in_the_family_that_its_file_names():
    sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", losses_page.render() + "\n", re.MULTILINE))
    assert list(sections) == [title for title, _ in losses_page.FAMILIES.values()]
    for name, cls in _registry._registered.items():
        title, _ = losses_page.FAMILIES[sys.modules[cls.__module__].FAMILY]
        assert f"\n| [`{name}`]" in sections[title]


@pytest.mark.parametrize("family", ["relation", None])
def test_refuses_a_loss_without_a_known_family(family, monkeypatch):
    monkeypatch.setattr(sys.modules["distill.losses.sp"], "FAMILY", family)
    with pytest.raises(ValueError, match=rf"FAMILY in the file of 'sp' must be one of logits, .*, got {family!r}"):
        losses_page.render()


def test_what_a_class_takes_is_said_by_its_method_where_that_differs_from_the_function():
    class NewLoss(nn.Module):
        def per_sample(self, student, teacher, target):
            """Compute the loss.

            Args:
                student: The student's maps. More about them.
                teacher: The teacher's
                    maps.
                target: Not used.
            """

    function = inspect.getdoc(distill.wsld_loss)
    assert losses_page._inputs(NewLoss, function) == {"student": "The student's maps", "teacher": "The teacher's maps"}
    NewLoss.per_sample.__doc__ = "One value per sample."
    assert list(losses_page._inputs(NewLoss, function)) == ["student", "teacher", "target"]


def test_losses_of_other_packages_are_left_out():
    @distill.register_loss("from_elsewhere")
    class ElsewhereLoss(nn.Module):
        pass

    assert "from_elsewhere" not in losses_page.render()


def test_refuses_a_docstring_without_the_section(monkeypatch):
    monkeypatch.setattr(distill.sp_loss, "__doc__", distill.sp_loss.__doc__.replace("Reference:", "See:"))
    with pytest.raises(ValueError, match="a docstring must have the section 'Reference', got:"):
        losses_page.render()


def test_the_page_for_choosing_names_only_losses():
    text = (ROOT / "docs/choosing.md").read_text()
    named = set(re.findall(r"`([a-z_]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))
    assert named
    assert named <= set(distill.list_losses())
