"""Every example says what it does when it is asked for help, and refuses what it does not know."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = [path for path in sorted(EXAMPLES.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_asked_for_help_it_trains_nothing(path, monkeypatch, capsys):
    for option, code in (("--help", 0), ("--no-such-option", 2)):
        monkeypatch.setattr(sys, "argv", [str(path), option])
        try:
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(path), run_name="__main__")
        except ImportError as error:
            pytest.skip(f"the example needs {error.name}")
        assert end.value.code == code
    assert "usage:" in capsys.readouterr().out
