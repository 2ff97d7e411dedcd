"""The registry, and losses of other packages found through entry points."""

import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

from distill import KLLoss, LogitLoss, _registry, create_loss, get_loss, list_losses, register_loss


class Plain(nn.Module):
    def forward(self, student, teacher, target=None, *, mask=None):
        return (student - teacher).abs().mean()


def test_creates_by_name_with_arguments():
    assert type(create_loss("logit")) is LogitLoss
    loss = create_loss("kl", 2.0, reduction="sum")
    assert type(loss) is KLLoss
    assert (loss.temperature, loss.reduction) == (2.0, "sum")


def test_finds_the_class_of_a_name():
    assert get_loss("kl") is KLLoss
    with pytest.raises(KeyError, match=r"got 'logits'; did you mean 'logit'\? Known: .*kl, .*logit"):
        get_loss("logits")


def test_lists_names_sorted():
    assert list_losses() == sorted(list_losses())
    assert {"kl", "logit"} <= set(list_losses())


def test_register_returns_the_class_and_makes_it_known():
    assert register_loss("plain")(Plain) is Plain
    assert "plain" in list_losses()
    assert type(create_loss("plain")) is Plain


def test_defining_a_class_again_replaces_it():
    first = register_loss("plain")(type("Mine", (Plain,), {"__module__": "notebook", "__qualname__": "Mine"}))
    second = register_loss("plain")(type("Mine", (Plain,), {"__module__": "notebook", "__qualname__": "Mine"}))
    assert first is not second
    assert type(create_loss("plain")) is second


def test_rejects_a_name_that_is_taken():
    match = r"unique, got 'kl' for .*\.Plain: distill\.losses\.kl\.KLLoss has it already"
    with pytest.raises(ValueError, match=match):
        register_loss("kl")(Plain)
    assert type(create_loss("kl")) is KLLoss


@pytest.mark.parametrize("name", ["", "KL", "my-loss", "1st", "a b", "kl\n", "distill.kl"])
def test_rejects_malformed_names(name):
    with pytest.raises(ValueError, match="lower-case letters, digits and underscores, first a letter, got "):
        register_loss(name)


@pytest.mark.parametrize("thing", [torch.nn.functional.mse_loss, LogitLoss(), int])
def test_rejects_what_is_no_module_class(thing):
    with pytest.raises(ValueError, match=r"register_loss\('thing'\) must decorate an nn.Module class, got "):
        register_loss("thing")(thing)
    assert "thing" not in list_losses()


def test_rejects_unknown_names_with_the_nearest_and_the_list():
    with pytest.raises(KeyError, match=r"got 'logits'; did you mean 'logit'\? Known: .*kl, .*logit"):
        create_loss("logits")
    with pytest.raises(KeyError, match=r"got 'KL'; did you mean 'kl'\?"):
        create_loss("KL")
    for name in ("KLLoss", "kl_loss"):
        with pytest.raises(KeyError, match=f"got '{name}'; did you mean 'kl'\\?"):
            create_loss(name)
    with pytest.raises(KeyError, match=r"got 'kd'\. Known: "):  # too short to be meant for skd
        create_loss("kd")
    with pytest.raises(KeyError, match=r"got 'zzz'\. Known: "):
        create_loss("zzz")


# The packages below are real: modules on the path, with the metadata that an installer would have written.


def install(site: Path, package: str, source: str, *points: str) -> None:
    (site / f"{package}.py").write_text(textwrap.dedent(source))
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distill.losses]\n" + "\n".join(points) + "\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in ("acme_losses", "other_losses"):
        sys.modules.pop(module, None)


ACME = """
    from torch import nn

    class Manhattan(nn.Module):
        def __init__(self, scale=1.0):
            super().__init__()
            self.scale = scale

        def forward(self, student, teacher, target=None, *, mask=None):
            return self.scale * (student - teacher.detach()).abs().mean()
"""


def test_entry_point_is_listed_unimported_and_created(site):
    install(site, "acme_losses", ACME, "manhattan = acme_losses:Manhattan", "broken = acme_losses_missing:Loss")
    assert {"manhattan", "broken"} <= set(list_losses())
    create_loss("kl")
    assert "acme_losses" not in sys.modules
    loss = create_loss("manhattan", scale=2.0)
    assert get_loss("manhattan") is type(loss)
    assert loss(torch.ones(2, 3), torch.zeros(2, 3)) == 2
    assert type(create_loss("manhattan")) is type(loss)


def test_entry_point_whose_module_registers_too(site):
    source = ACME.replace(
        "class Manhattan", "import distill\n\n    @distill.register_loss('manhattan')\n    class Manhattan"
    )
    install(site, "acme_losses", source, "manhattan = acme_losses:Manhattan")
    assert type(create_loss("manhattan")).__name__ == "Manhattan"


