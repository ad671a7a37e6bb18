"""Measures the speed of the data stream, and the cost of resuming and of a large corpus.

    python benchmarks/stream.py [--quick] [--json FILE] [--data FOLDER]

The batches are [8, 1024] tokens from text in Parquet. Speed is tokens per CPU second of all
processes of the reader, including its start (imports, Ray); if one process does everything, the
speed of reading alone is shown as well. Text, tokenizers and the shards of other libraries are kept
in --data and used again; --quick needs 0.2 GB there, the full run 9 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pickle
import random
import secrets
import shutil
import site
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import measure
import stream_peers
from stream_peers import ENV, LENGTH, ROWS

if TYPE_CHECKING:
    from sevenfold.data.encode import TextEncoder

MB = 10**6
GROUP_BYTES, SHARD_GROUPS = 2 * MB, 16  # text per row group, row groups per file
DOCUMENT_BYTES = 20_000  # longer texts are split at blank lines
HERE = Path(__file__).resolve()
PLATFORM = HERE.parents[1] / "platform"
EXECUTORS = ("inline", "ray")
FRACTIONS = (0.05, 0.95)


class Size(NamedTuple):
    corpus_mb: int  # for speed: large, since the start does not matter in a run of days
    vocabulary: int
    sample_mb: int  # text that the tokenizer is trained on
    epochs: int
    rounds: int
    peers: tuple[str, ...]
    peer_seconds: float  # maximum reading time, from the first batch on
    resume_mb: int
    memory_mb: tuple[int, int]
    memory_batches: int
    resumers: tuple[str, ...]  # the other libraries whose resuming is measured
    resumers_mb: int  # smaller than resume_mb, since they read everything before that position


FULL = Size(
    1000,
    32_000,
    20,
    5,
    3,
    ("datasets", "ray", "mosaicml", "litdata", "memmap"),
    60,
    1000,
    (1000, 4000),
    16_000,
    ("datasets", "mosaicml"),
    250,
)
QUICK = Size(30, 8_000, 3, 2, 1, ("datasets",), 10, 100, (50, 200), 1000, (), 30)


# Our stream, each time in a process of its own.


def ours(a: argparse.Namespace, start: float) -> dict[str, Any]:
    """Reads batches with the executor `a.ours`.

    "seconds" and "cpu_s" (of this process) are counted from when imports and Ray are ready.
    """
    import torch

    from sevenfold.data.order import LanePosition
    from sevenfold.data.reader import ReaderState
    from sevenfold.data.stream import Stream
    from sevenfold.engine.batch import to_batch

    torch.set_num_threads(1)
    order, selection, encoder = pickle.loads((a.data / "stream.pkl").read_bytes())  # noqa: S301
    state, first, tokens, device = ReaderState(), None, 0, torch.device("cpu")
    if a.fraction is not None:
        ordinal = int(a.fraction * order.chunks_per_epoch / order.lanes)
        state.positions = {lane: LanePosition(ordinal, 0) for lane in range(order.lanes)}
    stream = Stream(replace(order, epochs=a.epochs), selection, encoder, LENGTH, a.ours)
    with local_ray() if a.ours == "ray" else contextlib.nullcontext():
        begin, cpu = time.perf_counter(), time.process_time()
        reader = stream.shard(0, 1).reader(ROWS // order.lanes, state)
        try:
            for rows in itertools.islice(reader, a.batches):
                batch = to_batch(rows).to(device)
                first = first or time.perf_counter() - start
                if batch.input_ids.shape != (ROWS, LENGTH) or batch.input_ids.dtype != torch.int64:
                    raise SystemExit(
                        f"expected a batch [{ROWS}, {LENGTH}], found {list(batch.input_ids.shape)}"
                    )
                reader.take_read_ranges()
                tokens += int(rows.used.sum())  # at the end of the epochs, rows are padding
                if reader.ended:
                    break
            seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        finally:
            reader.close()
    return {"tokens": tokens, "seconds": seconds, "first_batch_s": first, "cpu_s": cpu}


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """Starts a Ray like that of the other library: without the dashboard, which takes CPU time."""
    folder = tempfile.mkdtemp(prefix="ray-")
    os.environ.pop("RAY_ADDRESS", None)
    # a token of its own: otherwise Ray leaves ~/.ray/auth_token behind, which changes how later
    # clusters start
    os.environ.update(
        RAY_TMPDIR=folder, RAY_AUTH_TOKEN=secrets.token_hex(32), PYTHONPATH=str(PLATFORM)
    )
    import ray

    try:
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=512 * 2**20,
            log_to_driver=False,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def run_ours(executor: str, data: Path, *options: str | int | float) -> measure.Measured:
    return measure.run(
        [sys.executable, HERE, "--ours", executor, "--data", data, *map(str, options)], ENV, 1800
    )


# The data that is read.


def documents() -> Iterator[str]:
    """Yields Python source of this interpreter and its packages, and the system's documentation.

    It repeats forever; from the second time on, each text starts with the number of the repetition.
    """
    paths = {
        p
        for name in ("stdlib", "purelib", "platlib")
        for p in Path(sysconfig.get_path(name)).rglob("*.py")
    }
    paths.update(p for folder in site.getsitepackages() for p in Path(folder).rglob("*.py"))
    paths.update(
        p
        for p in Path("/usr/share/doc").rglob("*")
        if p.is_file() and p.suffix not in (".gz", ".xz", ".png")
    )
    order = sorted(paths)
    random.Random(0).shuffle(order)  # noqa: S311
    for copy in itertools.count():
        for path in order:
            try:
                text = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            for part in [text] if len(text) < DOCUMENT_BYTES else text.split("\n\n\n"):
                if part.strip():
                    yield f"# {copy}: {part}" if copy else part


def write_text(folder: Path, size_mb: int) -> None:
    """Writes Parquet files with zstd and row groups of about GROUP_BYTES, if they do not exist."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if (folder / "ready").exists():
        return
    say(f"writing {size_mb} MB of text to {folder}")
    text = stream_peers.fresh(folder) / "text"
    text.mkdir()
    schema, remaining, texts = pa.schema([("text", pa.string())]), size_mb * MB, documents()
    for shard in itertools.count():
        if remaining <= 0:
            break
        with pq.ParquetWriter(text / f"{shard:05}.parquet", schema, compression="zstd") as writer:
            for _ in range(SHARD_GROUPS):
                group, size = list[str](), 0
                while size < min(GROUP_BYTES, remaining):
                    group.append(next(texts))
                    size += len(group[-1].encode())
                remaining -= size
                if group:
                    writer.write_table(pa.table({"text": group}, schema), row_group_size=len(group))
    (folder / "ready").touch()


