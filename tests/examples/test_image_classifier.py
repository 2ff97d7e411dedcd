"""The example of an image classifier: it reads a folder, and the teacher counts."""

import pytest
import torch

import image_classifier
from image_classifier import fit, load

pytest.importorskip("PIL")
from PIL import Image


def test_reads_a_folder_of_pictures_with_a_subfolder_for_each_class(tmp_path):
    for kind, shade in (("bright", 250), ("dark", 5)):
        (tmp_path / kind).mkdir()
        for number in range(3):
            Image.new("RGB", (40, 30), (shade, shade, number)).save(tmp_path / kind / f"{number}.png")
    for hidden in (tmp_path, tmp_path / "dark"):
        (hidden / ".DS_Store").write_text("of macOS")
    pictures, labels = load(tmp_path)
    assert pictures.shape == (6, 3, 32, 32)
    assert pictures.mean().item() == pytest.approx(0, abs=1e-5)
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert ((pictures[:, 0].mean((1, 2)) > 0) == (labels == 0)).all()  # "bright" is the first by name


def test_a_folder_without_classes_is_refused(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "train/cat/0.png")
    for folder in (tmp_path, tmp_path / "train", tmp_path / "none"):
        with pytest.raises(SystemExit, match="must have a subfolder of pictures for each class, two or more"):
            load(folder)


def test_a_student_of_a_teacher_that_is_always_wrong_is_wrong_too():
    y = torch.arange(64) % 2
    x = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)) + 4.0 * (y - 0.5).view(-1, 1, 1, 1)

    class Wrong(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot((x.mean((1, 2, 3)) <= 0).long(), 2) * 40.0

    alone, taught = (fit(2, 2, x, y, seed=0, epochs=20, teacher=teacher).train() for teacher in (None, Wrong()))
    assert (alone(x).argmax(1) == y).float().mean() > 0.8
    assert (taught(x).argmax(1) == y).float().mean() < 0.2


def run(monkeypatch, capsys, x, y):
    monkeypatch.setattr(image_classifier, "load", lambda folder: (x, y))
    monkeypatch.setattr(image_classifier, "fit", lambda *args, epochs, **more: fit(*args, epochs=2, **more))
    image_classifier.main([])
    return [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]


def test_the_command_says_how_many_each_gets_right(monkeypatch, capsys):
    said = run(monkeypatch, capsys, torch.randn(16, 1, 4, 4), torch.arange(16) % 2)
    assert said == ["teacher", "students alone", "students taught"]


def test_a_class_may_be_missing_from_the_pictures_that_the_student_sees(monkeypatch, capsys):
    y = torch.arange(280) % 2
    y[275:] = 2  # the student has 70 to 269
    assert len(run(monkeypatch, capsys, torch.randn(280, 1, 4, 4), y)) == 3
