"""The encoder example on a tiny random encoder: the student comes nearer, and is saved as from_pretrained wants it."""

import random
import re

import pytest
import torch

pytest.importorskip("transformers")

import sentence_encoder
from language_models import write_encoder
from sentence_encoder import Encoder, batches, embed, train

WORDS = [first + second for first in ("ba", "ce", "di", "fo", "gu") for second in ("l", "m", "n", "r")]
TEXTS = [" ".join(random.Random(seed).choices(WORDS, k=1 + seed % 4)) for seed in range(200)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of an encoder of three layers with random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    write_encoder(folder, WORDS)
    return folder


def test_the_command_trains_a_student_and_saves_it(teacher, tmp_path, capsys, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 6))  # 1000 are held out, 200 are trained with
    options = ["--teacher", str(teacher), "--text", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "student")]
    sentence_encoder.main(options)
    cosine = float(re.search(r"cosine to the teacher: ([\d.]+)", capsys.readouterr().out)[1])
    saved, whole = Encoder(tmp_path / "student"), Encoder(teacher)
    assert len(saved.transformer.encoder.layer) == saved.transformer.config.num_hidden_layers == 2
    again = (embed(saved, TEXTS) * embed(whole, TEXTS)).sum(1).mean().item()
    assert again == pytest.approx(cosine, abs=1e-3)


def test_training_brings_the_student_nearer_and_leaves_the_embeddings(teacher):
    whole, student = Encoder(teacher), Encoder(teacher)
    del student.transformer.encoder.layer[1:-1]
    wanted = embed(whole, TEXTS)
    before = (embed(student, TEXTS) * wanted).sum(1).mean()
    random.seed(0)
    train(student, TEXTS, lambda part: wanted[part], epochs=5)
    assert (embed(student, TEXTS) * wanted).sum(1).mean() > before + 0.5 * (1 - before)
    kept = zip(student.transformer.embeddings.parameters(), whole.transformer.embeddings.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in kept)


def test_vectors_are_in_the_order_of_the_texts_whatever_the_batches_and_the_padding(teacher):
    encoder = Encoder(teacher)
    alone = torch.cat([encoder([text]) for text in TEXTS[:9]]).detach()
    torch.testing.assert_close(embed(encoder, TEXTS)[:9], alone)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(9))


def test_batches_hold_every_text_once():
    cut = batches(TEXTS, size=16)
    assert sorted(number for part in cut for number in part) == list(range(len(TEXTS)))
    assert all(max(lengths) - min(lengths) <= 8 for part in cut if (lengths := [len(TEXTS[number]) for number in part]))
