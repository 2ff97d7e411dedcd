"""A small Llama teaches a smaller one through `DistillTrainer`, byte by byte, on the definitions of a dictionary.

The teacher learns from much of it, the students from 25 kB: a case in which a teacher pays, as text is what they lack.

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


def train(model: Any, rows: Tensor, out: Path, seed: int, steps: int, teacher: Any = None) -> None:
    """Train a model: alone with the Trainer of transformers, with a teacher with the DistillTrainer."""
    options: dict[str, Any] = {"max_steps": steps, "warmup_steps": steps // 10, "lr_scheduler_type": "cosine"}
    options |= {"learning_rate": 2e-3, "per_device_train_batch_size": 8, "dataloader_pin_memory": False, "seed": seed}
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


FEW = 200  # rows of text that the students learn from
# A step with the teacher takes 2.5 times as long as one without: one student alone takes as long as the taught one.
STUDENTS = {"student alone": 400, "student alone for as long": 1000, "student with the teacher": 400}


def main(arguments: list[str] | None = None) -> None:
    """Train a teacher, and the same student in three ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default="runs/data/dictionary.txt")
    parser.add_argument("--out", type=Path, default="runs/causal_lm")
    args = parser.parse_args(arguments)
    if not args.text.is_file() or args.text.stat().st_size < 70_000:
        parser.error(f"--text must be a file of 70 kB or more, got {args.text}; examples/fetch.py fetches the default")
    held, rows = read(args.text)
    teacher = llama(128, 4, seed=0)
    train(teacher, rows, args.out, seed=0, steps=1200)
    print(f"teacher: {bits_per_byte(teacher, held):.3f} bits per byte")
    for name, steps in STUDENTS.items():
        student = llama(64, 2, seed=0)
        train(student, rows[:FEW], args.out, seed=0, steps=steps, teacher=teacher if "with" in name else None)
        print(f"{name}: {bits_per_byte(student, held):.3f} bits per byte")
        student.save_pretrained(args.out)  # at last the taught one


if __name__ == "__main__":
    main()
