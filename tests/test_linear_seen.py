"""What a model does to its logits after the head, and positions that the head did not see: found, not compared."""

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from distill import Distiller, KLLoss, LinearCrossEntropyLoss, LinearLogitLoss, LinearLoss, Term
from distill.losses import _seen
from language_models import VOCABULARY, llama

TOKENS = torch.arange(1, 13).view(2, 6)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def gemma():
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.5)
    return Gemma2ForCausalLM(config)


def cohere():
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625))


def granite():
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0))


def distilled(teacher, **options):
    student = llama(8)
    loss = LinearLoss(KLLoss(), student.lm_head, teacher.lm_head, **options)
    return Distiller(student, teacher, Term(loss, at="model.norm"), task_loss=None)


@pytest.mark.parametrize(
    ("build", "words", "options"),
    [
        (gemma, "those of the teacher are a curved function of those of its head", {"teacher_softcap": 0.5}),
        (cohere, "those of the teacher are 0.0625 times those of its head", {"teacher_scale": 0.0625}),
        (granite, "those of the teacher are 0.125 times those of its head", {"teacher_scale": 1 / 8}),
    ],
)
@pytest.mark.parametrize("kept", [0, 1])
def test_a_teacher_that_changes_its_logits_after_the_head(build, words, options, kept):
    teacher = build()
    batch = {"input_ids": TOKENS, "logits_to_keep": kept}
    with pytest.raises(ValueError, match=f"term 'distillation': .*{words}.* teacher_scale= .* teacher_softcap="):
        distilled(teacher)(batch)
    distiller = distilled(teacher, **options)
    value = distiller(batch).loss
    with torch.no_grad():
        logits = [model(input_ids=TOKENS).logits for model in (distiller.student, teacher)]
    torch.testing.assert_close(value, KLLoss()(*logits))


def test_a_student_and_linear_logit_loss_are_looked_at_too():
    student, teacher = granite(), llama(8)
    heads = student.lm_head, teacher.lm_head
    for loss in (LinearLogitLoss(*heads), LinearLoss(KLLoss(), *heads)):
        distiller = Distiller(student, teacher, Term(loss, at="lm_head:input"), task_loss=None)
        with pytest.raises(ValueError, match=r"the student are 0.125 times .* student_scale="):
            distiller({"input_ids": TOKENS})
    task = LinearCrossEntropyLoss(heads[0])
    options = {"task_loss": task, "task_output": lambda out: out.hidden_states[-1]}
    distiller = Distiller(student, None, {}, **options)
    with pytest.raises(ValueError, match="term 'task': .* the student are 0.125 times"):
        distiller({"input_ids": TOKENS, "output_hidden_states": True}, TOKENS)
    loss = LinearLogitLoss(*heads, student_scale=1 / 8)
    Distiller(student, teacher, Term(loss, at="model.norm"), task_loss=None)({"input_ids": TOKENS})


def test_a_tied_t5_with_dropout():
    torch.manual_seed(0)
    options = {"d_model": 64, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    student, teacher = (
        T5ForConditionalGeneration(T5Config(vocab_size=200, tie_word_embeddings=True, dropout_rate=0.1, **options))
        for _ in range(2)
    )
    loss = LinearLoss(KLLoss(), student.lm_head, teacher.lm_head)
    distiller = Distiller(student, teacher, Term(loss, at="decoder.final_layer_norm"), task_loss=None)
    batch = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]}
    with pytest.raises(ValueError, match=r"are about 0\.1\d? times those of its head"):
        distiller(batch)
    scale = 64**-0.5
    loss = LinearLoss(KLLoss(), student.lm_head, teacher.lm_head, student_scale=scale, teacher_scale=scale)
    distiller = Distiller(student, teacher, Term(loss, at="decoder.final_layer_norm"), task_loss=None).train()
    distiller(batch)  # dropout makes the logits others than those of the head, but not by a factor


class Model(nn.Module):
    """A model that returns logits; `after` is what it does to them."""

    def __init__(self, width, after=lambda logits: logits, vocabulary=40):
        super().__init__()
        self.norm, self.head, self.after = nn.Linear(5, width), nn.Linear(width, vocabulary), after

    def forward(self, x):
        return self.after(self.head(self.norm(x)))


