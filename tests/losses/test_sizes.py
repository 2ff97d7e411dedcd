"""`Loss.between`: losses with layers built from the shapes that they will compare."""

import pytest
import torch

import distill
from contract import make_pair
from distill import HintLoss, KLLoss, MGDLoss, OFDLoss, QueueKLLoss, ReviewLoss, SRDLoss, VIDLoss, tap_shapes
from models import ResNet, images

MAPS = (4, 3, 8, 8), (4, 5, 4, 4)


@pytest.mark.parametrize("cls", [HintLoss, VIDLoss, MGDLoss, SRDLoss])
def test_maps_give_their_channels(cls):
    loss = cls.between(*MAPS)
    assert (loss.student_channels, loss.teacher_channels) == (3, 5)
    assert loss(*make_pair(*MAPS[0], teacher_shape=MAPS[1])).isfinite()


def test_vectors_give_the_last_dimension_but_where_dim_says_otherwise():
    assert HintLoss.between((4, 7, 3), (4, 7, 5)).regressor.weight.shape == (5, 3)
    loss = HintLoss.between((4, 3, 7), (4, 5, 7), dim=1, reduction="sum")
    assert (loss.student_channels, loss.teacher_channels, loss.dim, loss.reduction) == (3, 5, 1, "sum")
    loss = HintLoss.between((4, 2, 2, 3), (4, 2, 2, 5), dim=-1)
    assert (loss.student_channels, loss.teacher_channels) == (3, 5)
    assert HintLoss.between((4, 3), (4, 3)).regressor is None
    loss = QueueKLLoss.between((4, 3), (4, 5), queue_size=16)
    assert loss.queue.shape == (16, 5)


def test_several_maps_and_what_else_a_loss_must_have():
    shapes = ((4, 3, 8, 8), (4, 6, 4, 4), (4, 6)), ((4, 5, 8, 8), (4, 7, 4, 4), (4, 7))
    loss = ReviewLoss.between(*shapes, mid_channels=8)
    assert (loss.student_channels, loss.teacher_channels, loss.mid_channels) == ((3, 6, 6), (5, 7, 7), 8)
    loss = OFDLoss.between(*MAPS, -torch.ones(5))
    assert loss.margin.shape == (5,)


def test_takes_tensors_and_what_tap_shapes_gives():
    x, _ = images()
    shapes, teacher_shapes = tap_shapes(ResNet(), x), tap_shapes(ResNet(width=6), x)
    loss = HintLoss.between(shapes["layer2"], teacher_shapes["layer3"])
    assert (loss.student_channels, loss.teacher_channels) == (8, 24)
    loss = HintLoss.between(torch.zeros(MAPS[0]), torch.zeros(MAPS[1], device="meta"))
    assert (loss.student_channels, loss.teacher_channels) == (3, 5)


def test_is_the_loss_that_the_channels_would_build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        by_shape = HintLoss.between(*MAPS)
        torch.manual_seed(0)
        by_channels = HintLoss(3, 5)
    assert repr(by_shape) == repr(by_channels)
    for name, weight in by_channels.state_dict().items():
        assert torch.equal(by_shape.state_dict()[name], weight)


def test_every_loss_with_channels_has_it():
    with_channels = {
        cls
        for cls in vars(distill).values()
        if isinstance(cls, type) and {"student_channels", "teacher_channels"} <= set(getattr(cls, "built", ()))
    }
    assert len(with_channels) >= 6
    assert all(cls.size is not None for cls in with_channels)


def test_rejects_losses_without_layers_and_shapes_that_do_not_fit():
    with pytest.raises(TypeError, match="KLLoss has no layers whose sizes follow from shapes"):
        KLLoss.between(*MAPS)
    with pytest.raises(TypeError, match=r"the student's shape must be a tuple of sizes, .*, got .\{"):
        HintLoss.between("{'logits': (2, 5)}", MAPS[1])
    with pytest.raises(TypeError, match=r"the teacher's shape must be a tuple of sizes, .*, got None"):
        HintLoss.between(MAPS[0], None)
    with pytest.raises(TypeError, match=r"the student's shapes must be a tuple of shapes, got 3"):
        ReviewLoss.between(3, MAPS)
    with pytest.raises(ValueError, match=r"the student's shape must be \(N, C, H, W\), got \(4, 7, 3\)"):
        VIDLoss.between((4, 7, 3), MAPS[1])
    with pytest.raises(ValueError, match=r"the teacher's shape must be \(N, D\), got \(4, 5, 4, 4\)"):
        QueueKLLoss.between((4, 3), MAPS[1])
    with pytest.raises(ValueError, match=r"the student's shape must be \(N, C, ...\), got \(4, 7\)"):
        HintLoss.between((4, 7), (4, 7), dim=1)
