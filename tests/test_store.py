"""A teacher on disk: what is written is what is read, by whoever asks for it; others are refused."""

import copy
import io
import math
import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from contract import pickled_modules
from distill import (
    Distiller,
    HintLoss,
    KLLoss,
    LinearLoss,
    StoredTeacher,
    TeacherOutput,
    Teachers,
    TeacherWriter,
    Term,
    TopK,
    fingerprint,
    record,
)
from models import Net
from stored import generator, integers, random, same, shards, write

forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


# --- what is written is what is read ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)], ids=["vectors", "sequences", "maps"])
def test_tensors_come_back_bit_for_bit_and_in_the_order_asked(tmp_path, dtype, shape):
    output = random(6, *shape, dtype=dtype)
    output[0, 0] = -math.inf  # a class without a probability
    teacher = write(tmp_path, range(10, 16), output)
    order = [3, 0, 5, 3]
    read = teacher([10 + at for at in order])
    assert read.dtype == dtype
    assert torch.equal(read, output[order])


def test_dtype_says_what_is_stored(tmp_path):
    output = random(4, 5)
    assert torch.equal(write(tmp_path, range(4), output, dtype=torch.bfloat16)(range(4)), output.bfloat16())


def test_sequences_of_several_lengths_are_padded_at_the_end(tmp_path):
    rows = [random(length, 5, seed=length) for length in (3, 1, 4)]
    read = write(tmp_path, [0, 1, 2], rows)([2, 0])
    assert torch.equal(read[0], rows[2])
    assert torch.equal(read[1], torch.cat([rows[0], torch.zeros(1, 5)]))


@pytest.mark.parametrize("kind", ["left", "right", "scattered"])
@pytest.mark.parametrize("k", [None, 3])
def test_positions_that_the_mask_hides_are_not_stored_and_those_it_shows_go_to_their_places(tmp_path, kind, k):
    shown = {
        "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
        "left": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]],
        "scattered": [[1, 0, 1, 0, 1], [1, 1, 0, 1, 1]],
    }
    mask = torch.tensor(shown[kind])
    logits, tokens = random(2, 5, 7), integers(9, 2, 5)
    logits[mask == 0] = math.nan
    teacher = write(tmp_path, [0, 1], logits, tokens, mask=mask, k=k)
    assert len(load_file(shards(tmp_path)[0])["output" if k is None else "output/log_tail"]) == 7
    read = teacher([1, 0], tokens.flip(0), mask.flip(0))
    shown, given = mask.flip(0).bool(), logits.flip(0)
    if k is None:
        assert torch.equal(read[shown], given[shown])
        assert (read[~shown] == 0).all()
    else:
        assert same(read[shown], TopK.of(given[shown], k).to(torch.float16))
        even = read[~shown].check(7)
        torch.testing.assert_close(even.log_tail, torch.full((3,), math.log(4 / 7)))
        torch.testing.assert_close(even.log_probs, torch.full((3, 3), -math.log(7)).half())


