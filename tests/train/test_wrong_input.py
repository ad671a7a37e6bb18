"""Wrong input that is found while a run trains ends it at once, with its name."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import RECIPE, start_job, stdlib_texts


@pytest.mark.parametrize(
    "executor",
    [
        pytest.param("ray", marks=pytest.mark.slow),
        pytest.param("inline", marks=pytest.mark.nightly),
    ],
)
def test_a_bad_line_that_one_rank_reads_ends_the_run(tmp_path: Path, executor: str) -> None:
    """Ray restarts the workers after other errors: they would find the same line again."""
    texts = [t[i : i + 3000] for t in stdlib_texts() for i in range(0, len(t) - 300, 3000)]
    lines = [json.dumps({"text": text}) for text in texts]
    for number in range(4):
        part = lines[number::4]
        if number == 2:
            part[len(part) // 2] = part[len(part) // 2][:50]
        (tmp_path / f"text{number}.jsonl").write_text("\n".join(part) + "\n")
    tree = json.loads(json.dumps(RECIPE)) | {"seed": 1, "cluster": {"num_workers": 2}}
    tree["data"] |= {"sources": [{"path": str(tmp_path)}], "executor": executor}
    tree["data"]["sequence_length"] = 512
    tree["tokenizer"]["train_mb"] = 0.02  # so that the line is not found at the start
    tree["train"] |= {"steps": 300, "log_every": 100}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    process = start_job("pretrain", "recipe.yaml", home=tmp_path)
    stdout, stderr = process.communicate(timeout=500)
    assert process.returncode == 2, stdout + stderr
    [error] = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "text2.jsonl: line " in error and "expected a JSON object" in error, stderr
    assert stdout.count("training with 2 workers") == 1, stdout
