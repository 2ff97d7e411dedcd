"""The example of balanced weights: it runs, and half of the gradient is what a calibrated loss starts with."""

import re

import pytest

pytest.importorskip("sklearn")

import balance


def test_the_command_shows_both_weights_of_a_loss(monkeypatch, capsys):
    monkeypatch.setattr(balance, "TERMS", {"at": balance.TERMS["at"]})
    balance.main(["--seeds", "1", "--epochs", "1"])
    alone, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"0  alone +\d+\.\d %  ", alone)
    found = [re.fullmatch(r"0  at +(\w+) +\d+\.\d %  weight +(\S+), (\S+) of the gradient", line) for line in lines]
    (kind, weight, share), (other, less, half) = (match.groups() for match in found)
    assert (kind, float(weight), other) == ("published", 1000.0, "calibrated")
    assert float(share) > 0.95
    assert 0.3 < float(half) < 0.7
    assert float(less) < 100
