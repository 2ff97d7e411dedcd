"""Reads a stored teacher for speed, kills its writers, and damages its files.

    python benchmarks/stored_teacher.py speed
    python benchmarks/stored_teacher.py kills --count 30
    python benchmarks/stored_teacher.py damage --count 200

speed: random batches of packed top-k (k = 32, a vocabulary of 128,256, 512 tokens a sample) from files that the system
has in memory, in one thread; processor time, so that a busy machine counts less. `first` opens the folder and compares
every sample with its checksum, `again` reads on, `copy` is the floor: as many bytes of the same files as a sample has
are copied out of a memory map, and nothing is done with them.

kills: two processes write one folder, and are ended by SIGKILL at a random moment; then the folder is read, and two
others go on. Whatever a `flush` had reported must be there as it was written, and nothing else than what was written.

damage: a bit is flipped, a file cut off, deleted or exchanged with another one, a run of bytes overwritten; then every
sample is read. Each must be as it was written, or an error must say what is wrong.

The last two exit with 1 if anything was lost or wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from distill import StoredTeacher, StoreError, TeacherOutput, TeacherWriter, TopK

VOCABULARY = 70_000  # ids of 17 bits
WIDTH, K = 6, 5


def answer(sample: int) -> tuple[TeacherOutput, list[torch.Tensor]]:
    """What the teacher gives for a sample, and its tokens: both follow from the number of the sample."""
    generator = torch.Generator().manual_seed(sample)
    length = 1 + sample % 7
    indices = torch.rand(length, 500, generator=generator).topk(K).indices * (VOCABULARY // 500)
    log_probs = torch.randn(length, K + 1, generator=generator).log_softmax(-1)
    hidden = torch.randn(length, WIDTH, generator=generator).bfloat16()
    tokens = torch.randint(VOCABULARY, (length,), generator=generator)
    topk = TopK(indices, log_probs[:, :K], log_probs[:, K]).to(torch.float16)
    return TeacherOutput([topk], {"model.norm": [hidden]}), [tokens]


def writer_of(folder: Path) -> TeacherWriter:
    """A writer for what `answer` gives."""
    return TeacherWriter(folder, vocabulary=VOCABULARY, model="made up", progress=False)


def is_right(teacher: StoredTeacher, sample: int) -> bool:
    """Whether what is read of a sample is what was written, bit for bit."""
    (topks, features), tokens = answer(sample)
    output, seen = teacher.read([sample], tokens)
    pairs = [(output.indices, topks[0].indices), (output.log_probs, topks[0].log_probs)]
    pairs += [(output.log_tail, topks[0].log_tail), (seen["model.norm"], features["model.norm"][0])]
    return all(torch.equal(got[0], wanted.to(got.dtype)) for got, wanted in pairs)


def write_on(folder: Path, ids: Sequence[int], seed: int, reports: Connection) -> None:
    """Write what is missing of some ids, and report after each flush which are written."""
    draw = random.Random(seed)
    with writer_of(folder) as writer:
        todo = [sample for sample, is_missing in zip(ids, writer.missing(ids).tolist(), strict=True) if is_missing]
        reports.send([])
        while todo:
            batch, todo = todo[: (size := draw.randint(1, 40))], todo[size:]
            for sample in batch:
                writer.add([sample], *answer(sample))
            writer.flush()
            reports.send(batch)


def kill_campaign(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kill pairs of writers, and look at the folder after each.

    Args:
        folder: An empty folder.
        kills: How many processes to kill; a multiple of 2.
        seed: For the moments.

    Returns:
        How many were killed, reported, found, lost and wrong.
    """
    draw = random.Random(seed)
    context = multiprocessing.get_context("fork")
    reported: set[int] = set()
    counts: Counter[str] = Counter()
    ids = range(1_000_000)  # more than will ever be written
    for round_of in range(kills // 2):
        links = []
        for half in range(2):
            mine, theirs = context.Pipe(duplex=False)
            # Batches start where those before ended, so that nobody counts to a million.
            part = ids[half * 500_000 : half * 500_000 + 40 * (round_of + 1) * 30]
            process = context.Process(target=write_on, args=(folder, part, draw.random(), theirs))
            process.start()
            theirs.close()
            mine.recv()
            links.append((process, mine))
        for process, mine in links:
            if round_of % 2:  # every other time not before something was reported
                reported.update(mine.recv())
            time.sleep(draw.uniform(0, 0.4))
            if process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            counts["killed"] += process.exitcode == -signal.SIGKILL
            try:
                while True:
                    reported.update(mine.recv())
            except EOFError:
                mine.close()
        counts["left over"] = len([*folder.glob("*.tmp")])
        if reported:
            teacher = StoredTeacher(folder)
            there = set(teacher.ids().tolist())
            counts["found"], counts["reported"] = len(there), len(reported)
            counts["lost"] += len(reported - there)
            counts["wrong"] += sum(not is_right(teacher, sample) for sample in there)
    return counts


def damage_campaign(folder: Path, count: int, seed: int) -> Counter[str]:
    """Damage copies of a folder, and read all of each.

    Args:
        folder: An empty folder.
        count: How many copies.
        seed: For the damage.

    Returns:
        How often each kind of damage was `named` by an error or `harmless` (all is read as it was written), and how
        often something was `lost`, read `wrong`, or an error was no `StoreError`.
    """
    draw = random.Random(seed)
    whole, copy = folder / "whole", folder / "copy"
    samples = range(24)
    for first in (0, 12):  # two writers of three shards
        with writer_of(whole) as writer:
            for sample in range(first, first + 12):
                writer.add([sample], *answer(sample))
                if sample % 4 == 3:
                    writer.flush()
    kinds = (flip, cut, overwrite, delete, exchange)
    counts = Counter({f"undamaged: {_outcome(whole, samples)}": 1})
    for number in range(count):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        files = sorted(copy.iterdir())
        damage = kinds[number % len(kinds)]
        damage(files, draw)
        counts[f"{damage.__name__}: {_outcome(copy, samples)}"] += 1
    return counts


def _outcome(folder: Path, samples: Sequence[int]) -> str:
    named = False
    try:
        teacher = StoredTeacher(folder)
    except StoreError:
        return "named"
    except Exception as error:
        return f"another error ({type(error).__name__})"
    for sample in samples:
        try:
            if not is_right(teacher, sample):
                return "wrong"
        except StoreError:
            named = True
        except KeyError:
            return "lost"
        except Exception as error:
            return f"another error ({type(error).__name__})"
    return "named" if named else "harmless"


def flip(files: list[Path], draw: random.Random) -> None:
    """Flip one bit of a file."""
    file = draw.choice(files)
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def cut(files: list[Path], draw: random.Random) -> None:
    """Cut a file off."""
    file = draw.choice(files)
    os.truncate(file, draw.randrange(file.stat().st_size))


def overwrite(files: list[Path], draw: random.Random) -> None:
    """Overwrite a run of bytes with others."""
    file = draw.choice(files)
    data = bytearray(file.read_bytes())
    first = draw.randrange(len(data))
    for place in range(first, min(first + 64, len(data))):
        data[place] = draw.randrange(256)
    file.write_bytes(data)


def delete(files: list[Path], draw: random.Random) -> None:
    """Delete a file."""
    draw.choice(files).unlink()


def exchange(files: list[Path], draw: random.Random) -> None:
    """Give two files each other's content: mostly two shards, as in a copy that went wrong."""
    shards = [file for file in files if file.suffix == ".safetensors"]
    one, two = draw.sample(shards if draw.random() < 0.8 else files, 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def time_reading(folder: Path, samples: int, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Million tokens a second of processor time, by the size of a batch, first and again.

    Args:
        folder: An empty folder.
        samples: How many to write.
        tokens: How many tokens each has.
        repeats: How often the whole folder is read, each time in another order.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    with TeacherWriter(folder, vocabulary=128_256) as writer:
        for first in range(0, samples, 32):
            few = torch.rand(32, tokens, 501, generator=generator).topk(32).indices * 256
            indices = few + torch.randint(256, few.shape, generator=generator)
            log_probs = torch.randn(32, tokens, 33, generator=generator).mul(3).log_softmax(-1)
            topk = TopK(indices, log_probs[..., :32], log_probs[..., 32])
            writer.add(torch.arange(first, first + 32), topk, torch.randint(128_256, (32, tokens)))
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for size in (8, 32, 64):
            teacher, copier = StoredTeacher(folder), Copier(folder, samples, size)
            for name, read in (("first", teacher), ("again", teacher), ("copy", copier)):
                order = torch.randperm(samples, generator=generator)
                start = time.process_time()
                for at in range(0, samples, size):
                    read(order[at : at + size])
                seconds = time.process_time() - start
                found.setdefault(f"batches of {size:2}, {name}", []).append(samples * tokens / seconds / 1e6)
    return found


class Copier:
    """Copies as many bytes as a sample has out of the only shard of a folder, for each sample of a batch."""

    def __init__(self, folder: Path, samples: int, size: int) -> None:
        (shard,) = folder.glob("*.safetensors")
        self._data = np.memmap(shard, mode="r")
        self._bytes = len(self._data) // samples
        self._batch = np.empty((size, self._bytes), np.uint8)

    def __call__(self, order: torch.Tensor) -> None:
        """Copy those of a batch."""
        for place, sample in zip(self._batch, order.tolist(), strict=True):
            place[:] = self._data[sample * self._bytes : (sample + 1) * self._bytes]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "kills", "damage"])
    parser.add_argument("--count", type=int, default=30, help="repetitions, kills or damaged copies")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the three, and print its counts."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "speed":
            print(f"million tokens a second of one core, median and range of {options.count}")
            found = time_reading(Path(folder), 1024, 512, options.count)
            for name, rates in found.items():
                floor = found[f"{name.split(',')[0]}, copy"]
                shares = [rate / most for rate, most in zip(rates, floor, strict=True)]
                share = f"{statistics.median(shares):.2f} of a copy's"
                print(f"{name}: {statistics.median(rates):5.1f} ({min(rates):.1f} to {max(rates):.1f}), {share}")
            return 0
        campaign = kill_campaign if options.what == "kills" else damage_campaign
        counts = campaign(Path(folder), options.count, options.seed)
    for name, count in sorted(counts.items()):
        print(f"{count:6} {name}")
    bad = ("lost", "wrong", "error")
    return int(any(count for name, count in counts.items() if any(word in name for word in bad)))


if __name__ == "__main__":
    sys.exit(main())
