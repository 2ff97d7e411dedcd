"""What the page on language models says of real models, against loops over sequences, one at a time."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

import recipes_worker  # noqa: E402
from distill import Distiller, KLLoss, next_tokens  # noqa: E402
from language_models import VOCABULARY, llama, needs_packing  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs/language-models.md"
LENGTHS = [5, 9, 3]


def setting(student=None, teacher=None):
    """A Distiller, sequences of unequal length, and the loss of every position that predicts a token."""
    student, teacher = student or llama(8).double(), teacher or llama(16, seed=1).double()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, VOCABULARY, (1, length), generator=generator) for length in LENGTHS]
    return Distiller(student, teacher, {"kl": KLLoss(2.0)}), rows


def loop(distiller, rows, first=0):
    """Mean of cross-entropy and KL over the tokens of all rows from `first + 1` on, one row at a time."""
    values = []
    for row in rows:
        ours = distiller.student(input_ids=row, use_cache=False).logits[0]
        theirs = distiller.teacher(input_ids=row, use_cache=False).logits[0].detach()
        for t in range(first, row.shape[1] - 1):
            task = F.cross_entropy(ours[t][None], row[0, t + 1][None])
            kl = F.kl_div((ours[t] / 2).log_softmax(-1), (theirs[t] / 2).softmax(-1), reduction="sum")
            values.append(task + 4 * kl)
    return torch.stack(values).mean()


def same(distiller, out, expected):
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad(out.loss, [*distiller.parameters()], allow_unused=True)
    theirs = torch.autograd.grad(expected, [*distiller.parameters()], allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-11)


def padded(rows, *, left):
    longest = max(LENGTHS)
    pads = [(longest - row.shape[1], 0) if left else (0, longest - row.shape[1]) for row in rows]
    tokens = torch.cat([F.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    attention = torch.cat([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])
    return {"input_ids": tokens, "attention_mask": attention}, tokens.masked_fill(attention == 0, -100)


@pytest.mark.parametrize("absolute", [False, True])
def test_padding_on_either_side_changes_nothing(absolute):
    models = ()
    if absolute:
        sizes = {
            "n_positions": 16,
            "n_embd": 8,
            "n_layer": 1,
            "n_head": 2,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_implementation": "eager",
        }
        config = transformers.GPT2Config(vocab_size=VOCABULARY, resid_pdrop=0.0, **sizes)
        models = [transformers.GPT2LMHeadModel(config).double() for _ in range(2)]
    distiller, rows = setting(*models)
    expected = loop(distiller, rows)
    right, labels = padded(rows, left=False)
    target, mask = next_tokens(labels)
    assert torch.equal(next_tokens(labels, segments=right["attention_mask"])[1], mask)
    same(distiller, distiller(right, target, mask=mask), expected)
    expected = loop(distiller, rows)
    left, labels = padded(rows, left=True)
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    target, mask = next_tokens(labels, segments=left["attention_mask"])
    same(distiller, distiller(left, target, mask=mask), expected)


@needs_packing
def test_packed_sequences_are_as_if_each_were_alone():
    distiller, rows = setting()
    expected = loop(distiller, rows)
    packed = {"input_ids": torch.cat(rows, 1), "use_cache": False}
    packed["position_ids"] = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    segments = torch.cat([torch.full((length,), place) for place, length in enumerate(LENGTHS)])[None]
    target, mask = next_tokens(packed["input_ids"], segments=segments)
    assert mask.sum() == sum(LENGTHS) - 3
    same(distiller, distiller(packed, target, mask=mask), expected)


def test_prompts_do_not_count():
    distiller, rows = setting()
    expected = loop(distiller, rows, first=1)
    batch, labels = padded(rows, left=False)
    labels[:, :2] = -100
    target, mask = next_tokens(labels)
    same(distiller, distiller(batch, target, mask=mask), expected)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the page after each block, up to the one on vocabularies."""
    names, found = {"__name__": "page"}, {}
    with torch.random.fork_rng():
        for code, text in recipes_worker.blocks(PAGE):
            if "adapt.Columns" in text:
                break
            exec(code, names)
            found[text] = dict(names)
    return found


def after(page, part):
    (found,) = (names for text, names in page.items() if part in text)
    return found


def test_the_page_does_what_the_loops_check(page):
    left = after(page, "stands for a batch that is padded on the left")
    assert left["mask"].sum() == (left["left"]["attention_mask"].sum(1) - 1).sum()
    packed = after(page, '"use_cache": False')
    assert not packed["mask"][0, 4]
    assert packed["mask"].sum() == 10
    prompts = after(page, "answers_only")
    assert not prompts["mask"][:, :3].any()
    assert prompts["mask"][:, 3].all()


def test_labels_of_encoder_decoders_are_not_shifted(page):
    names = after(page, "T5ForConditionalGeneration(config)")
    answers, batch = names["answers"], names["batch"]
    distiller = names["sequences"].eval()  # without dropout
    out = distiller({**batch, "decoder_input_ids": names["decoder_input_ids"]}, answers, mask=answers != 0)
    expected = names["small"](**batch, labels=answers).loss  # the model's own
    torch.testing.assert_close(out.terms["task"], expected.detach())
    assert torch.equal(names["decoder_input_ids"][:, 1:], answers[:, :-1])
    ours, theirs = out.student.logits.detach() / 4, out.teacher.logits / 4
    kl = 16 * F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(out.terms["distillation"], kl.mean())


def test_a_longer_prompt_of_the_teacher_is_aligned_with_the_answer(page):
    names = after(page, "teacher_inputs=long")
    total, count = 0.0, 0
    for i in range(4):
        length = int(names["attention_mask"][i].sum())
        row = names["input_ids"][i : i + 1, :length]
        with torch.no_grad():
            ours = names["student"](input_ids=row).logits[0] / 4
            theirs = names["teacher"](input_ids=torch.cat([names["context"][i : i + 1], row], 1)).logits[0, 6:] / 4
        for t in range(length - 1):
            total += 16 * F.kl_div(ours[t].log_softmax(-1), theirs[t].softmax(-1), reduction="sum").item()
            count += 1
    assert names["out"].loss.item() == pytest.approx(total / count, rel=1e-3)
