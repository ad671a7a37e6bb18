"""Examines one of transformers' model types: is it trained right, or refused?

Everything that a run does with a model is done with a tiny one of the type: check, training step,
checkpoint, resume, export, adapter. Losses and gradients are compared with those of transformers'
own model, one document at a time.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers.models.auto.modeling_auto as auto
from torch.distributed.checkpoint import CheckpointException
from transformers import AutoConfig

from helpers.tiny_models import tokenizer
from sevenfold.data.rows import Rows
from sevenfold.data.scan import scan
from sevenfold.engine import optim
from sevenfold.engine.batch import IGNORE
from sevenfold.engine.checkpoint import CheckpointManager, latest_checkpoint, load_checkpoint
from sevenfold.engine.objectives import Objective, attach_losses, build_objective
from sevenfold.engine.step import train_step
from sevenfold.errors import InputError
from sevenfold.export.hugging_face import export
from sevenfold.model import build, parallel
from sevenfold.model.probe.shrink import shrunken
from sevenfold.model.probe.tiny import MAX_PARAMETERS
from sevenfold.prepare.model import check_model
from sevenfold.recipe import Recipe

LENGTH = 64  # tokens of a row
CPU = torch.device("cpu")
CLOSE = 2e-4  # nats; see probe.TOLERANCE
# fields of configs whose defaults are not valid, or lack a kind of layer that real models have
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deberta-v2": {"pos_att_type": ["c2p", "p2c"], "relative_attention": True},
    "falcon": {"new_decoder_architecture": False, "alibi": False},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "phi3": {"pad_token_id": 0},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "reformer": {"axial_pos_embds": False},
}


class Outcome(NamedTuple):
    """What was found out about a model type with an objective.

    Attributes:
        refused: The message of the refusal, "" if the type is accepted.
        packed: Whether packed documents are trained on as they are.
        no_adapter: The message that refuses an adapter of all linear layers, "" if it is accepted.
        problems: What is wrong with an accepted type. If there are none, it is trained right.
    """

    refused: str
    packed: bool
    no_adapter: str
    problems: list[str]


def model_types() -> Iterator[tuple[str, str]]:
    """Yields each model type of transformers with the pretraining objectives that may suit it."""
    names = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "denoise": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    for objective, types in names.items():
        for model_type in types:
            yield objective, model_type


def examine(objective: str, model_type: str) -> Outcome:
    """Trains, saves, resumes and exports a tiny model of a type, on one rank."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            recipe = _recipe(objective, model_type, root)
            support = check_model(recipe).support
        except InputError as e:
            return Outcome(str(e), False, "", [])
        no_adapter = ""
        try:
            check_model(_adapted(recipe))
        except InputError as e:
            no_adapter = str(e)
        problems = []
        for name, examination in (
            ("losses and gradients", _compare_with_transformers),
            ("checkpoint and export", _save_and_export),
            ("adapter", _train_adapter),
        ):
            if no_adapter and name == "adapter":
                continue
            try:
                problems += [f"{name}: {p}" for p in examination(recipe, support, root)]
            except (Exception, CheckpointException) as e:  # a problem is reported, whatever it is
                problems.append(f"{name}: {type(e).__name__}: {str(e).strip().splitlines()[-1:]}")
        return Outcome("", support.packing, no_adapter, problems)


