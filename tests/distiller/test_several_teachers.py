"""A teacher for each sample of a batch, and teachers whose vocabularies differ at the end."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill import Distiller, KLLoss, LogitLoss, Teachers, Term, kl_loss, next_tokens
from models import Net, batch

BY_ID = {0: "big", 1: "small", 7: "big"}


def experts(**options):
    return Teachers(big=Net(width=12, seed=1).eval(), small=Net(seed=2).eval(), **{"by_id": BY_ID, **options})


def llama(vocab_size, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf = pytest.importorskip("transformers", reason="a development dependency")
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=vocab_size, max_position_embeddings=16, **sizes)).eval()


def test_each_sample_gets_the_logits_of_its_teacher_which_runs_once_on_its_samples():
    teachers, inputs = experts(), batch(8)[0]
    ids = torch.tensor([0, 1, 1, 7, 0, 1, 7, 7])
    calls = []
    for name, teacher in teachers.named_children():
        teacher.register_forward_hook(lambda _model, _args, out, name=name: calls.append((name, len(out))))
    found = teachers(inputs, teacher_ids=ids)
    assert calls == [("big", 5), ("small", 3)]
    big, small = teachers.big(inputs), teachers.small(inputs)
    torch.testing.assert_close(found, torch.where((ids == 1)[:, None], small, big))
    assert torch.equal(teachers(inputs, ids), found)
    assert torch.equal(teachers(x=inputs, teacher_ids=ids.tolist()), found)


def test_a_teacher_without_samples_in_a_batch_is_not_run():
    teachers, inputs = experts(), batch(4)[0]
    teachers.big.register_forward_hook(lambda *_: pytest.fail("it has no samples"))
    torch.testing.assert_close(teachers(inputs, [1, 1, 1, 1]), teachers.small(inputs))


def test_names_may_be_ids_and_inputs_lists():
    teachers = Teachers(
        a=lambda texts, scale: torch.tensor([[len(text) * scale, 0.0] for text in texts]),
        b=lambda texts, scale: torch.tensor([[-len(text) * scale, 0.0] for text in texts]),
        by_id={"math": "a", "code": "b"},
    )
    found = teachers(["x", "yy", "zzz"], scale=2.0, teacher_ids=["code", "math", "code"])
    assert found.tolist() == [[-2.0, 0.0], [4.0, 0.0], [-6.0, 0.0]]


def test_a_tuple_is_no_list_of_samples():
    sizes = []
    teachers = Teachers(a=lambda x, size: sizes.append(size) or x, b=lambda x, size: x, by_id={0: "a", 1: "b"})
    teachers(torch.randn(2, 3), size=(8, 8), teacher_ids=[0, 1])
    assert sizes == [(8, 8)]


def test_in_a_distiller():
    teachers, (inputs, labels) = experts(), batch(4)
    ids = torch.tensor([1, 0, 7, 1])
    out = Distiller(Net(), teachers, KLLoss())(inputs, labels, teacher_inputs=(inputs, ids))
    expected = torch.where((ids == 1)[:, None], teachers.small(inputs), teachers.big(inputs)).detach()
    torch.testing.assert_close(out.teacher, expected)
    torch.testing.assert_close(out.terms["distillation"], kl_loss(out.student, expected).mean().detach())
    out.loss.backward()
    assert all(not parameter.requires_grad for parameter in teachers.parameters())
    assert not any(module.training for module in teachers.modules())


def test_a_tap_sees_the_samples_of_its_teacher_only():
    teachers, (inputs, labels) = experts(), batch(4)
    term = Term(LogitLoss(), at=("body", "small.body"), student=lambda body: body[:2])
    out = Distiller(Net(), teachers, term, task_loss=None)(inputs, labels, teacher_inputs=(inputs, [1, 1, 0, 0]))
    expected = (Net().body(inputs)[:2] - teachers.small.body(inputs[:2])).square().mean()
    torch.testing.assert_close(out.loss, expected)


def test_language_models_of_two_domains_with_vocabularies_that_differ_at_the_end():
    models = {"math": llama(vocab_size=60, seed=1), "code": llama(vocab_size=64, seed=2)}
    teachers = Teachers(**models, by_id={0: "math", 1: "code"}, vocab_size=60)
    ids = torch.randint(60, (3, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    target, mask = next_tokens(ids)
    distiller = Distiller(llama(vocab_size=60), teachers, KLLoss(), task_loss=None)
    domains = torch.tensor([1, 0, 1])
    out = distiller(inputs, target, mask=mask, teacher_inputs={**inputs, "teacher_ids": domains})
    code, math = (models[name](**inputs).logits[..., :60] for name in ("code", "math"))
    expected = torch.where((domains == 1)[:, None, None], code, math).detach()
    torch.testing.assert_close(out.teacher, expected)
    out.loss.backward()


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_a_mean_over_vocabularies_that_differ_at_the_end(combine):
    wide, narrow = torch.randn(4, 7), torch.randn(4, 5)
    sides = {"wide": lambda: wide, "narrow": lambda: narrow}
    found = Teachers(**sides, combine=combine, vocab_size=5)()
    expected = Teachers(wide=lambda: wide[:, :5], narrow=lambda: narrow, combine=combine)()
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"one shape, got \{'wide': \(4, 7\), 'narrow': \(4, 5\)\}; vocab_size="):
        Teachers(**sides, combine=combine)()
    with pytest.raises(
        ValueError, match=r"teacher 'narrow' must give at least vocab_size=6 logits, got shape \(4, 5\)"
    ):
        Teachers(**sides, combine=combine, vocab_size=6)()


def test_two_students_teach_each_other():
    first, second, (inputs, labels) = Net(), Net(width=12, seed=1), batch()
    distillers = Distiller(first, lambda x: second(x), KLLoss(1.0)), Distiller(second, lambda x: first(x), KLLoss(1.0))
    for net, other, distiller in ((first, second, distillers[0]), (second, first, distillers[1])):
        out = distiller(inputs, labels)
        expected = kl_loss(out.student, other(inputs), temperature=1.0).mean()
        torch.testing.assert_close(out.terms["distillation"], expected.detach())
        for parameter in (*first.parameters(), *second.parameters()):
            parameter.grad = None
        out.loss.backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in other.parameters())


def test_each_teacher_of_a_mean_runs_once_per_batch():
    teachers = Teachers(big=Net(seed=1), small=Net(seed=2), combine="probabilities")
    calls = []
    for teacher in teachers.children():
        teacher.register_forward_hook(lambda *_: calls.append(1))
    terms = {"kl": KLLoss(), "big": Term(LogitLoss(), at=("body", "big.body")), "again": KLLoss(2.0)}
    Distiller(Net(), teachers, terms)(*batch())
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"by_id": {0: "a"}}, r"by_id must name every teacher and no other, \['a', 'b'\], got \['a'\]"),
        ({"by_id": {0: "a", 1: "b", 2: "c"}}, r"by_id must name every teacher .*, got \['a', 'b', 'c'\]"),
        ({"by_id": {0: "a", 1: "b"}, "combine": "logits"}, "by_id leaves nothing to combine, .*, got combine='logits'"),
        ({"by_id": {0: "a", 1: "b"}, "weights": {"a": 1, "b": 2}}, "weights need combine"),
        ({"vocab_size": 5}, "vocab_size needs by_id, or combine='logits' or 'probabilities', got combine=None"),
        ({"vocab_size": 0, "combine": "logits"}, "vocab_size must be a positive integer, got 0"),
    ],
)
def test_rejects_options_that_do_not_fit(options, match):
    with pytest.raises(ValueError, match=match):
        Teachers(a=nn.Linear(2, 3), b=nn.Linear(2, 3), **options)


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        (None, ValueError, "teacher_ids must be a tensor or a list with the id of each sample, got None"),
        ([], ValueError, r"teacher_ids must be a tensor or a list .*, got \[\]"),
        (torch.tensor([0.0, 1.0, 1.0, 0.0]), ValueError, r"must be integers \(N,\), got torch.float32 of shape \(4,\)"),
        (torch.tensor([[0, 1, 1, 0]]), ValueError, r"must be integers \(N,\), got torch.int64 of shape \(1, 4\)"),
        ([0, 1, 2, 1], KeyError, r"teacher_ids must be of \[0, 1, 7\], got 2"),
        ([0, 1, 1], ValueError, "by_id needs inputs of as many samples as there are ids, 3; none"),
    ],
)
def test_rejects_ids_that_do_not_fit(ids, error, match):
    with pytest.raises(error, match=match):
        experts()(batch(4)[0], teacher_ids=ids)


def test_rejects_ids_without_a_mapping_and_teachers_that_give_something_else():
    inputs = batch(4)[0]
    with pytest.raises(ValueError, match="teacher_ids need by_id, the teacher of each id, got by_id=None"):
        Teachers(a=Net(), combine="logits")(inputs, teacher_ids=[0, 0, 0, 0])
    two = {"by_id": {0: "a", 1: "b"}}
    with pytest.raises(ValueError, match=r"one shape, got \{'a': \(5,\), 'b': \(8,\)\}; vocab_size="):
        Teachers(a=Net(), b=Net().body, **two)(inputs, teacher_ids=[0, 1, 1, 0])
    with pytest.raises(ValueError, match=r"teacher 'b' must give logits of its 2 samples, got shape \(1, 5\)"):
        Teachers(a=Net(), b=lambda x: Net().eval()(x[:1]), **two)(inputs, teacher_ids=[0, 1, 1, 0])
    with pytest.raises(ValueError, match="teacher 'a' must give a tensor or something with .logits, got tuple"):
        Teachers(a=lambda x: (x,), b=Net(), **two)(inputs, teacher_ids=[0, 1, 1, 0])


def test_repr_says_which_teacher_has_which_samples():
    assert "by_id={0: 'big', 1: 'small', 7: 'big'}, vocab_size=3" in repr(experts(vocab_size=3))


def test_inputs_that_one_teacher_changes_in_place_do_not_reach_the_next():
    first, second = (Net(seed=seed).eval() for seed in (1, 2))
    inputs, kept = batch()[0], batch()[0]
    for options in ({"combine": "logits"}, {"by_id": {0: "first", 1: "second"}}):
        teachers = Teachers(
            first=lambda x, bias: first(x) + bias.mul_(2.0), second=lambda x, bias: second(x), **options
        )
        ids = {"teacher_ids": [0, 0, 1, 1]} if teachers.by_id else {}
        with pytest.raises(ValueError, match="a teacher must leave its inputs as they are.*'first' changed them in pl"):
            teachers(inputs, torch.ones(5), **ids)
    taken = Teachers(first=lambda parts: first(parts.pop()), second=lambda parts: second(parts.pop()), combine="logits")
    with pytest.raises(ValueError, match="a teacher must leave its inputs as they are"):
        taken([inputs, kept])
    held = Teachers(first=lambda data: first(data.x.mul_(2.0)), second=lambda data: second(data.x), combine="logits")
    with pytest.raises(ValueError, match="a teacher must leave its inputs as they are"):
        held(SimpleNamespace(x=inputs.clone()))
    alone = Teachers(first=lambda x: first(x.mul_(2.0)), combine="logits")
    torch.testing.assert_close(alone(inputs), first(2.0 * kept))
