"""Servers that list hostile names for the files of a model directory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# what a hostile link is named in the error; "" if it is left out, as links to other places are
LINKS = {
    "../../../escaped.json": "'../../../escaped.json'",
    "/model/../../escaped.json": "'../../escaped.json'",
    "..%2f..%2fescaped.json": "'../../escaped.json'",
    "%2e%2e/escaped.json": "'../escaped.json'",
    "..\\..\\escaped.json": r"'..\\..\\escaped.json'",
    "a/../../escaped.json": "'a/../../escaped.json'",
    "a//escaped.json": "'a//escaped.json'",
    "./escaped.json": "'./escaped.json'",
    "%2Fescaped.json": "'/escaped.json'",
    "a%00.json": r"'a\x00.json'",
    "a%0a.json": r"'a\n.json'",
    "&#46;&#46;/escaped.json": "'../escaped.json'",
    "config%2ejson": "'config.json' twice",
    f"{'a' * 300}.json": "with a part of more than 255 bytes",
    "/other/escaped.json": "",
    "//elsewhere.invalid/escaped.json": "",
    "http://elsewhere.invalid/escaped.json": "",
    "file:///etc/escaped.json": "",
    "config.json?as=../../escaped.json": "'config.json?as=../../escaped.json'",
    "?C=N;O=D": "",
    "#escaped.json": "",
    "../": "",
    "notes.exe": "",
    "deep/config.json/": "",
}
# keys of an S3 bucket next to those of the model, and what the error says
KEYS = {
    "model/../escaped.json": "found",
    "model/../../escaped.json": "found",
    "model//escaped.json": "",  # pyarrow lists no such key
    "model/a\\escaped.json": "found",
    "model/a\x01.json": "found",
    "model/./escaped.json": "found",
    "model/notes.exe": "",
    "model/checkpoints/step/config.json": "",
    "elsewhere/escaped.json": "",
}


@contextlib.contextmanager
def web_server(folder: Path, links: list[str], endless: str = "") -> Iterator[str]:
    """Serves the files of a folder under /model, and lists them with some further links.

    Args:
        folder: The folder.
        links: The links, which lead to files with the content {} wherever they point.
        endless: "page": the listing never ends; "folders": each folder has another one; "names":
            it lists many names.

    Yields:
        The URL of /model.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            file = folder / path.removeprefix("/model/")
            if path in ("/model", "/model/") or (endless == "folders" and path.endswith("/")):
                self.list_folder()
            elif file.is_file() and path.startswith("/model/"):
                self.send(file.read_bytes(), "application/octet-stream")
            elif path.endswith(".json") and "config" not in path:
                self.send(b"{}", "application/json")
            else:
                self.send_error(404)

        def list_folder(self) -> None:
            names = [*sorted(p.name for p in folder.iterdir()), *links]
            if endless == "folders":
                names.append("1_more/")
            if endless == "names":
                names += [f"{i}.json" for i in range(20_000)]
            page = "".join(f'<li><a href="{name}">{name}</a></li>\n' for name in names)
            if endless != "page" or self.command == "HEAD":
                self.send(page.encode(), "text/html")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(page.encode())

        def send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", kind)
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/model"
    finally:
        server.shutdown()
        server.server_close()
