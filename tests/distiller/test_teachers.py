"""Teachers of every kind: any callable, none, several, an averaged one, one whose features were stored."""

import copy

import pytest
import torch
from torch import nn

from distill import Distiller, KLLoss, LogitLoss, TeacherOutput, Teachers, Term, kl_loss
from models import Net, batch


def test_a_teacher_may_be_a_function():
    teacher = Net(seed=1).eval()
    inputs, labels = batch()
    by_function = Distiller(Net(), lambda x: teacher(x), KLLoss())(inputs, labels)
    torch.testing.assert_close(by_function.loss, Distiller(Net(), teacher, KLLoss())(inputs, labels).loss)
    assert not by_function.teacher.requires_grad


def test_a_teacher_may_be_an_exported_program():
    teacher = Net(seed=1).eval()
    inputs, labels = batch()
    exported = torch.export.export(teacher, (inputs,)).module()
    out = Distiller(Net(), exported, KLLoss())(inputs, labels)
    torch.testing.assert_close(out.teacher, teacher(inputs).detach())
    both = Teachers(exported=exported, plain=teacher, combine="logits")
    torch.testing.assert_close(Distiller(Net(), both, KLLoss())(inputs, labels).loss, out.loss)


def test_without_a_teacher_its_output_must_be_given():
    teacher = Net(seed=1).eval()
    distiller = Distiller(Net(), None, KLLoss())
    inputs, labels = batch()
    with torch.inference_mode():
        cached = teacher(inputs)
    out = distiller(inputs, labels, teacher_output=cached)
    torch.testing.assert_close(out.loss, Distiller(Net(), teacher, KLLoss())(inputs, labels).loss)
    with pytest.raises(ValueError, match=r"\['distillation'\] must have a teacher .* got teacher=None and no t"):
        distiller(inputs, labels)


def test_stored_features_are_given_with_the_output():
    student, teacher = Net(), Net(seed=1)
    terms = {"kl": KLLoss(), "body": Term(LogitLoss(), at="body"), "pair": Term(LogitLoss(), at="fc:input")}
    live = Distiller(student, teacher, terms)
    inputs, labels = batch()
    features = {"body": teacher.body(inputs), "fc:input": teacher.body(inputs)}
    stored = TeacherOutput(teacher(inputs), features)
    expected = live(inputs, labels)
    torch.testing.assert_close(live(inputs, labels, teacher_output=stored).terms, expected.terms)
    for teacher_or_none, given in ((None, stored), (lambda x: stored, None)):
        out = Distiller(student, teacher_or_none, terms)(inputs, labels, teacher_output=given)
        torch.testing.assert_close(out.terms, expected.terms)
        out.loss.backward()
    with pytest.raises(ValueError, match=r"the teacher's taps \['fc:input'\] must see something.*got features of \['b"):
        live(inputs, labels, teacher_output=TeacherOutput(stored.output, {"body": features["body"]}))


def test_several_teachers_with_taps_into_each():
    big, small, student = Net(width=12, seed=1), Net(seed=2), Net()
    teachers = Teachers(big=big, small=small, combine="logits", weights={"big": 3, "small": 1})
    terms = {"kl": KLLoss(), "small": Term(LogitLoss(), at=("body", "small.body"))}
    inputs, labels = batch()
    calls = []
    big.register_forward_hook(lambda *_: calls.append(1))
    out = Distiller(student, teachers, terms)(inputs, labels)
    assert len(calls) == 1
    expected = 0.75 * big(inputs) + 0.25 * small(inputs)
    torch.testing.assert_close(out.teacher, expected.detach())
    torch.testing.assert_close(out.terms["kl"], kl_loss(out.student, expected).mean().detach())
    torch.testing.assert_close(out.terms["small"], (student.body(inputs) - small.body(inputs)).square().mean().detach())
    assert not any(module.training for module in teachers.modules())


