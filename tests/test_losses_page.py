"""What the pages say of each loss comes from the registry and the docstrings, and leaves none out."""

import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

import conf
import distill
import family_tree
import losses_page
from distill import _registry

ROOT = Path(__file__).parents[1]
FAMILY_PAGES = sorted((ROOT / "docs/losses").glob("*.md"))
OURS = {name: cls for name, cls in _registry._registered.items() if cls.__module__.startswith("distill.losses.")}


def rows():
    return dict(re.findall(r"^\| \{py:obj\}`(\w+) <distill\.(\w+)>` \| .* \|$", losses_page.table(), re.MULTILINE))


def doc_of(name):
    return f"{inspect.getdoc(getattr(distill, f'{name}_loss'))}\n\n{inspect.getdoc(OURS[name])}"


def test_every_loss_has_its_row_and_every_public_name_its_entry():
    assert rows() == {name: cls.__name__ for name, cls in OURS.items()}
    pages = "\n".join(losses_page.fill(page.read_text()) for page in FAMILY_PAGES)
    shown = re.findall(r"^\.\. auto(\w+):: distill\.(\w+)$", pages, re.MULTILINE)
    homes = ((name, getattr(getattr(distill, name), "__module__", "")) for name in distill.__all__)
    of_losses = [name for name, home in homes if home.startswith("distill.losses.")]
    assert sorted(name for _, name in shown) == sorted(of_losses)
    assert all(kind == ("class" if name[0].isupper() else "function") for kind, name in shown)
    assert sorted(re.findall(r"^## (\w+)$", pages, re.MULTILINE)) == sorted(OURS)


def test_a_row_says_what_the_docstrings_say():
    text = losses_page.table()
    assert (
        "| {py:obj}`kl <distill.KLLoss>` "
        f"| {inspect.getdoc(distill.kl_loss).partition(', one value per sample.')[0]} |  |\n"
    ) in text
    assert re.search(r"^\| \{py:obj\}`dkd <distill\.DKDLoss>` \| .* \| yes \|$", text, re.MULTILINE)
    assert not re.search(r"one value (per|for)", text)


def test_every_loss_says_its_formula_its_paper_and_whose_scale_it_has():
    for said in (r"^    loss = ", r"^    Scale: ", r"^Reference:$"):
        silent = [name for name in OURS if not re.search(said, doc_of(name), re.MULTILINE)]
        assert not silent, said


def test_changes_with_the_docstring(monkeypatch):
    monkeypatch.setattr(distill.sp_loss, "__doc__", "Another | line.\n")
    assert r"| {py:obj}`sp <distill.SPLoss>` | Another \| line |  |" in losses_page.table()


def test_a_loss_stands_in_the_family_that_its_file_names():
    families = losses_page.families()
    assert {page for page, _ in families.values()} == {f"losses/{page.stem}" for page in FAMILY_PAGES}
    section = re.compile(r"^### \[.+\]\((.+)\.md\)\n((?:(?!### ).*\n)*)", re.MULTILINE)
    sections = dict(section.findall(losses_page.table() + "\n"))
    assert list(sections) == [page for page, _ in families.values()]  # the navigation's order
    for name, cls in OURS.items():
        word = sys.modules[cls.__module__].FAMILY
        page, title = families[word]
        assert f"| {{py:obj}}`{name} <" in sections[page]
        assert f"# {title}\n" in (ROOT / f"docs/{page}.md").read_text()
        assert f"\n## {name}\n" in losses_page.fill((ROOT / f"docs/{page}.md").read_text())


@pytest.mark.parametrize("family", ["relation", None])
def test_refuses_a_loss_without_a_known_family(family, monkeypatch):
    monkeypatch.setattr(sys.modules["distill.losses.sp"], "FAMILY", family)
    with pytest.raises(ValueError, match=rf"FAMILY in the file of 'sp' must be one of divergences, .*, got {family!r}"):
        losses_page.table()


