"""Whether inductor can turn a graph into C++ here, and a way in which it takes a fraction of the time."""

import contextlib
import ctypes
import gc
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

HAS_COMPILER = any(map(shutil.which, ("g++", "clang++", "cl")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler on the CPU")

# What a kernel takes beside tensors.
NUMBERS = {"int64_t": ctypes.c_int64, "long": ctypes.c_long, "float": ctypes.c_float, "double": ctypes.c_double}


@contextlib.contextmanager
def one_library() -> Iterator[None]:
    """Inductor's kernels within the block are built together, when the first of them is called.

    Inductor starts the C++ compiler once for each kernel, and a graph has one between any two operations that are not
    its own, as products are: most of the compiler's time goes into starting. The code has no vector instructions, which
    take inductor a third more time; nothing is kept for a later process, and no garbage collected in between.
    """
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.async_compile import AsyncCompile

    build, waiting, vectors = AsyncCompile.cpp_pybinding, [], cpu_vec_isa.valid_vec_isa_list

    def promise(self: AsyncCompile, types: list[str], source: str) -> "_Kernel":
        waiting.append(_Kernel(types, source, lambda: _build(lambda all_of_it: build(self, [], all_of_it), waiting)))
        return waiting[-1]

    AsyncCompile.cpp_pybinding = promise
    cpu_vec_isa.valid_vec_isa_list = list  # none: to find them takes a library of its own and a Python that loads it
    gc.disable()
    try:
        with config.patch({"cpp.simdlen": 1, "compile_threads": 1, "fx_graph_cache": False}):
            yield
    finally:
        gc.enable()
        AsyncCompile.cpp_pybinding, cpu_vec_isa.valid_vec_isa_list = build, vectors


class _Kernel:
    """A function of C++ that is there from its first call on."""

    def __init__(self, types: list[str], source: str, build: Any) -> None:
        names = [name.removeprefix("const ") for name in types]
        self.types = [ctypes.c_void_p if name.endswith("*") else NUMBERS[name] for name in names]
        self.source, self.build, self.function = source, build, None

    def __call__(self, *arguments: Any) -> None:
        if self.function is None:
            self.build()
        self.function(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments))


def _build(build: Any, kernels: list[_Kernel]) -> None:
    """Build all kernels that are waiting as one source, unoptimised, as each of them runs for microseconds."""
    includes = sorted(
        {line for kernel in kernels for line in kernel.source.splitlines() if line.startswith("#include")}
    )
    sources = [re.sub(r"\bkernel\(", f"kernel_{i}(", kernel.source) for i, kernel in enumerate(kernels)]
    entry = 'extern "C" void kernel() {}'  # the only one that inductor looks for
    binding = build("\n".join([*includes, '#pragma GCC optimize("O0")', *sources, entry]))
    library = ctypes.CDLL(binding.__self__.__file__)
    for i, kernel in enumerate(kernels):
        kernel.function = library[f"kernel_{i}"]
        kernel.function.argtypes, kernel.function.restype = kernel.types, None
    kernels.clear()
