"""What a Distiller is called with for a batch of a `transformers.Trainer`, and what that takes for a model's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from distill.language import next_tokens

_SHIFTED = "prepare=lambda batch: ({'input_ids': batch['input_ids']}, *distill.next_tokens(batch['labels']))"
# Causal language models whose own loss takes the labels as they are. Others of their kind shift them.
UNSHIFTED = {
    "BartForCausalLM",
    "BigBirdPegasusForCausalLM",
    "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM",
    "MBartForCausalLM",
    "MarianForCausalLM",
    "MusicgenForCausalLM",
    "MusicgenMelodyForCausalLM",
    "MvpForCausalLM",
    "PLBartForCausalLM",
    "PegasusForCausalLM",
    "Speech2Text2ForCausalLM",
    "TrOCRForCausalLM",
    "WhisperForCausalLM",
    "XLMWithLMHeadModel",
    "XLNetLMHeadModel",
}


def split_batch(
    batch: dict[str, Any], model: Any, *, shifts: bool = False, name: str = "labels", ignored: int = -100
) -> tuple[Any, Any, Any]:
    """Take a batch apart into inputs, target and mask.

    Args:
        batch: The batch; it is not changed.
        model: The student, unwrapped.
        shifts: Whether the model's own loss shifts the labels, where its class does not say so.
        name: What the labels are called.
        ignored: A label that means "none" to the task loss; -100 does so too.

    Returns:
        The inputs without the labels; an encoder-decoder model gets its decoder's inputs, or the labels if it makes
        those of them by itself. The labels, shifted where the model predicts the next token. The mask: where there is a
        label; without labels the `attention_mask`, if there is one; none for labels that are no tensor of integers.

    Raises:
        ValueError: If the model does not say whether the labels must be shifted.
    """
    inputs = dict(batch)
    labels, seen = inputs.pop(name, None), inputs.get("attention_mask")
    if labels is None or not isinstance(labels, Tensor) or labels.is_floating_point():
        return inputs, labels, seen.bool() if labels is None and seen is not None else None
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    kinds, causal = _kinds(model), {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if labels.ndim == 2 and (odd := [*kinds & UNSHIFTED]):
        raise ValueError(
            f"{odd[0]} must have a prepare= that makes target and mask of the labels, since its own loss does not "
            f"shift them as those of other causal language models do; if they are the input_ids: {_SHIFTED}"
        )
    # A Trainer does not know all that are asked with pictures, and older ones know none.
    shifts = shifts or bool(kinds & causal) or (not encodes and bool(kinds & _of_pictures()))
    if labels.ndim == 2 and shifts:
        segments = seen.long() if isinstance(seen, Tensor) and seen.shape == labels.shape else None
        target, mask = next_tokens(labels, segments=segments)  # no padding on the left predicts a first token
        return inputs, target, mask & (target != ignored)
    if labels.ndim == 2 and not encodes and (held := causal & {type(part).__name__ for part in model.modules()}):
        raise ValueError(
            f"{type(model).__name__} must have a prepare= that makes target and mask of the labels, since it holds a "
            f"{min(held)} but is none itself, so that nobody knows whether they must be shifted; if so: {_SHIFTED}"
        )
    if encodes and labels.ndim > 1 and not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        else:  # Whisper and others make them of the labels in their forward
            inputs["labels"] = labels
    found = labels.long()  # as unsigned bytes, 156 would equal -100
    return inputs, labels, (found != -100) & (found != ignored)


def checked(prepare: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """A `prepare` of the user's whose result is checked."""

    def run(batch: dict[str, Any]) -> tuple[Any, ...]:
        parts = prepare(batch)
        if not isinstance(parts, tuple) or len(parts) not in (3, 4):
            got = f"a tuple of {len(parts)}" if isinstance(parts, tuple) else type(parts).__name__
            must = "a tuple (inputs, target, mask), or with the teacher's inputs as a fourth"
            raise ValueError(f"prepare must give {must}, got {got}")
        return parts

    return run


def as_returned(loss: Any, output: Any) -> Any:
    """A student's output as a Trainer expects it: but for a mapping, it takes the first entry for the loss."""
    if isinstance(output, dict):
        return output
    return (loss, *output) if isinstance(output, (tuple, list)) else (loss, output)


def _of_pictures() -> set[str]:
    """The classes of models that answer in text to pictures and text; some are named together."""
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    return {name for each in names for name in ((each,) if isinstance(each, str) else each)}


def _kinds(model: Any) -> set[str]:
    """The names of a model's class and of those that it comes from."""
    return {
        kind.__name__ for kind in type(model.get_base_model() if hasattr(model, "get_base_model") else model).__mro__
    }
