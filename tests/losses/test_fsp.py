"""FSPLoss against the matrices of Yim et al. (2017), entry by entry, at the scale of RepDistiller."""

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair
from distill import Distiller, FSPLoss, Term, fsp_loss


def flow(first, second):
    """Mean over the positions of the products of a channel of the one layer with one of the other."""
    return np.array([[(f * g).mean() for g in second] for f in first])


def reference(student, teacher):
    """Mean squared difference of the matrices, sample by sample."""
    pairs = zip(*student, *teacher, strict=True)
    return np.array([((flow(s1, s2) - flow(t1, t2)) ** 2).mean() for s1, s2, t1, t2 in pairs])


def make_layers(*shapes, teacher_shapes=None, dtype=torch.float64):
    pairs = [
        make_pair(*shape, teacher_shape=teacher_shape, seed=seed, dtype=dtype)
        for seed, (shape, teacher_shape) in enumerate(zip(shapes, teacher_shapes or shapes, strict=True))
    ]
    return tuple(zip(*pairs, strict=True))


def arrays(maps):
    return [m.detach().numpy() for m in maps]


@pytest.mark.parametrize("shapes", [[(5, 2, 3, 4), (5, 6, 3, 4)], [(3, 1, 1, 1), (3, 4, 1, 1)]])
def test_matches_reference(shapes):
    student, teacher = make_layers(*shapes)
    expected = torch.from_numpy(reference(arrays(student), arrays(teacher)))
    torch.testing.assert_close(fsp_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        FSPLoss()(list(student), list(teacher)).detach(), expected.mean(), rtol=1e-12, atol=1e-12
    )


def test_the_larger_layer_of_a_network_is_average_pooled():
    student, teacher = make_layers((4, 2, 4, 6), (4, 3, 2, 3))
    blocks = [m[0].reshape(4, 2, 2, 2, 3, 2).mean((3, 5)) for m in (arrays(student), arrays(teacher))]
    expected = torch.from_numpy(reference([blocks[0], arrays(student)[1]], [blocks[1], arrays(teacher)[1]]))
    torch.testing.assert_close(fsp_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_student_and_teacher_may_differ_in_size():
    student, teacher = make_layers((4, 2, 2, 2), (4, 3, 2, 2), teacher_shapes=[(4, 2, 3, 5), (4, 3, 3, 5)])
    expected = torch.from_numpy(reference(arrays(student), arrays(teacher)))
    torch.testing.assert_close(fsp_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_layers((2, 2, 2, 4), (2, 3, 2, 2))
    assert torch.autograd.gradcheck(lambda *s: fsp_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(FSPLoss, shape=[(5, 2, 2, 3), (5, 3, 2, 3)], maps=True)
    assert_loss_contract(
        FSPLoss, shape=[(5, 2, 4, 4), (5, 3, 2, 2)], teacher_shape=[(5, 2, 6, 3), (5, 3, 6, 3)], maps=True
    )


def test_counts_neither_order_nor_common_rotation_of_the_positions():
    student, teacher = make_layers((4, 2, 2, 3), (4, 3, 2, 3))
    rotation = torch.linalg.qr(make_pair(6, 6)[1]).Q
    turned = [(m.flatten(2) @ rotation).reshape(m.shape) for m in student]
    torch.testing.assert_close(fsp_loss(turned, teacher), fsp_loss(student, teacher))


def test_grows_with_the_fourth_power():
    student, teacher = make_layers((4, 2, 2, 3), (4, 3, 2, 3))
    scaled = fsp_loss([3 * s for s in student], [3 * t for t in teacher])
    torch.testing.assert_close(scaled, 81 * fsp_loss(student, teacher))


def test_zero_when_equal_and_positive_otherwise():
    student, teacher = make_layers((4, 2, 2, 3), (4, 3, 2, 3))
    assert FSPLoss()(student, [s.detach() for s in student]) == 0
    assert (fsp_loss(student, teacher) > 0).all()


def test_finite_on_extreme_maps_and_on_zeros():
    (s1, s2), teacher = make_layers((4, 2, 2, 3), (4, 3, 2, 3), dtype=torch.float32)
    slope = gradient(lambda s: FSPLoss()((s, 1e4 * s2), [1e4 * t for t in teacher]), 1e4 * s1)
    assert slope.isfinite().all()
    zeros = torch.zeros(4, 2, 2, 3)
    assert gradient(lambda s: FSPLoss()((s, torch.zeros(4, 3, 2, 3)), teacher), zeros).abs().max() == 0


def test_layers_of_different_dtypes_are_computed_in_the_wider_one():
    (s1, s2), teacher = make_layers((4, 2, 2, 3), (4, 3, 2, 3))
    values = fsp_loss((s1.half(), s2), [t.bfloat16() for t in teacher])
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, fsp_loss((s1.half(), s2), [t.bfloat16().double() for t in teacher]))


def test_through_the_taps_of_a_distiller():
    def make_model():
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
        )

    inputs, target = make_pair(4, 1, 8, 8, dtype=torch.float32)[1], torch.tensor([0, 1, 1, 0])
    layers = ("0", "1")
    distiller = Distiller(make_model(), make_model(), Term(FSPLoss(), at=(layers, layers)))
    out = distiller(inputs, target)
    seen = []
    for model in (distiller.student, distiller.teacher):
        first = model[0](inputs)
        seen.append((first, model[1](first)))
    torch.testing.assert_close(out.terms["distillation"], FSPLoss()(*seen).detach())
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in distiller.student.parameters())