def test_registered_name_comes_before_an_entry_point(site):
    install(site, "acme_losses", ACME, "kl = acme_losses:Manhattan")
    assert type(create_loss("kl")) is KLLoss
    assert list_losses().count("kl") == 1
    assert "acme_losses" not in sys.modules


def test_rejects_an_entry_point_that_cannot_be_imported(site):
    install(site, "acme_losses", ACME, "gone = acme_losses_missing:Loss", "moved = acme_losses:Euclid")
    with pytest.raises(
        ImportError, match=r"'gone' of acme_losses_missing:Loss \(package acme_losses\) cannot be impor"
    ):
        create_loss("gone")
    with pytest.raises(ImportError, match=r"'moved' of acme_losses:Euclid .*has no attribute 'Euclid'"):
        create_loss("moved")


@pytest.mark.parametrize("metadata", ["is there", "missing", "in another encoding", "of nobody"])
def test_the_package_of_a_broken_entry_point_is_named_if_its_metadata_tell(site, monkeypatch, metadata):
    install(site, "acme_losses", ACME, "gone = acme_losses_missing:Loss")
    file = site / "acme_losses-1.0.dist-info/METADATA"
    if metadata == "missing":
        file.unlink()
    elif metadata == "in another encoding":
        file.write_bytes(b"Name: acme_losses\xff\n")
    elif metadata == "of nobody":
        point = EntryPoint("gone", "acme_losses_missing:Loss", "distill.losses")
        monkeypatch.setattr(_registry, "entry_points", lambda group: [point])
    package = "acme_losses" if metadata == "is there" else "unknown"
    with pytest.raises(ImportError, match=rf"'gone' of acme_losses_missing:Loss \(package {package}\) cannot be impor"):
        create_loss("gone")


def test_rejects_an_entry_point_that_is_no_module_class(site):
    install(site, "acme_losses", "number = 3", "number = acme_losses:number")
    with pytest.raises(ValueError, match="must decorate an nn.Module class, got 3"):
        create_loss("number")


def test_rejects_two_packages_with_one_name(site):
    install(site, "acme_losses", ACME, "manhattan = acme_losses:Manhattan")
    install(site, "other_losses", ACME, "manhattan = other_losses:Manhattan")
    with pytest.raises(ValueError, match=r"unique, got 'manhattan' from .*acme_losses:Manh.* and .*:Manh"):
        create_loss("manhattan")


@pytest.mark.parametrize("source", ["raise RuntimeError('mine')", "1 / 0", "import sys; sys.exit(3)", "def ("])
def test_a_package_that_raises_anything_breaks_its_own_name_only(site, source):
    install(site, "acme_losses", source, "manhattan = acme_losses:Manhattan")
    install(site, "other_losses", ACME, "city_block = other_losses:Manhattan")
    assert {"manhattan", "city_block"} <= set(list_losses())
    with pytest.raises(ImportError, match=r"'manhattan' of acme_losses:Manhattan \(package acme_losses\) cannot"):
        create_loss("manhattan")
    assert type(create_loss("city_block")).__name__ == "Manhattan"


def test_names_that_cannot_be_created_are_not_listed(site):
    install(site, "acme_losses", ACME, "My-Loss = acme_losses:Manhattan", "manhattan = acme_losses:Manhattan")
    install(site, "other_losses", ACME, "manhattan = other_losses:Manhattan", "city_block = other_losses:Manhattan")
    assert not {"My-Loss", "manhattan"} & set(list_losses())
    assert "city_block" in list_losses()
    with pytest.raises(KeyError, match="got 'My-Loss'"):
        create_loss("My-Loss")


@pytest.mark.parametrize("content", [b"[distill.losses]\nno value\n", b"\xff\xfe\x00", b"nothing = before:a_section\n"])
def test_metadata_that_cannot_be_read_hide_their_own_package_only(site, content):
    install(site, "acme_losses", ACME, "manhattan = acme_losses:Manhattan")
    (site / "acme_losses-1.0.dist-info" / "entry_points.txt").write_bytes(content)
    install(site, "other_losses", ACME, "city_block = other_losses:Manhattan")
    assert {"kl", "city_block"} <= set(list_losses())
    assert "manhattan" not in list_losses()
    assert type(create_loss("city_block")).__name__ == "Manhattan"
    with pytest.raises(KeyError, match="must be a registered one, got 'manhattan'"):
        create_loss("manhattan")


def test_entry_points_are_not_consulted_at_import(site, fresh):
    install(site, "acme_losses", "raise RuntimeError('imported')", "manhattan = acme_losses:Manhattan")
    code = (
        "import sys\n"
        "import importlib.metadata as m\n"
        "def consulted(*a, **k): raise RuntimeError('consulted')\n"
        "m.entry_points = m.distributions = consulted\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import distill\n"
        "distill.create_loss('logit')\n"
    )
    fresh.run(code, str(site))
