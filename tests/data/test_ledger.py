"""The ledger: small files are put together, and nothing is lost or doubled by a kill."""

import random
from pathlib import Path

import pytest

from sevenfold import storage
from sevenfold.data import ledger
from sevenfold.data.ledger import Ledger
from sevenfold.data.reader import ReadRange
from sevenfold.errors import InputError

LANES = 4


class Killed(BaseException):
    """The process ends here."""


def reads(first: int, last: int, seed: int) -> list[ReadRange]:
    """Returns what the lanes read in these steps, in no order."""
    rng = random.Random(seed)
    found = [
        ReadRange(step, lane, step, rng.randrange(100), rng.randrange(50), 1, rng.getrandbits(62))
        for step in range(first, last + 1)
        for lane in range(LANES)
    ]
    rng.shuffle(found)
    return found


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_SMALL_PARTS", 5)
    monkeypatch.setattr(ledger, "FULL_BYTES", 60_000)
    monkeypatch.setattr(ledger, "_GROUP_ROWS", 16)


@pytest.mark.usefixtures("small")
def test_many_files_become_few(tmp_path: Path) -> None:
    book, expected = Ledger(str(tmp_path)), []
    for part in range(300):
        draws = reads(10 * part + 1, 10 * part + 10, part)
        book.write(draws)
        expected += sorted(draws)
    assert book.read(1, 3000) == expected
    assert len(book.parts()) <= 100 and len(list(tmp_path.iterdir())) == len(book.parts())
    for step in (1, 10, 1234, 2999, 3000):
        assert book.step(step) == [read for read in expected if read.step == step]
    with pytest.raises(InputError, match="expected step 3001, found steps 1 to 3000"):
        book.step(3001)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(30))
def test_the_ledger_is_what_was_written_last_whenever_the_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A run saves, is killed while it writes, goes back to a checkpoint, and writes again."""
    rng = random.Random(seed)
    expected: dict[int, list[ReadRange]] = {}
    countdown = [10**9]

    def dying(function):  # type: ignore[no-untyped-def]
        def call(*args: object) -> object:
            countdown[0] -= 1
            if countdown[0] < 0:
                raise Killed
            return function(*args)

        return call

    monkeypatch.setattr(storage, "write", dying(storage.write))
    monkeypatch.setattr(storage, "remove", dying(storage.remove))
    step = 0
    for attempt in range(30):
        last = step + rng.randint(1, 5)
        draws = reads(step + 1, last, 1000 * seed + attempt)
        countdown[0] = rng.randrange(12) if rng.random() < 0.4 else 10**9
        try:
            Ledger(str(tmp_path)).write(draws)
            step, committed = last, True
        except Killed:
            committed = False  # the checkpoint at the end of these steps does not exist
        countdown[0] = 10**9
        expected = {s: r for s, r in expected.items() if s <= (step if not committed else last)}
        if committed:
            for read in draws:
                expected.setdefault(read.step, [])
            for s in range(draws and min(r.step for r in draws), last + 1):
                expected[s] = sorted(read for read in draws if read.step == s)
        known = Ledger(str(tmp_path)).read(1, step)
        assert known == [read for s in sorted(expected) for read in expected[s]]
        if not committed and rng.random() < 0.5:  # it resumes from an older checkpoint
            step = rng.randint(0, step)
            Ledger(str(tmp_path)).cut(step)
            expected = {s: r for s, r in expected.items() if s <= step}


def test_a_file_that_was_cut_is_named(tmp_path: Path) -> None:
    book = Ledger(str(tmp_path))
    book.write(reads(1, 10, 0))
    [(_, _, path)] = book.parts()
    Path(path).write_bytes(Path(path).read_bytes()[:-100])
    with pytest.raises(InputError, match=r"steps-.*parquet: damaged: not a Parquet file") as error:
        book.step(3)
    assert "\n" not in str(error.value)
