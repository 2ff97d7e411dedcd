"""For the tests of teachers on disk: random tensors, and a folder in one call."""

from pathlib import Path

import torch

from distill import StoredTeacher, TeacherWriter, TopK


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=generator(seed))


def write(folder, ids, output, tokens=None, *, mask=None, **options):
    with TeacherWriter(folder, **options) as writer:
        writer.add(ids, output, tokens, mask=mask)
    return StoredTeacher(folder)


def shards(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def same(got, wanted):
    if not isinstance(wanted, TopK):
        return torch.equal(got, wanted)
    columns = ("indices", "log_probs", "log_tail")
    return got.temperature == wanted.temperature and all(
        torch.equal(getattr(got, column), getattr(wanted, column).to(getattr(got, column).dtype)) for column in columns
    )
