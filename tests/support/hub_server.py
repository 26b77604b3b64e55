"""A Hub of one's own: what `huggingface_hub` asks for about the datasets in memory, over HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Hub(ThreadingHTTPServer):
    """Datasets by name, each with its files; the commit follows from what they hold.

    Attributes:
        repositories: Files by path, of each dataset.
        older: Files of commits that were once the newest ones.
        requested: Paths of the requests so far.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.older: dict[str, Mapping[str, bytes]] = {}
        self.requested: list[str] = []

    @property
    def address(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, name: str, files: Mapping[str, bytes]) -> str:
        """Make files the newest commit of a dataset; gives the commit."""
        self.repositories[name] = dict(files)
        commit = _commit(files)
        self.older[commit] = dict(files)
        return commit


def _commit(files: Mapping[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        """Answer a request."""
        self.server.requested.append(self.path)
        path = unquote(self.path.partition("?")[0])
        for name, newest in self.server.repositories.items():
            for prefix, answer in (
                (f"/api/datasets/{name}/revision/", self._describe),
                (f"/api/datasets/{name}/tree/", self._list),
                (f"/datasets/{name}/resolve/", self._give),
            ):
                if path.startswith(prefix):
                    revision, _, below = path.removeprefix(prefix).partition("/")
                    files = newest if revision == "main" else self.server.older.get(revision)
                    if files is not None:
                        answer(name, files, below)
                        return
                    self._send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
                    return
        self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def _describe(self, name: str, files: Mapping[str, bytes], _below: str) -> None:
        siblings = [{"rfilename": file} for file in files]
        facts = {"id": name, "sha": _commit(files), "private": False, "siblings": siblings}
        self._send(json.dumps(facts | {"downloads": 0, "likes": 0, "tags": []}).encode())

    def _list(self, _name: str, files: Mapping[str, bytes], below: str) -> None:
        """The entries of one folder."""
        prefix = f"{below}/" if below else ""
        found: dict[str, dict[str, object]] = {}
        for file, content in files.items():
            if not file.startswith(prefix):
                continue
            first, _, rest = file.removeprefix(prefix).partition("/")
            kind, size = ("directory", 0) if rest else ("file", len(content))
            oid = hashlib.sha1(content).hexdigest()
            found[first] = {"type": kind, "path": prefix + first, "size": size, "oid": oid}
        self._send(json.dumps(list(found.values())).encode())

    def _give(self, _name: str, files: Mapping[str, bytes], file: str) -> None:
        if file not in files:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = files[file]
        tag = hashlib.sha1(content).hexdigest()
        self._send(content, 200, {"X-Repo-Commit": _commit(files), "ETag": f'"{tag}"'})

    def _send(
        self, content: bytes, code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub that answers until the end of the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
