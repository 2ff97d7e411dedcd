"""The recipes: their code runs and does what it should, on one process and on two that stand for a cluster."""

import copy
import importlib.util
import os
import re
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState

import recipes_worker
from distill import Distiller, HintLoss, KLLoss, Term
from workers import workers

WORKER = Path(recipes_worker.__file__)


class Taken(torch.nn.Module):
    """Keeps what it was given."""

    def forward(self, student, teacher, target=None):
        self.seen = student.detach()
        return student.sum()


def run(name):
    """Run a page up to the first block that imports what is not there."""
    names = {"__name__": "page"}
    with torch.random.fork_rng():
        for code, text in recipes_worker.blocks(recipes_worker.RECIPES / f"{name}.md"):
            imported = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
            missing = [package for package in imported if importlib.util.find_spec(package) is None]
            if missing:
                names["missing"] = missing
                break
            exec(code, names)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What one process and two found on the pages; the one is this."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    kept, here = dict(os.environ), Path.cwd()
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        others = workers(WORKER, [(rank, 2, ports[0], folder) for rank in (0, 1)], timeout=600)
        with others, torch.random.fork_rng():
            recipes_worker.main(0, 1, ports[1], folder)
    finally:
        os.environ.clear()
        os.environ.update(kept)
        os.chdir(here)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("page", ["distributed", "accelerate"])
def test_two_processes_take_the_steps_of_one(processes, page):
    one, *two = processes
    assert len(one[page]) == {"distributed": 5 if recipes_worker.HAS_FSDP2 else 2, "accelerate": 1}[page]
    for place, alone in enumerate(one[page]):
        loss = sum(process[page][place]["loss"] for process in two) / 2
        torch.testing.assert_close(loss, alone["loss"], rtol=1e-6, atol=1e-6)
        for process in two:
            torch.testing.assert_close(process[page][place]["gradients"], alone["gradients"], rtol=1e-5, atol=1e-6)
            # Adam divides by the size of the gradient, rounding included.
            torch.testing.assert_close(process[page][place]["state"], alone["state"], rtol=1e-4, atol=1e-5)


def test_no_state_has_a_teacher_and_what_learns_is_in_it(processes):
    for process in processes:
        for page in ("distributed", "accelerate"):
            for look in process[page]:
                assert not [name for name in look["state"] if "teacher" in name]
        assert "losses.hint.regressor.weight" in process["distributed"][0]["state"]


@pytest.mark.skipif(not recipes_worker.HAS_FSDP2, reason="PyTorch 2.5 shards on GPUs only")
def test_the_teacher_is_sharded_after_its_forward_but_for_the_head_of_linear_loss(processes):
    _, *two = processes
    for process in two:
        whole, linear, _ = (look["sharded"] for look in process["distributed"] if "sharded" in look)
        assert whole == [True, True]
        assert linear == [True, False]
        assert "the weight of teacher_head must be whole in each process" in process["distributed"][-1]["refused"]


