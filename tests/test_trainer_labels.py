"""DistillTrainer: which labels it shifts, and what is left of padding and packing."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import LlamaForCausalLM  # noqa: E402

from distill import CrossEntropyLoss, Distiller, KLLoss, next_tokens  # noqa: E402
from distill.integrations._labels import UNSHIFTED, split_batch  # noqa: E402
from distill.integrations.transformers import DistillTrainer  # noqa: E402
from language_models import arguments, build, llama, needs_packing, rows, stack  # noqa: E402
from trainer_steps import assert_step, shifted, step_by_hand  # noqa: E402


def test_labels_are_shifted_for_subclasses_and_adapters_too(tmp_path):
    class Mine(LlamaForCausalLM):
        pass

    student = Mine(llama(8).config)
    trainer = DistillTrainer(distiller=Distiller(student, llama(16), KLLoss()), args=arguments(tmp_path))
    batch = stack(rows(2))
    _, target, _ = trainer.prepare(dict(batch))
    assert torch.equal(target, next_tokens(batch["labels"])[0])


def test_labels_in_unsigned_bytes_are_not_taken_for_missing():
    labels = torch.tensor([156, 3], dtype=torch.uint8)  # as a byte, -100 is 156
    assert split_batch({"labels": labels}, nn.Linear(1, 1))[2].all()


def bart():
    config = transformers.BartConfig(vocab_size=31, d_model=8, decoder_layers=1, decoder_attention_heads=2)
    return transformers.BartForCausalLM(config)


def test_a_model_whose_own_loss_does_not_shift_is_refused_without_prepare(tmp_path):
    model, ids = bart().eval(), torch.tensor([[3, 5, 7, 9]])
    own = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(own.loss, nn.functional.cross_entropy(own.logits.flatten(0, 1), ids.flatten()))
    with pytest.raises(ValueError, match="BartForCausalLM must have a prepare= that makes target and mask"):
        split_batch({"input_ids": ids, "labels": ids}, model)
    DistillTrainer(
        distiller=Distiller(bart(), bart(), KLLoss()),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=rows(),
        prepare=lambda batch: ({"input_ids": batch["input_ids"]}, *next_tokens(batch["labels"])),
    ).train()


def test_a_model_around_a_language_model_is_refused_without_prepare_and_a_compiled_one_is_what_it_was():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama(8)

    batch = stack(rows(2))
    with pytest.raises(ValueError, match="Around must have a prepare= .* it holds a LlamaForCausalLM but is none"):
        split_batch(batch, Around())
    compiled = torch.compile(llama(8), backend="eager")
    assert torch.equal(split_batch(batch, compiled)[1], next_tokens(batch["labels"])[0])
    with pytest.raises(ValueError, match="BartForCausalLM must have a prepare="):
        split_batch(batch, torch.compile(bart(), backend="eager"), shifts=True)


def test_every_causal_language_model_that_does_not_shift_is_known():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for source in re.split("^class ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            name = re.match(r"\w+", source)[0]
            shifts = re.search(r"loss_function|shift_labels|\[\.\.\., 1:|\[:, 1:", source)
            if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and re.search("(?i)cross_?entropy", source):
                found |= set() if shifts else {name}
    assert "BartForCausalLM" in found <= UNSHIFTED


def test_encoder_decoder_models_get_their_decoder_inputs(tmp_path):
    config = transformers.T5Config(
        vocab_size=31, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    student, teacher = (transformers.T5ForConditionalGeneration(config) for _ in range(2))
    DistillTrainer(
        distiller=Distiller(student, teacher, KLLoss()), args=arguments(tmp_path), train_dataset=rows()
    ).train()


def whisper(head=transformers.WhisperForConditionalGeneration):
    sizes = {"d_model": 8, "num_mel_bins": 4, "max_source_positions": 8, "vocab_size": 31, "classifier_proj_size": 4}
    layers = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return head(transformers.WhisperConfig(**sizes, **layers, **tokens, begin_suppress_tokens=None))


def test_models_that_shift_their_decoders_inputs_by_themselves_get_the_labels():
    student, teacher = whisper(), whisper()
    batch = {"input_features": torch.randn(2, 4, 16), "labels": torch.tensor([[5, 6, 7], [8, 9, -100]])}
    given, target, mask = split_batch(
        {"input_features": batch["input_features"], "mine": batch["labels"]}, student, name="mine"
    )
    out = Distiller(student, teacher, KLLoss())(given, target, mask=mask)
    torch.testing.assert_close(out.terms["task"], student(**batch).loss.detach())
    decoded = torch.zeros_like(target)  # decoder inputs of one's own stay
    assert "labels" not in split_batch({**batch, "decoder_input_ids": decoded}, student)[0]


def test_what_the_task_loss_ignores_is_masked_and_not_counted(tmp_path):
    padded = [{**row, "labels": row["labels"].masked_fill(row["labels"] == -100, 0)} for row in rows(2)]
    task = CrossEntropyLoss(ignore_index=0)
    for train, own in ((padded, task), (rows(2), CrossEntropyLoss())):
        distiller = Distiller(llama(8), llama(8, seed=1), KLLoss(), task_loss=own)
        trainer = DistillTrainer(distiller=distiller, args=arguments(tmp_path, report_to=[]), train_dataset=train)
        _, _, mask = trainer.prepare(stack(train))
        assert torch.equal(mask, next_tokens(stack(rows(2))["labels"])[1])
    maps = {"pixel_values": torch.zeros(1), "labels": torch.tensor([[[0, 255], [-100, 3]]])}  # of a segmentation
    assert split_batch(maps, nn.Linear(1, 1), ignored=255)[2].tolist() == [[[True, False], [False, True]]]


def test_a_classifier_with_a_decoder_and_a_detector_keep_their_labels():
    model = whisper(transformers.WhisperForAudioClassification)
    assert model.config.is_encoder_decoder
    batch = {"input_features": torch.randn(2, 4, 16), "labels": torch.tensor([1, 0])}
    given, target, mask = split_batch(batch, model)
    assert [*given] == ["input_features"]
    assert torch.equal(target, batch["labels"])
    assert mask.all()
    boxes = [{"class_labels": torch.tensor([1])}]  # as of a detector: no tensor
    assert split_batch({"pixel_values": torch.zeros(1), "labels": boxes}, model)[1:] == (boxes, None)


def test_models_that_are_asked_with_pictures_and_text_shift_whatever_the_trainer_says():
    class LlavaForConditionalGeneration(nn.Module):  # by name alone: one is large, and what decides is the class
        config = transformers.PretrainedConfig()

    class IdeficsForVisionText2Text(LlavaForConditionalGeneration):
        pass

    batch = stack(rows(2))
    for model in (LlavaForConditionalGeneration(), IdeficsForVisionText2Text()):
        assert torch.equal(split_batch(batch, model)[1], next_tokens(batch["labels"])[0])


def test_padding_on_the_left_predicts_nothing(tmp_path):
    flipped = [{name: value.flip(0) for name, value in row.items()} for row in rows(4)]
    for row in flipped:
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
    distiller, by_hand = build(), build()
    before = copy.deepcopy(distiller.state_dict())
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    DistillTrainer(distiller=distiller, args=args, train_dataset=flipped).train()
    alone = [{name: value[None, row["attention_mask"] == 1] for name, value in row.items()} for row in flipped]
    assert_step(distiller, before, step_by_hand(by_hand, [shifted(row) for row in alone]))


@needs_packing
def test_packed_sequences_are_as_if_each_were_alone(tmp_path):
    lengths = [4, 5]
    packed = []
    for row in rows(2):
        labels = row["input_ids"].clone()
        labels[4] = -100  # the start of the second
        places = torch.cat([torch.arange(length) for length in lengths])
        packed.append({"input_ids": row["input_ids"], "position_ids": places, "labels": labels})
    distiller, by_hand = build(), build()
    before = copy.deepcopy(distiller.state_dict())
    args = arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer = DistillTrainer(distiller=distiller, args=args, train_dataset=packed, data_collator=stack)
    trainer.train()
    assert not distiller.teacher.config.use_cache
    alone = [part[None] for row in packed for part in row["input_ids"].split(lengths)]
    pieces = [shifted({"input_ids": part, "labels": part}) for part in alone]
    assert_step(distiller, before, step_by_hand(by_hand, pieces))
