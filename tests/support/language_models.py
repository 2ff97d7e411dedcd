"""Small language models, rows of tokens and a Trainer's arguments, for the tests of one and of several processes."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

from distill import Distiller, HintLoss, KLLoss, Term

VOCABULARY = 31
needs_packing = pytest.mark.skipif(
    find_spec("transformers.masking_utils") is None,
    reason="this transformers keeps packed sequences apart in flash attention only",
)


def llama(width: int, *, seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    """A causal language model of two layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def write_encoder(folder: Path, words: list[str]) -> None:
    """A folder with an encoder of three layers with random weights, and its tokenizer of some words."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokens), **sizes)).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Rows of unequal length, padded on the right, prompts of two tokens not learned."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for index in range(count):
        length = 5 + index % 4
        tokens = torch.randint(1, VOCABULARY, (9,), generator=generator)
        attention = (torch.arange(9) < length).long()
        labels = tokens.masked_fill(attention == 0, -100)
        labels[:2] = -100
        made.append({"input_ids": tokens * attention, "attention_mask": attention, "labels": labels})
    return made


def stack(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as one batch."""
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def build(terms: Any = None, **options: Any) -> Distiller:
    """A Distiller, the same each time; with a loss that learns if no terms are given."""
    student, teacher = llama(8), llama(16, seed=1)
    torch.manual_seed(2)
    terms = terms or {"kl": KLLoss(2.0), "hint": Term(HintLoss(8, 16), at="model.norm")}
    return Distiller(student, teacher, terms, **options)


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    """One quiet step of SGD on the CPU."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**{**defaults, **options})
