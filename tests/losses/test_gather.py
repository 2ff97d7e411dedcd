"""`gather=True`: what one process sees of it; `tests/test_recipes.py` runs two."""

import copy
import inspect

import pytest
import torch
import torch.distributed as dist

from contract import make_pair
from distill import (
    CCLoss,
    CRDLoss,
    Distiller,
    DISTLoss,
    ICKDLoss,
    PearsonLoss,
    PKTLoss,
    RKDLoss,
    SKDLoss,
    SPLoss,
    SRDLoss,
    Term,
    get_loss,
    list_losses,
)
from distill.losses import _base, _gather

BATCH_LOSSES = {
    "rkd": RKDLoss,
    "sp": SPLoss,
    "pkt": PKTLoss,
    "cc": CCLoss,
    "crd": lambda **options: CRDLoss(6, 6, **options),
    "dist": DISTLoss,
    "ickd": ICKDLoss,
    "pearson": PearsonLoss,
    "skd": SKDLoss,
    "srd": lambda **options: SRDLoss(6, 6, **options),
}


@pytest.fixture
def group(monkeypatch):
    """A group of one process that gathers as if there were others."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(_base, "is_alone", lambda: False)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_is_an_option_that_is_checked_shown_and_copied(name):
    loss = BATCH_LOSSES[name](gather=True)
    assert "gather=True" in repr(loss)
    assert "gather" not in repr(BATCH_LOSSES[name]())
    assert copy.deepcopy(loss).gather
    loss.gather = False
    for wrong in (1, None, "yes"):
        with pytest.raises(ValueError, match="gather must be True or False, got"):
            loss.gather = wrong


def test_every_loss_of_a_whole_batch_has_it():
    for name in list_losses():
        if issubclass(get_loss(name), _base.BatchLoss):
            assert "gather" in inspect.signature(get_loss(name)).parameters, name


@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_changes_nothing_where_there_is_one_process(name):
    student, teacher = make_pair(5, 6, 3) if name in ("ickd", "pearson") else make_pair(5, 6)
    torch.manual_seed(0)
    loss = BATCH_LOSSES[name](gather=True).double()
    twin = copy.deepcopy(loss)
    twin.gather = False
    assert torch.equal(loss(student, teacher), twin(student, teacher))


@pytest.mark.usefixtures("group")
def test_gathers_tensors_of_every_dtype_and_the_gradient_of_its_own():
    tensors = {
        "half": torch.rand(3, 2, 2).half(),
        "mask": torch.tensor([True, False, True]),
        "places": torch.tensor([7, 0, 3], dtype=torch.int32),
        "nothing": None,
        "bits": torch.rand(2, 3).mT.bfloat16(),  # not contiguous
    }
    for given, got in zip(tensors.values(), _gather.gather_batches(**tensors), strict=True):
        assert given is got is None or (torch.equal(given, got) and given.dtype == got.dtype)
    student, teacher = make_pair(5, 6)
    (slope,) = torch.autograd.grad(SPLoss(gather=True)(student, teacher), student, create_graph=True)
    torch.testing.assert_close(slope, torch.autograd.grad(SPLoss()(student, teacher), student)[0])
    (second,) = torch.autograd.grad(slope.square().sum(), student)
    assert second.abs().sum() > 0
    (tripled,) = torch.autograd.grad(_gather._ScaledGradient.apply(student, 3).sum(), student)
    assert torch.equal(tripled, torch.full_like(student, 3.0))


@pytest.mark.usefixtures("group")
def test_passes_on_what_the_loss_itself_refuses_and_takes_the_target_where_one_is_used():
    student, teacher = make_pair(5, 6)
    with pytest.raises(TypeError, match="student must be a tensor, got list"):
        SPLoss(gather=True)([1.0], teacher)
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        SPLoss(gather=True)(student, teacher, mask=[1])
    SPLoss(gather=True)(student, teacher, {"labels": "of another term"})
    loss = CRDLoss(6, 6, 9, num_negatives=2, gather=True).double()
    loss(student, teacher, torch.arange(5))
    with pytest.raises(TypeError, match="target must be a tensor, got list"):
        loss(student, teacher, [0, 1, 2, 3, 4])


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # a Function that is traced
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the tracer looks at it
def test_breaks_the_graph_of_what_is_compiled():
    student, teacher = make_pair(5, 6)
    torch.compiler.reset()
    compiled = torch.compile(SPLoss(gather=True), backend="eager")
    value = compiled(student, teacher)
    torch.testing.assert_close(value, SPLoss()(student, teacher))
    (slope,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(slope, torch.autograd.grad(SPLoss()(student, teacher), student)[0])


def test_what_the_processes_do_not_agree_on_is_refused():
    pair = [((4, 6), "float"), ((4, 7), "float")]
    names = ["student", "teacher"]
    _gather._check_everywhere(names, [pair, [((3, 6), "float"), ((3, 7), "float")]])
    for other in ([((4, 5), "float"), pair[1]], [((4, 6), "half"), pair[1]], [None, pair[1]]):
        with pytest.raises(ValueError, match="with gather=True student must have the same shape and dtype on all"):
            _gather._check_everywhere(names, [pair, other])
    with pytest.raises(ValueError, match="the same samples in dimension 0, got .'student': .3, 6.* on process 1"):
        _gather._check_everywhere(names, [pair, [((3, 6), "float"), pair[1]]])


def test_rejects_classes_in_the_dimension_that_is_gathered():
    logits = torch.rand(4, 9)
    DISTLoss(dim=1, gather=True)(logits, logits)
    for dim in (0, -2):
        with pytest.raises(ValueError, match=f"dimension 0 must be the samples, got dim={dim} for the classes"):
            DISTLoss(dim=dim, gather=True)(logits, logits)


def test_a_gathered_mean_takes_no_denominator():
    maps = torch.rand(4, 3, 5)
    with pytest.raises(ValueError, match="denominator must be None with gather=True"):
        ICKDLoss(gather=True)(maps, maps.flip(0), denominator=8)
    student, teacher = torch.nn.Conv1d(3, 3, 1), torch.nn.Conv1d(3, 3, 1)
    terms = {"whole": Term(ICKDLoss(gather=True)), "own": Term(ICKDLoss())}
    out = Distiller(student, teacher, terms, task_loss=None)(maps, denominator=8)
    torch.testing.assert_close(out.terms["whole"], 2 * out.terms["own"])
