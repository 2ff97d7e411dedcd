"""What the Distiller promises about its models, whatever is done to it."""

import copy
import pickle

import pytest
import torch

from distill import Distiller, KLLoss, LogitLoss, Term
from models import Hint, Net, batch


def build(**options):
    losses = {"hint": Term(Hint(8, 8), at="body"), "logit": LogitLoss()}
    return Distiller(Net(), Net(seed=1), losses, **options)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(module, before):
    after = module.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_teacher_stays_bitwise_what_it_was_over_50_steps_of_training():
    distiller = build()
    before = snapshot(distiller.teacher)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)
    losses = []
    for step in range(50):
        distiller.train()
        out = distiller(*batch(seed=step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.detach())
        assert not any(module.training for module in distiller.teacher.modules())
    assert_same(distiller.teacher, before)
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert sum(losses[-10:]) < sum(losses[:10])
    assert distiller.student.training
    assert distiller.student.body[1].num_batches_tracked == 50


@pytest.mark.parametrize("culprit", [lambda teacher: teacher.train(), lambda teacher: teacher.body[1].train()])
def test_teacher_is_in_eval_mode_even_if_it_was_switched_behind_our_back(culprit):
    distiller = build()
    before = snapshot(distiller.teacher)
    expected = distiller(*batch()).teacher
    culprit(distiller.teacher)
    assert torch.equal(distiller(*batch()).teacher, expected)
    assert_same(distiller.teacher, before)


def test_a_dropout_that_both_models_have_stays_on_in_the_student_alone():
    both = torch.nn.Dropout(0.5)
    student, teacher = (torch.nn.Sequential(torch.nn.Linear(4, 64), both) for _ in range(2))
    seen = []
    both.register_forward_hook(lambda module, *_: seen.append(module.training))
    distiller = Distiller(student, teacher, LogitLoss(), task_loss=None)
    for _ in range(2):
        distiller(torch.ones(2, 4)).loss.backward()
    distiller.eval()(torch.ones(2, 4))
    assert seen == [False, True, False, True, False, False]  # teacher, student and so on


def test_teacher_runs_without_a_graph_even_if_unfrozen():
    distiller = build()
    assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())
    distiller.teacher.requires_grad_(True)
    distiller.requires_grad_(True)
    out = distiller(*batch())
    assert not out.teacher.requires_grad
    out.loss.backward()
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


def test_teacher_is_not_among_parameters_modules_and_state():
    distiller = build()
    theirs = {id(tensor) for tensor in distiller.teacher.state_dict(keep_vars=True).values()}
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    assert not theirs & {id(tensor) for tensor in held}
    assert not theirs & {id(tensor) for tensor in distiller.buffers()}
    assert distiller.teacher not in set(distiller.modules())
    own = [*distiller.student.parameters(), *distiller.losses.parameters()]
    assert {id(tensor) for tensor in held} == {id(tensor) for tensor in own}


def test_state_is_that_of_the_student_and_the_losses_own_weights():
    distiller = build()
    state = distiller.state_dict()
    assert len(state) == len(Net().state_dict()) + len(Hint(8, 8).state_dict())
    student = {name.removeprefix("student."): t for name, t in state.items() if name.startswith("student.")}
    assert_same(distiller.student, student)
    assert {name for name in state if not name.startswith("student.")} == {
        "losses.hint.regressor.weight",
        "losses.hint.regressor.bias",
    }
    Net().load_state_dict(distiller.student.state_dict())
    build().load_state_dict(state)


def test_teacher_follows_dtype_and_device():
    distiller = build()
    assert distiller.double() is distiller
    assert {t.dtype for t in distiller.teacher.parameters()} == {torch.float64}
    inputs, target = batch()
    assert distiller(inputs.double(), target).loss.dtype == torch.float64
    distiller.half()
    assert {t.dtype for t in distiller.teacher.parameters()} == {torch.half}
    distiller.to("meta")
    assert {t.device.type for t in distiller.teacher.state_dict().values()} == {"meta"}
    assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["deepcopy", "pickle"])
def test_copies_carry_their_own_teacher(twin):
    distiller = build()
    distiller.weights["hint"] = 3.0
    other = twin(distiller)
    assert other.teacher is not distiller.teacher
    assert_same(other.teacher, snapshot(distiller.teacher))
    assert dict(other.weights) == dict(distiller.weights)
    assert torch.equal(other(*batch()).loss, distiller(*batch()).loss)
    with torch.no_grad():
        other.teacher.fc.bias += 1
        other.student.fc.bias += 1
    assert not torch.equal(other(*batch()).teacher, distiller(*batch()).teacher)
    other(*batch()).loss.backward()
    assert other.student.fc.weight.grad is not None
    assert distiller.student.fc.weight.grad is None


def test_teacher_cannot_be_replaced():
    distiller = build()
    with pytest.raises(AttributeError, match="keeps its teacher for life"):
        distiller.teacher = Net()
    assert "teacher" not in dict(distiller.named_modules())


def test_rejects_a_model_that_is_its_own_teacher():
    net = Net()
    with pytest.raises(ValueError, match=r"must share no parameter or buffer .*deepcopy\(teacher\)"):
        Distiller(net, net, LogitLoss())
    Distiller(net, copy.deepcopy(net), LogitLoss())


