"""A teacher on disk as a teacher: in a Distiller, among others, copied, moved, and read by workers."""

import copy
import math
import pickle
import shutil

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
    StoreError,
    TeacherOutput,
    Teachers,
    TeacherWriter,
    Term,
    TopK,
    record,
)
from models import Net
from stored import generator, integers, random, shards, write

forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


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


def test_a_copy_refuses_a_folder_whose_teacher_was_replaced(tmp_path):
    asked = write(tmp_path / "a", range(3), random(3, 9), k=2, temperature=2.0, model="A")
    data = pickle.dumps(asked)
    with TeacherWriter(tmp_path / "a", k=2, temperature=2.0, model="A") as writer:
        writer.add([3], random(1, 9, seed=1))
    assert len(pickle.loads(data)) == 4  # more of the same may come
    shutil.rmtree(tmp_path / "a")
    write(tmp_path / "a", range(4), random(4, 9, seed=2), k=2, temperature=1.0, model="B")
    for make in (lambda: pickle.loads(data), lambda: copy.deepcopy(asked)):
        with pytest.raises(StoreError, match="but 1 of 1 shards are gone: another teacher may be"):
            make()


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
@pytest.mark.subprocess
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
