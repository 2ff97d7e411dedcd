"""The language model example on a handful of lines: it trains all models and saves the taught student."""

import math
import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import LlamaForCausalLM

import causal_lm
from distill import next_tokens

LINES = "".join(f"line {number} of a text that repeats itself over and over\n" for number in range(1600))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(LINES)
    return tmp_path / "text.txt"


@pytest.fixture
def short(monkeypatch):
    """Few steps of tiny models, measured on few rows."""
    llama, train, read = causal_lm.llama, causal_lm.train, causal_lm.read
    monkeypatch.setattr(causal_lm, "llama", lambda width, layers, seed: llama(width // 8, 1, seed))
    monkeypatch.setattr(causal_lm, "train", lambda *args, **options: train(*args, **{**options, "steps": 12}))
    monkeypatch.setattr(causal_lm, "read", lambda path: (read(path)[0][:20], read(path)[1]))


def test_the_command_trains_a_teacher_and_three_students_and_saves_the_taught_one(text, tmp_path, capsys, short):
    causal_lm.main(["--text", str(text), "--out", str(tmp_path / "out")])
    said = dict(re.findall(r"^(.+): ([\d.]+) bits per byte$", capsys.readouterr().out, re.MULTILINE))
    assert list(said) == ["teacher", *causal_lm.STUDENTS]
    assert said["student alone"] != said["student with the teacher"]
    held, _ = causal_lm.read(text)
    saved = causal_lm.bits_per_byte(LlamaForCausalLM.from_pretrained(tmp_path / "out"), held)
    assert saved == pytest.approx(float(said["student with the teacher"]), abs=1e-3)
    assert saved < 8


def test_rows_are_the_bytes_of_the_file_in_their_order(text):
    held, rows = causal_lm.read(text)
    assert len(held) == 500
    assert bytes(torch.cat([held, rows]).flatten().tolist()) == LINES.encode()[: (500 + len(rows)) * 128]


def test_bits_per_byte_are_those_of_the_formula():
    model = causal_lm.llama(16, 1, seed=0).eval()
    rows = torch.randint(256, (70, 8), generator=torch.Generator().manual_seed(0))
    target, mask = next_tokens(rows)
    log_probs = model(input_ids=rows).logits.double().log_softmax(-1)
    expected = -log_probs.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)[mask].mean() / math.log(2)
    assert causal_lm.bits_per_byte(model, rows) == pytest.approx(expected.item(), rel=1e-5)
