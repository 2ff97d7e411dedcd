"""The parts of `faults.py`: what is done to the study, and how it must end."""

import sys
from pathlib import Path

# The study, and the small runs of its tests.
sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("examples", "tests/support")]
