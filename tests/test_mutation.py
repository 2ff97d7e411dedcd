"""The changes of a mutation run are those that it names, and nothing that no test could see."""

from forked import failed
from mutants import report
from mutation import mutants

SOURCE = '''
"""Says - and +."""
import math

LIMIT: int = 1


def loss(s, t, *, temperature: float = 4.0, dim=-1):
    """Takes s - t."""
    check_pair(s, t)
    if temperature <= 0:
        raise ValueError("must be positive" + "é")
    with torch.no_grad():
        p = softmax(t.detach() / temperature, dim)
    return temperature**2 * (p * (s - t)).sum(
        dim - 1
    )
'''


def test_every_operator_that_matters_changes_its_place_and_nothing_else():
    found = {}
    for mutant in mutants(SOURCE):
        changed = mutant.apply(SOURCE)
        compile(changed, "mutant", "exec")
        assert changed != SOURCE
        found.setdefault(mutant.operator, []).append(mutant.show(SOURCE))
    assert found == {
        "off by one": ["1 -> 2", "1 -> 2", "0 -> 1", "2 -> 3", "1 -> 2"],
        "constant": ["4.0 -> 8.0"],
        "dim": ["-1 -> 0"],
        "dropped check": ["check_pair(s, t) -> pass", 'raise ValueError("must be positive" + "é") -> pass'],
        "condition": ["temperature <= 0 -> False", "temperature <= 0 -> True"],
        "boundary": ["<= -> <"],
        "no_grad": ["torch.no_grad() -> torch.enable_grad()"],
        "detach": ["t.detach() -> t"],
        "factor": ["/ -> *", "* -> /", "* -> /"],
        "power": ["temperature**2 -> temperature"],
        "sign": ["- -> +", "- -> +"],
        "reduction": ["(p * (s - t)).sum -> (p * (s - t)).mean"],
    }


def test_a_change_is_found_at_the_line_where_its_statement_begins():
    (last,) = [
        mutant for mutant in mutants(SOURCE) if mutant.operator == "sign" and mutant.start > SOURCE.index("dim - 1")
    ]
    assert SOURCE.splitlines()[last.line - 1].startswith("    return temperature**2")


def test_a_survivor_is_named_by_its_line_and_shown_with_its_reason():
    codes = [mutant.code(SOURCE) for mutant in mutants(SOURCE) if mutant.operator == "sign"]
    assert codes == ["return temperature**2 * (p * (s «-» t)).sum(", "dim «-» 1"]
    row = {"file": "src/distill/losses/kl.py", "line": 3, "operator": "sign", "code": codes[1], "change": "- -> +"}
    rows = [{**row, "verdict": verdict} for verdict in ("found", "survived", "time")]
    text = report(rows, {("src/distill/losses/kl.py", codes[1], "- -> +"): "Because."})
    assert "| sign | 3 | 1 |" in text
    assert "2 were not found; 2 of them have a reason:" in text
    assert "- `losses/kl.py:3` `dim «-» 1` becomes `+`. Because." in text
    assert "2 were not found; 0 of them have a reason:" in (unknown := report(rows, {}))
    assert "**No reason yet.**" in unknown


def test_the_tests_that_failed_are_read_from_what_pytest_prints():
    printed = "FAILED tests/a.py::test_b[x y] - AssertionError\nERROR tests/c.py\n1 failed in 3s"
    assert failed(printed) == {"tests/a.py::test_b[x y]", "tests/c.py"}
