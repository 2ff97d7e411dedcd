"""DistillTrainer: gradients whatever the batches are cut into, learned losses, checkpoints, logs, evaluation."""

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from transformers import LlamaForCausalLM, Trainer  # noqa: E402

from distill import Distiller, DISTLoss, HintLoss, KLLoss, LinearLoss, RKDLoss, Term, next_tokens  # noqa: E402
from distill.integrations.transformers import DistillTrainer  # noqa: E402
from language_models import VOCABULARY, arguments, build, llama, rows, stack  # noqa: E402
from trainer_steps import assert_step, change, shifted, step_by_hand  # noqa: E402
from workers import run_workers  # noqa: E402

WORKER = Path(__file__).parent / "support/tokens_worker.py"


@pytest.fixture(autouse=True)
def _forget_precision():
    """Before transformers 5 the mixed precision of a Trainer stays in the environment, for the next one."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.mark.parametrize("size", [8, 4, 2, 1])
def test_the_step_does_not_depend_on_how_the_batch_is_cut(tmp_path, size):
    torch.manual_seed(0)
    distiller = build()
    before = copy.deepcopy(distiller.state_dict())
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    DistillTrainer(distiller=distiller, args=arguments(tmp_path, **options), train_dataset=rows()).train()

    torch.manual_seed(0)
    by_hand = build()
    by_hand.load_state_dict(before)
    batch = stack(rows())
    target, mask = next_tokens(batch.pop("labels"))
    by_hand(batch, target, mask=mask).loss.backward()
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(change(distiller, before)[name], 0.1 * parameter.grad, rtol=1e-4, atol=2e-7)


def test_batch_losses_are_averaged_over_micro_batches(tmp_path):
    distiller = build({"rkd": Term(RKDLoss(), at=lambda out: out.logits[:, 0])}, task_loss=None)
    before = copy.deepcopy(distiller.state_dict())
    prepare = lambda batch: ({k: v for k, v in batch.items() if k != "labels"}, None, None)  # noqa: E731
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    DistillTrainer(distiller=distiller, args=args, train_dataset=rows(), prepare=prepare, data_collator=stack)
    trainer = DistillTrainer(distiller=distiller, args=args, train_dataset=rows(), prepare=prepare)
    seen = []
    compute = trainer.compute_loss

    def spy(model, inputs, *rest, **options):
        seen.append({name: value for name, value in inputs.items() if name != "labels"})
        return compute(model, inputs, *rest, **options)

    trainer.compute_loss = spy
    trainer.train()
    by_hand = build({"rkd": Term(RKDLoss(), at=lambda out: out.logits[:, 0])}, task_loss=None)
    by_hand.load_state_dict(before)
    assert len(seen) == 2
    for batch in seen:
        (by_hand(batch).loss / 2).backward()
    for name, parameter in by_hand.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(change(distiller, before)[name], 0.1 * grad, rtol=1e-3, atol=1e-6)


def test_a_linear_loss_forms_no_logits_and_takes_the_same_step(tmp_path):
    distiller = build()
    student, teacher = distiller.student, distiller.teacher
    soft = LinearLoss(KLLoss(2.0), student.lm_head, teacher.lm_head, cross_entropy=1.0)
    linear = Distiller(student, teacher, {"soft": Term(soft, at="model.norm")}, task_loss=None)
    before = copy.deepcopy(student.state_dict())

    def prepare(batch):
        target, mask = next_tokens(batch["labels"])
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return {**inputs, "logits_to_keep": 1}, target, mask

    args = arguments(tmp_path, gradient_accumulation_steps=4)
    DistillTrainer(distiller=linear, args=args, train_dataset=rows(), prepare=prepare).train()
    moved = {name: before[name] - value for name, value in student.state_dict().items()}
    student.load_state_dict(before)
    batch = stack(rows())
    target, mask = next_tokens(batch.pop("labels"))
    student.zero_grad()
    Distiller(student, teacher, {"kl": KLLoss(2.0)})(batch, target, mask=mask).loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(moved[name], 0.1 * parameter.grad, rtol=1e-4, atol=2e-7)


@pytest.mark.filterwarnings("ignore:You are using .torch.load:FutureWarning")  # transformers' own, on PyTorch 2.5
def test_what_learns_is_trained_saved_and_resumed_and_terms_are_logged(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    torch.manual_seed(0)
    distiller = build()
    first = copy.deepcopy(distiller.losses.state_dict())
    trainer = DistillTrainer(distiller=distiller, args=arguments(tmp_path / "a", **options), train_dataset=rows())
    distiller.weights["kl"] = 0.5
    trainer.train()
    assert not torch.equal(distiller.losses["hint"].regressor.weight, first["hint.regressor.weight"])
    logs = [entry for entry in trainer.state.log_history if "term/kl" in entry]
    assert len(logs) == 4
    assert all(set(entry) >= {"term/kl", "term/hint", "term/task", "loss"} for entry in logs)
    total = 0.5 * logs[0]["term/kl"] + logs[0]["term/hint"] + logs[0]["term/task"]
    assert logs[0]["loss"] == pytest.approx(total, rel=1e-3)

    torch.manual_seed(0)
    again = build()
    resumed = DistillTrainer(distiller=again, args=arguments(tmp_path / "a", **options), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert again.weights["kl"] == 0.5
    for name, value in distiller.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_saves_the_student_alone_and_evaluates(tmp_path):
    distiller = build()
    distiller.student = llama(8, tied=True)
    distiller = Distiller(distiller.student, distiller.teacher, {"kl": KLLoss()})
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer = DistillTrainer(distiller=distiller, args=args, train_dataset=rows(), eval_dataset=rows(4))
    trainer.train()
    batch = stack(rows(4))
    target, mask = next_tokens(batch.pop("labels"))
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    trainer.evaluate()
    distiller.eval()
    pieces = [{name: value[i : i + 8] for name, value in batch.items()} for i in (0,)]
    expected = distiller(pieces[0], target, mask=mask).loss.item()
    assert evaluated[-1] == pytest.approx(expected, rel=1e-4)
    trainer.save_model(str(tmp_path / "out"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(**batch).logits, distiller.student(**batch).logits)


def test_what_trains_without_labels_is_evaluated_without_labels(tmp_path):
    unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in rows(4)]
    distiller = build({"kl": KLLoss()})
    trainer = DistillTrainer(distiller=distiller, args=arguments(tmp_path), eval_dataset=unlabelled)
    with pytest.raises(ValueError, match=r"needs a target, got None; distiller.weights\['task'\] = 0 switches it off"):
        trainer.evaluate()  # Trainer itself would report no loss, without a word
    assert trainer.predict(unlabelled).predictions.shape == (4, 9, VOCABULARY)
    distiller.weights["task"] = 0.0
    batch = stack(unlabelled)
    expected = distiller.eval()(batch, mask=batch["attention_mask"].bool()).loss.item()
    graphs = []
    trainer.model.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert not any(graphs)


def test_students_without_keywords_get_the_same_gradient(tmp_path):
    class Plain(nn.Module):
        def __init__(self, seed=0):
            super().__init__()
            torch.manual_seed(seed)
            self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

        def forward(self, input_ids, attention_mask=None):
            return {"logits": self.head(self.embedding(input_ids))}

    distiller = Distiller(Plain(), Plain(1), {"kl": KLLoss()})
    before = copy.deepcopy(distiller.state_dict())
    shift = lambda batch: ({"input_ids": batch["input_ids"]}, *next_tokens(batch["labels"]))  # noqa: E731
    args = arguments(tmp_path, gradient_accumulation_steps=4, remove_unused_columns=False)
    DistillTrainer(distiller=distiller, args=args, train_dataset=rows(), prepare=shift).train()
    by_hand = Distiller(Plain(), Plain(1), {"kl": KLLoss()})
    batch = stack(rows())
    target, mask = next_tokens(batch["labels"])
    by_hand({"input_ids": batch["input_ids"]}, target, mask=mask).loss.backward()
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(change(distiller, before)[name], 0.1 * parameter.grad, rtol=1e-4, atol=2e-7)


def test_a_step_without_a_label_changes_nothing(tmp_path):
    empty = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows(2)]
    distiller = build({"kl": KLLoss()})
    soft = LinearLoss(KLLoss(), distiller.student.lm_head, distiller.teacher.lm_head, cross_entropy=1.0)
    linear = Distiller(distiller.student, distiller.teacher, {"soft": Term(soft, at="model.norm")}, task_loss=None)
    for each in (distiller, linear):
        before = copy.deepcopy(each.state_dict())
        DistillTrainer(distiller=each, args=arguments(tmp_path), train_dataset=empty).train()
        for name, value in each.state_dict().items():
            assert torch.equal(value, before[name]), name


def test_relations_beside_means_over_tokens_and_batches_without_labels(tmp_path):
    distiller = build({"kl": KLLoss(), "dist": DISTLoss()})
    before = copy.deepcopy(distiller.state_dict())
    trainer = DistillTrainer(distiller=distiller, args=arguments(tmp_path), train_dataset=rows(2))
    trainer.train()
    batch = stack(rows(2))
    target, mask = next_tokens(batch.pop("labels"))
    by_hand = build({"kl": KLLoss(), "dist": DISTLoss()})
    by_hand(batch, target, mask=mask).loss.backward()
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(change(distiller, before)[name], 0.1 * parameter.grad, rtol=1e-3, atol=1e-6)
    inputs, target, mask = trainer.prepare(dict(batch))
    assert target is None
    assert torch.equal(mask, batch["attention_mask"].bool())
    goals = torch.rand(2)
    assert trainer.prepare({**inputs, "labels": goals})[1:] == (goals, None)


def test_a_loss_of_the_batch_is_averaged_over_micro_batches_with_its_weight(tmp_path):
    distiller = build({"kl": KLLoss(), "dist": Term(DISTLoss(), weight=3.0)})
    trainer = DistillTrainer(distiller=distiller, args=arguments(tmp_path), train_dataset=rows(2))
    batch = stack(rows(2))
    _, count = trainer.get_batch_samples(iter([batch, batch]), 2, torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=count)
    target, mask = next_tokens(batch.pop("labels"))
    losses = distiller(batch, target, mask=mask, denominator=count).losses
    torch.testing.assert_close(loss, losses["task"] + losses["kl"] + 3.0 / 2 * losses["dist"])


def test_without_a_mask_the_means_of_the_micro_batches_are_averaged(tmp_path):
    def prepare(batch):
        return {"input_ids": batch["input_ids"]}, None, None

    distiller = build({"kl": KLLoss(2.0)}, task_loss=None)
    before = copy.deepcopy(distiller.state_dict())
    args = arguments(tmp_path, gradient_accumulation_steps=4)
    DistillTrainer(distiller=distiller, args=args, train_dataset=rows(), prepare=prepare).train()
    by_hand = build({"kl": KLLoss(2.0)}, task_loss=None)
    by_hand({"input_ids": stack(rows())["input_ids"]}).loss.backward()
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(change(distiller, before)[name], 0.1 * parameter.grad, rtol=1e-3, atol=1e-6)


def test_evaluates_before_training_with_the_mask_of_prepare(tmp_path):
    def prepare(batch):
        target, mask = next_tokens(batch.pop("labels"))
        return batch, target, mask & (torch.arange(9) > 3)

    args = arguments(tmp_path, gradient_accumulation_steps=4, per_device_eval_batch_size=8)
    distiller = build({"kl": KLLoss()})
    trainer = DistillTrainer(distiller=distiller, args=args, eval_dataset=rows(), prepare=prepare)
    found = trainer.evaluate()["eval_loss"]
    batch, target, mask = prepare(stack(rows()))
    assert found == pytest.approx(distiller.eval()(batch, target, mask=mask).loss.item(), rel=1e-5)


def test_an_optimizer_of_ones_own_must_hold_what_learns(tmp_path):
    distiller = build()
    theirs = torch.optim.SGD(distiller.student.parameters(), lr=0.1)
    trainer = DistillTrainer(
        distiller=distiller, args=arguments(tmp_path), train_dataset=rows(), optimizers=(theirs, None)
    )
    with pytest.raises(ValueError, match="the optimizer must hold what learns in the losses"):
        trainer.train()
    mine = torch.optim.SGD(distiller.parameters(), lr=0.0)
    args = arguments(tmp_path, max_steps=3)
    trainer = DistillTrainer(distiller=distiller, args=args, train_dataset=rows(), optimizers=(mine, None))
    trainer.train()
    assert all(parameter.grad is None for parameter in distiller.losses.parameters())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning", "ignore:.is_gradient:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.cpu.amp:FutureWarning")  # accelerate's, on PyTorch 2.5
@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"bf16": True}, {"max_grad_norm": 0.5}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("tied", [False, True])
def test_options_of_the_trainer_and_tied_embeddings(tmp_path, options, tied):
    def make():
        torch.manual_seed(2)
        terms = {"kl": KLLoss(2.0), "hint": Term(HintLoss(8, 16), at="model.norm")}
        return Distiller(llama(8, tied=tied), llama(16, seed=1), terms)

    distiller, by_hand = make(), make()
    before = copy.deepcopy(distiller.state_dict())
    args = arguments(tmp_path, gradient_accumulation_steps=2, **options)
    DistillTrainer(distiller=distiller, args=args, train_dataset=rows(4)).train()
    gradients = step_by_hand(by_hand, [shifted(stack(rows(4)))])
    if "max_grad_norm" in options:  # Trainer clips the model's gradient
        norm = torch.stack([g.norm() for name, g in gradients.items() if name.startswith("student")]).norm()
        assert norm > 0.5
        gradients = {name: g * (0.5 / norm if name.startswith("student") else 1) for name, g in gradients.items()}
    if tied:
        gradients["student.lm_head.weight"] = gradients["student.model.embed_tokens.weight"]
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert_step(distiller, before, gradients, **({"rtol": 0.1, "atol": 2e-3 * largest} if "bf16" in options else {}))
    if "bf16" in options:
        assert {parameter.dtype for parameter in distiller.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_adapters_are_trained_and_saved_as_adapters(tmp_path):
    peft = pytest.importorskip("peft")

    def make():
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        return Distiller(peft.get_peft_model(llama(8), config), llama(16, seed=1), KLLoss(2.0))

    distiller, by_hand = make(), make()
    by_hand.load_state_dict(distiller.state_dict())
    before = copy.deepcopy(distiller.state_dict())
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = DistillTrainer(distiller=distiller, args=args, train_dataset=rows(4))
    trainer.train()
    gradients = step_by_hand(by_hand, [shifted(stack(rows(4)))])
    assert all("lora" in name for name in gradients)
    assert_step(distiller, before, gradients)
    trainer.save_model(str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not names & {"model.safetensors", "distiller.pt"}


def test_what_is_saved_and_what_a_checkpoint_holds(tmp_path):
    distiller = build()
    args = arguments(tmp_path / "run", save_strategy="steps", save_steps=1)
    trainer = DistillTrainer(distiller=distiller, args=args, train_dataset=rows(2))
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors"} <= saved
    assert "distiller.pt" not in saved
    held = {path.name for path in (tmp_path / "run/checkpoint-1").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "distiller.pt"} <= held
    from safetensors.torch import load_file

    for folder in (tmp_path / "out", tmp_path / "run/checkpoint-1"):
        assert set(load_file(folder / "model.safetensors")) == set(distiller.student.state_dict())
    learned = torch.load(tmp_path / "run/checkpoint-1/distiller.pt", weights_only=True)["learned"]
    assert set(learned) == {"losses.hint.regressor.weight", "losses.hint.regressor.bias"}


@pytest.mark.subprocess
def test_two_processes_take_the_step_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_workers(WORKER, [(rank, world, port, tmp_path) for rank, world in ((0, 1), (0, 2), (1, 2))])
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    for rank in (0, 1):
        both = torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)
        torch.testing.assert_close(both["hand"], one["hand"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(both["trainer"], one["trainer"], rtol=1e-3, atol=1e-6)
        assert any(name.startswith("losses.hint") for name in both["trainer"])


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler:UserWarning")  # which does not know of the skipping
def test_a_step_that_a_scaler_skips_leaves_no_gradient_of_what_learns(tmp_path, monkeypatch):
    step, calls = accelerate.optimizer.AcceleratedOptimizer.step, []

    def skip_first(self, closure=None):  # as a scaler of half precision does where something overflowed
        calls.append(self)
        return None if len(calls) == 1 else step(self, closure)

    monkeypatch.setattr(accelerate.optimizer.AcceleratedOptimizer, "step", skip_first)
    distiller = build()
    before = copy.deepcopy(distiller.state_dict())
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=8)
    DistillTrainer(distiller=distiller, args=args, train_dataset=rows()).train()
    by_hand = build()
    batch = stack(rows())
    target, mask = next_tokens(batch.pop("labels"))
    by_hand(batch, target, mask=mask).loss.backward()
    assert len(calls) == 2
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(change(distiller, before)[name], 0.1 * parameter.grad, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("give", [lambda x: {"logits": x}, lambda x: x, lambda x: (x,), lambda x: [x]])
def test_predictions_are_those_of_every_sample_whatever_the_student_returns(tmp_path, give):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, input_ids):
            return give(self.embedding(input_ids))

    student = Plain()
    logits = lambda output: output["logits"] if isinstance(output, dict) else output[0]  # noqa: E731
    tensor = torch.is_tensor(give(torch.zeros(1)))
    distiller = Distiller(student, Plain(), KLLoss(), output=None if tensor else logits)
    shift = lambda batch: ({"input_ids": batch["input_ids"]}, *next_tokens(batch["labels"]))  # noqa: E731
    args = arguments(tmp_path, remove_unused_columns=False, label_names=["labels"], per_device_eval_batch_size=4)
    found = DistillTrainer(distiller=distiller, args=args, prepare=shift).predict(rows())
    batch = stack(rows())
    assert torch.equal(torch.from_numpy(found.predictions), student.embedding(batch["input_ids"]).detach())
    assert torch.equal(torch.from_numpy(found.label_ids), batch["labels"])


def test_rejects(tmp_path):
    with pytest.raises(ValueError, match="leave compute_loss_func and label_smoothing_factor out"):
        DistillTrainer(distiller=build(), args=arguments(tmp_path, label_smoothing_factor=0.5))
    with pytest.raises(TypeError, match="distiller must be a Distiller, got int"):
        DistillTrainer(distiller=3)
    with pytest.raises(ValueError, match="the model must be the Distiller's student"):
        DistillTrainer(distiller=build(), model=llama(8), args=arguments(tmp_path))
    assert issubclass(DistillTrainer, Trainer)