def test_rejects_what_is_no_pair():
    student, teacher = make_layers((4, 2, 2, 3), (4, 3, 2, 3))
    with pytest.raises(
        TypeError, match=r"student must be a tuple of 2 maps \(in a Term: a tuple of paths\), got Tensor"
    ):
        fsp_loss(student[0], teacher)
    with pytest.raises(TypeError, match="teacher must be a tuple of 2 maps .*, got list at 1"):
        fsp_loss(student, (teacher[0], [teacher[1]]))
    for loss in (fsp_loss, FSPLoss()):
        with pytest.raises(ValueError, match=r"teacher must be a tuple of 2 maps .*, got 3"):
            loss(student, (*teacher, teacher[0]))


def test_rejects_layers_that_do_not_fit():
    (s1, s2), (t1, t2) = make_layers((4, 2, 2, 3), (4, 3, 2, 3))
    with pytest.raises(ValueError, match=r"of the same N and C, got \(4, 2, 2, 3\) and \(4, 3, 2, 3\)"):
        fsp_loss((s1, s2), (t2, t1))
    with pytest.raises(ValueError, match=r"of the same N.*, got \[\(4, 2, 2, 3\), \(1, 3, 2, 3\)\]"):
        fsp_loss((s1, s2[:1]), (t1, t2[:1]))
    with pytest.raises(ValueError, match=r"maps must be on one device, got \['cpu', 'meta'\]"):
        fsp_loss((s1, s2.to("meta")), (t1, t2.to("meta")))


def test_repr_shows_options():
    assert repr(FSPLoss(reduction="none")) == "FSPLoss(reduction='none')"


@pytest.mark.parametrize("size", [(6,), (2, 3, 2)])
def test_maps_of_one_and_three_dimensions(size):
    student, teacher = make_layers((4, 2, *size), (4, 3, *size))
    flat = [[m.reshape(*m.shape[:2], 1, -1) for m in arrays(maps)] for maps in (student, teacher)]
    torch.testing.assert_close(
        fsp_loss(student, teacher).detach(), torch.from_numpy(reference(*flat)), rtol=1e-12, atol=1e-12
    )
    with pytest.raises(
        ValueError, match=r"two layers must have as many dimensions, got \[\(4, 2, .*, \(4, 3, 1, 1\)\]"
    ):
        fsp_loss((student[0], torch.ones(4, 3, 1, 1)), (teacher[0], torch.ones(4, 3, 1, 1)))
