"""DistillTrainer with what people switch on: best checkpoints, resumed logs, predictions, names of labels, retries."""

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from distill import CrossEntropyLoss, Distiller, HintLoss, KLLoss, RKDLoss, Teachers, Term, next_tokens  # noqa: E402
from distill.integrations._counts import factor  # noqa: E402
from distill.integrations.transformers import DistillTrainer  # noqa: E402
from language_models import VOCABULARY, arguments, build, needs_packing, rows, stack  # noqa: E402

LOGGED = ("term/kl", "term/hint", "term/task")


def shifted(batch):
    return {"input_ids": batch["input_ids"]}, *next_tokens(batch["labels"])


def without_labels(count):
    return [{name: value for name, value in row.items() if name != "labels"} for row in rows(count)]


class Plain(nn.Module):
    """A student whose forward takes no labels, and nothing else that it does not know."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids):
        return self.embedding(input_ids)


@pytest.mark.filterwarnings("ignore:You are using .torch.load:FutureWarning")  # transformers' own, on PyTorch 2.5
@pytest.mark.parametrize("only", [False, True])
def test_the_best_checkpoint_brings_what_learned_and_the_weights_back(tmp_path, only):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2}
    best = {"load_best_model_at_end": True, "greater_is_better": True, "save_only_model": only}
    distiller = build()
    args = arguments(tmp_path, **options, **best)
    trainer = DistillTrainer(distiller=distiller, args=args, train_dataset=rows(4), eval_dataset=rows(2))
    evaluate = trainer.evaluate

    def lower(*rest, **named):
        found = evaluate(*rest, **named)
        distiller.weights["kl"] /= 2  # as a schedule would
        return found

    trainer.evaluate = lower
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    distiller.weights["kl"] *= 2  # a checkpoint is saved after it was evaluated
    assert evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


@pytest.mark.filterwarnings("ignore:You are using .torch.load:FutureWarning")
def test_terms_are_means_over_the_steps_since_the_last_log_also_resumed_and_again(tmp_path):
    def logs(trainer):
        found = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["loss"] for entry in found] == pytest.approx(
            [sum(entry[name] for name in LOGGED) for entry in found],
            abs=1e-4,  # older versions log four decimals
        )
        return found

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    trainer = DistillTrainer(distiller=build(), args=arguments(tmp_path, **options), train_dataset=rows())
    trainer.train()
    assert len(logs(trainer)) == 2
    resumed = DistillTrainer(distiller=build(), args=arguments(tmp_path, **options), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.log_history[0] == trainer.state.log_history[0]
    assert len(logs(resumed)) == 2
    before = copy.deepcopy(resumed.distiller.state_dict())
    resumed.train()  # once more, with the optimizer that accelerate has wrapped
    logs(resumed)
    assert all(parameter.grad is None for parameter in resumed.distiller.losses.parameters())
    assert not torch.equal(
        resumed.distiller.state_dict()["losses.hint.regressor.weight"], before["losses.hint.regressor.weight"]
    )


def test_a_smaller_batch_size_is_tried_and_the_log_holds_that_try_alone(tmp_path):
    distiller, sizes = build(), []

    def full(model, given, named):
        sizes.append(len(named["input_ids"]))
        if len(sizes) == 2:
            raise RuntimeError("CUDA out of memory. Tried")

    distiller.student.register_forward_pre_hook(full, with_kwargs=True)
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = DistillTrainer(distiller=distiller, args=arguments(tmp_path, **options), train_dataset=rows())
    trainer.train()
    assert sizes[:2] == [4, 4]
    assert len({*sizes}) == 2
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(sum(log[name] for name in LOGGED), rel=1e-5)


def test_a_metric_over_batches_without_labels_comes_with_the_loss(tmp_path):
    distiller = build({"kl": KLLoss()}, task_loss=None)
    args = arguments(tmp_path, per_device_eval_batch_size=3)
    trainer = DistillTrainer(
        distiller=distiller, args=args, eval_dataset=without_labels(4), compute_metrics=lambda _: {}
    )
    alone = DistillTrainer(distiller=distiller, args=args, eval_dataset=without_labels(4))
    assert trainer.evaluate()["eval_loss"] == alone.evaluate()["eval_loss"]
    assert "test_loss" not in trainer.predict(without_labels(4)).metrics


@pytest.mark.parametrize("count", [3, 4])  # a last batch of one sample, and of two
def test_what_is_predicted_without_labels_goes_through_prepare(tmp_path, count):
    student = Plain()
    distiller = Distiller(student, Plain(), KLLoss(), task_loss=None)
    args = arguments(tmp_path, remove_unused_columns=False, per_device_eval_batch_size=2)
    prepare = lambda batch: ({"input_ids": batch["input_ids"].flip(1)}, None, None)  # noqa: E731
    trainer = DistillTrainer(distiller=distiller, args=args, prepare=prepare)
    found = trainer.predict(without_labels(count))
    tokens = stack(rows(count))["input_ids"].flip(1)
    assert torch.equal(torch.from_numpy(found.predictions), student(tokens).detach())


def test_a_student_that_takes_no_labels_keeps_those_of_the_batch(tmp_path):
    student = Plain()
    distiller = Distiller(student, Plain(), KLLoss())
    trainer = DistillTrainer(
        distiller=distiller,
        args=arguments(tmp_path),
        train_dataset=rows(2),
        eval_dataset=rows(4),
        prepare=shifted,
        compute_metrics=lambda seen: {"first": seen.label_ids[0, 2], "width": seen.predictions.shape[2]},
    )
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_first"] == rows(1)[0]["labels"][2]
    assert found["eval_width"] == VOCABULARY
    assert found["eval_loss"] > 0


def test_labels_of_another_name_are_labels(tmp_path):
    renamed = [{("goals" if name == "labels" else name): value for name, value in row.items()} for row in rows(2)]
    named, plain = (build({"kl": KLLoss()}, task_loss=None) for _ in range(2))
    args = arguments(tmp_path, label_names=["goals"])
    DistillTrainer(distiller=named, args=args, train_dataset=renamed).train()
    DistillTrainer(distiller=plain, args=arguments(tmp_path), train_dataset=rows(2)).train()
    for name, value in named.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_what_prepare_must_give_is_said(tmp_path):
    distiller, args = Distiller(Plain(), Plain(), KLLoss()), arguments(tmp_path)
    for made, got in (({}, "dict"), (({}, None), "a tuple of 2"), (({},) * 5, "a tuple of 5")):
        trainer = DistillTrainer(distiller=distiller, args=args, prepare=lambda batch, made=made: made)
        with pytest.raises(ValueError, match=rf"prepare must give a tuple \(inputs, target, mask\), .*, got {got}"):
            trainer.prepare({})


def test_masks_by_name_count_over_the_accumulated_batch_too(tmp_path):
    def prepare(batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        target, mask = next_tokens(batch["labels"])
        return inputs, target, {"kl": mask, "late": mask & (torch.arange(9) < 6), "task": mask & (torch.arange(9) > 3)}

    class Late(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            distiller.weights["late"] = 2.0

    terms = {"kl": Term(KLLoss(2.0), weight=3.0), "late": Term(KLLoss(), weight=0.0)}
    terms["rkd"] = Term(RKDLoss(), at=lambda out: out.logits[:, 0], weight=0.0)
    distiller, by_hand = build(terms), build(terms)
    by_hand.weights["late"] = 2.0
    before = copy.deepcopy(distiller.state_dict())
    args = arguments(tmp_path, gradient_accumulation_steps=4)
    trainer = DistillTrainer(distiller=distiller, args=args, train_dataset=rows(), prepare=prepare, callbacks=[Late()])
    trainer.train()
    inputs, target, mask = prepare(stack(rows()))
    out = by_hand(inputs, target, mask=mask)
    out.loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert trainer.state.log_history[0]["term/task"] == pytest.approx(out.terms["task"].item(), rel=1e-5)
    for name, parameter in by_hand.named_parameters():
        change = before[name] - distiller.state_dict()[name]
        torch.testing.assert_close(change, 0.1 * parameter.grad, rtol=1e-4, atol=2e-7)


def test_a_mean_that_is_switched_on_without_a_mask_is_refused_by_name():
    with pytest.raises(ValueError, match="the masks must have one for 'late'"):
        factor({"kl": torch.ones(())}, "late")


@needs_packing
def test_several_teachers_see_that_sequences_are_packed_as_one_does(tmp_path):
    places = torch.cat([torch.arange(4), torch.arange(5)])
    packed = [{"input_ids": row["input_ids"], "position_ids": places, "labels": row["input_ids"]} for row in rows(2)]
    alone = build({"kl": KLLoss()})
    two = Teachers(combine="logits", first=copy.deepcopy(alone.teacher), second=copy.deepcopy(alone.teacher))
    several = Distiller(copy.deepcopy(alone.student), two, {"kl": KLLoss()})
    for distiller in (alone, several):
        DistillTrainer(distiller=distiller, args=arguments(tmp_path), train_dataset=packed, data_collator=stack).train()
    for name, value in alone.student.state_dict().items():
        torch.testing.assert_close(several.student.state_dict()[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:You are using .torch.load:FutureWarning")
def test_a_task_loss_that_learns_is_trained_saved_and_resumed(tmp_path):
    class Scaled(nn.Module):
        reduction = "mean"

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, logits, target, **options):
            return CrossEntropyLoss()(logits * self.scale, target, **options)

    def make():
        return build({"kl": KLLoss()}, task_loss=Scaled())

    distiller, by_hand, again = make(), make(), make()
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "per_device_train_batch_size": 8}
    args = arguments(tmp_path, **options)
    DistillTrainer(distiller=distiller, args=args, train_dataset=rows()).train()
    batch = stack(rows())
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        target, mask = next_tokens(batch["labels"])
        by_hand(inputs, target, mask=mask).loss.backward()
        optimizer.step()
    assert by_hand.task_loss.scale.item() != 1.5
    torch.testing.assert_close(distiller.task_loss.scale, by_hand.task_loss.scale, rtol=1e-5, atol=1e-7)
    trainer = DistillTrainer(distiller=again, args=args, train_dataset=rows())
    again.task_loss = Scaled()  # not the one that was there when the trainer was made
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(again.task_loss.scale, distiller.task_loss.scale)


def test_weight_decay_leaves_biases_and_norms_of_what_learns_alone_as_those_of_the_student(tmp_path):
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.layer_norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, hidden):
            return self.layer_norm(self.linear(hidden))

    terms = {"kl": KLLoss(), "hidden": Term(HintLoss(8, 16), at="model.norm", student=Adapter())}
    distiller = build(terms)
    trainer = DistillTrainer(distiller=distiller, args=arguments(tmp_path, weight_decay=0.5), train_dataset=rows())
    groups = trainer.create_optimizer().param_groups
    decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays.keys() == {*distiller.parameters()}
    for name, parameter in distiller.named_parameters():
        assert decays[parameter] == (0.0 if "bias" in name or "norm" in name else 0.5), name
    assert {*decays.values()} == {0.0, 0.5}
