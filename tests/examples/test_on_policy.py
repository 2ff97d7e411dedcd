"""The on-policy example: a short run, in which the student gets better on its own text."""

import pytest

pytest.importorskip("transformers")

import on_policy


def test_a_short_run_brings_the_student_nearer_to_the_teacher(capsys, monkeypatch):
    monkeypatch.setattr(on_policy, "DIGITS", 2)
    monkeypatch.setattr(on_policy, "PROMPT", on_policy.PROMPT[:3])
    result = on_policy.main(["--steps", "60"])
    assert result["teacher"] > 0.5
    assert result["student after"] > result["student before"] + 0.1
    assert "student after" in capsys.readouterr().out
