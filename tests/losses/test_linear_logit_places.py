"""Heads that a model has replaced or sharded, and heads that saw fewer positions than there are."""

import copy
import gc
import pickle
import re
import warnings
import weakref

import pytest
import torch
from torch import nn

from distill import Distiller, KLLoss, LinearLogitLoss, LinearLoss, LogitLoss, Term
from linear_heads import METHODS, LoRA, by_logits, heads, hidden
from workers import needs_gloo, run_workers


class Model(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.body, self.top = nn.Identity(), nn.ModuleDict({"head": head})


def test_check_models_notices_a_head_that_was_replaced():
    pair = heads()
    student, teacher = Model(pair[0]), Model(pair[1])
    loss = LinearLogitLoss(*pair)
    for _ in range(2):
        loss.check_models(student, teacher)
    for side, model in (("student", student), ("teacher", teacher)):
        head = model.top["head"]
        for other in (copy.deepcopy(head), LoRA(head)):
            model.top["head"] = other
            with pytest.raises(ValueError, match=rf"{side}_head must be the head that the model has, but Model has .*"):
                loss.check_models(student, teacher)
        del model.top["head"]
        with pytest.raises(ValueError, match=r"Model has another module at 'top.head' now: build the loss anew"):
            loss.check_models(student, teacher)
        model.top["head"] = head
        loss.check_models(student, teacher)


def test_a_loss_of_the_heads_that_a_model_was_copied_from_is_refused():
    pair = heads()
    student, teacher = Model(pair[0]), Model(pair[1])
    for loss in (LinearLogitLoss(*pair), LinearLoss(KLLoss(), *pair)):
        twin = copy.deepcopy(student)
        with pytest.raises(
            ValueError, match=r"student_head .* Model has a copy of it at 'top.head': build the loss with"
        ):
            Distiller(twin, teacher, Term(loss, at="top.head:input"), task_loss=None)
        with pytest.raises(ValueError, match=r"teacher_head .* Model has a copy of it at 'top.head'"):
            loss.check_models(student, copy.deepcopy(teacher))
        # A Distiller is copied with its heads; models that never had the head pass, and so does one that shares it.
        whole = copy.deepcopy(Distiller(student, teacher, Term(loss, at="top.head:input"), task_loss=None))
        whole.losses["distillation"].check_models(whole.student, whole.teacher)
        with torch.no_grad():
            twin.top["head"].weight.add_(1)
        loss.check_models(twin, nn.Identity())
        tied = Model(copy.copy(pair[0]))
        loss.check_models(tied, teacher)


def test_check_models_finds_every_place_of_a_shared_head():
    pair = heads()
    student = Model(pair[0])
    student.tied = pair[0]
    loss = LinearLogitLoss(*pair)
    loss.check_models(student, None)
    student.tied = heads()[0]
    with pytest.raises(ValueError, match="another module at 'tied' now"):
        loss.check_models(student, None)


def test_check_models_lets_pass_what_never_had_the_head():
    loss = LinearLogitLoss(*heads())
    for teacher in (None, lambda x: x, nn.Identity()):
        loss.check_models(nn.Identity(), teacher)
    other = Model(loss.student_head)
    loss.check_models(other, None)  # another model is another place
    loss.check_models(loss.student_head, None)


def test_check_models_of_a_copy_starts_anew_and_keeps_no_model_alive():
    pair = heads()
    student = Model(pair[0])
    loss = LinearLogitLoss(*pair)
    loss.check_models(student, None)
    for twin in (copy.deepcopy([loss, student]), pickle.loads(pickle.dumps([loss, student]))):
        twin[0].check_models(twin[1], None)
        twin[1].top["head"] = heads()[0]
        with pytest.raises(ValueError, match="another module at 'top.head' now"):
            twin[0].check_models(twin[1], None)
    loss.check_models(student, None)
    seen = weakref.ref(student)
    del student
    gc.collect()
    assert seen() is None


def test_a_distiller_refuses_a_head_that_its_model_has_replaced():
    """A vocabulary that grows gives a transformers model another head, and so does an assignment."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    models = [
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, hidden_size=size, tie_word_embeddings=False))
        for size in (8, 16)
    ]
    tokens = torch.arange(10).view(2, 5)
    terms = Term(LinearLogitLoss(*(model.lm_head for model in models)), at="model.norm")
    distiller = Distiller(*models, terms, task_loss=None)
    expected = LogitLoss()(*(model(tokens).logits for model in models))
    torch.testing.assert_close(distiller({"input_ids": tokens, "logits_to_keep": 1}).loss, expected)

    narrow = Distiller(*models, Term(terms.loss, at="lm_head:input"), task_loss=None)
    for given in ({"mask": torch.ones(2, 5)}, {"target": torch.zeros(2, 5, dtype=torch.long)}):
        with pytest.raises(ValueError, match=r"must be shaped like the per-sample values, \(2, 1\), got \(2, 5\)"):
            narrow({"input_ids": tokens, "logits_to_keep": 1}, **given)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models[0].resize_token_embeddings(48)
    if models[0].lm_head is not terms.loss.student_head:  # a release of transformers may keep the module
        with pytest.raises(ValueError, match="LlamaForCausalLM has another module at 'lm_head' now: build the loss"):
            distiller(tokens)
    models[0].lm_head = nn.Linear(8, 40)
    with pytest.raises(ValueError, match="student_head must be the head that the model has, but LlamaForCausalLM has"):
        distiller(tokens)


def test_replaced_parameters_are_seen_at_each_call():
    for trains in (False, True):
        pair, states = heads(trains=trains), hidden(5)
        loss = LinearLogitLoss(*pair, method="gram" if trains else "factor")
        loss(*states)
        for head in pair:
            head.weight = nn.Parameter(head.weight.detach() + 1, requires_grad=head.weight.requires_grad)
            head.bias = nn.Parameter(head.bias.detach() - 1, requires_grad=head.weight.requires_grad)
            torch.testing.assert_close(loss(*states), by_logits(pair, states))


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_rejects_masks_and_labels_of_other_positions(method):
    loss = LinearLogitLoss(*heads(trains=method != "factor"), method=method)
    states = hidden(2, 1)
    match = r"must be shaped like the per-sample values, \(2, 1\), got \(2, 5\); where the heads see fewer positions .*"
    with pytest.raises(ValueError, match=f"mask {match}logits_to_keep"):
        loss(*states, mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=f"labels {match}let the loss listen at the module before them"):
        loss(*states, torch.zeros(2, 5, dtype=torch.long))
    loss(*states, torch.zeros(2, 1, dtype=torch.long), mask=torch.ones(2, 1))
    # What is no label of each position says nothing of how many there are.
    for target in (
        torch.zeros(2, dtype=torch.long),
        torch.rand(2, 5),
        torch.zeros(2, 1, 4, dtype=torch.long),
        {"a": 1},
    ):
        loss(*states, target)


SHARDED = """
import sys
import torch, torch.distributed as dist
from torch import nn
from distill import LinearLogitLoss, linear_logit_loss, LogitLoss
folder = sys.argv[1]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    from torch.distributed._composable.fsdp import fully_shard
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
student, teacher = nn.Linear(6, 40), nn.Linear(9, 40)
states = torch.randn(5, 6, requires_grad=True), torch.randn(5, 9)
expected = LogitLoss()(student(states[0]), teacher(states[1]))
(right,) = torch.autograd.grad(expected, student.weight)
loss = LinearLogitLoss(student, teacher)
loss(*states)
plain = student.weight.detach().clone(), student.bias.detach().clone()
fully_shard(student, mesh=mesh)
lines = open(folder + "/lines", "w")
for call in (lambda: loss(*states), lambda: LinearLogitLoss(student, teacher), lambda: loss.plan(5),
             lambda: linear_logit_loss(states[0], student.weight, states[1], teacher.weight)):
    try:
        call()
    except ValueError as error:
        print(error, file=lines)
full = student.weight.full_tensor(), student.bias.full_tensor()
value = linear_logit_loss(
    states[0], full[0], states[1], teacher.weight, student_bias=full[1], teacher_bias=teacher.bias
).mean()
assert torch.equal(full[0], plain[0])
value.backward()
torch.testing.assert_close(value, expected)
torch.testing.assert_close(student.weight.grad.full_tensor(), right)
dist.destroy_process_group()
lines.close()
"""


@needs_gloo
def test_rejects_sharded_heads_and_names_the_cure(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    run_workers(tmp_path / "sharded.py", [[tmp_path]])
    lines = (tmp_path / "lines").read_text().splitlines()
    assert len(lines) == 4
    for line in lines:
        assert re.match(
            r"(student_weight|the weight of student_head) must be whole in each process, got a DTensor", line
        )
        assert "reshard_after_forward=False)), or call linear_logit_loss with its weight.full_tensor()" in line
