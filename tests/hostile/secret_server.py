"""An HTTP server whose files need a password, and a signature in the query."""

from __future__ import annotations

import base64
import contextlib
import http.server
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder; refuses requests without the password or the signature."""

    def send_head(self) -> object:  # type: ignore[override]
        """Answers 401 or 403 instead of the file, as its server's `login` and `query` require."""
        server: SecretServer = self.server  # type: ignore[assignment]
        expected = "Basic " + base64.b64encode(server.login.encode()).decode()
        url = urllib.parse.urlsplit(self.path)
        if self.headers.get("Authorization") != expected:
            return self.send_error(401)
        query, needed = map(urllib.parse.parse_qs, (url.query, server.query))
        if url.path.endswith((".jsonl", ".gguf")) and query != needed:
            return self.send_error(403)
        self.path = url.path
        return super().send_head()

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


class SecretServer(http.server.ThreadingHTTPServer):
    """The server.

    Attributes:
        login: "user:password".
        query: The query that data files need, such as "sig=...".
    """

    login: str
    query: str

    def url(self, path: str, query: bool = True) -> str:
        """Returns the URL of a file with its secrets."""
        user, _, password = self.login.partition(":")
        login = f"{user}:{urllib.parse.quote(password, safe='')}"
        tail = f"?{self.query}" if query else ""
        return f"http://{login}@127.0.0.1:{self.server_port}/{path}{tail}"

    def plain_url(self, path: str) -> str:
        """Returns the URL of a file without secrets."""
        return f"http://127.0.0.1:{self.server_port}/{path}"


@contextlib.contextmanager
def secret_server(folder: Path, login: str, query: str) -> Iterator[SecretServer]:
    """Runs the server in a thread."""

    def handler(*args: object) -> _Handler:
        return _Handler(*args, directory=str(folder))  # type: ignore[arg-type]

    server = SecretServer(("127.0.0.1", 0), handler)  # type: ignore[arg-type]
    server.login, server.query = login, query
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
