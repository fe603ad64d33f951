"""Whether two answers are the same expression, by math-verify in a process of its own, killed at its time limit.

math-verify's own limits work by signals, which only a main thread may use; here they are switched off, and the
process is what ends. It is started once and answers one pair a line.
"""

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from functools import lru_cache
from importlib.util import find_spec

_START_SECONDS = 60.0

_PROGRAM = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from math_verify import parse, verify
def same(a, b):
    try:
        a, b = (parse("$" + x + "$", parsing_timeout=None) for x in (a, b))
        return any(verify(*pair, timeout_seconds=None) for pair in ((a, b), (b, a)))
    except Exception:
        return False
print("ready", file=answers, flush=True)
for line in sys.stdin:
    print(json.dumps(bool(same(*json.loads(line)))), file=answers, flush=True)
"""


class _Worker:
    """The process, one caller at a time; started when first asked, and again after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, a: str, b: str, seconds: float) -> bool | None:
        """None if there was no answer within the limit."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([a, b]).encode() + b"\n")
                process.stdin.flush()
                answer = self._line(process, seconds)
            except OSError:
                answer = b""
            if not answer:
                self.stop()
                return None
            return bool(json.loads(answer))

    def stop(self) -> None:
        """Kills the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            quiet = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE) | {"stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen([sys.executable, "-c", _PROGRAM], **quiet)  # type: ignore[call-overload]
            if not self._line(self._process, _START_SECONDS):
                self.stop()
                raise RuntimeError('math-verify does not start; pip install "pyquiet[scale]" again')
        assert self._process is not None
        return self._process

    @staticmethod
    def _line(process: "subprocess.Popen[bytes]", seconds: float) -> bytes:
        """The next line, empty if it does not come in time or the process has ended."""
        assert process.stdout is not None
        line, deadline = b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    return b""
                more = os.read(process.stdout.fileno(), 4096)
                if not more:
                    return b""
                line += more
        return line


_worker = _Worker()
atexit.register(_worker.stop)


def available() -> bool:
    """Whether math-verify is installed."""
    return find_spec("math_verify") is not None


@lru_cache(maxsize=2**16)
def same_expression(a: str, b: str, seconds: float) -> bool:
    """Whether math-verify calls the two the same within so many seconds; what takes longer is different.

    Works in any thread; the caller waits. Starting the process is not counted.
    """
    return _worker.ask(a, b, seconds) or False
