"""Reads, writes and lists files on disk, in memory, over HTTP and in S3, also during outages."""

import contextlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ask

from sevenfold import storage
from sevenfold.errors import InputError, RunError
from sevenfold.run_folder import RunFolder
from sevenfold.storage import object_stores, reader, retry

# The contents of the file that most tests read: 13 MiB, more than one read or part.
BYTES = random.Random(7).randbytes(13 << 20)
SHARDS = (".parquet",)


def input_paths(path: str, suffixes: tuple[str, ...] = SHARDS) -> list[str]:
    """The paths of the input files; what their listing says of each is what a look at it says."""
    files = storage.input_files(path, suffixes)
    for file in files:
        assert file.size is None or file.size == storage.size(file.path)
        # fsspec's files in memory report their time in two forms
        assert file.version == storage.version(file.path) or path.startswith("memory:")
    return [file.path for file in files]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEVENFOLD_HOME", raising=False)
    assert storage.resolve_input("runs/a") == str(tmp_path / "runs/a")
    assert storage.resolve_input("s3://bucket/x/") == "s3://bucket/x"
    monkeypatch.setenv("SEVENFOLD_HOME", "/elsewhere")
    assert storage.resolve_input("runs/a") == "/elsewhere/runs/a"


def test_relative_paths_in_a_ray_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEVENFOLD_HOME", raising=False)
    # In a Ray job, the working folder is temporary, so results go to the home folder.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert storage.resolve_input("runs/a") == os.path.expanduser("~/sevenfold/runs/a")
    (tmp_path / "uploaded").mkdir()
    assert storage.resolve_input("uploaded") == str(tmp_path / "uploaded")


@pytest.mark.parametrize("root", ["{tmp}", "memory://bucket"])
def test_write_read_list_remove(root: str, tmp_path: Path) -> None:
    root = root.format(tmp=tmp_path)
    folder = storage.join(root, "run")
    storage.write(storage.join(folder, "a.json"), '{"x": 1}')
    storage.write(storage.join(folder, "b.parquet"), b"1")
    assert storage.read_json(storage.join(folder, "a.json")) == {"x": 1}
    assert storage.listdir(folder) == ["a.json", "b.parquet"]
    shards = input_paths(folder)
    assert [p.rsplit("/", 1)[-1] for p in shards] == ["b.parquet"]
    matches = input_paths(storage.join(folder, "*.json"))
    assert [p.rsplit("/", 1)[-1] for p in matches] == ["a.json"]
    storage.remove(folder)
    assert not storage.exists(storage.join(folder, "a.json"))
    assert storage.listdir(storage.join(root, "none")) == []


def test_missing_files_are_errors(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "none", "a file or folder"),
        (tmp_path, r"files \(\*\.parquet\) in this folder"),
        (tmp_path / "*.x", "matches"),
    ):
        with pytest.raises(InputError, match=says):
            input_paths(str(path))
    with pytest.raises(InputError, match="expected a run"):
        RunFolder.existing(str(tmp_path))


@pytest.mark.parametrize("root", ["{tmp}", "memory://shards"])
def test_files_searches_recursively_and_skips_hidden_ones(root: str, tmp_path: Path) -> None:
    root = root.format(tmp=tmp_path)
    for name in (
        "b.parquet",
        "a/c.jsonl",
        "a/_SUCCESS",
        "a/.c.parquet.crc",
        "_temporary/0/d.parquet",
        ".x/e.parquet",
        "f.md",
    ):
        storage.write(storage.join(root, *name.split("/")), b"1")
    paths = input_paths(root, (".parquet", ".jsonl"))
    assert [p.split("/")[-1] for p in paths] == ["c.jsonl", "b.parquet"] and paths == sorted(paths)
    with pytest.raises(
        InputError, match=r"expected files \(\*\.txt, \*\.json\) in this folder, found none"
    ):
        input_paths(root, (".txt", ".json"))


def check_reader(path: str) -> None:
    """Checks that each way of reading the file at `path` gives BYTES."""
    assert storage.size(path) == len(BYTES)
    with storage.open_read(path) as f:
        assert (f.size, f.readable(), f.seekable(), f.tell()) == (len(BYTES), True, True, 0)
        assert f.read(10) == BYTES[:10] and f.tell() == 10
        assert f.seek(-7, os.SEEK_END) == len(BYTES) - 7
        assert f.read() == BYTES[-7:] and f.read(5) == b""
        f.seek(6 << 20)
        assert f.readinto(buffer := bytearray(1 << 20)) == 1 << 20
        assert buffer == BYTES[6 << 20 : 7 << 20]
        f.seek(1)
        assert f.seek(2, os.SEEK_CUR) == 3 and f.read(4) == BYTES[3:7]
        assert io.BufferedReader(f).read() == BYTES[7:]
    assert f.closed
    with pytest.raises(ValueError, match="closed"):
        f.read(1)
    expected = BYTES[5 << 20 : (5 << 20) + 100]
    assert pa.PythonFile(storage.open_read(path)).read_at(100, 5 << 20) == expected