def decoded(arrays, k, vocabulary):
    """Class ids from the arrays of a shard, one by one: as docs/stored-teachers.md describes them."""
    low = arrays["output/indices"].to(torch.int64)
    if vocabulary <= 65_536 or vocabulary > 131_072:
        return low
    rows = []
    for ids, high in zip(low.tolist(), arrays["output/indices_high"].tolist(), strict=True):
        rows.append([low + 65_536 * (high[at // 8] >> (7 - at % 8) & 1) for at, low in enumerate(ids)])
    return torch.tensor(rows)


@pytest.mark.parametrize("k", [7, 32])
@pytest.mark.parametrize("vocabulary", [100, 65_536, 65_537, 131_072, 131_073])
def test_packed_top_k_is_what_the_page_describes_and_comes_back(tmp_path, vocabulary, k):
    indices = random(3, 4, 50).topk(k).indices * (vocabulary // 50)
    indices[:, :, 0] = vocabulary - 1
    rows = random(3, 4, k + 1, seed=1).mul(3).log_softmax(-1)
    topk = TopK(indices, rows[..., :k], rows[..., k], 2.0)
    read = write(tmp_path, range(3), topk, vocabulary=vocabulary, temperature=2.0)(range(3))
    rounded = topk.to(torch.float16)
    assert same(read, rounded)
    assert torch.equal(read.indices.long(), indices)
    arrays = load_file(shards(tmp_path)[0])
    assert torch.equal(decoded(arrays, k, vocabulary), indices.reshape(12, k))
    assert torch.equal(arrays["output/log_probs"], rounded.log_probs.reshape(12, k))
    assert torch.equal(arrays["output/log_tail"], rounded.log_tail.reshape(12))
    assert arrays["output/log_tail"].dtype == torch.float32
    wanted = {100: torch.uint16, 65_536: torch.uint16, 131_073: torch.int32}.get(vocabulary, torch.uint16)
    assert arrays["output/indices"].dtype == wanted


def test_a_token_takes_at_most_140_bytes_at_k_32(tmp_path):
    indices = random(8, 256, 100).topk(32).indices * 1310
    rows = random(8, 256, 33, seed=1).log_softmax(-1)
    topk = TopK(indices, rows[..., :32], rows[..., 32])
    write(tmp_path, range(8), topk, integers(9, 8, 256), vocabulary=131_072)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) / (8 * 256) <= 140


def test_the_writer_takes_the_k_largest_itself(tmp_path):
    logits = random(2, 3, 40)
    read = write(tmp_path, [0, 1], SimpleNamespace(logits=logits), k=5, temperature=2.0)([0, 1])
    assert same(read, TopK.of(logits, 5, temperature=2.0).to(torch.float16))
    p = np.exp(logits.double().numpy() / 2)
    p = -np.sort(-p / p.sum(-1, keepdims=True), -1)
    np.testing.assert_allclose(read.log_probs.double().exp().numpy(), p[..., :5], rtol=3e-3)
    whole = read.log_probs.double().exp().sum(-1) + read.log_tail.double().exp()
    torch.testing.assert_close(whole, torch.ones(2, 3).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["tensor", "sequence", "top-k", "half top-k"])
def test_what_was_added_may_change_before_it_is_written(tmp_path, kind):
    ids, output = torch.arange(2), random(2, 3, 200_000) if "top" in kind else random(2, 3, 5)
    output = output[:, 0].clone() if kind == "tensor" else output
    if "top" in kind:
        output = TopK.of(output, 4)
        output = TopK(output.indices.int(), output.log_probs, output.log_tail)
        output = output.to(torch.float16) if kind == "half top-k" else output
    wanted = copy.deepcopy(output)
    with TeacherWriter(tmp_path, vocabulary=None if kind in ("tensor", "sequence") else 200_000) as writer:
        writer.add(ids, output)
        ids.zero_()
        for tensor in (
            [output] if isinstance(output, torch.Tensor) else [output.indices, output.log_probs, output.log_tail]
        ):
            tensor.zero_()
    asked = StoredTeacher(tmp_path)
    assert same(asked([0, 1]), wanted.to(torch.float16) if isinstance(wanted, TopK) else wanted)


def test_inference_tensors_are_stored(tmp_path):
    with torch.inference_mode():
        output, tokens = random(2, 3, 5) * 1, integers(9, 2, 3) * 1
    read = write(tmp_path / "a", [0, 1], TeacherOutput(output, {"fc": output}), tokens)([0, 1], tokens)
    assert torch.equal(read, output)
    assert same(write(tmp_path / "b", [0, 1], output, k=2)([0, 1]), TopK.of(output, 2).to(torch.float16))


def test_drawn_classes_and_lists_of_top_k_are_stored_too(tmp_path):
    logits = [random(length, 30, seed=length) for length in (2, 5)]
    topks = [TopK.of(each, 4, samples=3, generator=generator()) for each in logits]
    read = write(tmp_path, [0, 1], topks, vocabulary=30)([1])
    assert (read.k, read.samples) == (4, 3)
    assert same(read[0], topks[1].to(torch.float16))
    short = StoredTeacher(tmp_path)([0, 1])[0, 2:]  # padding is a TopK like any other
    assert short.check(30).k == 4


def test_classes_without_a_probability_are_stored(tmp_path):
    logits = random(2, 3, 9)
    logits[..., 2:] = -math.inf
    read = write(tmp_path, [0, 1], logits, k=4)([0, 1])
    assert same(read, TopK.of(logits, 4).to(torch.float16))
    assert (read.log_probs[..., 2:] == -math.inf).all()
    assert (read.log_probs.exp().sum(-1) + read.log_tail.exp() - 1).abs().max() < 1e-3


def test_all_classes_may_be_kept(tmp_path):
    logits = random(2, 5)
    read = write(tmp_path, [0, 1], logits, k=5)([0, 1])
    student = random(2, 5, seed=1)
    torch.testing.assert_close(KLLoss(1.0)(student, read), KLLoss(1.0)(student, logits), rtol=1e-3, atol=1e-3)


def test_outputs_may_be_mappings_and_features_may_stand_alone(tmp_path):
    assert torch.equal(write(tmp_path / "a", [0], {"logits": random(1, 5)})([0]), random(1, 5))
    teacher = write(tmp_path / "b", [0], TeacherOutput(features={"fc": random(1, 5)}))
    assert teacher([0]) is None
    assert torch.equal(teacher.read([0]).features["fc"], random(1, 5))


# --- a teacher like any other ---


def stored(folder, model, inputs, at=(), **options):
    return write(folder, range(len(inputs)), record(model, inputs, at), inputs, model=model, **options)


def test_a_distiller_gives_the_same_from_disk_as_live(tmp_path):
    student, teacher, inputs, labels = Net(), Net(width=16, seed=1).eval(), random(4, 6), torch.arange(4)
    terms = {
        "soft": KLLoss(),
        "hint": Term(HintLoss(8, 16), at="body.1"),
        "pool": Term(HintLoss(8, 16), at="fc:input"),
        "two": Term(SumOf(), at=("fc", ("body", "body.0#0"))),
    }
    asked = stored(tmp_path, teacher, inputs, ["body.1", "fc:input", "body", "body.0#0"])
    live = Distiller(student, teacher, terms)(inputs, labels)
    order = torch.tensor([2, 0, 3, 1])
    for question in (order, (order, inputs[order]), {"ids": order, "tokens": inputs[order]}):
        out = Distiller(student, asked, terms)(inputs[order], labels[order], teacher_inputs=question)
        torch.testing.assert_close(out.loss, live.loss)
        assert out.terms.keys() == live.terms.keys()
    read = asked.read(order)
    out = Distiller(student, None, terms)(inputs[order], labels[order], teacher_output=read)
    torch.testing.assert_close(out.loss, live.loss)
    few = StoredTeacher(tmp_path, features=["body"])
    assert list(few.read(order).features) == ["body"]


class SumOf(nn.Module):
    def forward(self, student, teacher, target=None):
        return student.sum() * sum(part.sum() for part in teacher)


def test_a_loss_takes_stored_top_k_as_it_takes_a_live_one(tmp_path):
    student, teacher, inputs = nn.Linear(6, 40), nn.Linear(6, 40), random(4, 6)
    with torch.no_grad():
        logits = teacher(inputs)
    asked = write(tmp_path, range(4), logits, k=8, temperature=4.0)
    loss = KLLoss(temperature=4.0)
    live = Distiller(student, lambda x: TopK.of(teacher(x), 8, temperature=4.0).to(torch.float16), loss, task_loss=None)
    out = Distiller(student, asked, loss, task_loss=None)(inputs, teacher_inputs=range(4))
    assert out.loss == live(inputs).loss
    with pytest.raises(ValueError, match=r"temperature.*2\.0.*4\.0"):
        Distiller(student, asked, KLLoss(temperature=2.0), task_loss=None)(inputs, teacher_inputs=range(4))


def test_stored_hidden_states_serve_every_temperature_through_the_head(tmp_path):
    student, teacher = (nn.Sequential(nn.Embedding(9, width), nn.Linear(width, 50)) for width in (4, 6))
    teacher.eval().bfloat16()
    ids = integers(9, 2, 3)
    asked = write(tmp_path, [0, 1], TeacherOutput(features={"0": record(teacher, ids, ["0"]).features["0"]}), ids)
    size = sum(path.stat().st_size for path in shards(tmp_path))
    assert load_file(shards(tmp_path)[0])["feature/0"].nbytes == 2 * 3 * 6 * 2 < size  # 2 d bytes a token
    for temperature in (1.0, 4.0):
        term = Term(LinearLoss(KLLoss(temperature), student[1], teacher[1]), at="0")
        live = Distiller(student, teacher, term, task_loss=None)(ids)
        out = Distiller(student, asked, term, task_loss=None)(ids, teacher_inputs=([0, 1], ids))
        assert out.loss == live.loss


def test_several_calls_and_inputs_of_one_module_are_heard_apart(tmp_path):
    features = {"block:input#1": random(2, 3, seed=1), "block#2": random(2, 3, seed=2)}
    asked = write(tmp_path, [0, 1], TeacherOutput(random(2, 3), features))
    student = nn.Sequential(nn.Linear(3, 3))

    def see(at):
        return Distiller(student, asked, Term(Keep(), at=("0", at)), task_loss=None)(
            random(2, 3), teacher_inputs=[0, 1]
        )

    for path, feature in features.items():
        see(path)
        assert torch.equal(Keep.seen, feature)
    with pytest.raises(ValueError, match="must be a tensor or a tuple of tensors, got NotStored"):
        see("block#1")
    with pytest.raises(ValueError, match="at least 4 times"):
        see("block#3")
    with pytest.raises(ValueError, match="must name a module of the teacher, got 'blok'; the nearest are 'block'"):
        see("blok")


class Keep(nn.Module):
    def forward(self, student, teacher, target=None):
        Keep.seen = teacher
        return student.sum()


def test_it_is_one_of_several_teachers(tmp_path):
    live, inputs = nn.Linear(6, 5), random(4, 6)
    asked = write(tmp_path, range(4), random(4, 5))
    both = Teachers(live=lambda ids: live(inputs[ids]), stored=asked, combine="logits")
    ids = torch.tensor([1, 3])
    torch.testing.assert_close(both(ids), (live(inputs[ids]) + random(4, 5)[ids]) / 2)


def train(distiller, inputs, labels, questions):
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    for step in range(6):
        ids = torch.randperm(len(inputs), generator=generator(step))[:8]
        optimizer.zero_grad()
        distiller(inputs[ids], labels[ids], teacher_inputs=questions(ids)).loss.backward()
        optimizer.step()
    return distiller.student.state_dict()


def ruin(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)


def test_training_without_the_teacher_ends_where_training_with_it_ends(tmp_path):
    inputs, labels, teacher = random(32, 6), integers(5, 32), Net(width=16, seed=1).eval()
    asked = stored(tmp_path, teacher, inputs)
    live = train(Distiller(Net(seed=2), teacher, KLLoss()), inputs, labels, lambda ids: inputs[ids])
    ruin(teacher)
    disk = train(Distiller(Net(seed=2), asked, KLLoss()), inputs, labels, lambda ids: (ids, inputs[ids]))
    for name, value in live.items():
        torch.testing.assert_close(disk[name], value)


def test_training_without_logits_and_without_the_teachers_body_ends_the_same(tmp_path):
    student, teacher = (nn.Sequential(nn.Embedding(9, width), nn.Linear(width, 50)) for width in (4, 6))
    students = student, copy.deepcopy(student)
    teacher.eval()
    tokens = integers(9, 32, 3)
    hidden = record(teacher, tokens, ["0"]).features
    asked = write(tmp_path, range(32), TeacherOutput(features=hidden), tokens)
    ends = []
    for student, known, question in zip(
        students, (teacher, asked), (lambda ids: tokens[ids], lambda ids: (ids, tokens[ids])), strict=True
    ):
        term = Term(LinearLoss(KLLoss(2.0), student[1], teacher[1]), at="0")
        ends.append(train(Distiller(student, known, term, task_loss=None), tokens, tokens, question))
        ruin(teacher[0])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value)


def test_state_copies_pickles_and_moves_are_those_of_a_module(tmp_path):
    asked = write(tmp_path, range(3), TeacherOutput(random(3, 5), {"model.norm": random(3, 2)}))
    assert not asked.state_dict()
    assert not [*asked.parameters()]
    assert [name for name, _ in asked.named_modules()] == ["", "model", "model.norm"]
    for twin in (copy.deepcopy(asked), pickle.loads(pickle.dumps(asked))):
        assert torch.equal(twin([2]), asked([2]))
        assert torch.equal(twin.read([2]).features["model.norm"], random(3, 2)[[2]])
    assert not [name for name in pickled_modules(asked) if "._" in name]
    assert asked.to("cpu")([0]).dtype == torch.float32
    assert asked.half()([0]).dtype == torch.float16
    assert asked.to("cpu")([0]).dtype == torch.float16
    assert asked.double().read([0]).features["model.norm"].dtype == torch.float64
    assert asked.to("meta")([0]).device.type == "meta"
    distiller = Distiller(Net(), StoredTeacher(tmp_path), KLLoss()).double()
    out = distiller(random(2, 6, dtype=torch.float64), torch.tensor([0, 1]), teacher_inputs=[0, 2])
    assert out.teacher.dtype == torch.float64
    twin = pickle.loads(pickle.dumps(distiller))
    assert torch.equal(twin.teacher([1]), distiller.teacher([1]))
    assert repr(asked).startswith("StoredTeacher(\n  '")


def test_top_k_moves_as_it_is_stored(tmp_path):
    asked = write(tmp_path, range(3), random(3, 9), k=2)
    assert asked.double()([0]).dtype == torch.float16
    assert asked.to("meta")([0]).device.type == "meta"


class Samples(torch.utils.data.Dataset):
    """Reads in the worker."""

    def __init__(self, asked):
        self.asked = asked

    def __len__(self):
        return len(self.asked)

    def __getitem__(self, at):
        return self.asked([at])[0]


@forks
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_read_it(tmp_path, method):
    asked = write(tmp_path, range(6), random(6, 5))
    loader = torch.utils.data.DataLoader(
        Samples(asked), batch_size=3, num_workers=1, multiprocessing_context=method, timeout=120
    )
    assert torch.equal(torch.cat([*loader]), random(6, 5))


def test_a_compiled_student_takes_what_a_stored_teacher_gives(tmp_path):
    asked, student = write(tmp_path, range(4), random(4, 5)), Net()
    distiller = Distiller(student, asked, KLLoss())
    inputs, labels = random(4, 6), torch.arange(4)
    wanted = distiller(inputs, labels, teacher_inputs=range(4)).loss
    compiled = torch.compile(distiller, backend="eager")
    torch.testing.assert_close(compiled(inputs, labels, teacher_inputs=torch.arange(4)).loss, wanted)


def test_ids_and_what_is_stored_can_be_asked(tmp_path):
    asked = write(tmp_path, [5, 1, 9], random(3, 5))
    assert asked.ids().tolist() == [1, 5, 9]
    assert len(asked) == 3
    assert 5 in asked
    assert 2 not in asked


# --- it belongs to what is asked ---


def test_other_tokens_are_refused_with_both_hashes(tmp_path):
    tokens = integers(100, 2, 6)
    asked = write(tmp_path, [0, 1], random(2, 6, 5), tokens)
    for same_tokens in (tokens.int(), [*tokens], tokens.flip(0).flip(0)):
        asked([0, 1], same_tokens)
    other = tokens.clone()
    other[1, 5] += 1
    with pytest.raises(ValueError, match=r"of id 1 must be those that the teacher saw, with the hash -?\d+, got -?\d+"):
        asked([0, 1], other)
    with pytest.raises(ValueError, match=r"of id 0 must be those"):
        asked([0, 1], tokens[:, :5])
    with pytest.raises(ValueError, match="give the mask as well"):
        asked([0, 1], torch.cat([tokens, torch.zeros(2, 1).long()], 1))
    with pytest.raises(ValueError, match="checked only where they were stored"):
        write(tmp_path / "none", [0, 1], random(2, 6, 5))([0, 1], tokens)


def test_padding_with_other_tokens_than_the_mask_hides_does_not_matter(tmp_path):
    tokens, mask = integers(100, 2, 6), torch.ones(2, 6)
    mask = mask.bool()
    mask[0, 4:] = False
    asked = write(tmp_path, [0, 1], random(2, 6, 5), tokens, mask=mask)
    longer = torch.cat([tokens, torch.full((2, 3), 7)], 1)
    read = asked([0, 1], longer, torch.cat([mask, torch.zeros(2, 3).bool()], 1))
    assert read.shape == (2, 9, 5)
    assert torch.equal(read[:, :6][mask], random(2, 6, 5)[mask])
    with pytest.raises(ValueError, match=r"the output of id 0 has 4 positions, got 5 in the mask"):
        asked([0], None, mask=torch.ones(1, 5).long())
    with pytest.raises(ValueError, match=r"of id 0 has 4 positions, got 6 tokens \(a padded batch needs its mask\)"):
        write(tmp_path / "list", [0], [random(4, 5)], [tokens[0]])([0], tokens[:1])


def view(image, sample, seed):
    """A crop and a flip that follow from the sample and the seed alone."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + sample)
    top, left, flip = (int(torch.randint(high, (), generator=draw)) for high in (5, 5, 2))
    cut = nn.functional.pad(image, (2, 2, 2, 2))[:, top : top + 8, left : left + 8]
    return cut.flip(-1) if flip else cut


def test_an_answer_belongs_to_one_augmented_view(tmp_path):
    images, teacher = random(4, 3, 8, 8), nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()

    def views(seed):
        return torch.stack([view(image, at, seed) for at, image in enumerate(images)])

    with TeacherWriter(tmp_path, model=teacher) as writer:
        for seed in (0, 1):
            pairs = torch.stack([torch.arange(4), torch.full((4,), seed)], 1)
            writer.add(pairs, record(teacher, views(seed)), views(seed))
    asked = StoredTeacher(tmp_path)
    pairs = torch.tensor([[2, 1], [0, 0]])
    pixels = torch.stack([view(images[2], 2, 1), view(images[0], 0, 0)])
    torch.testing.assert_close(asked(pairs, pixels), teacher(pixels))  # the same view, made again from its seed
    assert asked.ids().tolist() == [[at, seed] for at in range(4) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"of id \[2, 1\] must be those that the teacher saw"):
        asked(pairs, torch.stack([view(images[2], 2, 0), pixels[1]]))
    with pytest.raises(KeyError, match=r"every sample must be stored, got \[2, 7\], one of 1 that are not"):
        asked([[2, 7]])
    unchecked = asked([[2, 0]])
    assert not torch.allclose(unchecked, teacher(pixels[:1]))  # without pixels nothing is compared: a wrong number
    with pytest.raises(ValueError, match=r"ids in .* are pairs \(N, 2\) of a sample and a seed, got samples \(N,\)"):
        asked([2, 0])


def test_another_model_vocabulary_or_temperature_is_refused_with_both_values(tmp_path):
    model, other = nn.Linear(3, 20), nn.Linear(3, 20)
    write(tmp_path, [0], random(1, 20), model=model, k=4, temperature=2.0)
    StoredTeacher(tmp_path, model=model, vocabulary=20, temperature=2.0)
    with pytest.raises(
        ValueError, match=f"model of what is stored in .* must be '{fingerprint(other)}', got '{fingerprint(model)}'"
    ):
        StoredTeacher(tmp_path, model=other)
    with pytest.raises(ValueError, match=r"vocabulary of what .* must be 21, got 20"):
        StoredTeacher(tmp_path, vocabulary=21)
    with pytest.raises(ValueError, match=r"temperature of what .* must be 1\.0, got 2\.0"):
        StoredTeacher(tmp_path, temperature=1.0)
    logits = write(tmp_path / "logits", [0], random(1, 20), model="served, version 3")
    StoredTeacher(tmp_path / "logits", model="served, version 3", vocabulary=20, temperature=3.0)
    with pytest.raises(ValueError, match=r"vocabulary of what .* must be 21, got 20"):
        StoredTeacher(tmp_path / "logits", vocabulary=21)
    with pytest.raises(ValueError, match=r"must be 'other', got 'served, version 3'"):
        StoredTeacher(tmp_path / "logits", model="other")
    with pytest.raises(ValueError, match=r"features must be stored, those of \[\], got 'fc'"):
        StoredTeacher(tmp_path / "logits", features=["fc"])
    assert len(logits) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "other"}, "was written with model='mine', got 'other'"),
        ({}, "was written with model='mine', got None"),
        ({"model": "mine", "k": 5}, "was written with k=4, got 5"),
        ({"model": "mine", "k": 4, "temperature": 2.0}, "was written with temperature=1.0, got 2.0"),
        ({"model": "mine", "vocabulary": 7}, "was written with vocabulary=20, got 7"),
    ],
)
def test_a_writer_with_other_options_is_refused_before_it_writes(tmp_path, options, message):
    write(tmp_path, [0], random(1, 20), model="mine", k=4)
    with pytest.raises(ValueError, match=message):
        TeacherWriter(tmp_path, **options)


class Extra(nn.Linear):
    """Saves more than tensors."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def test_fingerprint_is_of_names_shapes_dtypes_and_numbers():
    model = nn.Linear(3, 2)
    first = fingerprint(model)
    assert first == fingerprint(copy.deepcopy(model))
    twin = nn.Sequential(copy.deepcopy(model))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.weight[1, 2] += 1e-6
    assert len({first, fingerprint(twin), fingerprint(changed), fingerprint(copy.deepcopy(model).bfloat16())}) == 4
    extra = Extra(3, 2)
    extra.load_state_dict(model.state_dict(), strict=False)
    assert fingerprint(extra) == first
    with pytest.raises(ValueError, match="must have plain tensors, got Tensor on meta as 'bias'; give a name"):
        fingerprint(nn.Linear(3, 2, device="meta"))
    with pytest.raises(TypeError, match="the model must be an nn.Module, got str"):
        fingerprint("model")


# --- refusals ---


def rejects(tmp_path, error, message, ids, output, tokens=None, *, mask=None, before=None, **options):
    with TeacherWriter(tmp_path, **options) as writer:
        if before is not None:
            writer.add(*before)
        with pytest.raises(error, match=message):
            writer.add(ids, output, tokens, mask=mask)
        assert len(writer) == (0 if before is None else len(before[0]))  # what was refused is not half added


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one, got"),
        ([0.5, 1.0], "got torch.float32"),
        ([[0, 1, 2]], r"got torch.int64 of shape \(1, 3\)"),
        (torch.tensor(3), r"of shape \(\)"),
        (["a", "b"], r"ids must be integers \(N,\), or pairs"),
        ([True], "got torch.bool"),
        ([3, 3], r"ids must differ, got 3 2 times"),
    ],
)
def test_rejects_what_are_no_ids(tmp_path, ids, message):
    rejects(tmp_path, ValueError, message, ids, random(2, 5))


REFUSED = {
    "samples": (ValueError, r"output must be \(N, ...\) for the 2 ids, got shape \(3, 5\)", random(3, 5), {}),
    "scalar": (ValueError, r"for the 2 ids, got shape \(\)", random(1)[0], {}),
    "dtype": (ValueError, "must be float16, bfloat16 or float32, got torch.float64", random(2, 5).double(), {}),
    "integers": (ValueError, "must be floating-point, got torch.int64", integers(3, 2, 5), {"dtype": torch.float16}),
    "nan": (ValueError, "must have no NaN", torch.full((2, 5), math.nan), {}),
    "nan in k": (ValueError, "NaN|sum to", torch.full((2, 5), math.nan), {"k": 2}),
    "range": (
        ValueError,
        r"must fit into torch.float16, got values to 100000",
        torch.full((2, 5), 1e5),
        {"dtype": torch.half},
    ),
    "kind": (TypeError, "must be a tensor, a TopK, a list .* got tuple", (random(2, 5),), {}),
    "nothing": (ValueError, "must be something to store", TeacherOutput(), {}),
    "root": (ValueError, "must have the path of a module in the model", TeacherOutput(None, {"": random(2, 5)}), {}),
    "method": (ValueError, "got 'ids.0'", TeacherOutput(None, {"ids.0": random(2, 5)}), {}),
    "feature": (TypeError, "feature/fc must be a tensor, or a list .*, got str", TeacherOutput(None, {"fc": "x"}), {}),
    "feature top-k": (
        TypeError,
        "only the output may be a TopK",
        TeacherOutput(None, {"fc": TopK.of(random(2, 5), 2)}),
        {},
    ),
    "no vocabulary": (ValueError, "vocabulary must be given to store a TopK", TopK.of(random(2, 5), 2), {}),
    "vocabulary": (ValueError, "classes of the vocabulary, 6, got 5", random(2, 5), {"k": 2, "vocabulary": 6}),
    "classes": (ValueError, "classes from 0 to 1, got", TopK.of(random(2, 5), 4), {"vocabulary": 2}),
    "too many": (ValueError, "k must be at most the number of classes, 5, got 6", random(2, 5), {"k": 6}),
    "k": (ValueError, "writer's k=3 and temperature=1.0, got k=2", TopK.of(random(2, 5), 2), {"k": 3, "vocabulary": 5}),
    "temperature": (
        ValueError,
        "got k=2 and temperature=2.0",
        TopK.of(random(2, 5), 2, temperature=2.0),
        {"vocabulary": 5},
    ),
    "dense vocabulary": (ValueError, "classes of the vocabulary, 6, got 5", random(2, 5), {"vocabulary": 6}),
    "k for nothing": (ValueError, "got k=3 and temp", TeacherOutput(None, {"fc": random(2, 5)}), {"k": 3}),
    "temperature for nothing": (ValueError, "got k=None and temperature=2.0", random(2, 5), {"temperature": 2.0}),
    "dtype for nothing": (ValueError, "dtype must have a tensor", random(2, 5), {"dtype": torch.float16, "k": 2}),
    "short list": (ValueError, r"for each of the 2 ids, got 1 of \['Tensor'\]", [random(2, 5)], {}),
    "mixed list": (
        ValueError,
        r"got 2 of \['TopK', 'Tensor'\]|got 2 of \['Tensor', 'TopK'\]",
        [TopK.of(random(2, 5), 2), random(2, 5)],
        {},
    ),
    "unlike list": (
        ValueError,
        r"alike but for a T of at least 1, got \[\(4,\), \(5,\)\]",
        [random(2, 5), random(2, 4)],
        {},
    ),
    "empty list": (ValueError, "alike but for a T of at least 1", [random(2, 5), random(0, 5)], {}),
    "temperatures": (
        ValueError,
        "must have one temperature",
        [TopK.of(random(2, 5), 2, temperature=t) for t in (1.0, 2.0)],
        {"vocabulary": 5},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rejects_outputs(tmp_path, case):
    error, message, output, options = REFUSED[case]
    rejects(tmp_path, error, message, [0, 1], output, **options)


@pytest.mark.parametrize(
    ("tokens", "mask", "error", "message"),
    [
        ("text", None, TypeError, "tokens must be a tensor, got str"),
        (torch.zeros(3, 4), None, ValueError, r"tokens must be \(N, ...\) for the 2 ids, got shape \(3, 4\)"),
        ([torch.zeros(3)], None, ValueError, "tokens must be one tensor for each of the 2 ids, got 1"),
        ([[1], [2]], None, TypeError, "tokens must be a tensor, got list"),
        (None, [[1, 1]], TypeError, "mask must be a tensor, got list"),
        (None, torch.ones(2, 3), ValueError, r"mask must be bools or integers \(N, T\) .* got torch.float32"),
        (None, torch.ones(3, 3).bool(), ValueError, r"for the 2 ids, got torch.bool of shape \(3, 3\)"),
        (None, torch.tensor([[1, 1], [0, 0]]), ValueError, "must leave a position of every sample"),
        (
            torch.zeros(2, 4).long(),
            torch.ones(2, 3).bool(),
            ValueError,
            r"the same \(N, T\), got \(2, 4\) and \(2, 3\)",
        ),
    ],
)
def test_rejects_tokens_and_masks(tmp_path, tokens, mask, error, message):
    rejects(tmp_path, error, message, [0, 1], random(2, 3, 5), tokens, mask=mask)


def test_rejects_what_is_unlike_what_was_added_before(tmp_path):
    before = ([0, 1], TeacherOutput(random(2, 5), {"fc": random(2, 3)}))
    cases = [
        (TeacherOutput(random(2, 5)), r"feature/fc must be tensor \(3\) of float32, got None"),
        (
            TeacherOutput(random(2, 5), {"fc": random(2, 4)}),
            r"feature/fc must be tensor \(3\) of float32, got tensor \(4\)",
        ),
        (TeacherOutput(random(2, 5), {"fc": random(2, 3).half()}), r"got tensor \(3\) of float16"),
        (TeacherOutput(random(2, 5), {"fc": [random(2, 3)] * 2}), r"got tensor \(T, 3\) of float32"),
        (
            TeacherOutput(random(2, 5), {"fc": random(2, 3), "x": random(2, 1)}),
            r"feature/x must be None, got tensor \(1\)",
        ),
    ]
    for at, (output, message) in enumerate(cases):
        rejects(tmp_path / str(at), ValueError, message, [2, 3], output, before=before)
    rejects(tmp_path / "ids", ValueError, "ids must be 1, got 2", [[2, 0], [3, 0]], before[1], before=before)
    rejects(
        tmp_path / "tokens",
        ValueError,
        "tokens must be False, got True",
        [2, 3],
        before[1],
        random(2, 3),
        before=before,
    )


def test_rejects_options_and_use_after_the_end(tmp_path, monkeypatch):
    for options, message in (
        ({"k": 0}, "k must be a positive integer, got 0"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"vocabulary": -1}, "vocabulary must be a positive integer"),
        ({"shard_bytes": 0}, "shard_bytes must be a positive integer"),
        ({"dtype": torch.float64}, "dtype must be float16, bfloat16 or float32, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            TeacherWriter(tmp_path, **options)
    with pytest.raises(TypeError, match="the model must be an nn.Module, got int"):
        TeacherWriter(tmp_path, model=3)
    writer = TeacherWriter(tmp_path)
    writer.close()
    with pytest.raises(ValueError, match="a writer must be open, got one that was closed"):
        writer.add([0], random(1, 5))
    writer = TeacherWriter(tmp_path)
    writer.add([0], random(1, 5))
    with monkeypatch.context() as context:
        context.setattr(os, "getpid", lambda: 1)
        for use in (lambda: writer.add([1], random(1, 5)), writer.flush, writer.close):
            with pytest.raises(ValueError, match="must be used by the process that made it, got a fork: make one here"):
                use()
    writer.close()
    assert StoredTeacher(tmp_path).ids().tolist() == [0]


def test_a_writer_without_safetensors_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'TeacherWriter needs safetensors: pip install "distill\[store\]"'):
        TeacherWriter(tmp_path)


def test_rejects_questions(tmp_path):
    asked = write(tmp_path, [3, 8], random(2, 5))
    with pytest.raises(KeyError, match=r"got 4, one of 2 that are not; .* has 2 samples, from 3 to 8"):
        asked([3, 4, 9])
    with pytest.raises(ValueError, match=r"ids in .* are samples \(N,\), got pairs"):
        asked([[3, 0]])
    with pytest.raises(ValueError, match="ids must be integers"):
        Distiller(Net(), asked, KLLoss())(random(2, 6), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"must be asked with ids \(teacher_inputs=ids\), got input_ids"):
        asked(input_ids=torch.zeros(1, 3))
    with pytest.raises(TypeError, match="got nothing"):
        asked()


def test_record_keeps_what_taps_see_and_rejects_what_they_reject():
    model = Net(inplace=True).eval()
    output, features = record(model, (random(4, 6),), ["body.1", "fc:input", "body.1"])
    assert torch.equal(output, model(random(4, 6)))
    assert list(features) == ["body.1", "fc:input"]
    assert (features["body.1"] < 0).any()  # before the ReLU changed it in place
    assert not output.requires_grad
    with pytest.raises(TypeError, match="the model must be an nn.Module, got function"):
        record(random, random(4, 6))
    with pytest.raises(ValueError, match="must name a module of the teacher, got 'head'"):
        record(model, random(4, 6), ["head"])
    with pytest.raises(ValueError, match=r"must be in eval mode \(model.eval\(\)\), got training mode"):
        record(model.train(), random(4, 6))


# --- the progress line ---


def test_a_progress_line_stands_on_a_terminal_only(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    seen = {}
    for name, stream, progress in (
        ("terminal", Terminal(), None),
        ("file", io.StringIO(), None),
        ("asked", io.StringIO(), True),
        ("not asked", Terminal(), False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr("distill._store.progress.time.monotonic", iter(range(10)).__next__)
        with TeacherWriter(tmp_path / name, total=3 if progress is None else None, progress=progress) as writer:
            writer.add([0, 1], random(2, 5))
        seen[name] = stream.getvalue()
    assert seen["file"] == seen["not asked"] == ""
    assert seen["terminal"].startswith("\r2 of 3 (67%) samples, 0.0 MB written, 2 samples/s")
    assert seen["terminal"].endswith("  \n")
    assert seen["asked"].startswith("\r2 samples, ")