def build(after, at="norm", **options):
    torch.manual_seed(0)
    student, teacher = Model(6, after), Model(9)
    return Distiller(
        student, teacher, Term(LinearLoss(KLLoss(), student.head, teacher.head), at=at, **options), task_loss=None
    )


def test_a_factor_is_found_where_squares_overflow_half_precision():
    distiller = build(lambda logits: 2 * logits).half()
    with torch.no_grad():
        distiller.student.head.weight *= 1000
    with pytest.raises(ValueError, match="those of the student are 2 times those of its head"):
        distiller(torch.ones(3, 4, 5, dtype=torch.half))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_change_after_the_head_passes(dtype):
    x = torch.randn(3, 4, 5, dtype=dtype)
    for after in (
        lambda logits: logits,
        lambda logits: logits.flip(1),  # other positions
        lambda logits: logits + 3e-3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)),  # noise
        lambda logits: logits[..., :-1],  # another vocabulary
        lambda logits: logits.detach().fill_(torch.nan),
        lambda logits: logits[:1],
        lambda logits: {"other": logits},
    ):
        build(after).to(dtype)(x)
    build(lambda logits: logits / 3, at=("norm", "norm"), student=lambda hidden: hidden / 3)(x.float())
    scaled = build(lambda logits: logits / 3).to(dtype)
    with pytest.raises(ValueError, match="the student are 0.33"):
        scaled(x)


def test_a_soft_cap_is_found_once_logits_are_large():
    distiller = build(lambda logits: 30 * torch.tanh(logits / 30))
    small = torch.randn(3, 4, 5)
    with torch.no_grad():
        distiller(0.1 * small)
        distiller.student.head.weight.mul_(100)
        with pytest.raises(ValueError, match="a curved function"):
            distiller(small)


def test_a_slight_soft_cap_is_told_from_noise():
    logits, noise = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    assert _seen._is_curve(30 * torch.tanh(2 * logits / 30), 2 * logits, 1e-3)
    assert not _seen._is_curve(2 * logits + 1e-2 * noise, 2 * logits, 1e-3)


def test_it_is_asked_at_calls_1_2_4_8(monkeypatch):
    distiller, x, calls = build(lambda logits: logits), torch.randn(3, 4, 5), []
    monkeypatch.setattr(_seen, "_difference", lambda *args: calls.append(args))
    for _ in range(9):
        distiller(x)
    assert len(calls) == 2 * 4


@pytest.mark.parametrize("kind", [LinearLogitLoss, lambda *heads: LinearLoss(KLLoss(), *heads)])
def test_one_position_of_many_is_refused_unless_said(kind):
    student, teacher = llama(8), llama(16)
    loss = kind(student.lm_head, teacher.lm_head)
    distiller = Distiller(student, teacher, Term(loss, at="lm_head:input"), task_loss=None)
    last = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "logits_to_keep": 1}
    with pytest.raises(ValueError, match=r"those of all 6 positions, got 1: .*at=\"model.norm\".*shape, \(2, 1\)"):
        distiller(last)
    for marks in ({"mask": torch.ones(2, 6)}, {"target": TOKENS}):
        with pytest.raises(ValueError, match=r"must be shaped like the per-sample values, \(2, 1\)"):
            distiller(last, **marks)
    said = distiller(last, mask=torch.ones(2, 1, dtype=torch.bool))
    torch.testing.assert_close(said.loss, distiller(last, TOKENS[:, :1]).loss)
    distiller({"input_ids": TOKENS[:, :1]})  # there is but one
    whole = Distiller(student, teacher, Term(loss, at="model.norm"), task_loss=None)
    torch.testing.assert_close(whole(last).loss, distiller({"input_ids": TOKENS}).loss)


def test_labels_of_other_positions_are_refused_though_the_loss_uses_none():
    student, teacher = llama(8), llama(16)
    loss = LinearLoss(KLLoss(), student.lm_head, teacher.lm_head)
    hidden = torch.randn(2, 1, 8), torch.randn(2, 1, 16)
    with pytest.raises(ValueError, match=r"labels must be shaped like the per-sample values, \(2, 1\), got \(2, 6\)"):
        loss(*hidden, TOKENS)
    loss(*hidden, TOKENS[:, :1])
