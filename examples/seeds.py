"""Run an example with three seeds, and write the table that its quickstart in the docs shows.

python examples/fetch.py
python examples/seeds.py sentence_encoder   # runs/sentence_encoder/results.md
python examples/seeds.py causal_lm          # runs/causal_lm/results.md

Stopped, the same command goes on: each row of the table is a file, and is made once.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import causal_lm
from cifar.settings import describe_device
from sentence_encoder import Encoder, embed, train

MINUTES = "training, minutes of a core"
Numbers = dict[str, float]
Row = tuple[str, int | None, Callable[[], Numbers]]  # a model, its seed, and what makes and measures it


def millions(model: nn.Module) -> float:
    """The number of a model's parameters, in millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def clock(work: Callable[[], Any]) -> float:
    """The minutes that one core needs for some work."""
    start = time.process_time()
    work()
    return (time.process_time() - start) / 60


def nearest(vectors: Tensor) -> Tensor:
    """The number of the nearest other vector, for each."""
    return (vectors @ vectors.T).fill_diagonal_(-2).argmax(1)


def spearman(first: Tensor, second: Tensor) -> float:
    """The correlation of the ranks; equal values share the mean of theirs."""
    ranks = [(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2 for x in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def word_similarity(encoder: Encoder, path: Path) -> float:
    """The rank correlation of the encoder's cosines with people's scores for pairs of words."""
    pairs = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]
    first, second = (embed(encoder, [pair[side] for pair in pairs]) for side in (0, 1))
    return spearman((first * second).sum(1), torch.tensor([float(pair[2]) for pair in pairs]))


def relative_speed(encoder: Encoder, teacher: Encoder, texts: list[str]) -> float:
    """How many texts the encoder embeds while the teacher embeds one: the median of five turns."""
    return median(clock(lambda: embed(teacher, texts)) / clock(lambda: embed(encoder, texts)) for _ in range(5))


def compare(encoder: Encoder, teacher: Encoder, held: list[str], wanted: Tensor, data: Path) -> Numbers:
    """What the table says of an encoder."""
    vectors = embed(encoder, held)
    return {
        "parameters, million": millions(encoder),
        "speed": relative_speed(encoder, teacher, held[:100]),
        "cosine": float((vectors * wanted).sum(1).mean()),
        "same neighbour": float((nearest(vectors) == nearest(wanted)).float().mean()),
        "WordSim-353": word_similarity(encoder, data / "wordsim353.tsv"),
        "SimLex-999": word_similarity(encoder, data / "simlex999.txt"),
    }


def encoders(data: Path, out: Path, seeds: list[int]) -> Iterator[Row]:
    """The teacher, two of its layers before training, and the students."""
    lines = (data / "dictionary.txt").read_text(encoding="utf-8").splitlines()
    held, texts = lines[:1000], lines[1000:9000]
    teacher, kept = Encoder(data / "all-MiniLM-L6-v2"), out / "vectors.pt"
    if not kept.exists():
        torch.save((embed(teacher, held), embed(teacher, texts)), part := kept.with_suffix(".part"))
        part.replace(kept)
    wanted, vectors = torch.load(kept, weights_only=True)

    def student(seed: int | None) -> Numbers:
        encoder = Encoder(data / "all-MiniLM-L6-v2")
        del encoder.transformer.encoder.layer[1:-1]
        random.seed(seed)
        minutes = 0.0 if seed is None else clock(lambda: train(encoder, texts, lambda part: vectors[part]))
        return {**compare(encoder, teacher, held, wanted, data), MINUTES: minutes}

    yield "teacher", None, lambda: {**compare(teacher, teacher, held, wanted, data), MINUTES: 0.0}
    yield "student before training", None, partial(student, None)
    for seed in seeds:
        yield "student", seed, partial(student, seed)


def language_models(data: Path, out: Path, seeds: list[int]) -> Iterator[Row]:
    """The teacher, the students alone, and the students with the teacher."""
    held, rows = causal_lm.read(data / "dictionary.txt")

    def trained(width: int, layers: int, text: Tensor, steps: int, seed: int, teacher: Any = None) -> Numbers:
        model = causal_lm.llama(width, layers, seed)
        minutes = clock(lambda: causal_lm.train(model, text, out, seed, steps, teacher))
        if width == 128:
            model.save_pretrained(out / "teacher")
        bits = causal_lm.bits_per_byte(model, held)
        return {"parameters, million": millions(model), "bits per byte": bits, MINUTES: minutes}

    yield "teacher", None, partial(trained, 128, 4, rows, 1200, 0)
    teacher = LlamaForCausalLM.from_pretrained(out / "teacher")
    for seed in seeds:
        for name, steps in causal_lm.STUDENTS.items():
            by = teacher if "with" in name else None
            yield name, seed, partial(trained, 64, 2, rows[: causal_lm.FEW], steps, seed, by)


EXAMPLES = {"sentence_encoder": encoders, "causal_lm": language_models}


def run(rows: Iterator[Row], out: Path) -> list[dict[str, Any]]:
    """Make the rows of the table that have no file yet, and read all of them."""
    made = []
    for name, seed, make in rows:
        path = out / f"{name.replace(' ', '-')}{'' if seed is None else f'-{seed}'}.json"
        if not path.exists():
            part = path.with_suffix(".part")  # a row is there whole or not at all
            part.write_text(json.dumps(make()))
            part.replace(path)
        made.append({"model": name, "seed": seed, **json.loads(path.read_text())})
    return made


def render(rows: list[dict[str, Any]], where: str) -> str:
    """The table in Markdown: of models with seeds their mean and standard deviation, then one by one."""
    columns = [column for column in rows[0] if column not in ("model", "seed")]
    lines = [["model", *columns], ["---"] * (1 + len(columns))]
    for name in dict.fromkeys(row["model"] for row in rows):
        group = [row for row in rows if row["model"] == name]
        if len(group) > 1:
            spread = [(mean(row[column] for row in group), stdev(row[column] for row in group)) for column in columns]
            lines.append([f"**{name}, {len(group)} seeds**", *(f"**{m:.3f} ± {s:.3f}**" for m, s in spread)])
        for row in group:
            seed = "" if row["seed"] is None else f", seed {row['seed']}"
            lines.append([name + seed, *(f"{row[column]:.3f}" for column in columns)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\nMeasured on {where}. ± is the sample standard deviation.\n"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=EXAMPLES)
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="what fetch.py wrote; default: runs/data")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure an example, and write rows and table."""
    args = parse_arguments(arguments)
    if not (args.data / "dictionary.txt").is_file():
        raise SystemExit(f"--data must be what examples/fetch.py wrote, got {args.data}")
    out = args.out / args.example
    out.mkdir(parents=True, exist_ok=True)
    rows = run(EXAMPLES[args.example](args.data, out, args.seeds), out)
    where = (
        f"{describe_device(torch.device('cpu'), 'float32')}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    (out / "results.json").write_text(json.dumps({"rows": rows, "where": where}, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(render(rows, where), encoding="utf-8")
    print(render(rows, where))


if __name__ == "__main__":
    main()
