"""Store a teacher's answers, delete the teacher, and train from the disk: the student ends as with the live teacher.

python examples/fetch.py                # texts and an encoder, into runs/data
python examples/from_disk.py encoder    # the student of sentence_encoder.py: the teacher's vectors are stored
python examples/from_disk.py language   # a student of causal_lm.py: hidden states, from which the head makes logits

Both students of a run have the same weights, to the last bit; the command prints their hashes.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

import causal_lm
from distill import (
    Distiller,
    KLLoss,
    LinearLoss,
    StoredTeacher,
    TeacherOutput,
    TeacherWriter,
    Term,
    fingerprint,
    next_tokens,
    record,
)
from distill.integrations.transformers import DistillTrainer
from sentence_encoder import Encoder, embed, train


def seen(texts: list[str]) -> list[Tensor]:
    """The bytes of each text: a hash of them is stored, and the vector of another text is refused."""
    return [torch.tensor(list(text.encode())) for text in texts]


def encoder(data: Path, out: Path, held: int = 1000) -> None:
    """Train a sentence encoder from vectors in memory and from stored ones."""
    lines, folder = (data / "dictionary.txt").read_text(encoding="utf-8").splitlines(), data / "all-MiniLM-L6-v2"
    new, texts = lines[:held], lines[held : held + 8000]
    teacher = Encoder(folder)
    wanted, vectors = embed(teacher, new), embed(teacher, texts)
    with TeacherWriter(out / "vectors", model=teacher) as writer:
        if writer.missing(range(len(texts))).any():  # else they are there from a run before
            writer.add(range(len(texts)), vectors, seen(texts))
    del teacher
    stored = StoredTeacher(out / "vectors")
    ways = {"live": lambda part: vectors[part], "stored": lambda part: stored(part, seen([texts[i] for i in part]))}
    for name, answers in ways.items():
        random.seed(0)
        student = Encoder(folder)
        del student.transformer.encoder.layer[1:-1]
        train(student, texts, answers)
        cosine = (embed(student, new) * wanted).sum(1).mean()
        print(f"{name}: cosine to the teacher {cosine:.3f}, weights {fingerprint(student)}")


def train_language(teacher: Any, head: torch.nn.Linear, rows: Tensor, out: Path, steps: int) -> Any:
    """Train a student of causal_lm.py: each batch has the numbers of its rows, with which a stored teacher is asked."""
    student = causal_lm.llama(64, 2, seed=0)
    loss = LinearLoss(KLLoss(temperature=1.0), student.lm_head, head, cross_entropy=0.5)
    distiller = Distiller(student, teacher, Term(loss, at="model.norm"), task_loss=None)

    def prepare(batch: dict[str, Tensor]) -> tuple[Any, ...]:
        target, mask = next_tokens(batch["labels"])
        inputs = {"input_ids": batch["input_ids"], "logits_to_keep": 1}
        stored = (batch["ids"], batch["input_ids"])
        return inputs, target, mask, stored if isinstance(teacher, StoredTeacher) else inputs

    options: dict[str, Any] = {
        "max_steps": steps,
        "warmup_steps": steps // 10,
        "lr_scheduler_type": "cosine",
        "seed": 0,
    }
    options |= {"learning_rate": 2e-3, "per_device_train_batch_size": 8, "dataloader_pin_memory": False}
    args = TrainingArguments(str(out), save_strategy="no", report_to=[], remove_unused_columns=False, **options)
    data = [{"input_ids": row, "labels": row, "ids": number} for number, row in enumerate(rows)]
    DistillTrainer(distiller=distiller, prepare=prepare, args=args, train_dataset=data).train()
    return student


def language(data: Path, out: Path, steps: int = 400, few: int = 200) -> None:
    """Train a language model on a few rows of text from a live teacher, and from its hidden states and its head."""
    held, rows = causal_lm.read(data / "dictionary.txt")
    teacher = causal_lm.llama(128, 4, seed=0)
    causal_lm.train(teacher, rows, out, seed=0, steps=3 * steps)
    teacher.eval()
    head, rows = teacher.lm_head, rows[:few]
    with TeacherWriter(out / "hidden", model=teacher, total=few) as writer:
        for ids in torch.arange(few).split(8):  # type: ignore[no-untyped-call]
            if not writer.missing(ids).any():  # they are there from a run before
                continue
            features = record(teacher, {"input_ids": rows[ids]}, at=["model.norm"]).features
            writer.add(ids, TeacherOutput(features=features), rows[ids])
    live = train_language(teacher, head, rows, out, steps)
    del teacher  # of which the head is left
    stored = train_language(StoredTeacher(out / "hidden"), head, rows, out, steps)
    for name, student in {"live": live, "stored": stored}.items():
        print(f"{name}: {causal_lm.bits_per_byte(student, held):.3f} bits per byte, weights {fingerprint(student)}")


def main(arguments: list[str] | None = None) -> None:
    """Train two students, and say how good they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encoder", "language"])
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="what fetch.py wrote; default: runs/data")
    parser.add_argument("--out", type=Path, default=Path("runs/from_disk"))
    args = parser.parse_args(arguments)
    if not (args.data / "dictionary.txt").is_file():
        parser.error(f"--data must be what examples/fetch.py wrote, got {args.data}")
    train_both = encoder if args.what == "encoder" else language
    train_both(args.data, args.out)


if __name__ == "__main__":
    main()
