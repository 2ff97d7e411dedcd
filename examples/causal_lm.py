"""A small Llama teaches a smaller one through `DistillTrainer`, byte by byte, on the definitions of a dictionary.

python examples/fetch.py       # the text, into runs/data
python examples/causal_lm.py   # or yours: --text FILE
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from distill import Distiller, KLLoss, LinearLoss, Term, next_tokens
from distill.integrations.transformers import DistillTrainer


def llama(width: int, layers: int, seed: int) -> Any:
    """A model of bytes, with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def prepare(batch: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Ask the models for the logits of one position only: the loss forms the others, a few at a time."""
    target, mask = next_tokens(batch["labels"])
    return {"input_ids": batch["input_ids"], "logits_to_keep": 1}, target, mask


def train(model: Any, rows: Tensor, out: Path, seed: int, steps: int = 200, teacher: Any = None) -> None:
    """Train a model: alone with the Trainer of transformers, with a teacher with the DistillTrainer."""
    options: dict[str, Any] = {"max_steps": steps, "warmup_steps": steps // 10, "lr_scheduler_type": "cosine"}
    options |= {"learning_rate": 4e-3, "per_device_train_batch_size": 32, "dataloader_pin_memory": False, "seed": seed}
    args = TrainingArguments(str(out), save_strategy="no", report_to=[], **options)
    data = [{"input_ids": row, "labels": row} for row in rows]
    if teacher is None:
        Trainer(model=model, args=args, train_dataset=data).train()
    else:
        loss = LinearLoss(KLLoss(temperature=1.0), model.lm_head, teacher.lm_head, cross_entropy=0.5)
        distiller = Distiller(model, teacher, Term(loss, at="model.norm"), task_loss=None)
        DistillTrainer(distiller=distiller, prepare=prepare, args=args, train_dataset=data).train()


def read(path: Path, length: int = 128) -> tuple[Tensor, Tensor]:
    """The bytes of a file in rows: 500 to measure with, and the others."""
    rows = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long().unfold(0, length, length)
    return rows[:500], rows[500:]


@torch.no_grad()
def bits_per_byte(model: Any, rows: Tensor) -> float:
    """The cross-entropy of the model for each byte of the rows after the first."""
    parts = rows.to(model.device).chunk(10)
    return sum(float(model.eval()(input_ids=x, labels=x).loss) * len(x) for x in parts) / len(rows) / math.log(2)


def main(arguments: list[str] | None = None) -> None:
    """Train a teacher, a student alone, and the same student with the teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default="runs/data/dictionary.txt")
    parser.add_argument("--out", type=Path, default="runs/causal_lm")
    args = parser.parse_args(arguments)
    held, rows = read(args.text)
    teacher, alone, taught = llama(128, 4, seed=0), llama(64, 2, seed=0), llama(64, 2, seed=0)
    train(teacher, rows, args.out, seed=0)
    train(alone, rows, args.out, seed=0, steps=100)
    train(taught, rows, args.out, seed=0, steps=100, teacher=teacher)
    for name, model in {"teacher": teacher, "student alone": alone, "student with the teacher": taught}.items():
        print(f"{name}: {bits_per_byte(model, held):.3f} bits per byte")
    taught.save_pretrained(args.out)


if __name__ == "__main__":
    main()
