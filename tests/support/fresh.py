"""A Python that has imported torch and nothing of ours: what runs in a fork of it starts in no time."""

import subprocess
import sys
import tempfile

_SERVER = """
import ast, gc, os, sys
import numpy, torch, typing_extensions
gc.collect()
gc.freeze()  # or a collection in a fork would copy all pages that torch's objects lie on
for line in sys.stdin:
    code, arguments, output = ast.literal_eval(line)
    pid = os.fork()
    if not pid:
        sys.argv = ["-c", *arguments]
        out = os.open(output, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        failed = 1
        try:
            exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
            failed = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(failed)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Fresh:
    """Runs code as `python -c` does, but that torch is there already."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str, *arguments: str) -> str:
        """What some code prints; it must end well."""
        with tempfile.NamedTemporaryFile("r") as output:
            print(repr((code, arguments, output.name)), file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            text = output.read()
        assert status == 0, text
        return text

    def close(self) -> None:
        """End the process."""
        with self._process:
            self._process.stdin.close()