def _recipe(objective: str, model_type: str, root: Path) -> Recipe:
    """Writes a tiny base model of a type, and returns a recipe that trains it further.

    Raises:
        InputError: Transformers cannot build a model of the type.
    """
    texts = tokenizer()
    if objective == "denoise":
        texts.add_tokens([f"<extra_id_{i}>" for i in range(20)], special_tokens=True)
    base = root / "base"
    texts.save_pretrained(base)
    (root / "text.txt").write_text("a line of text\n" * 20)
    model_class, _ = build.MODEL_CLASSES[objective]
    reason = ""
    try:
        config = AutoConfig.for_model(model_type, **FIELDS.get(model_type, {}))
        for small in shrunken(config):
            small.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
            if objective == "causal" and getattr(small, "is_decoder", None) is False:
                small.is_decoder = True  # of BERT and its kin
            if small.is_encoder_decoder:
                small.decoder_start_token_id = getattr(small, "pad_token_id", None) or 0
            layerdrops = [n for n in vars(small) if "layerdrop" in n]
            for name in (*build.dropouts(small), *layerdrops):
                setattr(small, name, 0.0)
            try:
                small.validate()
                with torch.device("meta"):
                    size = sum(p.numel() for p in model_class.from_config(small).parameters())
                if size > MAX_PARAMETERS:
                    reason = reason or f"its smallest copy has {size:,} parameters"
                    break
                torch.manual_seed(0)
                model = model_class.from_config(small)
            except Exception as e:
                reason = reason or f"{type(e).__name__}: {str(e).splitlines()[:1]}"
                continue
            model.save_pretrained(base)
            break
        if not (base / "config.json").exists():
            raise InputError(f"transformers cannot build {model_type}: {reason}")
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"the default config of {model_type} is invalid: {e}") from None
    return Recipe.model_validate(
        {
            "name": "x",
            "objective": objective,
            "data": {"sources": [{"path": str(root / "text.txt")}], "sequence_length": LENGTH},
            "model": {"path": str(base)},
            "corruption": {"rate": 0.3, "mean_span": 2},
            "train": {"global_batch": 2, "micro_batch": 1, "steps": 3},
            "optimizer": {"learning_rate": 1e-3},
        }
    )


def _built(recipe: Recipe, support: Any) -> tuple[Any, Objective]:
    """Builds model and objective as a worker does."""
    words = tokenizer()
    config = build.config_of(recipe, len(words), words)
    kernel = build.choose_attention(recipe, CPU, config)
    model = build.build(recipe, config, weights=True, attention=kernel)
    if recipe.adapter is not None:
        build.with_adapter(model, recipe)
    from sevenfold.data.tokenizer import load_tokenizer

    objective = build_objective(recipe, load_tokenizer(str(recipe.model.path)), config, support)
    attach_losses(model, objective)
    return model, objective


def _rows(seed: int, objective: Objective) -> Rows:
    """Two rows of packed random documents, with padding at the end of each."""
    rng = np.random.default_rng(seed)
    special = {*objective.special_tokens.special, objective.special_tokens.mask}
    words = [i for i in range(10, 300) if i not in special]
    tokens = np.zeros((2, LENGTH), np.uint16)
    tokens[:, :60] = rng.choice(words, (2, 60))
    starts = np.array([0, 21, 45, 60, 0, 33, 60], np.int32)
    return Rows(tokens, starts, np.array([60, 60], np.int32))


def _compare_with_transformers(recipe: Recipe, support: Any, root: Path) -> Iterator[str]:
    """Yields the differences in losses and gradients from transformers' own model."""
    model, objective = _built(recipe, support)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        # so that every matrix has an effect
        if parameter.requires_grad and parameter.ndim >= 2 and "A_log" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    # Reformer has gradients in training mode only; PhiMoE's router draws at random in it
    model.train(model.config.model_type == "reformer")
    reference = copy.deepcopy(model)
    rows = _rows(0, objective)
    losses = 0.0
    for batch in objective.batches(rows, 0, 1, 2, CPU):
        loss = model.token_losses(batch).sum()
        loss.backward()
        losses += float(loss)
    expected = 0.0
    packed = type(objective)(objective.special_tokens, recipe.seed, 0.3, 2)
    for i in range(2):
        for inputs, labels in _documents(packed, rows.part(i, i + 1)):
            logits = reference.forward(**inputs).logits[0].float()
            loss = F.cross_entropy(
                logits[: len(labels)], labels, ignore_index=IGNORE, reduction="sum"
            )
            loss.backward()
            expected += float(loss)
    count = max(1, 2 * LENGTH)
    if not abs(losses - expected) <= CLOSE * count:
        yield f"loss {losses:.4f}, by transformers {expected:.4f}"
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if (ours.grad is None) != (theirs.grad is None):
            has = [g.grad is None or not g.grad.any() for g in (ours, theirs)]
            if not all(has):
                yield f"{name}: a gradient by one of the two only"
        elif ours.grad is not None and theirs.grad is not None:
            scale = float(theirs.grad.abs().max())
            difference = float((ours.grad - theirs.grad).abs().max())
            if difference > 1e-3 * scale + 1e-4:
                yield f"{name}: its gradient differs by {difference:.2g} of {scale:.2g}"


