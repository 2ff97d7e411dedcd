"""The example of stored views on random images: from the disk the same weights as live, and another view is refused."""

import pytest
import torch

pytest.importorskip("sklearn")

import views_from_disk
from distill import StoredTeacher, fingerprint

IMAGES = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_from_the_disk_the_student_has_the_weights_that_it_has_live(tmp_path):
    teacher, students = views_from_disk.network(4, 1).eval(), [views_from_disk.network(2, 0) for _ in range(3)]
    views_from_disk.store(teacher, IMAGES, 2, str(tmp_path))
    stored = StoredTeacher(tmp_path)
    assert stored.ids().tolist() == [[sample, seed] for sample in range(40) for seed in range(2)]
    for student, known in zip(students, (teacher, stored, None), strict=True):
        views_from_disk.train(student, known, IMAGES, torch.arange(40) % 10, 2)
    live, same, alone = map(fingerprint, students)
    assert live == same != alone


def test_a_view_follows_from_sample_and_seed_and_another_one_is_refused(tmp_path):
    samples = torch.tensor([3, 3, 5])
    ids, pixels = views_from_disk.views(IMAGES, samples, 1)
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels, views_from_disk.views(IMAGES, samples, 1)[1])
    assert not torch.equal(pixels, views_from_disk.views(IMAGES, samples, 2)[1])
    views_from_disk.store(views_from_disk.network(2, 0), IMAGES[:6], 2, str(tmp_path))
    stored = StoredTeacher(tmp_path)
    stored(ids, pixels)
    with pytest.raises(ValueError, match=r"pixels of id \[3, 1\] must be those that the teacher saw"):
        stored(ids, views_from_disk.views(IMAGES, samples, 0)[1])
