"""A student that does not train, weights that come to be shared, losses that drift apart."""

import copy

import pytest
import torch
from torch import nn

from distill import Distiller, HintLoss, KLLoss, LogitLoss, Term
from distill._distiller import guards
from models import Net, batch


def hint(student, **options):
    return Distiller(student, Net(seed=1), Term(HintLoss(8, 8), at="body"), task_loss=None, **options)


def learned(student):
    """A term whose learned part makes its value require a gradient, whatever the student does."""
    term = Term(LogitLoss(), at=lambda out: out, student=nn.Linear(5, 5))
    return Distiller(student, Net(seed=1), term, task_loss=None)


def test_a_frozen_student_is_refused_in_training():
    distiller = learned(Net().requires_grad_(False))
    with pytest.raises(ValueError, match="the student must have a parameter to train, but none requires a gradient"):
        distiller(batch()[0])
    distiller.eval()(batch()[0])
    with torch.no_grad():
        distiller.train()(batch()[0])
    with pytest.raises(ValueError, match="the student's tap 'body' must carry a gradient in training"):
        hint(Net().requires_grad_(False))(batch()[0])


def test_a_copy_of_a_model_that_another_distiller_froze_is_refused():
    model = Net()
    Distiller(Net(seed=2), model, LogitLoss())
    with pytest.raises(ValueError, match="another Distiller may have frozen it or the model that it was copied from"):
        learned(copy.deepcopy(model))(batch()[0])


def test_a_forward_under_no_grad_is_refused():
    class Careless(Net):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    with pytest.raises(ValueError, match="the student must get a gradient in training, .* ran under no_grad"):
        learned(Careless())(batch()[0])
    distiller = Distiller(Net(), Net(seed=1), LogitLoss())
    with pytest.raises(ValueError, match="the student must get a gradient in training"):
        distiller(*batch(), student=lambda x: distiller.student(x).detach())


def test_another_model_as_student_is_refused():
    distiller, other = Distiller(Net(), Net(seed=1), LogitLoss()), Net(seed=3)
    with pytest.raises(ValueError, match="student= must run the Distiller's own student, wrapped, but no parameter"):
        distiller(*batch(), student=other)
    distiller(*batch(), student=lambda x: distiller.student(x))


def test_a_compiled_student_is_no_other_model():
    distiller = Distiller(Net(), Net(seed=1), LogitLoss())
    distiller(*batch(), student=torch.compile(distiller.student, backend="eager"))


def test_functional_gradients_are_those_of_backward():
    student, teacher = nn.Sequential(nn.Linear(4, 5)), nn.Sequential(nn.Linear(4, 5))
    distiller = Distiller(student, teacher, {"kl": KLLoss(), "hint": Term(HintLoss(5, 5), at="0")})
    x, target = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 2])
    weights = dict(distiller.named_parameters())
    found = torch.func.grad(lambda values: torch.func.functional_call(distiller, values, (x, target)).loss)(weights)
    distiller(x, target).loss.backward()
    torch.testing.assert_close(found, {name: weight.grad for name, weight in weights.items()})


def test_an_ensemble_of_students_under_vmap_gets_the_gradient_of_each():
    students = [nn.Sequential(nn.Linear(4, 5)) for _ in range(2)]
    teacher, (x, target) = nn.Sequential(nn.Linear(4, 5)), (torch.randn(3, 4), torch.tensor([0, 4, 2]))
    terms = {"kl": KLLoss(), "hint": Term(HintLoss(), at="0")}
    weights, _ = torch.func.stack_module_state(students)
    skeleton = Distiller(copy.deepcopy(students[0]).to("meta"), teacher, terms)

    def loss(own):
        own = {f"student.{name}": weight for name, weight in own.items()}
        return torch.func.functional_call(skeleton, own, (x, target)).loss

    torch.vmap(loss)(weights).sum().backward()
    for place, student in enumerate(students):
        Distiller(student, teacher, terms)(x, target).loss.backward()
        torch.testing.assert_close(weights["0.weight"].grad[place], student[0].weight.grad)


def test_parameters_that_come_to_be_shared_are_found():
    student, teacher = Net(), Net(seed=1)
    distiller = Distiller(student, teacher, LogitLoss())
    distiller(*batch()).loss.backward()
    student.load_state_dict(teacher.state_dict(), assign=True)
    student.requires_grad_(True)
    with pytest.raises(ValueError, match=r"must share no parameter .* got the teacher's 'body.0.weight' in 'student"):
        distiller(*batch())


