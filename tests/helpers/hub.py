"""A server on this machine that speaks the model hub's protocol for the files of folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Repositories of models or datasets, whose branch `main` can be moved.

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

        def do_POST(self) -> None:
            """Answers what is at some paths of a repository."""
            parts = self.path.partition("?")[0].strip("/").split("/")
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = (
                json.loads(asked)["paths"]
                if asked.startswith("{")
                else urllib.parse.parse_qs(asked).get("paths", [])
            )
            repository = "/".join(parts[2:4])
            entries = self._entries(repository, hub.commit(repository, parts[5]) or "")
            self._send(json.dumps([e for e in entries if e["path"] in wanted]).encode(), True)

        def _entries(self, repository: str, commit: str) -> list[dict[str, object]]:
            """Returns the files and folders of a commit."""
            files = hub.files(repository, commit)
            folders = {str(f) for n in files for f in Path(n).parents if str(f) != "."}
            return [
                *({"type": "directory", "path": f, "size": 0, "oid": f} for f in sorted(folders)),
                *(
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": self._etag(p)}
                    for n, p in files.items()
                ),
            ]

        def _answer(self, body: bool) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            is_api = parts[:2] in (["api", "models"], ["api", "datasets"])
            parts = parts[2:] if is_api else parts[parts[0] == "datasets" :]
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
            entries = self._entries(repository, commit)
            if "recursive=true" not in self.path.lower():
                inside = "/".join(parts[4:])
                entries = [e for e in entries if str(e["path"]).rpartition("/")[0] == inside]
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
            content = path.read_bytes()
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                content = content[int(wanted[1]) : int(wanted[2]) + 1]
            return self._send(content, body, headers, 206 if wanted else 200)

        def _send(
            self,
            data: bytes,
            body: bool,
            headers: dict[str, str] | None = None,
            status: int = 200,
        ) -> None:
            self.send_response(status)
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
