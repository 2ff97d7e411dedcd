"""Whether inductor can turn a graph into C++ here."""

import shutil

import pytest

HAS_COMPILER = any(map(shutil.which, ("g++", "clang++", "cl")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler on the CPU")
