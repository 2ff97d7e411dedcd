"""Distil a sentence encoder to two of its layers: all-MiniLM-L6-v2, on the definitions of a dictionary.

python examples/fetch.py              # encoder and texts, into runs/data
python examples/sentence_encoder.py   # or yours: --teacher FOLDER --text FILE, with a text on each line
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from distill import CosineLoss, Distiller


class Encoder(nn.Module):
    """A transformer, its tokenizer, and the mean over the tokens: a vector of length 1 for each text."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizer, self.transformer = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)

    def forward(self, texts: list[str]) -> Tensor:
        """Give the vectors, (N, C)."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        states = self.transformer(**tokens).last_hidden_state
        return nn.functional.normalize((states * tokens["attention_mask"].unsqueeze(-1)).sum(1), dim=-1)


def batches(texts: list[str], size: int = 64) -> list[list[int]]:
    """Cut the texts' numbers into random batches of texts of about the same length, so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]) + 4 * random.random())
    cut = [order[i : i + size] for i in range(0, len(order), size)]
    return random.sample(cut, len(cut))


@torch.no_grad()
def embed(encoder: Encoder, texts: list[str]) -> Tensor:
    """The vectors of all texts, (N, C)."""
    parts = batches(texts)
    vectors = torch.cat([encoder.eval()([texts[i] for i in part]) for part in parts])
    return vectors[torch.tensor([i for part in parts for i in part]).argsort()]


def train(student: Encoder, texts: list[str], teacher: Callable[[list[int]], Tensor], epochs: int = 3) -> None:
    """Teach a student to give the vectors that the teacher gives for the numbers of some texts."""
    student.transformer.embeddings.requires_grad_(False)  # they stay the teacher's, which saves a third of the time
    distiller = Distiller(student, teacher, CosineLoss(), task_loss=None)
    optimizer = torch.optim.AdamW(distiller.parameters())
    steps = [part for _ in range(epochs) for part in batches(texts)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(steps), pct_start=0.1)
    for part in steps:
        optimizer.zero_grad()
        distiller([texts[i] for i in part], teacher_inputs=part).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def main(arguments: list[str] | None = None) -> None:
    """Train a student, say how near it comes on texts that it has not seen, and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default="runs/data/all-MiniLM-L6-v2")
    parser.add_argument("--text", type=Path, default="runs/data/dictionary.txt")
    parser.add_argument("--out", type=Path, default="runs/sentence_encoder/student")
    args = parser.parse_args(arguments)
    if not (args.teacher.is_dir() and args.text.is_file()):
        parser.error(f"{args.teacher} and {args.text} must be there; examples/fetch.py fetches the defaults")
    texts = args.text.read_text(encoding="utf-8").splitlines()[:9000]  # the first 1000 are not trained with
    if len(texts) <= 1000:
        parser.error(f"--text must have more than 1000 lines, got {len(texts)}")
    args.out.mkdir(parents=True, exist_ok=True)  # before the training: it may fail
    teacher, student = Encoder(args.teacher), Encoder(args.teacher)
    del student.transformer.encoder.layer[1:-1]  # the first and the last stay
    student.transformer.config.num_hidden_layers = 2
    vectors = embed(teacher, texts[1000:])  # once, not in each epoch; from_disk.py keeps them on the disk
    train(student, texts[1000:], lambda part: vectors[part])
    print(f"cosine to the teacher: {(embed(student, texts[:1000]) * embed(teacher, texts[:1000])).sum(1).mean():.3f}")
    student.transformer.save_pretrained(args.out)
    student.tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
