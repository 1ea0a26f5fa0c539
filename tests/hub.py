"""A stand-in for the Hugging Face hub: its HTTP interface, on this machine."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest


class Hub:
    """Repositories by name: revision to commit, commit to files."""

    def __init__(self) -> None:
        self.revisions: dict[str, dict[str, str]] = {}
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.requests: list[str] = []
        self.broken: set[str] = set()  # file names that answer with status 500
        self.gated: set[str] = set()

    def add(
        self, repository: str, commit: str, files: dict[str, bytes], branch: str = "main"
    ) -> None:
        self.revisions.setdefault(repository, {})[branch] = commit
        for name, content in files.items():
            self.files[repository, commit, name] = content

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for ``/org/repo/resolve/revision/file``."""
        if "/resolve/" not in path:  # the client also asks for this and that
            return 404, {}, b""
        self.requests.append(path)
        _, organisation, name, _, revision, filename = path.split("?")[0].split("/", 5)
        repository = f"{organisation}/{name}"
        if filename in self.broken:
            return 500, {}, b""
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if repository not in self.revisions:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        revisions = self.revisions[repository]
        commit = revisions.get(revision, revision if revision in revisions.values() else None)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        headers = {"X-Repo-Commit": commit}
        content = self.files.get((repository, commit, filename))
        if content is None:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        return 200, {**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Do what ``HF_ENDPOINT`` does when it is set before the client is imported."""
    constants = huggingface_hub.constants
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    huggingface_hub.close_session()  # the next one sees the changed environment
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's retries


@contextmanager
def served_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub on this machine, and let the client ask it."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._send(body=False)

        def do_GET(self) -> None:
            self._send(body=True)

        def _send(self, body: bool) -> None:
            status, headers, content = state.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    use_endpoint(monkeypatch, endpoint)
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
