"""Indexing a file in a process that has no torch, little memory, and can open nothing.

The parsers are Python without ``eval``, unpickling or imports, so a file has no way to run code.
What is left is what a parser may do to itself: use up memory or time, or crash the interpreter. All
of that happens in a child (:mod:`pydetox.checkpoints.sandbox_server`) whose limits the kernel
keeps, and becomes an error that names the file.

The descriptor that the child parses is the one from which the weights are then read and hashed.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from pydetox.checkpoints.index import FileIndex, WeightsFile
from pydetox.checkpoints.index_json import from_json
from pydetox.checkpoints.sandbox_server import CPU_SECONDS, MAX_ANSWER, MAX_REQUEST, STATUS
from pydetox.errors import CheckpointError, UnsafeCheckpointError

#: Then a child is killed, whatever it waits for: the processor's time is limited already, so this
#: is for file systems that do not answer.
WALL_SECONDS = 30.0

_SERVER = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from pydetox.checkpoints.sandbox_server import serve; serve(int(sys.argv[2]))"
)
_ROOT = Path(__file__).resolve().parents[2]


class Sandbox:
    """A server process and the connection to it; one file at a time."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        #: Of the last child: largest resident set in KiB, seconds of processor time.
        self.peak_kib, self.cpu_seconds = 0, 0.0
        if not sys.executable:
            raise CheckpointError("cannot start the sandbox: nobody knows where Python is")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-I", "-S", "-c", _SERVER, str(_ROOT), str(theirs.fileno())]
        kept = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C is not for it, and its group can be killed
                    env=kept,
                    cwd="/",
                )
        except OSError as error:
            ours.close()
            raise CheckpointError(f"cannot start the sandbox: {error.strerror}") from error
        self._control = ours

    def usable(self) -> bool:
        """Whether it runs and belongs to this process, not to one that this was forked from."""
        return self.owner == os.getpid() and self._process.poll() is None

    def index(self, file: WeightsFile, weights_key: str | None = None) -> FileIndex:
        """Index a file; raises what :func:`index_file` raises."""
        answer, status = self._ask(file, weights_key)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGXCPU:
                raise UnsafeCheckpointError(
                    f"takes more than {CPU_SECONDS} s of processor time only to be indexed"
                )
            raise UnsafeCheckpointError(
                f"crashed the process that indexed it ({signal.Signals(number).name})"
            )
        kind, text = answer[:1], answer[1:]
        if status or kind not in (b"+", b"-", b"!"):
            raise UnsafeCheckpointError("crashed the process that indexed it")
        if kind == b"+":
            return from_json(text, file.size)
        shown = text[:2000].decode("utf-8", "replace")
        message = "".join(c if c.isprintable() else "?" for c in shown)
        raise (UnsafeCheckpointError if kind == b"!" else CheckpointError)(message)

    def close(self) -> None:
        """End the server, and what it may be doing."""
        self._control.close()
        if self.owner == os.getpid():
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _ask(self, file: WeightsFile, weights_key: str | None) -> tuple[bytes, int]:
        """Return the child's answer and wait status."""
        deadline = time.monotonic() + WALL_SECONDS
        reading, writing = os.pipe()
        content = {"path": Path(file.path).name[-64:], "weights_key": weights_key}
        request = json.dumps(content).encode()
        if len(request) > MAX_REQUEST:
            raise CheckpointError("has no tensors under a key as long as that of weights_key=")
        try:
            try:
                socket.send_fds(self._control, [request], [file.descriptor, writing])
            finally:
                os.close(writing)
            answer = bytearray()
            while True:
                _wait_for(reading, deadline)
                part = os.read(reading, 1 << 20)
                if not part:
                    break
                answer += part
                if len(answer) > MAX_ANSWER:
                    raise UnsafeCheckpointError("took over the process that indexed it")
            _wait_for(self._control.fileno(), deadline)
            status = self._control.recv(STATUS.size)
        except OSError as error:
            self.close()
            raise CheckpointError(f"the sandbox has ended: {error.strerror}") from error
        except BaseException:  # too late or interrupted: the next answer would be this one's
            self.close()
            raise
        finally:
            os.close(reading)
        if len(status) != STATUS.size:
            self.close()
            raise CheckpointError("the sandbox has ended")
        code, self.peak_kib, self.cpu_seconds = STATUS.unpack(status)
        return bytes(answer), code


_lock = threading.Lock()
_sandbox: Sandbox | None = None


def index_in_sandbox(file: WeightsFile, weights_key: str | None = None) -> FileIndex:
    """Index a weights file of either format in a child process with hard limits.

    ``weights_key``: as for :func:`pydetox.checkpoints.formats.index_file`.

    The first call starts the server (about 50 ms), later ones cost a few milliseconds.

    Raises:
        CheckpointError: The file is neither format or damaged; or there is no sandbox.
        UnsafeCheckpointError: It is built to run code, or exhausted the memory or the time of the
            child, or crashed it.
    """
    with _lock:
        return _running().index(file, weights_key)


def _running() -> Sandbox:
    global _sandbox
    if _sandbox is None or not _sandbox.usable():
        _sandbox = Sandbox()
    return _sandbox


def _wait_for(descriptor: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise UnsafeCheckpointError(f"could not be indexed within {WALL_SECONDS:.0f} s")


@atexit.register
def _close() -> None:
    if _sandbox is not None:
        _sandbox.close()


def _unlock() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it, which the fork does not have


os.register_at_fork(after_in_child=_unlock)