class Corpora:
    """Corpora by their size in MB, all with the same tokenizer.

    Each folder also has stream.pkl: the order, the selection of documents and the encoder.
    """

    def __init__(self, folder: Path, size: Size):
        self.folder, self.size = folder, size
        self.encoder: TextEncoder | None = None

    def __call__(self, size_mb: int) -> Path:
        from sevenfold.data.backends import choose_backend
        from sevenfold.data.encode import TextEncoder
        from sevenfold.data.order import CHUNKS_PER_LANE, DataOrder
        from sevenfold.data.scan import scan
        from sevenfold.data.sources.documents import Selection
        from sevenfold.data.tokenizer import (
            LAST_WRITTEN,
            estimate_tokens_per_byte,
            load_tokenizer,
            sample,
            save_tokenizer,
            train_tokenizer,
        )
        from sevenfold.recipe import Data, Source

        folder = self.folder / f"{size_mb}mb-{self.size.vocabulary}"
        write_text(folder, size_mb)
        source, selection = Source(path=str(folder / "text")), Selection()
        manifest = scan([source], "causal", ROWS * CHUNKS_PER_LANE)
        if self.encoder is None:
            if not (folder / "tokenizer" / LAST_WRITTEN).exists():
                new_tokenizer = train_tokenizer(
                    manifest, selection, self.size.vocabulary, self.size.sample_mb, 0
                )
                save_tokenizer(new_tokenizer, str(folder / "tokenizer"))
            tokenizer = load_tokenizer(str(folder / "tokenizer"))
            texts = [t for column in sample(manifest, selection, 0, 1, 0) for t in column]
            backend, why = choose_backend(tokenizer, texts)
            say(why)
            self.encoder = TextEncoder(tokenizer, LENGTH, backend)
            self.tokenizer = folder / "tokenizer"
        elif not (folder / "tokenizer").exists():  # the other libraries expect it there
            shutil.copytree(self.tokenizer, folder / "tokenizer")
        manifest = manifest.measured(
            [estimate_tokens_per_byte(manifest, selection, self.encoder, 0, 1, 0)]
        )
        order = DataOrder.from_manifest(
            manifest, Data(sources=[source], sequence_length=LENGTH), 0, ROWS
        )
        (folder / "stream.pkl").write_bytes(pickle.dumps((order, selection, self.encoder)))
        say(
            f"{size_mb} MB: {order.tokens / MB:.1f} M tokens, {order.chunks_per_epoch} chunks per "
            "epoch"
        )
        return folder


