"""The process of a local worker: it reads tasks from a socket and writes their outcomes.

Messages are JSON, so that the driver never unpickles anything from a worker.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ..tasks import Task, failure

if TYPE_CHECKING:
    from ..worker import Worker


def main(descriptor: int) -> None:
    """Serve the driver at the other end of a socket until it closes it or dies."""
    # Ctrl-C reaches all processes of a terminal, but the driver ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # stdout belongs to results, and those are the driver's.
    os.dup2(sys.stderr.fileno(), 1)
    connection = Connection(descriptor)
    setup = json.loads(connection.recv_bytes())

    from ...errors import explain
    from ...progress import silence
    from ..config import ScannerConfig
    from ..worker import Worker

    silence()
    try:
        config = ScannerConfig.from_dict(setup["config"])
        worker = Worker(config, setup["device"], setup["threads"], share=setup["share"])
    except Exception as error:  # noqa: BLE001 - the driver has to hear of it
        _send(connection, {"failed": explain(error) or traceback.format_exc()})
        return
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks, worker), daemon=True).start()
    _send(connection, {"ready": True})
    while True:
        task = tasks.get()
        _send(connection, {"started": task.id})
        try:
            value = worker.run(task)
        except Exception as error:  # noqa: BLE001 - a bug in one checkpoint must not end the others
            line = f"{type(error).__name__}: {error}"
            value = failure(line, "internal", traceback=traceback.format_exc())
        _send(connection, {"done": task.id, "value": value})


def _receive(connection: Connection, tasks: queue.SimpleQueue[Task], worker: Worker) -> None:
    """Receive tasks and begin to read their files. End the process when the driver ends."""
    while True:
        try:
            task = Task.from_dict(json.loads(connection.recv_bytes()))
        except (EOFError, OSError):
            os._exit(0)
        worker.prepare(task)
        tasks.put(task)


def _send(connection: Connection, message: dict[str, Any]) -> None:
    try:
        connection.send_bytes(json.dumps(message).encode())
    except OSError:
        os._exit(0)
