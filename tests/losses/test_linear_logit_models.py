"""LinearLogitLoss as a term of the Distiller, with causal language models."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill import Distiller, LinearLogitLoss, LogitLoss, Term
from linear_heads import as_if_large, traces_functions


class LanguageModel(nn.Module):
    """A causal transformer whose forward gives hidden states, or logits if it is asked."""

    def __init__(self, width, vocabulary=512, *, seed=0, logits=False, tied=False):
        super().__init__()
        self.logits = logits
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        states = self.norm(self.block(self.embedding(tokens), src_mask=causal, is_causal=True))
        return self.head(states) if self.logits else states


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.update(tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def has_logits(self, samples, vocabulary):
        return any(vocabulary in shape and np.prod(shape) >= samples * vocabulary for shape in self.seen)


TOKENS = torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_language_models_in_a_distiller_never_form_logits(frozen, tied, monkeypatch):
    as_if_large(monkeypatch)
    student, teacher = LanguageModel(16, tied=tied), LanguageModel(24, seed=1)
    student.head.requires_grad_(not frozen)
    loss = LinearLogitLoss(student.head, teacher.head)
    assert loss.plan(TOKENS.numel()).method == ("factor" if frozen else "gram")
    distiller = Distiller(student, teacher, loss, task_loss=None)
    mask = TOKENS > 100
    with Shapes() as shapes:
        out = distiller(TOKENS, mask=mask)
        out.loss.backward()
    assert not shapes.has_logits(TOKENS.numel(), 512)

    twin, giant = LanguageModel(16, logits=True, tied=tied), LanguageModel(24, seed=1, logits=True)
    twin.head.requires_grad_(not frozen)
    with Shapes() as shapes:
        expected = Distiller(twin, giant, LogitLoss(), task_loss=None)(TOKENS, mask=mask)
        expected.loss.backward()
    assert shapes.has_logits(TOKENS.numel(), 512)
    torch.testing.assert_close(out.loss, expected.loss)
    for ours, theirs in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_term_taps_the_heads_inputs():
    student, teacher = LanguageModel(16, logits=True), LanguageModel(24, seed=1, logits=True)
    loss = LinearLogitLoss(student.head, teacher.head)
    for at in ("head:input", "norm"):
        out = Distiller(student, teacher, Term(loss, at=at), task_loss=None)(TOKENS)
        torch.testing.assert_close(out.loss, LogitLoss()(student(TOKENS), teacher(TOKENS)))


def test_distiller_trains_the_students_head_once_and_never_the_teachers():
    student, teacher = LanguageModel(16), LanguageModel(24, seed=1)
    distiller = Distiller(student, teacher, LinearLogitLoss(student.head, teacher.head), task_loss=None)
    assert list(distiller.state_dict()) == [f"student.{name}" for name in student.state_dict()]
    assert len(list(distiller.parameters())) == len(list(student.parameters()))
    before = [tensor.clone() for tensor in teacher.parameters()]
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = distiller(TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(map(torch.equal, before, teacher.parameters()))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copy_of_a_distiller_refers_to_the_heads_of_its_own_models(clone):
    student, teacher = LanguageModel(16), LanguageModel(24, seed=1)
    student.head.requires_grad_(False)
    loss = LinearLogitLoss(student.head, teacher.head, method="factor")
    distiller = Distiller(student, teacher, loss, task_loss=None)
    expected = distiller(TOKENS).loss
    twin = clone(distiller)
    copied = twin.losses["distillation"]
    assert copied.student_head is twin.student.head
    assert copied.student_head is not student.head
    assert copied.teacher_head is twin.teacher.head
    assert torch.equal(twin(TOKENS).loss, expected)
    with torch.no_grad():
        twin.student.head.weight.zero_()
    assert not torch.equal(twin(TOKENS).loss, expected)
    assert torch.equal(distiller(TOKENS).loss, expected)


def test_follows_the_models_to_another_dtype():
    student, teacher = LanguageModel(16), LanguageModel(24, seed=1)
    student.head.requires_grad_(False)
    distiller = Distiller(student, teacher, LinearLogitLoss(student.head, teacher.head), task_loss=None)
    before = distiller(TOKENS).loss
    after = distiller.double()(TOKENS).loss
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), before)


@traces_functions
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_distiller_with_linear_heads_is_traced_whole(frozen, large, monkeypatch):
    if large:
        as_if_large(monkeypatch)
    student, teacher = LanguageModel(16), LanguageModel(24, seed=1)
    student.head.requires_grad_(not frozen)
    distiller = Distiller(student, teacher, LinearLogitLoss(student.head, teacher.head), task_loss=None)
    torch.compiler.reset()
    compiled = torch.compile(distiller, fullgraph=True, backend="aot_eager")
    expected, ours = distiller(TOKENS).loss, compiled(TOKENS).loss
    torch.testing.assert_close(ours, expected)
    wanted = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for a, b in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
