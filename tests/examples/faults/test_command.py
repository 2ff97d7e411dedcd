"""The command itself: where it prints, losses that others wrote, and options that cannot be."""

import errno
import functools
import re
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

import cifar_resnet
from campaign.lines import bad_lines
from distill import _registry


def test_output_that_nobody_reads_ends_the_command_quietly(monkeypatch, capsys):
    def broken(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    closed = []
    monkeypatch.setattr(cifar_resnet, "_run", broken)
    monkeypatch.setattr(cifar_resnet.os, "dup2", lambda *pair: closed.append(pair[1]))
    assert cifar_resnet.main([]) == 141
    assert closed == [1]
    assert capsys.readouterr().err == "Stopped: nobody reads the output any more. The same command goes on.\n"


def test_a_terminal_that_lacks_a_sign_gets_another(monkeypatch, tmp_path):
    screen = (tmp_path / "screen").open("w", encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(cifar_resnet, "_run", lambda *_: screen.write("91.60 \u00b1 1.35\n") and 0)
    assert cifar_resnet.main([]) == 0
    screen.close()
    assert (tmp_path / "screen").read_text() == "91.60 ? 1.35\n"


class Broken(torch.nn.Module):
    """A loss that raises what nobody expects."""

    def __init__(self, where="build"):
        super().__init__()
        if where == "build":
            raise RuntimeError("no such thing")

    def forward(self, student, teacher, target=None):
        raise ZeroDivisionError("no such thing")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Broken, r"--loss: 'broken' cannot be built without arguments: no such thing"),
        (
            functools.partial(Broken, "forward"),
            r"--loss broken at logits does not work here: term 'broken': no such thing",
        ),
        (None, r"--loss: the loss 'broken' of broken_package:Loss \(package .*\) cannot be imported: .*no such thing"),
    ],
)
def test_a_loss_of_others_that_raises_anything_is_named(monkeypatch, capsys, tmp_path, loss, message):
    if loss is not None:
        monkeypatch.setitem(_registry._registered, "broken", loss)
    else:
        (tmp_path / "broken_package.py").write_text("raise RuntimeError('no such thing')")
        monkeypatch.syspath_prepend(tmp_path)
        point = EntryPoint("broken", "broken_package:Loss", "distill.losses")
        monkeypatch.setattr(_registry, "entry_points", lambda **_: [point])
    with pytest.raises(SystemExit) as stopped:
        cifar_resnet.main(["--student", "8", "--teacher", "8", "--out", str(tmp_path / "runs"), "--loss", "broken"])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs" / "weights").exists()
    with pytest.raises(SystemExit) as stopped:
        cifar_resnet.main(["--help"])
    assert stopped.value.code == 0
    assert "broken" in capsys.readouterr().out


def test_command_lines_that_cannot_be_run_are_refused_by_name(tmp_path):
    assert list(bad_lines(12, tmp_path)) == [{"refused by name": 1}] * 12
