"""Runs other data loaders on the work of our stream: batches [8, 1024] of int64 tokens.

    python stream_peers.py PEER prepare --data FOLDER
    python stream_peers.py PEER read --data FOLDER [--epochs N] [--max-seconds S]
    python stream_peers.py PEER resume --data FOLDER --save STATE.json [--fraction F]
    python stream_peers.py PEER resume --data FOLDER --load STATE.json

FOLDER has text/*.parquet (column `text`) and tokenizer/ (a Hugging Face fast tokenizer). `datasets`
and `ray` tokenize while they read; `mosaicml`, `litdata` and `memmap` read tokens that are prepared
before, all of them from those of `memmap prepare`. The script does not import the project: it runs
in the environment of each peer.

The last line of the output is JSON: first_batch_s is counted from the start of main, seconds from
when the peer is ready (imports, Ray); next_crc32 is that of the batch that follows the state.
`read --max-seconds 0` reads one batch, which gives the cost of a start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

ROWS, LENGTH = 8, 1024
# Documents that are tokenized together; the tokens that do not fill a row are dropped, as is usual.
DOCUMENTS = 256
BLOCKS = 4096  # rows per shard of prepared tokens
ENV = {  # one thread each, so that CPU seconds are comparable
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
TORCH = "torch==2.13.*"  # for another version, pip may download gigabytes of CUDA
REQUIREMENTS: dict[str, list[str]] = {  # for measure.environment; empty: the project's environment
    "datasets": [TORCH, "transformers==5.23.*", "datasets==5.2.*", "torchdata==0.11.*"],
    "ray": [],
    "mosaicml": [
        TORCH,
        "torchvision==0.28.*",
        "mosaicml-streaming==0.13.*",
        "transformers<5",
        "numpy<2.2",
    ],
    "litdata": [TORCH, "torchvision==0.28.*", "litdata==0.2.76"],
    "memmap": [],
}


class Peer:
    """A data loader.

    `state` is that of the last iterator of `batches`; after `load`, the next one continues from it.
    """

    def __init__(self, data: Path):
        self.data = data

    def prepare(self) -> None:
        """Writes the files that reading needs; this is not measured."""

    def batches(self, epoch: int) -> Iterator[torch.Tensor]:
        raise NotImplementedError

    def state(self) -> Any:
        raise SystemExit(f"{type(self).__name__} has no state to resume from")

    def load(self, state: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def files(self) -> list[str]:
        return sorted(map(str, (self.data / "text").glob("*.parquet")))

    def tokens(self) -> np.ndarray:
        """Returns the prepared corpus, uint16 [rows, LENGTH], mapped into memory."""
        import numpy as np

        path = self.data / "memmap" / "tokens.bin"
        if not path.exists():
            raise SystemExit(
                f"{path} is missing: run `stream_peers.py memmap prepare --data {self.data}` first"
            )
        flat = np.memmap(path, np.uint16, "r")
        return flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)


class Tokenize:
    """Converts documents to rows of tokens, end to end, with EOS after each document."""

    def __init__(self, folder: str):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def ids(self, texts: list[str]) -> list[int]:
        encoded = self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False)[
            "input_ids"
        ]
        return [i for ids in encoded for i in (*ids, self.tokenizer.eos_token_id)]

    def __call__(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        import numpy as np

        flat = np.array(self.ids(list(batch["text"])), np.int32)
        return {"tokens": flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)}


class Memmap(Peer):
    """Reads rows of a memory-mapped file in random order: the minimal work of a loader."""

    at = 0  # batches read in this epoch

    def prepare(self) -> None:
        import numpy as np
        import pyarrow.parquet as pq

        tokenize = Tokenize(str(self.data / "tokenizer"))
        if len(tokenize.tokenizer) > 2**16:
            raise SystemExit(
                "the prepared tokens are uint16: use a tokenizer with at most 65,536 tokens"
            )
        folder = fresh(self.data / "memmap")
        with open(folder / "tokens.tmp", "wb") as out:
            for file in self.files():
                for batch in pq.ParquetFile(file).iter_batches(DOCUMENTS, columns=["text"]):
                    np.array(tokenize.ids(batch["text"].to_pylist()), np.uint16).tofile(out)
        os.replace(folder / "tokens.tmp", folder / "tokens.bin")

    def batches(self, epoch: int) -> Iterator[torch.Tensor]:
        import numpy as np
        import torch

        tokens = self.tokens()
        order = np.random.default_rng(epoch).permutation(len(tokens))
        while self.at < len(tokens) // ROWS:
            rows = order[self.at * ROWS : (self.at + 1) * ROWS]
            self.at += 1
            yield torch.from_numpy(tokens[rows].astype(np.int64))
        self.at = 0

    def state(self) -> Any:
        return self.at

    def load(self, state: Any) -> None:
        self.at = state


class Datasets(Peer):
    """Streaming with datasets and torchdata's StatefulDataLoader.

    It has no shuffle buffer: with one, resuming is not exact.
    """

    def __init__(self, data: Path):
        super().__init__(data)
        import numpy as np
        import torch
        from datasets import disable_progress_bars, load_dataset
        from torchdata.stateful_dataloader import StatefulDataLoader

        disable_progress_bars()
        self.cache = tempfile.mkdtemp(prefix="stream-peers-")
        texts = load_dataset(
            "parquet", data_files=self.files(), split="train", streaming=True, cache_dir=self.cache
        )
        self.rows = texts.select_columns(["text"]).map(
            Tokenize(str(data / "tokenizer")),
            batched=True,
            batch_size=DOCUMENTS,
            remove_columns=["text"],
        )
        self.loader = StatefulDataLoader(
            self.rows.with_format("numpy"),
            batch_size=ROWS,
            num_workers=0,  # further processes would not reduce CPU time
            collate_fn=lambda rows: torch.from_numpy(
                np.stack([r["tokens"] for r in rows]).astype(np.int64)
            ),
            drop_last=True,
        )

    def batches(self, epoch: int) -> Iterator[torch.Tensor]:
        self.rows.set_epoch(epoch)
        return iter(self.loader)

    def state(self) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(state)

    def close(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)


class Ray(Peer):
    """Plain Ray Data. It has no state: to resume, it reads everything again and discards it."""

    def __init__(self, data: Path):
        super().__init__(data)
        import ray

        self.temporary = tempfile.mkdtemp(prefix="ray-")
        # a token of its own: otherwise Ray leaves ~/.ray/auth_token behind, which changes how later
        # clusters start
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        ray.init(
            "local",
            num_cpus=4,
            include_dashboard=False,
            _temp_dir=self.temporary,
            log_to_driver=False,
        )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # by default 128 MB of text are tokenized before the first batch
        context.target_max_block_size = 8 * 2**20
        self.skip = self.given = 0

    def batches(self, epoch: int) -> Iterator[torch.Tensor]:
        import ray
        import torch

        rows = (
            ray.data.read_parquet(self.files())
            .select_columns(["text"])
            .map_batches(
                Tokenize,
                fn_constructor_args=(str(self.data / "tokenizer"),),
                batch_size=DOCUMENTS,
                # of the 4 logical CPUs; reading needs the others
                compute=ray.data.ActorPoolStrategy(size=2),
            )
        )
        self.skip, skip = 0, self.skip
        for i, batch in enumerate(
            rows.iter_torch_batches(batch_size=ROWS, drop_last=True, dtypes=torch.int64)
        ):
            self.given = i + 1
            if i >= skip:
                yield batch["tokens"]

    def state(self) -> Any:
        return self.given

    def load(self, state: Any) -> None:
        self.skip = state

    def close(self) -> None:
        import ray

        ray.shutdown()
        shutil.rmtree(self.temporary, ignore_errors=True)


class Mosaicml(Peer):
    """Reads MDS shards with mosaicml-streaming."""

    def __init__(self, data: Path):
        super().__init__(data)
        # It imports torchvision. With a CPU build of torch, the registry's build of torchvision has
        # no operators and fails when it looks for them. Nothing here calls them.
        import torch

        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            self.operators = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                self.operators.define(
                    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
        import streaming  # noqa: F401

    def prepare(self) -> None:
        from streaming import MDSWriter

        columns = {"tokens": f"ndarray:uint16:{LENGTH}"}
        with MDSWriter(
            writer=str(fresh(self.data / "mosaicml")),
            columns=columns,
            size_limit=BLOCKS * LENGTH * 2,
        ) as writer:
            for row in self.tokens():
                writer.write({"tokens": row})

    def open(self) -> Any:
        import numpy as np
        import torch
        from streaming import StreamingDataLoader, StreamingDataset

        rows = StreamingDataset(local=str(self.data / "mosaicml"), shuffle=True, batch_size=ROWS)
        return StreamingDataLoader(
            rows,
            batch_size=ROWS,
            num_workers=0,
            collate_fn=lambda rows: torch.from_numpy(
                np.stack([r["tokens"] for r in rows]).astype(np.int64)
            ),
            drop_last=True,
        )

    def batches(self, epoch: int) -> Iterator[torch.Tensor]:
        self.loader = getattr(self, "loader", None) or self.open()
        return iter(self.loader)

    def state(self) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader = self.open()
        self.loader.load_state_dict(state)


class Litdata(Peer):
    """Reads litdata's own chunks."""

    def __init__(self, data: Path):
        super().__init__(data)
        import litdata  # noqa: F401

    def prepare(self) -> None:
        from litdata import TokensLoader, optimize

        rows = len(self.tokens())
        optimize(
            fn=self.shard,
            inputs=list(range(0, rows, BLOCKS)),
            output_dir=str(fresh(self.data / "litdata")),
            chunk_size=BLOCKS * LENGTH,  # tokens
            item_loader=TokensLoader(),
            num_workers=1,
        )

    def shard(self, start: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.tokens()[start : start + BLOCKS].reshape(-1).copy())

    def open(self) -> Any:
        from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

        rows = StreamingDataset(
            str(self.data / "litdata"),
            item_loader=TokensLoader(block_size=LENGTH),
            shuffle=True,
            drop_last=True,
        )
        # without workers: passing int64 through worker processes takes 7 times the CPU time
        return StreamingDataLoader(rows, batch_size=ROWS, num_workers=0, drop_last=True)

    def batches(self, epoch: int) -> Iterator[torch.Tensor]:
        self.loader = getattr(self, "loader", None) or self.open()
        return (batch.long() for batch in self.loader)

    def state(self) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader = self.open()
        self.loader.load_state_dict(state)