def test_teachers_combine_probabilities_or_as_they_are_told():
    big, small = Net(seed=1).eval(), Net(seed=2).eval()
    inputs = batch()[0]
    both = big(inputs), small(inputs)
    mean = Teachers(big=big, small=small, combine="probabilities")(inputs)
    torch.testing.assert_close(mean.softmax(-1), (both[0].softmax(-1) + both[1].softmax(-1)) / 2)
    largest = Teachers(big=big, small=small, combine=lambda out: torch.maximum(out["big"], out["small"]))(inputs)
    torch.testing.assert_close(largest, torch.maximum(*both))
    one = {"one": Term(LogitLoss(), at=(lambda out: out, lambda out: out["small"]))}
    out = Distiller(Net(), Teachers(big=big, small=small), one)(*batch())
    torch.testing.assert_close(out.terms["one"], (out.student - both[1]).square().mean().detach())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "at least one teacher"),
        ({"a": Net(), "combine": "mean"}, "combine must be 'logits', 'probabilities', a function or None, got 'mean'"),
        ({"forward": Net()}, "name must be no attribute of a module"),
        ({"a": Net(), "combine": "logits", "weights": {"b": 1}}, r"every teacher's name, \['a'\], got \['b'\]"),
        ({"a": Net(), "combine": "logits", "weights": {"a": 0}}, "a weight above 0"),
        ({"a": Net(), "weights": {"a": 1}}, "weights need combine"),
    ],
)
def test_rejects_teachers(options, match):
    with pytest.raises(ValueError, match=match):
        Teachers(**options)


def test_an_averaged_teacher_follows_the_student_and_is_resumed():
    student = Net()
    distiller = Distiller(student, copy.deepcopy(student), LogitLoss())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    expected = copy.deepcopy(student.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        distiller(*batch()).loss.backward()
        optimizer.step()
        distiller.update_teacher(0.9)
        for name, value in student.state_dict().items():
            parameter = name in dict(student.named_parameters())
            expected[name] = 0.9 * expected[name] + 0.1 * value if parameter else value.clone()
    torch.testing.assert_close(dict(distiller.teacher.state_dict()), dict(expected))
    twin = Distiller(Net(), Net(), LogitLoss())
    twin.load_state_dict(distiller.state_dict())
    twin.teacher.load_state_dict(distiller.teacher.state_dict())
    assert twin.eval()(*batch()).loss == distiller.eval()(*batch()).loss
    assert all(not parameter.requires_grad for parameter in distiller.teacher.parameters())


def test_rejects_an_average_of_another_model():
    distiller = Distiller(Net(), Net(width=12), LogitLoss())
    with pytest.raises(ValueError, match="an averaged teacher must have the student's parameters"):
        distiller.update_teacher(0.9)
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="decay must be between 0 and 1"):
            distiller.update_teacher(decay)
    with pytest.raises(ValueError, match="an averaged teacher must be a module, got function"):
        Distiller(Net(), lambda x: x, LogitLoss()).update_teacher(0.9)


def test_rejects_what_is_no_teacher_or_student():
    with pytest.raises(TypeError, match=r"a function or None, or Teachers\(...\) for several, got int"):
        Distiller(Net(), 3, LogitLoss())
    with pytest.raises(TypeError, match="student must be a module, got function"):
        Distiller(lambda x: x, Net(), LogitLoss())


def test_teachers_may_be_functions_and_say_what_they_are():
    small = Net(seed=2).eval()
    teachers = Teachers(big=lambda x: 2 * small(x), small=small, combine="logits")
    torch.testing.assert_close(teachers(batch()[0]), 1.5 * small(batch()[0]))
    assert "combine='logits', shares={'big': 0.5, 'small': 0.5}" in repr(teachers)
    with pytest.raises(TypeError, match="a teacher must be a module or a function, got int as 'a'"):
        Teachers(a=3)
    with pytest.raises(ValueError, match=r"logits of one shape, got \{'a': \(4, 5\), 'b': \(4, 8\)\}"):
        Teachers(a=small, b=small.body, combine="logits")(batch()[0])
    with pytest.raises(ValueError, match="teacher 'a' must give a tensor or something with .logits, got tuple"):
        Teachers(a=lambda x: (x,), combine="logits")(batch()[0])


def test_rejects_an_average_in_half_precision():
    distiller = Distiller(Net().bfloat16(), Net().bfloat16(), LogitLoss())
    with pytest.raises(ValueError, match="must be float32 or wider, got torch.bfloat16 in 'body.0.weight'"):
        distiller.update_teacher(0.999)


def test_a_frozen_base_in_half_precision_is_no_hindrance_to_an_average():
    student = Net()
    student.body.bfloat16().requires_grad_(False)
    distiller = Distiller(student, copy.deepcopy(student), LogitLoss())
    with torch.no_grad():
        student.fc.weight.add_(1.0)
    distiller.update_teacher(0.75)
    torch.testing.assert_close(distiller.teacher.fc.weight, student.fc.weight - 0.75)
    assert torch.equal(distiller.teacher.body[0].weight, student.body[0].weight)