def test_rejects_a_teacher_that_shares_a_parameter_a_buffer_or_memory():
    student, teacher = Net(), Net(seed=1)
    teacher.fc.bias = student.fc.bias
    with pytest.raises(ValueError, match=r"got the teacher's 'fc.bias' in 'student.fc.bias'"):
        Distiller(student, teacher, LogitLoss())

    teacher = Net(seed=1)
    teacher.body[1].running_mean = student.body[1].running_mean
    with pytest.raises(ValueError, match=r"got the teacher's 'body.1.running_mean' in 'student.body.1.running_mean'"):
        Distiller(student, teacher, LogitLoss())

    teacher = Net(seed=1)
    teacher.load_state_dict(student.state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"got the teacher's 'body.0.weight' in 'student.body.0.weight'"):
        Distiller(student, teacher, LogitLoss())

    loss, teacher = Hint(8, 8), Net(seed=1)
    loss.regressor.bias = teacher.body[0].bias
    with pytest.raises(ValueError, match=r"got the teacher's 'body.0.bias' in 'losses.distillation.regressor.bias'"):
        Distiller(student, teacher, Term(loss, at="body"))


def test_models_without_memory_are_told_apart_by_identity():
    student, teacher = Net().to("meta"), Net().to("meta")
    Distiller(student, teacher, LogitLoss())
    with pytest.raises(ValueError, match="must share no parameter"):
        Distiller(student, student, LogitLoss())


def test_autocast_leaves_losses_in_float32():
    distiller = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = distiller(*batch())
    assert out.student.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, build()(*batch()).loss, rtol=0.2, atol=0)
    out.loss.backward()
    assert distiller.student.fc.weight.grad.dtype == torch.float32


def test_a_teacher_that_runs_the_student_leaves_it_its_gradient_under_autocast():
    student = Net()
    distiller = Distiller(student, lambda x: student(x + 1), LogitLoss())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = distiller(*batch())
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())  # 2.5 keeps casts without a gradient


@pytest.mark.parametrize("taps", [[None, ("body.1", "body.0")], ["fc:input"]], ids=["outputs-pair", "input"])
def test_compiles_to_one_graph_with_the_eager_loss_and_gradients(taps):
    torch.compiler.reset()
    losses = {"kl": Term(KLLoss(), weight=0.5), "hint": Term(Hint(8, 8), at="body")}
    losses |= {f"logit{i}": Term(LogitLoss(), at=at) for i, at in enumerate(taps)}
    eager = Distiller(Net(), Net(seed=1), losses)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    # A weight that changes every step must not end at the limit of recompilations, 8 (PyTorch 2.5 does not manage).
    many = 12 if hasattr(torch._dynamo.config, "recompile_limit") else 6
    for step in range(many if "fc:input" in taps else 2):
        eager.weights["kl"] = twin.weights["kl"] = 1.0 + step / 7 if "fc:input" in taps else 0.5
        eager.zero_grad(), twin.zero_grad()
        ours, theirs = compiled(*batch(seed=step)), eager(*batch(seed=step))
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.terms, theirs.terms)
        ours.loss.backward(), theirs.loss.backward()
        for (name, a), (_, b) in zip(twin.named_parameters(), eager.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert_same(twin.teacher, snapshot(eager.teacher))
    assert "forward" not in twin.student.fc.__dict__


def test_compiled_taps_leave_the_users_hooks_and_hook_tables_as_they_were():
    torch.compiler.reset()
    calls = []
    distiller = build()
    handle = distiller.student.body.register_forward_hook(lambda module, args, output: calls.append(1))
    torch.compile(distiller, fullgraph=True, backend="aot_eager")(*batch())
    assert len(calls) == 1
    distiller(*batch())
    assert len(calls) == 2
    handle.remove()
    later = distiller.student.body.register_forward_hook(lambda module, args, output: calls.append(2))
    on_teacher = distiller.teacher.body.register_forward_hook(lambda module, args, output: calls.append(3))
    distiller(*batch())
    assert sorted(calls[2:]) == [2, 3]
    later.remove(), on_teacher.remove()
    pickle.dumps(distiller)


def test_compiled_taps_see_keywords():
    torch.compiler.reset()

    class Keyword(Net):
        def forward(self, x):
            return self.fc(input=self.body(x))

    distiller = Distiller(Keyword(), Keyword(seed=1), Term(LogitLoss(), at="fc:input"))
    compiled = torch.compile(distiller, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch()).loss, distiller(*batch()).loss)


def test_taps_hear_a_student_that_was_compiled_before_and_is_evaluated_in_between():
    torch.compiler.reset()
    student = Net().eval()
    compiled = torch.compile(student, backend="aot_eager")
    distiller = Distiller(student, Net(seed=1), Term(LogitLoss(), at="fc:input")).eval()
    expected = distiller(*batch()).loss
    limits = {
        "recompile_limit": 4,
        "cache_size_limit": 4,
        "fail_on_recompile_limit_hit": True,
    }  # PyTorch 2.5: the second
    limits = {name: value for name, value in limits.items() if hasattr(torch._dynamo.config, name)}
    with torch._dynamo.config.patch(limits):
        for _ in range(6):
            torch.testing.assert_close(compiled(batch()[0]), student(batch()[0]))
            torch.testing.assert_close(distiller(*batch(), student=compiled).loss, expected)


def test_nothing_waits_for_the_device():
    # On the meta device every read of a value (.item(), bool(), a comparison in an if) raises.
    distiller = build().to("meta")
    inputs, target = batch()
    mask = torch.ones(4, device="meta")
    distiller = Distiller(distiller.student, distiller.teacher, {"a": LogitLoss(), "b": KLLoss()})
    out = distiller(inputs.to("meta"), target.to("meta"), mask=mask)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="meta"):
        out.loss.item()


def test_default_task_loss_has_no_state_that_distillers_could_share():
    first, second = build(), build()
    assert first.task_loss is second.task_loss
    before = second(*batch()).loss
    first.half().eval().requires_grad_(False)
    assert torch.equal(second(*batch()).loss, before)
    assert not list(second.task_loss.parameters())
    assert not list(second.task_loss.buffers())