def test_the_message_about_shared_parameters_names_the_way_for_adapters():
    model = Net()
    with pytest.raises(ValueError, match=r"teacher=None and give teacher_output=.*, in eval mode and with the adap"):
        Distiller(model, model, LogitLoss())


def test_an_adapter_tuned_model_is_taught_by_its_base():
    class Tuned(Net):
        """A low-rank change of the classifier, which can be switched off."""

        def __init__(self):
            super().__init__()
            self.requires_grad_(False)
            self.down, self.up, self.on = nn.Linear(8, 2, bias=False), nn.Linear(2, 5, bias=False), True

        def forward(self, x):
            x = self.body(x)
            return self.fc(x) + self.up(self.down(x)) if self.on else self.fc(x)

    model = Tuned()
    distiller = Distiller(model, None, KLLoss(), task_loss=None)
    model.on = False
    with torch.no_grad():
        base = model(batch()[0])
    model.on = True
    distiller(batch()[0], teacher_output=base).loss.backward()
    assert model.up.weight.grad.abs().max() > 0


def test_losses_may_ask_for_the_models_at_every_call():
    class Asks(LogitLoss):
        asked = 0

        def check_models(self, student, teacher):
            Asks.asked += isinstance(student, Net) and isinstance(teacher, Net)

    Distiller(Net(), Net(seed=1), Asks())(*batch())
    assert Asks.asked == 2  # when it is built, and in the call


def test_a_student_of_other_parameters_is_not_looked_through():
    class Sharded(nn.Parameter):
        """Stands for what a wrapper keeps in a parameter's place."""

    student = Net()
    student.fc.bias = Sharded(student.fc.bias.detach())
    distiller = Distiller(student, Net(seed=1), LogitLoss())
    distiller(*batch(), student=lambda x: student(x))


def test_learned_losses_outside_a_wrapper_are_told_by_their_parameters(monkeypatch):
    def check(loss):
        distiller = Distiller(Net(), Net(seed=1), {"hint": Term(loss, at="body")})
        guards.check_losses_in_step(distiller, nn.Sequential(distiller.student))
        guards.check_losses_in_step(distiller, distiller.student)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    check(HintLoss(8, 12))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    check(KLLoss())
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    assert not list(guards._own_parameters(wrapped))
    for loss in (HintLoss(8, 12), Around(HintLoss(8, 12))):
        with pytest.raises(ValueError, match="the learned part of term 'hint' must get the gradients of all processes"):
            check(loss)
    for options in ({"task_loss": Around(nn.Linear(5, 5))}, {"task_output": nn.Linear(5, 5)}):
        distiller = Distiller(Net(), Net(seed=1), LogitLoss(), **options)
        with pytest.raises(ValueError, match="the learned part of term 'task' must get the gradients of all processes"):
            guards.check_losses_in_step(distiller, nn.Sequential(distiller.student))
    student = Net()
    student.second = nn.Linear(5, 5)
    distiller = Distiller(student, Net(seed=1), LogitLoss(), task_output=student.second)
    guards.check_losses_in_step(distiller, nn.Sequential(student))  # with the student it is in step


class Around(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, student, teacher, target=None):
        return self.loss(student, teacher)


def test_a_task_loss_without_a_signature_is_called_with_a_target():
    distiller = Distiller(Net(), Net(seed=1), LogitLoss(), task_loss=max)
    with pytest.raises(ValueError, match="the task loss needs a target, got None"):
        distiller(batch()[0])


def test_taps_that_replicas_would_run_past_are_refused():
    distiller = Distiller(Net(), Net(seed=1), Term(LogitLoss(), at="body"))
    replicated = nn.DataParallel(distiller.student)
    replicated.device_ids = [0, 1]
    with pytest.raises(
        ValueError, match="the student's taps must hear the student itself, but nn.DataParallel runs rep"
    ):
        distiller(*batch(), student=replicated)
    teacher = nn.DataParallel(Net(seed=1))
    distiller = Distiller(Net(), teacher, Term(LogitLoss(), at=("body", "module.body")))
    teacher.device_ids = [0, 1]
    with pytest.raises(ValueError, match="the teacher's taps must hear the teacher itself"):
        distiller(*batch())
