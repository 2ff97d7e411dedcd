"""The example of a detector: four levels teach, and where the teacher is sure counts more."""

import pytest
import torch

pytest.importorskip("sklearn")

import detector
import scenes
from scenes import SmallDetector

torchvision = scenes.FasterRCNN


@pytest.fixture(params=["small", "torchvision"])
def build(request, monkeypatch):
    """Each kind of detector, as small as it can be."""
    if request.param == "small":
        monkeypatch.setattr(scenes, "FasterRCNN", None)
        return lambda large: SmallDetector(4 if large else 2)
    if torchvision is None:
        pytest.skip("torchvision is not installed")
    return lambda large: scenes.detector(large=large)


def data(count=2):
    images, _, targets = scenes.scenes(count, seed=5, digits=2)
    return [*images], targets


def test_each_level_teaches_and_the_positions_count_as_the_teacher_is_sure(build):
    torch.manual_seed(0)
    student, teacher = build(False), build(True)
    distiller = detector.distil(student, teacher)
    images, targets = data()
    out = distiller((images, targets))
    assert list(out.terms) == ["task", "level0", "level1", "level2", "level3"]
    assert out.terms["task"].item() == pytest.approx(sum(value.item() for value in out.student.values()))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in distiller.losses.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in student.backbone.parameters())

    level, weights = out.teacher[1]
    assert weights.shape == (len(images), *level.shape[2:])
    assert ((weights > 0) & (weights < 1)).all()
    seen = {}
    student.backbone.register_forward_hook(
        lambda module, inputs, levels: seen.update({k: m.detach() for k, m in levels.items()})
    )
    again = distiller((images, targets))
    student_map, (level, weights) = seen["1"], again.teacher[1]
    loss = distiller.losses["level1"]
    mapped = student_map if loss.regressor is None else loss.regressor(student_map.movedim(1, -1)).movedim(-1, 1)
    expected = (weights * (mapped - level).square().mean(1)).sum() / weights.sum()
    torch.testing.assert_close(again.terms["level1"], expected.detach())


def test_the_student_finds_objects_afterwards(build):
    student = build(False).eval()
    found = student(data(3)[0])
    assert len(found) == 3
    assert set(found[0]) == {"boxes", "labels", "scores"}


def test_the_command_compares_students(monkeypatch, capsys):
    draw, train = scenes.scenes, detector.train
    monkeypatch.setattr(scenes, "FasterRCNN", None)
    monkeypatch.setattr(detector, "scenes", lambda count, seed: draw(4, seed, digits=1))
    monkeypatch.setattr(
        detector, "train", lambda large, seed, pictures, **options: train(large, seed, 4, steps=2, **options)
    )
    detector.main()
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["teacher", "students alone", "students taught"]


def test_f1_counts_wrong_labels_far_boxes_and_what_was_missed():
    box = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    truth = [{"boxes": box, "labels": torch.tensor([1, 2])}]
    sure = torch.ones(2)
    assert scenes.f1([{"boxes": box, "labels": torch.tensor([1, 2]), "scores": sure}], truth) == 100
    half = [{"boxes": box, "labels": torch.tensor([1, 3]), "scores": sure}]
    assert scenes.f1(half, truth) == pytest.approx(50)
    moved = [{"boxes": box + torch.tensor([0.0, 4, 0, 4]), "labels": torch.tensor([1, 2]), "scores": sure}]
    assert scenes.f1(moved, truth) == 0  # IoU 6 / 14
    assert scenes.f1([{"boxes": box, "labels": torch.tensor([1, 2]), "scores": 0.4 * sure}], truth) == 0