PEERS = {
    "datasets": Datasets,
    "ray": Ray,
    "mosaicml": Mosaicml,
    "litdata": Litdata,
    "memmap": Memmap,
}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def read(peer: Peer, epochs: int, max_seconds: float, start: float) -> dict[str, Any]:
    begin, first_batch, tokens = time.perf_counter(), None, 0
    for epoch in range(epochs):
        for batch in peer.batches(epoch):
            first_batch = first_batch or time.perf_counter()
            checked(batch)
            tokens += batch.numel()
            if time.perf_counter() - first_batch >= max_seconds:
                break
        else:
            continue
        break
    if first_batch is None:
        raise SystemExit("no batch was read")
    return {
        "tokens": tokens,
        "seconds": time.perf_counter() - begin,
        "first_batch_s": first_batch - start,
    }


def save(peer: Peer, fraction: float, path: Path) -> dict[str, Any]:
    """Reads a fraction of an epoch, and writes the state that a run stopped there would have."""
    count = max(1, int(len(peer.tokens()) // ROWS * fraction))
    batches = peer.batches(0)
    for _ in range(count):
        checked(next(batches))
    path.write_text(json.dumps(peer.state()))
    return {
        "batches": count,
        "state_bytes": path.stat().st_size,
        "next_crc32": crc32(next(batches)),
    }


def resume(peer: Peer, path: Path, start: float) -> dict[str, Any]:
    peer.load(json.loads(path.read_text()))
    batch = checked(next(peer.batches(0)))
    return {"first_batch_s": time.perf_counter() - start, "next_crc32": crc32(batch)}


def crc32(batch: torch.Tensor) -> int:
    return zlib.crc32(batch.numpy().tobytes())


def checked(batch: torch.Tensor) -> torch.Tensor:
    import torch

    if batch.shape != (ROWS, LENGTH) or batch.dtype != torch.int64:
        raise SystemExit(
            f"expected a batch [{ROWS}, {LENGTH}] of int64, found {list(batch.shape)} of "
            f"{batch.dtype}"
        )
    return batch


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("action", choices=("prepare", "read", "resume"))
    parser.add_argument("--data", type=lambda s: Path(s).absolute(), required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=float("inf"),
        help="maximum time from the first batch on; 0: one batch",
    )
    parser.add_argument(
        "--fraction", type=float, default=0.9, help="fraction of the epoch at which --save stops"
    )
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path)
    a = parser.parse_args()
    if a.action == "resume" and (a.save is None) == (a.load is None):
        parser.error("resume: expected either --save or --load")
    os.environ.update(ENV)  # before the imports that read them
    import torch

    torch.set_num_threads(1)
    peer: Peer = PEERS[a.peer](a.data)
    with contextlib.closing(peer):
        if a.action == "prepare":
            peer.prepare()
            result: dict[str, Any] = {}
        elif a.action == "read":
            result = read(peer, a.epochs, a.max_seconds, start)
        elif a.save:
            result = save(peer, a.fraction, a.save)
        else:
            result = resume(peer, a.load, start)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
