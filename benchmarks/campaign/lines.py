"""Command lines that must be refused before anything is trained."""

from __future__ import annotations

import contextlib
import io
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cifar_resnet
from campaign.ends import Ends, Tries

BAD: dict[str, list[str]] = {
    "--student": ["", "0", "-20", "21", "20.0", "1e3", "nan", "999999998", "9" * 5000, "\u0662\u0660x", "20 20"],
    "--teacher": ["", "2", "-8", "109", "deep", "1208", "inf", "0x14"],
    "--epochs": ["", "0", "-1", "1.5", "1e9", "nan", "9" * 400, "1000001"],
    "--teacher-epochs": ["", "0", "-1", "1.5", "1000001", "as many"],
    "--runs": ["", "0", "-3", "2.5", "1001", "9" * 300, "many"],
    "--jobs": ["", "0", "-1", "257", "100000000", "two"],
    "--threads": ["", "0", "-1", "257", "100000000", "1.0", "all"],
    "--seed": ["", "-1", "1.5", "1073741824", "1000", "9" * 300, "x"],
    "--weight": ["", "0", "-1", "nan", "inf", "-inf", "1e999", "one", "1,2", "default,1", "1,", ","],
    "--task-weight": ["", "0", "-1", "nan", "inf", "x"],
    "--warmup": ["", "-0.1", "1.1", "nan", "inf", "x"],
    "--dataset": ["", "mnist", "CIFAR10", "cifar10 ", "../cifar10", "None"],
    "--recipe": ["", "pool", "Logits", "0"],
    "--engine": ["", "fast", "graph", "Eager"],
    "--precision": ["", "float16", "double", "32", "bf16"],
    "--device": ["", "cpu:3", "cuda:77", "meta", "gpu", "cpu:-1", "cpu:x", "no_such", "meta:0", "cuda:", "-1", " cpu"],
    "--loss": ["", ",", "logits", "KL", "kl,", "kl,at,zz", "kl;at", "../kl", "None", "hint2", "os.system", "kl\x1b[0m"],
    "--at": ["", ",", "+", "layer4", "relu1,,relu2", "relu1+", "fc:inputs", "fc:", ":input", "relu1,relu1", "a.b.c"],
    "--out": ["/dev/null", "/dev/null/x", "/proc/nowhere/x", "x" * 300, "/" + "y/" * 2100],
    "--data-dir": ["", ".", "/nowhere"],
    "--only": ["", "20/cifar10", "x"],
    "--tensorboard": ["yes"],
    "--no-baseline": ["1"],
    "--unknown": ["1"],
    "--reproduce": ["--student=20", "--loss=kl", "--only=32/cifar10", "--dataset=digits", "--no-baseline", "--at=fc"],
}


def bad_lines(count: int, where: Path, before: Sequence[Ends] = ()) -> Tries:
    """Give the command options that it must refuse before anything is trained."""
    lines = [[option, value] for option, values in BAD.items() for value in values]
    lines += [[option] for option in BAD if option not in ("--tensorboard", "--no-baseline", "--reproduce")]
    for line in random.Random(0).sample(lines, min(count, len(lines)))[len(before) :]:
        told = io.StringIO()
        out = [] if line[0] == "--out" else ["--out", str(where / "lines")]
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
                code: object = cifar_resnet.main(["--student", "8", "--teacher", "8", "--epochs", "1", *out, *line])
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as error:
            code = f"{type(error).__name__}"
        named = "error:" in told.getvalue() and "Traceback" not in told.getvalue()
        ends = Counter(["refused by name" if code in (1, 2) and named else f"ENDED WITH {code} {line[:2]}"[:80]])
        ends["TRAINED"] += (where / "lines" / "weights").exists()
        yield +ends