def test_what_a_class_takes_is_said_by_its_method_where_that_differs_from_the_function():
    class NewLoss(nn.Module):
        def per_sample(self, student, teacher, target):
            """Compute the loss.

            Args:
                student: The student's maps.
                target: Not used.
            """

    function = inspect.getdoc(distill.wsld_loss)
    assert not losses_page._reads_target(NewLoss, function)
    NewLoss.per_sample.__doc__ = "One value per sample."
    assert losses_page._reads_target(NewLoss, function)


def test_losses_of_other_packages_are_left_out():
    @distill.register_loss("from_elsewhere")
    class ElsewhereLoss(nn.Module):
        pass

    assert "from_elsewhere" not in losses_page.table()


def test_the_list_of_names_has_every_name_once():
    listed = re.findall(r"^\| \{py:obj\}`(\w+) <distill\.\1>` \| \S.* \|$", losses_page.names(), re.MULTILINE)
    assert sorted(listed) == sorted(distill.__all__)
    assert losses_page.names() in losses_page.fill((ROOT / "docs/names.md").read_text())


def test_the_family_tree_has_every_loss_once_and_every_family():
    picture = family_tree.render(losses_page.members(), losses_page.families())
    assert "\n" not in picture  # one block of HTML in the Markdown
    names = re.findall(r'<a href="(losses/[\w-]+)\.html#([\w-]+)">(\w+)</a>', picture)
    assert sorted(name for *_, name in names) == sorted(OURS)
    for page, anchor, name in names:
        assert page == losses_page.families()[sys.modules[OURS[name].__module__].FAMILY][0]
        assert anchor == name.replace("_", "-")  # the heading's
    assert picture in losses_page.fill((ROOT / "docs/losses.md").read_text())
    members, families = (
        {**losses_page.members(), "new": ["kl"]},
        {**losses_page.families(), "new": ("losses/new", "new")},
    )
    assert ">new</div>" in family_tree.render(members, families)  # a branch of its own


def test_a_name_is_a_link_where_it_is_first_mentioned_under_a_heading():
    code, kl = "```python\n`LogitLoss`\n# `x`\n```", "{py:obj}`KLLoss <distill.KLLoss>`"
    text = f"`KLLoss` and `KLLoss`, `unknown`\n# `KLLoss`\n[`KLLoss`](why.md), `KLLoss`.\n{code}\n`KLLoss`"
    linked = f"{kl} and `KLLoss`, `unknown`\n# `KLLoss`\n[`KLLoss`](why.md), {kl}.\n{code}\n`KLLoss`"
    assert losses_page.link(text) == linked


def test_a_loss_at_the_start_of_a_row_is_a_link():
    rows, linked = "| `kl` | `dkd` |\n| `nothing` | x |", "| {py:obj}`kl <distill.KLLoss>` | `dkd` |\n| `nothing` | x |"
    head = "| loss | take it when |\n|---|---|\n"
    assert losses_page.link(head + rows) == head + linked
    assert losses_page.link(f"{head}\n{rows}") == f"{head}\n{rows}"  # another table, of another library's names


def test_sphinx_gets_formulas_as_they_are_written():
    lines = ["The loss.", "", "    a = |b|", "", "    c", "with |b| <= 1", ""]
    section = ["Args:", "    a: It.", "", "        Of b."]
    lines += section
    conf.mark_formulas(None, "function", "loss", None, None, lines)
    block = ["    a = |b|", "", "    c"]
    assert lines[:7] == ["The loss.", "", ".. code-block:: text", "", *block]
    assert lines[7:] == [r"with \|b| <= 1", "", *section]


def test_inventories_are_used_where_they_can_be_fetched(tmp_path, monkeypatch):
    (tmp_path / "objects.inv").write_bytes(b"torch's names")
    there, away = f"{tmp_path.as_uri()}/", f"{(tmp_path / 'away').as_uri()}/"
    monkeypatch.setattr(conf, "INVENTORIES", {"torch": there, "python": away})
    config = SimpleNamespace()
    conf.find_inventories(SimpleNamespace(doctreedir=tmp_path / "trees"), config)
    assert config.intersphinx_mapping == {"torch": (there, str(tmp_path / "trees/torch.inv"))}
    assert (tmp_path / "trees/torch.inv").read_bytes() == b"torch's names"
