"""A server on this machine that speaks the model hub's protocol for the files of folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Repositories of models, whose branch `main` can be moved.

    Attributes:
        url: The server's address.
        downloads: "repository/file" of each file that was sent.
    """

    def __init__(self, url: str):
        self.url = url
        self.downloads: list[str] = []
        self._folders: dict[tuple[str, str], Path] = {}
        self._main: dict[str, str] = {}
        self.gated: set[str] = set()

    def push(self, repository: str, folder: Path) -> str:
        """Makes the files of a folder the branch main of a repository; returns the commit."""
        content = "".join(f"{p}{p.read_bytes()!r}" for p in sorted(folder.rglob("*.json")))
        commit = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        self._folders[repository, commit] = folder
        self._main[repository] = commit
        return commit

    def commit(self, repository: str, revision: str) -> str | None:
        """Returns the commit of a branch or a commit, None if there is none."""
        commit = self._main.get(repository) if revision == "main" else revision
        return commit if (repository, commit) in self._folders else None

    def files(self, repository: str, commit: str) -> dict[str, Path]:
        """Returns the files of a commit by their names in the repository."""
        folder = self._folders[repository, commit]
        return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}

    def known(self, repository: str) -> bool:
        """Returns whether there is such a repository."""
        return repository in self._main


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Runs a hub until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Logs nothing."""

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            parts = parts[2:] if is_api else parts
            repository, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else "main"
            if not hub.known(repository):
                return self._fail(404, "RepoNotFound")
            if repository in hub.gated:
                return self._fail(403, "GatedRepo")
            commit = hub.commit(repository, revision)
            if commit is None:
                return self._fail(404, "RevisionNotFound")
            files = hub.files(repository, commit)
            if not is_api:
                return self._send_file(repository, commit, "/".join(parts[4:]), body)
            entries = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": self._etag(p)}
                for n, p in files.items()
            ]
            siblings = [{"rfilename": n} for n in files]
            info = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
            is_tree = parts[2:3] == ["tree"]
            return self._send(json.dumps(entries if is_tree else info).encode(), body)

        def _send_file(self, repository: str, commit: str, name: str, body: bool) -> None:
            path = hub.files(repository, commit).get(name)
            if path is None:
                return self._fail(404, "EntryNotFound")
            if body:
                hub.downloads.append(f"{repository}/{name}")
            headers = {"ETag": f'"{self._etag(path)}"', "X-Repo-Commit": commit}
            return self._send(path.read_bytes(), body, headers)

        def _send(self, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def _fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _etag(self, path: Path) -> str:
            return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
