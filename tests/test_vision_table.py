"""The table of the losses for vision is written from the page for choosing, the classes and what was measured."""

import csv
import re

import conf
import vision_table


def rows():
    return {
        re.match(r"\| \{py:obj\}`(\w+) ", line)[1]: [cell.strip() for cell in line.split("|")[1:-1]]
        for line in vision_table.table().splitlines()[2:]
    }


def test_has_the_losses_for_vision_and_no_others():
    assert {"kl", "hint", "fgd", "cwd", "queue_kl", "sigmoid_kl", "gram", "sdd"} <= set(rows())
    assert not {"reverse_kl", "alm", "margin_mse", "linear_logit"} & set(rows())


def test_says_what_a_loss_is_like():
    table = rows()
    assert all(len(cells) == 6 for cells in table.values())
    assert table["hint"][1:5] == [
        'Hints: Romero et al., "FitNets: Hints for Thin Deep Nets" (2015)', "one a sample", "", "yes"
    ]  # fmt: skip
    assert [table[name][2] for name in ("sp", "dist", "kl")] == [
        "one value a batch",
        "one value a batch",
        "one a sample",
    ]
    assert [table[name][3] for name in ("dkd", "fgd", "sp")] == ["labels", "boxes", ""]
    assert table["crd"][3] == "places in the training set"
    learn = {name for name, cells in table.items() if cells[4]}
    assert learn == {"crd", "ctkd", "fgd", "hint", "mgd", "ofd", "queue_kl", "review", "srd", "vid"}
    text = (vision_table.PAGES / "choosing.md").read_text()
    (sentence,) = re.findall(r"Parameters that are trained too:\*\* (.*?)\. In a", text, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == learn


def test_has_the_numbers_that_were_measured(tmp_path, monkeypatch):
    with vision_table.MEASURED.open() as file:
        found = [row for row in csv.DictReader(file) if (row["loss"], row["way"]) == ("at", "eager")]
    (row,) = (row for row in found if row["table"] == "losses")
    assert rows()["at"][5].startswith(f"{float(row['over_ours']):.2f} [{float(row['over_ours_low']):.2f}, ")
    assert rows()["at"][5].endswith("128 x 64 x 8 x 8")
    (tmp_path / "none.csv").write_text("loss,table,way\n")
    monkeypatch.setattr(vision_table, "MEASURED", tmp_path / "none.csv")
    assert rows()["at"][5] == "not measured yet"


def test_stands_on_the_page_for_choosing():
    source = [(vision_table.PAGES / "choosing.md").read_text()]
    assert source[0].count(vision_table.MARK) == 1
    conf.fill_in(None, "choosing", source)
    assert vision_table.table() in source[0]
