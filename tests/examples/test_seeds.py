"""The tables of the examples: ranks, neighbours, means, and that what is committed follows from its rows."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from scipy.stats import spearmanr

import seeds

RESULTS = Path(__file__).parents[2] / "docs/results"


def test_rank_correlation_is_scipys_with_ties():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(5, (2, 40), generator=generator).float()
    assert seeds.spearman(first, second) == pytest.approx(spearmanr(first, second).statistic, abs=1e-6)


def test_nearest_is_the_most_similar_other_one():
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]])
    assert seeds.nearest(vectors).tolist() == [2, 2, 1, 1]


def test_a_row_is_made_once_and_read_afterwards(tmp_path):
    made = []
    rows = [
        ("teacher", None, lambda: made.append(0) or {"x": 1.0}),
        ("student", 2, lambda: made.append(1) or {"x": 2.0}),
    ]
    first = seeds.run(iter(rows), tmp_path)
    assert first == [{"model": "teacher", "seed": None, "x": 1.0}, {"model": "student", "seed": 2, "x": 2.0}]
    assert seeds.run(iter(rows), tmp_path) == first
    assert made == [0, 1]


def test_the_table_has_mean_and_sample_deviation_of_the_seeds():
    rows = [{"model": "teacher", "seed": None, "x": 1.0}]
    rows += [{"model": "student", "seed": seed, "x": value} for seed, value in enumerate((0.1, 0.2, 0.6))]
    lines = seeds.render(rows, "a machine").splitlines()
    assert lines[:4] == [
        "| model | x |",
        "| --- | --- |",
        "| teacher | 1.000 |",
        "| **student, 3 seeds** | **0.300 ± 0.265** |",
    ]
    assert lines[4] == "| student, seed 0 | 0.100 |"
    assert "a machine" in lines[-1]


@pytest.mark.parametrize("example", ["sentence_encoder", "causal_lm"])
def test_the_committed_table_follows_from_the_committed_rows(example):
    results = json.loads((RESULTS / example / "results.json").read_text(encoding="utf-8"))
    assert (RESULTS / example / "results.md").read_text(encoding="utf-8") == seeds.render(**results)
    assert [row["seed"] for row in results["rows"] if row["seed"] is not None]