def test_what_processes_do_not_agree_on_is_refused_by_each(processes):
    """That gathered losses equal those of one process, the processes themselves have checked."""
    _, *two = processes
    assert two[0]["refused"] == two[1]["refused"]
    wrong = ["got torch.float32 (4, 6) and torch.float32 (4, 5)", "torch.float64", "None and torch.bool", "process 1"]
    for message, part in zip(two[0]["refused"], wrong, strict=True):
        assert message.startswith("with gather=True")
        assert part in message


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(folder):
    names = run("training")
    distiller, optimizer = names["build"]()
    for step in range(4):
        optimizer.zero_grad()
        distiller(names["inputs"][step], names["labels"][step]).loss.backward()
        optimizer.step()
        if step < 2:
            distiller.weights["hint"] *= 0.5
    assert names["resumed"].weights["hint"] == 0.25
    for name, value in distiller.state_dict().items():
        assert torch.equal(value, names["resumed"].state_dict()[name]), name
    assert "losses.hint.regressor.weight" in names["resumed"].state_dict()
    student = torch.load("student.pt", weights_only=True)
    assert list(student) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_pieces_of_unequal_size_add_up_and_low_precision_reaches_the_models_alone(folder):
    names = run("training")
    accumulated, _ = names["build"]()
    whole, _ = names["build"]()
    for piece in names["pieces"]:
        accumulated(names["inputs"][0, piece], names["labels"][0, piece], denominator=16).loss.backward()
    whole(names["inputs"][0], names["labels"][0]).loss.backward()
    for ours, theirs in zip(accumulated.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = whole(names["inputs"][0], names["labels"][0])
    assert out.student.dtype == out.teacher.dtype == torch.bfloat16
    assert {value.dtype for value in (out.loss, *out.terms.values())} == {torch.float32}
    average = names["distiller"].teacher
    assert not torch.equal(average[0].weight, names["student"][0].weight)
    assert not average.training


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_adapters_learn_from_a_larger_teacher_and_from_their_base(folder):
    pytest.importorskip("peft")
    names = run("peft")
    student, tokens, out = names["student"], names["tokens"], names["out"]
    assert student.training
    learned = names["optimizer"].param_groups[0]["params"]
    assert len(learned) == 8 + 2  # two matrices for two projections in two layers, and the hint
    assert all(parameter.grad is not None for parameter in learned[:8])

    torch.manual_seed(0)  # as on the page: the base, whatever the adapters have learned since
    base = names["llama"](32).eval()
    with torch.no_grad():
        longer = base(**names["longer"]).logits[:, 6:]
    torch.testing.assert_close(out.teacher.logits[:, 6:], longer)
    adapted = out.student.logits.detach()
    expected = sum(
        16 * F.kl_div((adapted[i, t] / 4).log_softmax(-1), (longer[i, t] / 4).softmax(-1), reduction="sum")
        for i in range(4)
        for t in range(11)
    )
    torch.testing.assert_close(out.loss.detach(), expected / 44)
    assert sorted(path.name for path in Path("adapters").glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    merged = names["merged"].eval()(tokens).logits
    assert (merged - base(tokens).logits).abs().max() > 1e-4


def test_a_pruned_student_keeps_its_zeros_and_a_rounded_one_its_levels(folder):
    names = run("compression")
    teacher, pruned, rounded = names["teacher"], names["pruned"], names["rounded"]
    weights = torch.cat([pruned[k].weight.flatten() for k in (0, 3)])
    assert (weights == 0).float().mean() == pytest.approx(0.75, abs=1e-3)
    assert [len(rounded[k].weight.unique()) <= 15 for k in (0, 3, 7)] == [True] * 3
    for student in (pruned, rounded):  # both have trained, and are as ordinary as before
        assert student.state_dict().keys() == teacher.state_dict().keys()
        assert not torch.equal(student[7].bias, teacher[7].bias)
    again = copy.deepcopy(pruned)
    names["prune"].identity(again[0], "weight")
    assert {"0.weight_orig", "0.weight_mask"} <= again.state_dict().keys()
    assert [name for name, _ in again[0].named_parameters()] == ["bias", "weight_orig"]  # another order than before
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(again)


@pytest.mark.filterwarnings("ignore")  # PyTorch has moved its quantised layers elsewhere
def test_the_page_says_what_prepare_qat_does_to_taps_and_evaluation(folder):
    quantisation = pytest.importorskip("torch.ao.quantization")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch has no kernels of 8-bit integers")
    names = run("compression")
    teacher, images = names["teacher"], names["images"]
    body = copy.deepcopy(teacher).requires_grad_(True).train()
    student = torch.nn.Sequential(quantisation.QuantStub(), *body, quantisation.DeQuantStub())
    student.qconfig = quantisation.get_default_qat_qconfig("fbgemm")
    quantisation.fuse_modules_qat(student, [["1", "2", "3"], ["4", "5"]], inplace=True)
    quantisation.prepare_qat(student, inplace=True)
    assert isinstance(student[5], torch.nn.Identity)
    terms = {"kl": KLLoss(), "map": Term(HintLoss(), at=("4", "4"))}
    distiller = Distiller(student, teacher, terms)
    names["train"](distiller, torch.optim.SGD(distiller.parameters(), lr=0.01))

    taps = {"gave": Term(Taken(), at=("4", None)), "next": Term(Taken(), at=("6:input", None))}
    looks = Distiller(student.apply(quantisation.disable_observer), None, taps, task_loss=None).eval()
    looks(images)
    gave, got = (looks.losses[name].seen for name in taps)
    assert len(got.unique()) <= 128 < len(gave.unique())
    torch.testing.assert_close(student[4].activation_post_process(gave), got)

    with pytest.raises(ValueError, match="fits its range to each batch"):
        Distiller(copy.deepcopy(teacher), copy.deepcopy(student).apply(quantisation.enable_observer), KLLoss())
    integer = quantisation.convert(distiller.student.eval())
    with pytest.raises(ValueError, match="nothing that is compared carries one"):
        Distiller(integer, teacher, KLLoss())(images, names["labels"])
    maps = Term(HintLoss(), at=("4", "4"), teacher=torch.dequantize)
    Distiller(copy.deepcopy(body), integer, {"kl": KLLoss(), "map": maps})(images, names["labels"]).loss.backward()
    with pytest.raises(ValueError, match="floating-point"):
        Distiller(copy.deepcopy(body), integer, Term(HintLoss(), at=("4", "4")))(images, names["labels"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporters
def test_what_is_exported_gives_what_the_student_gives(folder):
    pytest.importorskip("safetensors")
    names = run("export")
    for loaded in (names["fresh"], names["exported"]):
        torch.testing.assert_close(loaded(names["tokens"]), names["expected"])
    assert names["fresh"].head.weight is names["fresh"].embedding.weight
    assert names["exported"](names["tokens"][:3]).shape == (3, 6, 50)
    out = Distiller(names["student"].train(), names["exported"], KLLoss())(names["tokens"], names["tokens"])
    assert out.terms["distillation"] < 1e-6
    if "missing" in names:
        pytest.skip(f"the part on ONNX needs {names['missing']}")


@pytest.mark.parametrize("page", ["trl", "lightning"])
@pytest.mark.filterwarnings("ignore")  # theirs
def test_page_of_a_trainer_runs(page, folder):
    pytest.importorskip(page, reason=f"its page needs {page}, which is no dependency of the tests")
    names = run(page)
    if page == "trl":
        logs = names["trainer"].state.log_history
        assert logs[0]["loss"] == pytest.approx(logs[0]["term/task"] + logs[0]["term/kl"], rel=1e-3)
        assert (folder / "student/model.safetensors").exists()
    else:
        module = names["module"]
        assert {"train/task", "train/kl", "train/hint", "valid/loss"} <= set(names["trainer"].callback_metrics)
        saved = torch.load("distillation.ckpt", weights_only=False)["state_dict"]
        assert not [name for name in saved if "teacher" in name]
        assert "distiller.losses.hint.regressor.weight" in saved
        assert not module.distiller.teacher.training
