"""Objectives of fine-tuning: packed examples give what each gives by itself, to transformers' own losses; DPO's values; LoRA on
one and two ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_ranks
from test_objectives import BERT, LENGTH, T5, VOCAB, WORDS, document

from sevenfold.data.rows import Rows
from sevenfold.engine import optim, tuning
from sevenfold.engine.batch import IGNORE, micro_batches
from sevenfold.engine.objectives import Causal, attach
from sevenfold.engine.step import evaluate, train_step
from sevenfold.model import build, parallel
from sevenfold.recipe import Adapter, Recipe

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
Example = tuple[list[int], list[bool]]


def rows_of(rows: list[list[Example]]) -> Rows:
    """Examples (ids, targets) laid into rows, padded."""
    tokens, targets = np.zeros((len(rows), LENGTH), np.uint16), np.zeros((len(rows), LENGTH), bool)
    starts, used = [], []
    for i, row in enumerate(rows):
        at = 0
        for ids, wanted in row:
            tokens[i, at : at + len(ids)], targets[i, at : at + len(ids)] = ids, wanted
            starts.append(at)
            at += len(ids)
        used.append(at)
        starts += [at] if at < LENGTH else []
    return Rows(tokens, np.array(starts, np.int32), np.array(used, np.int32), targets)


def example(seed: int, asked: int, answer: int) -> Example:
    return document(seed, asked) + document(seed + 100, answer), [False] * asked + [True] * answer


def model_of(tree: dict[str, Any], objective: str, config: dict[str, Any], **more: Any) -> tuple[Any, tuning.Causal, Recipe]:
    kind = objective if objective != "dpo" else "sft"  # which needs no path
    recipe = Recipe.model_validate(tree | {"objective": kind, "model": {"config": config}} | more)
    model = build.build(recipe, build.config_of(recipe, VOCAB), weights=True).eval()
    made = tuning.OBJECTIVES[objective](WORDS, 0, 0.15, 3.0)
    attach(model, made)
    return model, made, recipe


def preference(seed: int, asked: int, good: int, bad: int) -> Example:
    prompt = document(seed, asked)
    a, b = document(seed + 1, good), document(seed + 2, bad)
    return [*prompt, *a, *prompt, *b], [False] * asked + [True] * good + [False] * asked + [True] * bad


EXAMPLES = [example(1, 12, 9), example(2, 5, 20), example(3, 30, 8)]
PACKED = rows_of([EXAMPLES[:2], EXAMPLES[2:]])


def test_dpo_has_its_published_values() -> None:
    policy = torch.tensor([[-0.5, -0.1], [-10.0, -30.0], [-1.0, -21.0]])
    reference = torch.tensor([[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]])
    losses = -F.logsigmoid(tuning.preference_margins(policy, reference, 0.1))
    assert losses.tolist() == pytest.approx([0.693147, 0.313262, 0.126928], abs=1e-6)


def test_packed_completions_are_those_unpacked(tree: dict[str, Any]) -> None:
    model, made, _ = model_of(tree, "sft", LLAMA)
    with torch.no_grad():
        together = model.token_losses(made.collate(PACKED, 0))
        apart = [model.token_losses(made.collate(rows_of([[e]]), 0)) for e in EXAMPLES]
    for row, at, alone, (ids, wanted) in zip((0, 0, 1), (0, 21, 0), apart, EXAMPLES, strict=True):
        mine = together[row, at : at + len(ids)]
        assert torch.allclose(mine, alone[0, : len(ids)], atol=1e-5) and (mine > 0).sum() == sum(wanted)


def test_source_to_target_is_transformers_own(tree: dict[str, Any]) -> None:
    model, made, _ = model_of(tree, "seq2seq", T5)
    with torch.no_grad():
        batch = made.collate(PACKED, 0)
        losses = model.token_losses(batch)
        for k, (ids, wanted) in enumerate(EXAMPLES):
            source = torch.tensor([t for t, w in zip(ids, wanted, strict=True) if not w])[None]
            target = torch.tensor([t for t, w in zip(ids, wanted, strict=True) if w])[None]
            read = torch.cat([torch.tensor([[WORDS.start]]), target[:, :-1]], 1)
            own = model(input_ids=source, decoder_input_ids=read, labels=target).loss
            assert batch.decoder is not None
            mine = losses[int(k == 2)][batch.decoder.documents[int(k == 2)] == k % 2]
            assert torch.allclose(mine.mean(), own, atol=1e-5)


def test_classes_are_transformers_own(tree: dict[str, Any]) -> None:
    for config in (BERT, LLAMA):
        more = {"data": tree["data"] | {"classes": ["a", "b", "c"]}}
        model, made, _ = model_of(tree, "classify", config | {"pad_token_id": WORDS.pad}, **more)
        texts = [([*document(i, n), i % 3], [False] * n + [True]) for i, n in ((1, 9), (2, 21), (3, 33))]
        batch = made.collate(rows_of([texts[:2], texts[2:]]), 0)
        with torch.no_grad():
            losses, taken = model.token_losses(batch, judged=True)
            for i, (ids, _) in enumerate(texts):
                logits = model(input_ids=torch.tensor(ids[:-1])[None]).logits[0]
                assert losses[i] == pytest.approx(float(F.cross_entropy(logits, torch.tensor(ids[-1]))), abs=1e-5)
                assert int(taken[i]) == int(logits.argmax())
        assert model.config.num_labels == 3 and model.config.id2label == {0: "a", 1: "b", 2: "c"}
        empty = made.collate(Rows.empty(2, LENGTH), 0)
        assert empty.labels.tolist() == [IGNORE] and float(model.token_losses(empty).detach().sum()) == 0


def test_search_by_hand(tree: dict[str, Any]) -> None:
    model, made, _ = model_of(tree, "embed", BERT)
    assert isinstance(made, tuning.Embed)
    made.temperature = 0.2
    batch = made.collate(rows_of([EXAMPLES[:2], [*EXAMPLES[2:], EXAMPLES[0]]]), 0)  # one of them twice
    with torch.no_grad():
        losses, taken = model.token_losses(batch, judged=True)

        def one(ids: list[int]) -> torch.Tensor:
            return F.normalize(model(input_ids=torch.tensor(ids)[None]).last_hidden_state[0].mean(0), dim=0)

        sides = [[one([t for t, w in zip(*e, strict=True) if w == side]) for e in EXAMPLES] for side in (False, True)]
    near = torch.stack(sides[0]) @ torch.stack(sides[1]).T / 0.2
    twice = torch.cat([near, near[:, :1]], 1)
    twice[0, 3] = -torch.inf  # what is there twice does not count against itself
    expected = F.cross_entropy(twice, torch.arange(3), reduction="none")
    assert torch.allclose(losses, expected[[0, 1, 2, 0]], atol=1e-4)
    assert taken[:3].tolist() == near.argmax(1).tolist()


def test_a_query_with_two_right_documents(tree: dict[str, Any]) -> None:
    _, made, _ = model_of(tree, "embed", BERT)
    query, others = EXAMPLES[0], [example(40, 6, 9), EXAMPLES[1]]
    asked = [t for t, w in zip(*query, strict=True) if not w]
    found = [t for t, w in zip(*others[0], strict=True) if w]
    again = ([*asked, *found], [False] * len(asked) + [True] * len(found))
    batch = made.collate(rows_of([[query, again], [others[1]]]), 0)
    model, made, _ = model_of(tree, "embed", BERT)
    with torch.no_grad():
        logits = made.logits(model, batch)
    assert torch.isinf(logits).tolist() == [[False, True, False], [True, False, False], [False] * 3]


@pytest.mark.parametrize("adapter", [True, False])
def test_preferences(tree: dict[str, Any], adapter: bool) -> None:
    model, made, recipe = model_of(tree, "dpo", LLAMA)
    assert isinstance(made, tuning.Preference)
    pairs = [preference(10, 8, 6, 9), preference(20, 5, 10, 3), preference(30, 14, 7, 7)]
    batch = made.collate(rows_of([pairs[:2], pairs[2:]]), 0)
    if adapter:
        build.with_adapter(model, recipe.model_copy(update={"adapter": Adapter(rank=4)}))
    else:
        began, _, _ = model_of(tree, "sft", LLAMA)
        attach(began, Causal(WORDS, 0, 0.15, 3.0))
        made.reference = began
    losses = model.token_losses(batch)
    assert losses.tolist() == pytest.approx([np.log(2)] * 3)  # it is where it began
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))

    def likelihood(of: Any, ids: list[int], begin: int) -> float:
        with torch.no_grad():
            logs = of(input_ids=torch.tensor(ids)[None]).logits[0].log_softmax(-1)
        return float(logs[torch.arange(begin - 1, len(ids) - 1), torch.tensor(ids[begin:])].sum())

    before, _, _ = model_of(tree, "sft", LLAMA)
    for loss, (ids, wanted) in zip(model.token_losses(batch).tolist(), pairs, strict=True):
        asked = wanted.index(True)
        middle = wanted.index(False, asked)
        good, bad = ids[:middle], ids[middle:]
        gains = [likelihood(model, a, asked) - likelihood(before, a, asked) for a in (good, bad)]
        assert loss == pytest.approx(float(-F.logsigmoid(torch.tensor(0.1 * (gains[0] - gains[1])))), abs=2e-4)


def losses_of_lora(tree: dict[str, Any], objective: str) -> list[float]:
    """Ten steps; and one number of a validation at the end."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    recipe = Recipe.model_validate(tree)
    model = build.build(recipe, build.config_of(recipe, VOCAB), weights=rank == 0)
    build.with_adapter(model, recipe.model_copy(update={"adapter": Adapter(rank=4, dora=objective == "sft")}))
    made = tuning.OBJECTIVES[objective](WORDS, 0, 0.15, 3.0)
    attach(model, made)
    model = parallel.shard(model, torch.device("cpu"), recipe.train)
    optimizers, out = optim.build(model, recipe.optimizer), []
    batches = []
    for step in range(10):
        seeds = range(8 * step % 24, 8 * step % 24 + 8)
        kinds = {"sft": lambda s: example(s, 10, 20), "dpo": lambda s: preference(s, 8, 12, 9)}
        rows = rows_of([[kinds[objective](s)] for s in seeds]).part(rank * 8 // world, (rank + 1) * 8 // world)
        batches = micro_batches(rows, 2, 4 // world, lambda r: made.collate(r, 0), torch.device("cpu"))
        out.append(train_step(model, batches, optimizers, 2e-2, 1.0).loss)
    told: list[tuple[int, int]] | None = [] if made.judges else None
    nats, targets, _ = evaluate(model, batches, torch.zeros(VOCAB, dtype=torch.long), told)
    assert told is None or len(told) == 8 // world
    return [*out, nats / targets]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_lora_is_the_same_on_one_and_two_workers(tree: dict[str, Any], tmp_path: Path, objective: str) -> None:
    tree["model"] = {"config": LLAMA}
    (one,) = run_ranks(1, tmp_path / "one", losses_of_lora, tree, objective)
    for two in run_ranks(2, tmp_path / "two", losses_of_lora, tree, objective):
        assert two == pytest.approx(one, rel=1e-5)  # after ten steps, by the processor
    assert one[-1] < one[0] - 0.05


def test_a_batch_moves_with_all_its_parts(tree: dict[str, Any]) -> None:
    _, made, _ = model_of(tree, "dpo", LLAMA)
    batch = made.collate(rows_of([[preference(10, 8, 6, 9)]]), 0)
    moved = batch.to(torch.device("cpu"))
    assert moved.segments is not None and torch.equal(moved.segments, batch.segments)  # type: ignore[arg-type]
    assert replace(moved, decoder=None).targets is not None and moved.attention_mask is None