# The claims


class Peers:
    def __init__(self, data: Path):
        self.data = data

    def run(self, peer: str, *arguments: str | float | Path) -> measure.Measured:
        python = measure.environment(peer, stream_peers.REQUIREMENTS[peer])
        script = HERE.with_name("stream_peers.py")
        return measure.run(
            [python, script, peer, *map(str, arguments), "--data", self.data], ENV, 3600
        )

    def prepare(self, names: Sequence[str]) -> None:
        """Prepares the data of other libraries once; they start from the tokens of memmap."""
        for name in dict.fromkeys(["memmap", *names]):
            done = self.data / f"{name}.ready"
            if not done.exists():
                say(f"preparing {name}")
                self.run(name, "prepare")
                done.touch()


def speed(corpora: Corpora, size: Size) -> list[dict[str, Any]]:
    data = corpora(size.corpus_mb)
    peers = Peers(data)
    if any(p not in ("datasets", "ray") for p in size.peers):
        peers.prepare([p for p in size.peers if p not in ("datasets", "ray")])
    for peer in size.peers:
        measure.environment(peer, stream_peers.REQUIREMENTS[peer])  # before the measurement
    sides: dict[str, Callable[[], measure.Measured]] = {
        f"ours, {e}": partial(run_ours, e, data, "--epochs", size.epochs) for e in EXECUTORS
    }
    for peer in size.peers:
        sides[peer] = partial(
            peers.run, peer, "read", "--epochs", size.epochs, "--max-seconds", size.peer_seconds
        )
    results: dict[str, list[measure.Measured]] = {name: [] for name in sides}

    def rate(name: str) -> float:
        say(f"reading: {name}")
        m = sides[name]()
        results[name].append(m)
        return m.stdout_json["tokens"] / m.cpu_s / MB

    rates = {
        k: measure.median(v)
        for k, v in measure.interleaved({n: partial(rate, n) for n in sides}, size.rounds).items()
    }
    rows = []
    for name, measurements in results.items():
        m = measurements[-1]
        out = m.stdout_json
        alone = f"{out['tokens'] / out['cpu_s'] / MB:.3g}" if name == "ours, inline" else "-"
        figures = (rates[name], out["tokens"] / MB, m.cpu_s, out["first_batch_s"], m.peak_mb)
        rows.append([name, *(f"{f:,.3g}" if f < 1000 else f"{f:,.0f}" for f in figures), alone])
    measure.show(
        f"{size.corpus_mb} MB of text; medians of {size.rounds} rounds; from the third column on, "
        "the last round",
        (
            "reader",
            "M tokens / CPU s",
            "M tokens",
            "CPU s",
            "first batch s",
            "peak MB (PSS)",
            "M tokens / CPU s, reading alone",
        ),
        rows,
    )
    inline, by_ray, other = rates["ours, inline"], rates["ours, ray"], rates["datasets"]
    return [
        measure.claim("online_vs_datasets", inline, other, 30),
        measure.claim("ray_vs_datasets", by_ray, other, 30),
        measure.claim("inline_mtokens_per_cpu_s", inline, None, 20),
        measure.claim("ray_mtokens_per_cpu_s", by_ray, None, 12),
    ]


