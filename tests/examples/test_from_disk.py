"""The example of stored teachers on tiny models: from the disk a student ends with the weights that it has live."""

import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import causal_lm
import from_disk
from language_models import write_encoder

WORDS = ["ba", "ce", "di", "fo", "gu", "hy"]
LINES = [" ".join(WORDS[number % 4 : 3 + number % 5]) for number in range(60)]


@pytest.fixture
def data(tmp_path):
    write_encoder(tmp_path / "all-MiniLM-L6-v2", WORDS)
    (tmp_path / "dictionary.txt").write_text("\n".join(LINES * 200))
    return tmp_path


def weights(said):
    return re.findall(r"^(\w+): .*[\d.]+.* weights (\w{32})$", said, re.MULTILINE)


def test_an_encoder_from_stored_vectors_has_the_weights_of_one_from_live_vectors(data, capsys, monkeypatch):
    (data / "dictionary.txt").write_text("\n".join(LINES))
    from_disk.encoder(data, data / "out", held=40)
    (live, first), (stored, second) = weights(capsys.readouterr().out)
    assert (live, stored, first) == ("live", "stored", second)
    monkeypatch.setattr(from_disk, "train", lambda *args: None)
    from_disk.encoder(data, data / "out", held=40)  # a second time: the vectors are there


def test_a_language_model_from_stored_hidden_states_has_the_weights_of_one_from_the_live_teacher(
    data, capsys, monkeypatch
):
    llama = causal_lm.llama
    monkeypatch.setattr(causal_lm, "llama", lambda width, layers, seed: llama(width // 8, 1, seed))
    monkeypatch.setattr(causal_lm, "bits_per_byte", lambda model, rows: 8.0)
    with monkeypatch.context() as stopped:  # after the first rows
        stopped.setattr(from_disk, "train_language", lambda *args: llama(16, 1, 0))
        from_disk.language(data, data / "out", steps=2, few=8)
    capsys.readouterr()
    from_disk.language(data, data / "out", steps=2, few=12)
    (live, first), (stored, second) = weights(capsys.readouterr().out)
    assert (live, stored, first) == ("live", "stored", second)