def test_an_average_copies_what_has_no_mean_and_changes_nothing_where_it_is_refused():
    student = Net()
    student.scales = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    distiller = Distiller(student, copy.deepcopy(student), LogitLoss())
    student.scales.fill_(7)
    distiller.update_teacher(0.5)
    assert torch.equal(distiller.teacher.scales, student.scales)
    distiller.teacher.fc.bfloat16()
    before = copy.deepcopy(distiller.teacher.state_dict())
    with torch.no_grad():
        student.body[0].weight.add_(1.0)
    with pytest.raises(ValueError, match="must be float32 or wider"):
        distiller.update_teacher(0.5)
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())


def test_a_teacher_without_a_share_is_not_run_and_probabilities_keep_their_range():
    calls = []
    sure = torch.tensor([[0.0, -200.0]])
    teachers = Teachers(a=lambda: sure, b=lambda: calls.append(1), combine="logits", weights={"a": 1.0, "b": 0.0})
    assert torch.equal(teachers(), sure)
    assert not calls
    both = Teachers(a=lambda: sure, b=lambda: sure, combine="probabilities")()
    torch.testing.assert_close(both, sure.log_softmax(-1))


@pytest.mark.filterwarnings("ignore")  # PyTorch moves its quantisation elsewhere
def test_a_teacher_whose_fake_quantisation_still_observes_is_refused():
    quantisation = pytest.importorskip("torch.ao.quantization")
    inputs, labels = batch()
    teacher = nn.Sequential(Net(seed=1), quantisation.FakeQuantize())
    teacher(inputs)
    match = r"the teacher must stay as it is, but the fake quantisation at '1' fits its .*teacher.apply\({}.disable_obs"
    with pytest.raises(ValueError, match=match.format("torch.ao.quantization")):
        Distiller(Net(), teacher, KLLoss())
    elsewhere = type("FakeQuantize", (quantisation.FakeQuantize,), {"__module__": "torchao.quantization.pt2e.fake"})
    with pytest.raises(ValueError, match=match.format("torchao.quantization.pt2e")):
        Distiller(Net(), nn.Sequential(Net(seed=1), elsewhere()), KLLoss())
    before = copy.deepcopy(teacher.apply(quantisation.disable_observer).state_dict())
    Distiller(Net(), teacher, KLLoss())(10 * inputs, labels)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    fixed = quantisation.FixedQParamsFakeQuantize(quantisation.default_fixed_qparams_range_0to1_observer)
    Distiller(Net(), nn.Sequential(Net(seed=1), fixed), KLLoss())


@pytest.mark.filterwarnings("ignore")
def test_an_averaged_teacher_does_not_observe_with_its_student():
    quantisation = pytest.importorskip("torch.ao.quantization")
    inputs, labels = batch()
    student = nn.Sequential(Net(), quantisation.FakeQuantize())
    student(inputs)
    teacher = copy.deepcopy(student).apply(quantisation.disable_observer)
    distiller = Distiller(student, teacher, KLLoss())
    student(10 * inputs)
    distiller.update_teacher(0.5)
    assert torch.equal(teacher[1].scale, student[1].scale)
    before = copy.deepcopy(teacher.state_dict())
    distiller(100 * inputs, labels)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_models_that_accelerate_has_placed_stay_where_they_are():
    accelerate = pytest.importorskip("accelerate")
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 5))
    x, expected = torch.randn(3, 4), copy.deepcopy(net)
    placed = accelerate.cpu_offload(net, torch.device("cpu"))  # on meta between its forwards
    several = Teachers(placed=placed, plain=copy.deepcopy(expected), combine="logits")
    for teacher in (placed, several):
        out = Distiller(torch.nn.Linear(4, 5), teacher, LogitLoss(), task_loss=None).to("cpu", torch.float32)(x)
        torch.testing.assert_close(out.teacher, expected(x).detach())
    student = accelerate.dispatch_model(copy.deepcopy(expected), {"": "cpu"}, force_hooks=True)
    distiller = Distiller(student, several, Term(LogitLoss(), at=("0", "plain.0"), student=torch.nn.Linear(6, 6)))
    distiller.to("meta")
    assert not student[0].weight.is_meta
    assert distiller.adapters["distillation"][0].weight.is_meta
    assert several.get_submodule("plain")[0].weight.is_meta
    with pytest.raises(ValueError, match="must have its dtype before, got torch.float16 for Sequential with torch.flo"):
        distiller.half()
