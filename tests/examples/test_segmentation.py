"""The example of segmentation: what has no label counts nowhere."""

import pytest
import torch

pytest.importorskip("sklearn")

import segmentation
from scenes import CLASSES, IGNORED, Segmenter, scenes


def test_pixels_without_a_label_get_a_gradient_of_exactly_0():
    x, labels, _ = scenes(2, seed=3, side=32, digits=1)
    labels[1, :8] = IGNORED
    student = Segmenter(2)
    distiller = segmentation.distil(student, Segmenter(3))
    kept = {}

    def keep(module, inputs, result):
        kept.update({name: maps.requires_grad_() for name, maps in result.items()})
        for maps in kept.values():
            maps.retain_grad()

    student.register_forward_hook(keep)
    known = labels != IGNORED
    out = distiller(x, labels, mask=known)
    out.loss.backward()
    assert set(out.terms) == {"task", "pixels", "channels", "aux"}
    assert all(value > 0 for value in out.terms.values())
    for maps in kept.values():
        slopes = maps.grad.movedim(1, -1)
        assert (slopes[~known] == 0).all()
        assert (slopes[known] != 0).all()
    for name, loss in out.losses.items():  # each term by itself depends on known pixels alone
        spoilt = {key: maps.detach().masked_fill(~known.unsqueeze(1), 7.0) for key, maps in kept.items()}
        again = segmentation.distil(Fixed(spoilt), Fixed({k: m.detach() for k, m in out.teacher.items()})).eval()
        torch.testing.assert_close(again(x, labels, mask=known).terms[name], loss.detach())


class Fixed(torch.nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result


def test_the_command_compares_students(monkeypatch, capsys):
    small, train = scenes, segmentation.train
    monkeypatch.setattr(segmentation, "scenes", lambda count, seed: small(4, seed, side=32, digits=1))
    monkeypatch.setattr(segmentation, "train", lambda *args, **options: train(*args, **{**options, "steps": 2}))
    segmentation.main()
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["teacher", "students alone", "students taught"]


def test_mean_iou_of_known_pixels():
    labels = torch.arange(CLASSES).repeat(1, 4, 2)
    labels[0, 0, :3] = IGNORED
    right = torch.nn.functional.one_hot(labels.masked_fill(labels == IGNORED, 0), CLASSES).movedim(-1, 1).float()
    assert segmentation.mean_iou(lambda x: {"out": right}, labels, labels) == 100
    wrong = right.roll(1, 1)
    assert segmentation.mean_iou(lambda x: {"out": wrong}, labels, labels) == 0


def test_scenes_say_where_the_digits_are():
    pictures, pixels, targets = scenes(3, seed=0, digits=2)
    assert pictures.shape == (3, 3, 64, 64)
    assert set(pixels.unique().tolist()) <= {*range(CLASSES), IGNORED}
    for shown, target in zip(pixels, targets, strict=True):
        for (x1, y1, x2, y2), label in zip(target["boxes"].int().tolist(), target["labels"].tolist(), strict=True):
            inside = shown[y1:y2, x1:x2]
            assert set(inside.unique().tolist()) == {0, label, IGNORED}
        assert (shown > 0).sum() == sum((shown[y1:y2, x1:x2] > 0).sum() for x1, y1, x2, y2 in target["boxes"].int())
