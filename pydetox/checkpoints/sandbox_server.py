"""The other side of :mod:`pydetox.checkpoints.sandbox`: indexes files in forked children.

A small process without torch, started once. For every file it forks, so that a child costs a
millisecond; the child gives up nearly everything it could do, reads one file and ends. Nothing of
one file is left when the next one is read.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import socket
import struct

from pydetox.checkpoints.formats import index_file
from pydetox.checkpoints.index import WeightsFile
from pydetox.checkpoints.index_json import to_json
from pydetox.errors import CheckpointError, UnsafeCheckpointError

#: How a child ended: wait status, largest resident KiB, seconds of processor time.
STATUS = struct.Struct("<iqd")
MAX_REQUEST = 4096
#: Bytes of an answer. The largest header that is accepted makes less.
MAX_ANSWER = 16 << 20
#: Address space of a child, of which the interpreter has about 40 MiB. Headers and pickles of the
#: largest accepted size need about 250 MiB.
MEMORY = 384 << 20
#: Processor time; the largest accepted file takes less than one second.
CPU_SECONDS = 5


def serve(control_descriptor: int) -> None:
    """Answer requests until the other end of the control socket is closed.

    A request is a JSON object with ``path`` (for its extension only) and ``weights_key``, the
    descriptor of the weights and that of the pipe for the answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=control_descriptor)
    gc.collect()
    gc.freeze()  # children shall share its pages
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST, 2)
        if not request:
            return
        weights, answer = descriptors
        child = os.fork()
        if child == 0:
            control.close()
            _child(json.loads(request), weights, answer)
        os.close(weights)
        os.close(answer)
        _, status, usage = os.wait4(child, 0)
        control.send(STATUS.pack(status, usage.ru_maxrss, usage.ru_utime + usage.ru_stime))


def _child(request: dict[str, str | None], weights: int, answer: int) -> None:
    """Index one file, write the answer, end. Never returns."""
    code = 1
    try:
        _give_up_everything()
        data = _answer(request["path"] or "", weights, request["weights_key"])
        while data:
            data = data[os.write(answer, data) :]
        code = 0
    finally:
        os._exit(code)  # whatever happens, nothing of the server runs here


def _give_up_everything() -> None:
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 0,  # what is open stays open; no file and no socket is opened
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    # SIGXCPU first, so that the reason is known; then SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))


def _answer(path: str, weights: int, weights_key: str | None) -> bytes:
    """``+`` and the index, or ``!`` (unsafe), ``-`` (any other error) and the reason."""
    try:
        data = to_json(index_file(WeightsFile(path, weights), weights_key))
        if len(data) < MAX_ANSWER:
            return b"+" + data
        return b"!describes more tensors than any model has"
    except MemoryError:
        return b"!needs more than %d MiB of memory only to be indexed" % (MEMORY >> 20)
    except UnsafeCheckpointError as error:
        return b"!" + str(error).encode("utf-8", "replace")
    except CheckpointError as error:
        return b"-" + str(error).encode("utf-8", "replace")
