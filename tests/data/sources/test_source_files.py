"""Which files of a folder are read, how texts are divided into documents, and saved datasets."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sevenfold import storage
from sevenfold.data.manifest import Manifest
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import Selection
from sevenfold.data.sources.source_files import CURRENT, EARLIER
from sevenfold.errors import InputError
from sevenfold.prepare.data import Inputs, find_inputs, load_unchanged_inputs, write_inputs
from sevenfold.prepare.job import claim_folder, with_stored_separators
from sevenfold.recipe import Recipe, Source, loads
from sevenfold.run_folder import RunFolder


def manifest_of(path: Path, max_bytes: int = 10**6, **settings: Any) -> Manifest:
    return scan(
        [Source.model_validate({"path": str(path), **settings})], "causal", max_bytes=max_bytes
    )


def documents(manifest: Manifest) -> list[str]:
    selection = Selection()
    read = [selection.read(manifest, i).fields[0].to_pylist() for i in range(len(manifest))]
    return [text for texts in read for text in texts]


def write(folder: Path, *names: str, text: str = "one {}\ntwo\n") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = text.format(name).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def test_each_of_several_text_files_is_a_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "a.txt", "b.txt.gz")
    whole = ["one a.txt\ntwo\n", "one b.txt.gz\ntwo\n"]
    lines = ["one a.txt", "two", "one b.txt.gz", "two"]
    for path in (tmp_path, tmp_path / "*.txt*"):
        assert documents(manifest_of(path)) == whole
        assert "2 text files, each one document (separator" in capsys.readouterr().out
        assert documents(manifest_of(path, separator="\n")) == lines
        assert documents(manifest_of(path, separator="")) == whole
        assert "each one document" not in capsys.readouterr().out
    for name in ("a.txt", "b.txt.gz", "b*"):
        assert len(documents(manifest_of(tmp_path / name))) == 2
    # in a folder with other formats, too, one text file has a document per line
    (tmp_path / "b.txt.gz").unlink()
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n')
    assert documents(manifest_of(tmp_path)) == ["one a.txt", "two", "c"]


def test_a_large_text_file_has_a_document_per_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "a.txt", "b.txt", "c.txt.gz")
    large = "".join(f"line {i}\n" for i in range(20))
    write(tmp_path, "b.txt", "c.txt.gz", text=large)
    found = documents(manifest_of(tmp_path, max_bytes=100))
    assert found == ["one a.txt\ntwo\n", *large.split("\n")[:-1] * 2]
    said = capsys.readouterr().out
    assert said.count("3 text files, each one document; but 2, larger than 0.0001 MB (data.") == 1


def test_the_manifest_holds_how_texts_are_divided(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.txt")
    manifest = manifest_of(tmp_path)
    stored = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert documents(stored) == documents(manifest) and stored.version == CURRENT
    assert stored.hash() == manifest.hash() != manifest_of(tmp_path, separator="\n").hash()
    # without text files of their own documents, it is what earlier versions have written
    single = manifest_of(tmp_path / "a.txt")
    assert single.hash() == manifest_of(tmp_path / "a.txt", separator="\n").hash()
    tree = single.to_json()
    assert tree.pop("version") == CURRENT and tree["sources"][0]["separator"] == "\n"
    assert all("whole" not in shard for shard in tree["shards"])
    assert Manifest.from_json(tree).version == EARLIER


def recipe_of(tree: dict[str, Any], path: Path, **settings: Any) -> Recipe:
    data = tree["data"] | {"sources": [{"path": str(path), **settings}], "validation": []}
    return loads(yaml.safe_dump(tree | {"data": data}), "")


def earlier_yaml(recipe: Recipe) -> str:
    """Returns the recipe as versions before have stored it."""
    stored = yaml.safe_load(recipe.to_yaml())
    for source in stored["data"]["sources"]:
        source["separator"] = "\n"
    return yaml.safe_dump(stored)


def test_a_run_that_was_begun_before_reads_the_same(tree: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, "a.txt", "b.txt")
    folder = RunFolder(str(tmp_path / "run"))
    recipe = recipe_of(tree, data)
    storage.write(folder.recipe, earlier_yaml(recipe))
    lines = recipe_of(tree, data, separator="\n")
    manifest = find_inputs(lines).train
    earlier = manifest.to_json()
    del earlier["version"]
    write_inputs(folder, Inputs(Manifest.from_json(earlier), None))
    # what earlier versions did not read is new in the folder
    write(data, "c.csv", "d.arrow", "e.md", "state.txt.bak")
    inputs = load_unchanged_inputs(folder)
    assert inputs is not None and inputs.train.version == EARLIER
    assert documents(inputs.train) == ["one a.txt", "two", "one b.txt", "two"]
    # the same recipe resumes it, and the run keeps its lines
    kept = with_stored_separators(recipe, folder)
    assert claim_folder(folder, kept) == lines.hash() == recipe.hash()
    assert loads(storage.read_text(folder.recipe), "").data.sources[0].separator == "\n"
    write(data, "f.txt")
    with pytest.raises(InputError, match=r"f.txt: is new since this run began"):
        load_unchanged_inputs(folder)


def test_a_separator_that_is_set_later_is_another_recipe(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    write(tmp_path, "data/a.txt", "data/b.txt")
    recipe = recipe_of(tree, tmp_path / "data")
    claim_folder(folder, recipe)
    assert claim_folder(folder, with_stored_separators(recipe, folder)) == recipe.hash()
    for separator in ("\n", "", "\n\n"):
        other = recipe_of(tree, tmp_path / "data", separator=separator)
        with pytest.raises(InputError, match=r"another recipe.*sources.*unset|separator"):
            claim_folder(folder, with_stored_separators(other, folder))


def test_what_is_not_read_is_said_once(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("_old.txt", ".hidden/x.txt", "sub/.DS_Store", "a.md", "sub/b.md", "c.md.gz", "LICENSE")
    write(tmp_path, "a.txt", "b.txt", "p.png", *names)
    recipe = recipe_of(tree, tmp_path)
    find_inputs(recipe.override({"data.validation": recipe.model_dump()["data"]["sources"]}))
    lines = capsys.readouterr().out.splitlines()
    assert sum("2 text files, each one document" in line for line in lines) == 1
    said = [line for line in lines if "not read" in line]
    assert said == [
        f"{tmp_path}/: not read: 8 files (2 .md, 2 beginning with ., 1 .md.gz, 1 .png, 1 beginning "
        "with _, 1 without a suffix); add format: txt to read .md, .md.gz as text"
    ]


def test_names_of_any_kind_make_one_short_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "a.txt", *(f"x.{i:03}{'y' * 200}" for i in range(30)), "a.new\nline")
    manifest_of(tmp_path)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "and 23 other kinds)" in said and len(said) < 1200


def test_other_text_files_are_read_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = ["a.md", "b.rst", "c.text", "d.py", "e.txt", "f.MD.gz", "sub/Makefile"]
    write(
        tmp_path, *read, "_x.md", ".y.md", "t.csv", "t.jsonl.gz", "p.png", "w.tar.gz", "z.parquet"
    )
    found = documents(manifest_of(tmp_path, format="txt"))
    assert found == [f"one {name}\ntwo\n" for name in read]
    assert "format: txt" not in capsys.readouterr().out
    assert documents(manifest_of(tmp_path / "d.py", format="txt")) == ["one d.py", "two"]
    with pytest.raises(InputError, match=r"d.py: unsupported file type; supported: .*\.csv"):
        manifest_of(tmp_path / "d.py")


def save_to_disk(folder: Path, files: int = 2, **state: Any) -> list[str]:
    """Writes a folder as `datasets.Dataset.save_to_disk` does, beside other files of its cache."""
    folder.mkdir(parents=True)
    names, texts = [], []
    schema = pa.schema(
        {"text": pa.string()},
        {"huggingface": '{"info": {"features": {"text": {"dtype": "string"}}}}'},
    )
    for i in range(files):
        names.append(f"data-{i:05}-of-{files:05}.arrow")
        texts.append([f"file {i} row {j}" for j in range(5)])
        with pa.ipc.new_stream(str(folder / names[-1]), schema) as writer:
            writer.write_table(pa.table({"text": texts[-1]}, schema), max_chunksize=2)
    with pa.ipc.new_stream(str(folder / "cache-1b2c.arrow"), schema) as writer:
        writer.write_table(pa.table({"text": ["of another step"]}, schema))
    (folder / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}}')
    fields = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "9a8b",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    (folder / "state.json").write_text(json.dumps(fields | state))
    return [text for part in texts for text in part]


def test_a_saved_dataset_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = save_to_disk(tmp_path / "saved")
    for settings in ({}, {"format": "arrow"}):
        manifest = manifest_of(tmp_path / "saved", **settings)
        assert documents(manifest) == texts and len(manifest) == 6
        assert "not read: 1 file (1 .arrow)" in capsys.readouterr().out
    manifest.check_unchanged()
    pq.write_table(pa.table({"text": texts}), tmp_path / "same.parquet")
    assert documents(manifest_of(tmp_path / "same.parquet")) == texts


def test_datasets_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_to_disk(tmp_path / "splits" / split)
    (tmp_path / "splits/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        InputError, match=r"splits train, test: name one, as in `path: .*splits/tra"
    ):
        manifest_of(tmp_path / "splits")
    assert len(documents(manifest_of(tmp_path / "splits/test"))) == 10
    (tmp_path / "splits/dataset_dict.json").unlink()
    with pytest.raises(InputError, match="wrote in its folder test/: name it as a source"):
        manifest_of(tmp_path / "splits")
    for key in ("_indices_data_files", "_indices_files"):
        save_to_disk(tmp_path / key, **{key: [{"filename": "indices.arrow"}]})
        with pytest.raises(InputError, match=r"call \.flatten_indices\(\) before \.save_to_disk"):
            manifest_of(tmp_path / key)
    save_to_disk(tmp_path / "gone")
    (tmp_path / "gone/data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match=r"state.json: names the file data-00001-of-00002.arrow"):
        manifest_of(tmp_path / "gone")
    (tmp_path / "gone/state.json").write_text("[]")
    with pytest.raises(InputError, match=r"state.json: damaged"):
        manifest_of(tmp_path / "gone")
    save_to_disk(tmp_path / "outside", _data_files=[{"filename": "../gone/a.arrow"}])
    with pytest.raises(InputError, match=r"names the file ../gone/a.arrow, which is not in the"):
        manifest_of(tmp_path / "outside")