def resume(corpora: Corpora, size: Size) -> list[dict[str, Any]]:
    """Compares the seconds from the start of a process to its first batch, imports included."""
    rounds, data = 3, corpora(size.resume_mb)

    def one(fraction: float) -> float:
        return run_ours("inline", data, "--batches", 1, "--fraction", fraction).stdout_json[
            "first_batch_s"
        ]

    say("resuming: ours")
    early, late = medians({f: partial(one, f) for f in FRACTIONS}, rounds)
    rows = [
        ["ours, inline", str(size.resume_mb), f"{early:.2f}", f"{late:.2f}", f"{late / early:.2f}"]
    ]
    small = size.resumers_mb
    peers = Peers(corpora(small) if size.resumers else data)
    if size.resumers:
        peers.prepare(size.resumers)
    for name in size.resumers:
        say(f"resuming: {name}")
        states = {f: peers.data / f"{name}-{f}.json" for f in FRACTIONS}
        for f, path in states.items():
            peers.run(name, "resume", "--save", path, "--fraction", f)

        def load(name: str, path: Path) -> float:
            return peers.run(name, "resume", "--load", path).stdout_json["first_batch_s"]

        a, b = medians({f: partial(load, name, path) for f, path in states.items()}, rounds)
        rows.append([name, str(small), f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}"])
    measure.show(
        f"Resuming: s to the first batch, medians of {rounds}",
        ("reader", "MB of text", "at 5%", "at 95%", "ratio"),
        rows,
    )
    return [measure.claim("resume_is_constant", late, early, 1.2, at_most=True)]


def memory(corpora: Corpora, size: Size) -> list[dict[str, Any]]:
    """Compares the peak memory for the same number of batches of a small and a large corpus.

    The claim is that of the executor whose memory grows more.
    """
    folders = {mb: corpora(mb) for mb in size.memory_mb}
    peaks: dict[str, tuple[float, ...]] = {}
    for executor in EXECUTORS if size is FULL else EXECUTORS[:1]:
        say(f"memory: {executor}")
        peaks[executor] = tuple(
            run_ours(executor, d, "--batches", size.memory_batches).peak_mb
            for d in folders.values()
        )
    rows = [[f"ours, {e}", f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.2f}"] for e, (a, b) in peaks.items()]
    columns = ("reader", *(f"{mb} MB of text" for mb in folders), "ratio")
    measure.show(f"Peak MB (PSS) over {size.memory_batches:,} batches", columns, rows)
    small, large = max(peaks.values(), key=lambda p: p[1] / p[0])
    return [measure.claim("memory_is_constant", large, small, 1.1, at_most=True)]


def medians(sides: Mapping[float, Callable[[], float]], rounds: int) -> list[float]:
    results = measure.interleaved({str(k): v for k, v in sides.items()}, rounds)
    return [measure.median(results[str(k)]) for k in sides]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path(os.environ.get("SEVENFOLD_BENCH") or Path.home() / ".cache" / "sevenfold-bench")
    parser.add_argument(
        "--quick", action="store_true", help="about 60 s of CPU; too small to judge the claims by"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--data",
        type=lambda s: Path(s).absolute(),
        default=cache / "stream-data",
        help="folder in which the data is kept",
    )
    own = parser.add_argument_group("used by the script itself")
    own.add_argument("--ours", choices=EXECUTORS)
    own.add_argument("--epochs", type=int)
    own.add_argument("--batches", type=int)
    own.add_argument("--fraction", type=float)
    a = parser.parse_args()
    os.environ.update(ENV)
    if a.ours:
        print(json.dumps(ours(a, start)), flush=True)
        return 0
    size = QUICK if a.quick else FULL
    corpora = Corpora(a.data.absolute(), size)
    claims = [c for part in (speed, resume, memory) for c in part(corpora, size)]
    return 0 if measure.report(claims, a.json) or a.quick else 1


if __name__ == "__main__":
    sys.exit(main())