def _documents(
    objective: Objective, row: Rows
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Yields each document of a packed row: the arguments of a plain call, and the labels."""
    batch = objective.collate(row, 0)
    documents = batch.documents[0]
    for document in documents.unique().tolist():
        here = documents == document
        inputs = {"input_ids": batch.input_ids[0][here][None]}
        labels = batch.labels[0]
        if batch.decoder is not None:
            here = batch.decoder.documents[0] == document
            if not here.any():
                continue
            inputs["decoder_input_ids"] = batch.decoder.input_ids[0][here][None]
        labels = labels[here]
        if (labels != IGNORE).any():
            yield inputs, labels


def _sharded(recipe: Recipe, support: Any) -> tuple[Any, Objective, Any]:
    """Returns the model sharded over one rank, its objective and its optimizers."""
    model, objective = _built(recipe, support)
    sharded = parallel.shard(model, CPU, recipe.train, recipe.parallel)
    return sharded, objective, optim.build(sharded, recipe.optimizer)


def _step(model: Any, objective: Objective, optimizers: Any, step: int) -> float:
    """Trains one step and returns its loss."""
    torch.manual_seed(step)
    model.train()
    batches = objective.batches(_rows(step, objective), step, 1, 2, CPU)
    result = train_step(model, batches, optimizers, 1e-3, 1.0)
    assert result.applied
    return result.loss


def _save_and_export(recipe: Recipe, support: Any, root: Path) -> Iterator[str]:
    """Yields what changes by saving, resuming and exporting."""
    model, objective, optimizers = _sharded(recipe, support)
    first = _step(model, objective, optimizers, 0)
    checkpoints = str(root / "checkpoints")
    saver = CheckpointManager(checkpoints)
    saver.save(1, model, optimizers, {"recipe": recipe.hash(), "versions": {"sevenfold": "0"}})
    saver.close()
    checkpoint = latest_checkpoint(checkpoints)
    assert checkpoint is not None
    resumed, _, new_optimizers = _sharded(recipe, support)
    load_checkpoint(checkpoint, resumed, new_optimizers)
    output = str(root / "model")
    manifest = scan(recipe.data.sources, "causal")
    export(recipe, checkpoint, str(root / "base"), manifest, {}, output)
    model_class, _ = build.MODEL_CLASSES[recipe.objective]
    exported = model_class.from_pretrained(output, dtype=torch.float32).eval()
    inputs, _ = next(
        _documents(
            type(objective)(objective.special_tokens, 0, 0.3, 2), _rows(3, objective).part(0, 1)
        )
    )
    with torch.no_grad():
        model.eval()
        ours, theirs = model(**inputs).logits, exported(**inputs).logits
    if not torch.allclose(ours, theirs, atol=1e-4):
        yield f"logits of the export differ by {float((ours - theirs).abs().max()):.2g}"
    losses = [
        _step(m, objective, o, 1) for m, o in ((model, optimizers), (resumed, new_optimizers))
    ]
    if losses[0] != losses[1]:
        yield f"the loss after a resume is {losses[1]!r}, not {losses[0]!r}"
    if losses[0] == first:
        yield "the step changed nothing"


def _adapted(recipe: Recipe) -> Recipe:
    """Returns the recipe with a LoRA adapter of all linear layers."""
    return recipe.override({"adapter": {"rank": 2, "target_modules": "all-linear"}})


def _train_adapter(recipe: Recipe, support: Any, root: Path) -> Iterator[str]:
    """Yields what is wrong with a LoRA adapter of all linear layers."""
    model, objective, optimizers = _sharded(_adapted(recipe), support)
    before = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
    for step in range(2):
        _step(model, objective, optimizers, step)
    after = {n: p.full_tensor() for n, p in model.named_parameters()}
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    if not moved or any("lora_" not in name for name in moved):
        yield f"the steps changed {len(moved)} parameters: {[n for n in moved if 'lora_' not in n]}"
