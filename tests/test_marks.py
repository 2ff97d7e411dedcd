"""Which tests carry the marks of what is slow: those of what they do, and no others of their file."""

import os
import subprocess

import torch

from marks import compiles, starts_processes
from workers import run_workers


def call_with_a_list(command):
    return subprocess.run(command)


class Holder:
    def method(self):
        return run_workers(None, [])


def test_what_starts_processes_is_found_through_what_it_calls():
    assert starts_processes(call_with_a_list)
    assert starts_processes(lambda: [call_with_a_list(x) for x in ()])
    assert starts_processes(lambda: Holder())
    assert starts_processes(lambda: os.fork())
    assert not starts_processes(test_what_compiles_is_found)


def test_what_compiles_is_found():
    def with_torch():
        return torch.compile(torch.nn.Identity())

    assert compiles(with_torch)
    assert not compiles(lambda: torch.zeros(1) + compile("1", "", "eval").co_nlocals)