def test_local_reads(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(BYTES)
    check_reader(str(tmp_path / "x"))
    for path, says in (
        (tmp_path / "none", "expected a file, found none"),
        (tmp_path, "found a folder"),
    ):
        with pytest.raises(InputError, match=says):
            storage.open_read(str(path))
    with pytest.raises(InputError, match="found none"):
        storage.size(str(tmp_path / "x" / "y"))
    assert not storage.exists(str(tmp_path / "x" / "y"))


def test_two_readers_of_a_file_in_memory() -> None:
    storage.write("memory://two/x", b"0123456789")
    with storage.open_read("memory://two/x") as a, storage.open_read("memory://two/x") as b:
        assert [a.read(3), b.read(4), a.read(3), b.read(4)] == [b"012", b"0123", b"345", b"4567"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes retries of failed reads and writes wait for fractions of a second."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.4)
    monkeypatch.setattr(retry, "RETRY_SECONDS", 30.0)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "x"
    path.write_bytes(BYTES)
    with storage.open_read(str(path)) as f:
        f.read(1 << 20)
        path.write_bytes(BYTES[: 2 << 20])
        with pytest.raises(RunError, match="was changed while it was read"):
            f.read(4 << 20)


class Served:
    """An HTTP server of some files on this machine, which can be made to fail.

    It can be stopped and started again on the same port.

    Attributes:
        files: contents by path.
        ranges: whether it supports range requests.
        requests: the method and the Range header of each request.
        status: the status of each response; 200 serves the files.
        truncate: how many of the next response bodies end after half of their bytes.
    """

    def __init__(self, files: dict[str, bytes], ranges: bool = True) -> None:
        self.files, self.ranges = files, ranges
        self.requests: list[tuple[str, str | None]] = []
        self.status, self.truncate = 200, 0
        self.port = 0
        self.start()

    def start(self) -> None:
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def answer(self) -> None:
                served.requests.append((self.command, requested := self.headers.get("Range")))
                body = served.files.get(self.path)
                status = served.status if served.status != 200 else 404 if body is None else 200
                if body is None or status != 200:
                    self.send_error(status)
                    return
                part = body
                if requested and served.ranges:
                    first, last = (int(n) for n in requested.removeprefix("bytes=").split("-"))
                    part, status = body[first : last + 1], 206
                self.send_response(status)
                self.send_header("Content-Length", str(len(part)))
                self.send_header(
                    "Content-Type",
                    "text/html" if body.startswith(b"<html>") else "application/octet-stream",
                )
                if status == 206:
                    self.send_header(
                        "Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(body)}"
                    )
                self.end_headers()
                if self.command == "GET":
                    if served.truncate and len(part) > 1000:
                        served.truncate -= 1
                        part = part[: len(part) // 2]
                    with contextlib.suppress(ConnectionError):
                        self.wfile.write(part)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@pytest.fixture
def served() -> Iterator[Served]:
    server = Served(
        {"/x.bin": BYTES, "/get?id=5&part=1": BYTES, "/empty": b"", "/data": b"<html>x.bin</html>"}
    )
    yield server
    server.stop()


def parquet_table(rows: int = 50_000) -> tuple[pa.Table, bytes]:
    """Returns a table and the bytes of its parquet file."""
    table = pa.table({"n": pa.array(range(rows)), "text": [f"row {i * 7919}" for i in range(rows)]})
    output = pa.BufferOutputStream()
    pq.write_table(table, output, row_group_size=rows // 10, compression="none")
    return table, output.getvalue().to_pybytes()


def test_http_reads_ranges(served: Served) -> None:
    for path in ("/x.bin", "/get?id=5&part=1"):
        assert input_paths(served.url(path)) == [served.url(path)]
        served.requests.clear()
        with storage.open_read(served.url(path)) as f:
            f.seek(9 << 20)
            assert f.read(1000) == BYTES[9 << 20 : (9 << 20) + 1000]
        assert served.requests and all(r for method, r in served.requests if method == "GET")
    check_reader(served.url("/x.bin"))
    assert storage.read_text(served.url("/empty")) == ""
    table, served.files["/t.parquet"] = parquet_table()
    assert pq.ParquetFile(storage.open_read(served.url("/t.parquet"))).read().equals(table)


def test_http_without_ranges(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.ranges = False
    check_reader(served.url("/x.bin"))
    table, served.files["/t.parquet"] = parquet_table()
    assert pq.ParquetFile(storage.open_read(served.url("/t.parquet"))).read().equals(table)
    monkeypatch.setattr(reader, "MAX_DOWNLOAD_BYTES", 4 << 20)
    with pytest.raises(InputError, match=r"expected at most 4 MiB.*range requests"):
        storage.open_read(served.url("/x.bin"))


def test_http_has_no_folders(served: Served) -> None:
    for path in ("/data", "/shards/*.parquet"):
        with pytest.raises(
            InputError, match="expected the URL of one file, found a folder or glob"
        ):
            input_paths(served.url(path))


def test_http_missing_or_forbidden(served: Served) -> None:
    start = time.monotonic()
    missing = served.url("/none.parquet")
    assert not storage.exists(missing)
    for function in (storage.open_read, storage.size, lambda p: input_paths(p)):
        with pytest.raises(InputError, match=r"expected a file.*found none"):
            function(missing)
    served.status = 403
    for function in (storage.open_read, storage.size, storage.exists):
        with pytest.raises(InputError, match=r"refused .*403"):
            function(served.url("/x.bin"))
    # These errors are not retried.
    assert time.monotonic() - start < 5


def outage(served: Served, seconds: float) -> threading.Timer:
    """Stops the server; the timer that it returns starts it again."""
    served.stop()
    timer = threading.Timer(seconds, served.start)
    timer.start()
    return timer


def read_through(served: Served, seconds: float, caplog: pytest.LogCaptureFixture) -> None:
    """Reads a file in pieces, with an outage after 4 MiB, which must be logged exactly once."""
    path, data = served.url("/x.bin"), b""
    with storage.open_read(path) as f:
        while piece := f.read(1 << 20):
            data += piece
            if len(data) == 4 << 20:
                timer = outage(served, seconds)
    assert data == BYTES
    timer.join()
    messages = [r.getMessage() for r in caplog.records if r.name == "sevenfold.storage.retry"]
    assert [message.startswith(path) for message in messages] == [True]


def test_http_outage_in_a_read(
    served: Served, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    read_through(served, 2, caplog)
    for function, expected in (
        (storage.size, len(BYTES)),
        (storage.exists, True),
        (lambda p: input_paths(p), [served.url("/x.bin")]),
    ):
        timer = outage(served, 0.5)
        assert function(served.url("/x.bin")) == expected
        timer.join()


@pytest.mark.slow
def test_http_outage_of_20_seconds(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    read_through(served, 20, caplog)


@pytest.mark.parametrize("ranges", [True, False])
def test_http_truncated_bodies_and_503(ranges: bool, served: Served, quick: None) -> None:
    served.ranges, served.truncate = ranges, 2
    with storage.open_read(served.url("/x.bin")) as f:
        assert f.read(3 << 20) == BYTES[: 3 << 20]
        served.status = 503
        timer = threading.Timer(1, setattr, (served, "status", 200))
        timer.start()
        assert f.read() == BYTES[3 << 20 :]
    assert served.truncate == 0
    for function, expected in ((storage.size, len(BYTES)), (storage.exists, True)):
        served.status = 503
        threading.Timer(0.5, setattr, (served, "status", 200)).start()
        assert function(served.url("/x.bin")) == expected


def test_retries_end_with_an_error(
    served: Served, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.5)
    served.status = 503
    for function, verb in ((storage.open_read, "read"), (storage.exists, "looked up")):
        with pytest.raises(
            RunError, match=f"could not be {verb}, retried for [01] s: 503.*check the storage"
        ) as e:
            function(served.url("/x.bin"))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("url", [False, True])
def test_new_folder_replaces_all_or_nothing(tmp_path: Path, url: bool) -> None:
    path = f"memory://{tmp_path}/x" if url else str(tmp_path / "x")
    storage.write(f"{path}/old", "1")
    old = re.compile("old")
    with pytest.raises(RunError), storage.new_folder(path, old) as aside:
        Path(aside, "new").write_text("2")
        raise RunError("full")
    assert storage.listdir(path) == ["old"]
    with storage.new_folder(path, old) as aside:
        Path(aside, "new").write_text("2")
        assert storage.listdir(path) == ["old"]
    assert storage.listdir(path) == ["new"] and storage.read_text(f"{path}/new") == "2"
    assert url or [p.name for p in tmp_path.iterdir()] == ["x"]
    with (
        pytest.raises(InputError, match="expected a folder, found a file"),
        storage.new_folder(f"{path}/new"),
    ):
        pass


def test_s3(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A valid but unusual key: `?` must not be read as a wildcard.
    root = f"{bucket}/corpus/v?1"
    table, shard = parquet_table()
    storage.write(f"{bucket}/corpus/v/b.parquet", shard)
    storage.makedirs(root)
    assert not storage.exists(root)
    folder = tmp_path / "up"
    for name, content in (
        ("x.bin", BYTES),
        ("sub/a.parquet", shard),
        ("sub/_SUCCESS", b""),
        ("_temporary/c.parquet", b"1"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    storage.upload(str(folder), root)
    assert storage.listdir(root) == ["_temporary", "sub", "x.bin"]
    assert storage.listdir(f"{bucket}/none") == []
    assert input_paths(root) == [f"{root}/sub/a.parquet"]
    assert input_paths(f"{bucket}/corpus") == [
        f"{bucket}/corpus/v/b.parquet",
        f"{root}/sub/a.parquet",
    ]
    assert input_paths(f"{bucket}/corpus/v/*.parquet") == [f"{bucket}/corpus/v/b.parquet"]
    assert input_paths(f"{root}/x.bin") == [f"{root}/x.bin"]
    check_reader(f"{root}/x.bin")
    assert pq.ParquetFile(storage.open_read(f"{root}/sub/a.parquet")).read().equals(table)
    copy = Path(storage.local_copy(root))  # of the files of a model only
    assert (copy / "x.bin").read_bytes() == BYTES
    assert [p.name for p in copy.iterdir()] == ["x.bin"]
    # Another process uses the same copy and does not download the folder again.
    code = f"from sevenfold import storage; print(storage.local_copy({root!r}))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(copy)
    storage.write(f"{root}/x.bin", "again")
    storage.local_copy.cache_clear()
    assert (Path(storage.local_copy(root)) / "x.bin").read_text() == "again"
    assert storage.read_text(f"{root}/x.bin") == "again"
    storage.remove(f"{root}/x.bin")
    storage.remove(root)
    assert not storage.exists(f"{root}/sub/a.parquet")
    assert storage.exists(f"{bucket}/corpus/v/b.parquet")


def test_s3_missing_or_forbidden(
    bucket: str, moto: tuple[subprocess.Popen[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.monotonic()
    storage.write(f"{bucket}/x", b"1")
    assert not storage.exists(f"{bucket}/none") and not storage.exists("s3://no-such-bucket/x")
    for function in (
        storage.open_read,
        storage.size,
        storage.read_text,
        lambda p: input_paths(p),
    ):
        for path in (f"{bucket}/none", "s3://no-such-bucket/x"):
            with pytest.raises(InputError, match=r"expected a file.*found none"):
                function(path)
    for function in (
        lambda p: input_paths(p + "*"),
        lambda p: storage.write(p, b"1"),
    ):
        with pytest.raises(InputError, match="expected a bucket of this name, found none"):
            function("s3://no-such-bucket/x")
    ask("POST", f"{moto[1]}/moto-api/reset-auth", b"0")
    for function in (
        storage.open_read,
        storage.exists,
        storage.listdir,
        storage.remove,
        lambda p: storage.write(p, b"1"),
    ):
        with pytest.raises(InputError, match=r"refused .*check the address, the credentials"):
            function(f"{bucket}/x")
    assert time.monotonic() - start < 20


def test_s3_region(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def region() -> str:
        return str(object_stores.S3().fs.region)

    assert region() == "us-east-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    assert region() == "eu-west-3"
    monkeypatch.setenv("AWS_REGION", "ap-south-1")
    assert region() == "ap-south-1"


@pytest.mark.slow
def test_s3_outage(
    bucket: str,
    moto: tuple[subprocess.Popen[bytes], str],
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The server hangs during a read and before a write, for longer than pyarrow itself retries."""
    monkeypatch.setattr(object_stores, "TIMEOUT_SECONDS", 0.5)
    object_stores._s3.cache_clear()
    storage.write(f"{bucket}/x", BYTES)

    def hang() -> threading.Timer:
        moto[0].send_signal(signal.SIGSTOP)
        timer = threading.Timer(8, moto[0].send_signal, (signal.SIGCONT,))
        timer.start()
        return timer

    try:
        with storage.open_read(f"{bucket}/x") as f:
            assert f.read(3 << 20) == BYTES[: 3 << 20]
            timer = hang()
            assert f.read() == BYTES[3 << 20 :]
        timer.join()
        assert [r.name for r in caplog.records] == ["sevenfold.storage.retry"]
        timer = hang()
        storage.write(f"{bucket}/y", b"there")
        assert storage.listdir(bucket) == ["x", "y"] and storage.read_text(f"{bucket}/y") == "there"
        timer.join()
    finally:
        object_stores._s3.cache_clear()
