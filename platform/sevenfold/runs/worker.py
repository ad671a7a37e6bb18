"""What each Ray Train worker runs: it puts model, data and loop together."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import platform
import time
from dataclasses import replace
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import transformers
from ray.train.v2._internal.execution.context import get_train_context
from ray.util import get_node_ip_address

import sevenfold
from sevenfold import storage
from sevenfold.data.examples import ConversationEncoder, PairEncoder
from sevenfold.data.ledger import Ledger
from sevenfold.data.order import most_rows
from sevenfold.data.rows import Rows
from sevenfold.data.stream import Draw, LaneReader, ReaderState, Stream
from sevenfold.data.tokens import load_tokenizer, token_bytes
from sevenfold.engine import checkpoint as ckpt
from sevenfold.engine import cpu, loop, objectives, optim, tuning
from sevenfold.engine.batch import Batch, micro_batches
from sevenfold.engine.best import Best, UnknownMetricError
from sevenfold.engine.guard import Guard
from sevenfold.engine.interval import Interval, due
from sevenfold.engine.meter import Meter
from sevenfold.engine.notice import Notice
from sevenfold.engine.objectives import Causal
from sevenfold.engine.step import evaluate
from sevenfold.errors import DivergedError, RunError
from sevenfold.evaluate.generate import complete
from sevenfold.evaluate.metrics import bits_per_byte, bleu, classification, rouge
from sevenfold.model import build, parallel
from sevenfold.report.metrics import RunLog, logged
from sevenfold.runs import cluster
from sevenfold.runs.prepare import Job
from sevenfold.storage import RunFolder

log = logging.getLogger(__name__)
MARGIN = 3.0  # seconds before a machine's end that a last save is over by


class Worker:
    """One rank."""

    def __init__(self, job: Job):
        if not job.verbose:
            cluster.quieten()
        context = ray.train.get_context()
        self.job, self.recipe, self.folder = job, job.recipe, RunFolder(job.folder)
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.place = parallel.Place.of(self.rank, self.world, self.recipe.parallel.tensor)
        self.device = ray.train.torch.get_device()
        cpu.prepare(threads=max(1, min(int(self.recipe.cluster.cpus_per_worker), os.cpu_count() or 1)))
        self.tokenizer = load_tokenizer(job.tokenizer)
        self.token_bytes = torch.from_numpy(token_bytes(self.tokenizer))
        self.ledger = Ledger(self.folder.ledger)
        self.guard = Guard(self.recipe.guard)
        self.best = Best(self.recipe.validation, lambda: self.saver.committed())
        self.passed: list[tuple[int, int]] = []  # data steps that the guard has had passed over
        self.reported: dict[str, Any] = {}
        self.ranks: list[dict[str, Any]] = []  # what this start wrote to workers.json
        self.draws: list[Draw] = []  # since the last committed checkpoint, of all ranks
        self.run_log: RunLog | None = None  # of rank 0
        self.bell: Any = None  # that rank 0 listens to, once it has done a step
        self.stepped = False
        if self.job.bell is not None and self.rank == 0:
            self.job.bell.deaf.remote()
        self.told, self.looked = 0, time.time()  # how far a notice has been heeded; the last look for one

    def run(self) -> dict[str, Any]:
        """Returns the last report: metrics, step and checkpoint; or `ended`, a sentence that says why it did not get there."""
        self._tell_where()  # first: from then on no other start of this run writes
        last = self._last()
        start, self.before = self._stand(last)
        self.reader = self._read(start, self.before)  # Ray Data begins while the model is built
        try:
            self._train(start, last)
        except (ckpt.TakenOverError, UnknownMetricError, DivergedError, loop.LeftError) as e:
            self.reported, self.run_log = {"ended": str(e)}, None  # not raised: Ray would start it anew
        finally:
            self.reader.close()
            if self.run_log:
                self.run_log.close()
        return self.reported

    def _train(self, start: int, last: ckpt.Checkpoint | None) -> None:
        recipe = self.recipe
        self.objective, self.model, flops = self._model()
        self.optimizers = optim.build(self.model, recipe.optimizer)
        if last is not None:
            ckpt.load(last, self.model, self.optimizers)
        keep = recipe.checkpoint
        self.saver = ckpt.Saver(self.folder.checkpoints, keep.keep, keep.keep_every, self._tell, last, self.job.identity)
        self.interval = Interval(keep, self.world, start, self.saver, self._say)
        self.held_out = self._held_out()
        if self.rank == 0:
            self.run_log = RunLog(self.folder, start, self._tell)
        peak = recipe.cluster.peak_tflops * 1e12 if recipe.cluster.peak_tflops else None
        trainer = loop.Trainer(
            recipe, self.model, self.optimizers, self.objective, iter(lambda: next(self.reader), None),
            most_rows(recipe.train.global_batch, self.place.world_size, recipe.lanes), self.device,
            Meter(flops, peak, self.world, self.device), self.guard, self.interval, self.best,
        )  # fmt: skip
        hooks = loop.Hooks(
            self._log, self._validate, self._save, self._noticed, self._settle, self._report, self._say, self._go_back
        )
        try:
            again = self.job.post is not None and start > self.job.post.since and due(start, recipe.validation.every)
            at = loop.fit(trainer, hooks, start, logged(self.folder.log, start) if again else None)
            saved = self.saver.wait()
            if not self.best.over and (saved is None or saved.step < at):
                raise RunError(
                    f"the checkpoint of the last step, {at}, could not be written: make room, then start the run again"
                )
            self.reported |= self._best() or {"checkpoint": saved.path if saved else None}
        finally:
            self.saver.close()

    def _model(self) -> tuple[Causal, Any, float]:
        """The objective, the model laid over the ranks, and the FLOPs of a token."""
        recipe = self.recipe
        config = build.config_of(recipe, len(self.tokenizer), self.tokenizer)
        kernel = build.attention(recipe, self.device, config)
        model = build.build(recipe, config, weights=self.rank == 0, attention=kernel)
        if recipe.adapter is not None:
            build.with_adapter(model, recipe)
        objective, train = tuning.of(recipe, self.tokenizer, config), recipe.train
        if isinstance(objective, tuning.Preference) and recipe.adapter is None:
            objective.reference = self._reference(config, objective)
        objectives.attach(model, objective, train.loss_chunk, train.z_loss, train.label_smoothing)
        flops = build.flops_per_token(model, recipe)
        return objective, parallel.shard(model, self.device, recipe.train, recipe.parallel), flops

    def _reference(self, config: Any, objective: Causal) -> Any:
        """The model that the run began from, frozen, laid over the ranks."""
        recipe = self.recipe
        model = build.build(recipe, config, weights=self.rank == 0, attention=build.attention(recipe, self.device, config))
        objectives.attach(model, objectives.Causal(objective.words, 0, 0.5, 1), recipe.train.loss_chunk)
        settings = recipe.train.model_copy(update={"activation_checkpointing": "none"})
        return parallel.shard(model.requires_grad_(False), self.device, settings, recipe.parallel).eval()

    def _tell_where(self) -> None:
        """Which process on which node each rank is, for whoever has to look at one. The start that wrote it last owns the
        folder: see _before_commit."""
        context = ray.get_runtime_context()
        mine = {"rank": self.rank, "node": context.get_node_id(), "host": get_node_ip_address(), "pid": os.getpid()}
        self.ranks = [mine] * self.world
        torch.distributed.all_gather_object(self.ranks, mine)
        if self.rank == 0:
            storage.write(self.folder.workers, json.dumps(self.ranks, indent=1))
            if self.job.queue is not None:
                self._tell(f"training on {self.world} workers, {len({r['node'] for r in self.ranks})} machines")

    def _read(self, start: int, state: ReaderState) -> LaneReader:
        stream = replace(self.job.train, skip=(*self.job.train.skip, *self.passed))
        shard = stream.shard(self.place.rank, self.place.world_size)
        return shard.reader(self.recipe.train.global_batch // self.recipe.lanes, state, start)

    def _held_out(self) -> list[Batch]:
        """This rank's part of the held-out rows; every rank gets as many micro-batches."""
        if self.job.validation is None:
            return []
        rows = self.job.validation.epoch(self.recipe.validation.rows)
        rank, world = self.place.rank, self.place.world_size
        share = -(-len(rows) // world)
        count = -(-share // self.recipe.train.micro_batch)
        mine = [rows.part(i, i + 1) for i in range(rank, len(rows), world)]
        drawn = Rows.concatenate(mine) if mine else Rows.empty(0, rows.tokens.shape[1], rows.tokens.dtype)
        collate = functools.partial(self.objective.collate, step=0)  # the same each time
        return micro_batches(drawn, self.recipe.train.micro_batch, count, collate, self.device)

    def _last(self) -> ckpt.Checkpoint | None:
        """The last whole checkpoint, the same on every rank."""
        return ckpt.latest(self.folder.checkpoints, self._tell)

    def _stand(self, last: ckpt.Checkpoint | None) -> tuple[int, ReaderState]:
        """The step and the data's state to go on from; what was written after that is forgotten."""
        if last is not None and last.extra["recipe"] not in (self.job.identity, self.job.descent):
            raise RunError(f"{last.path}: a checkpoint of another recipe than this run's: move it elsewhere")
        self.draws = []
        if self.rank == 0:
            self.ledger.cut(last.step if last else 0)
        if last is None:
            return 0, ReaderState()
        self.guard.load(last.extra["guard"], self.guard.rollbacks)
        self.best.load(last.extra["best"])
        self.passed += [(a, b) for a, b in last.extra["passed"] if (a, b) not in self.passed]
        if self.rank == 0:
            self._tell(f"going on from step {last.step} ({last.path})")
            self._warn_of_skips(last.step)
        return last.step, ReaderState.from_json(last.extra["reader"])

    def _go_back(self, step: int, steps: int) -> int:
        """As loop.Hooks says."""
        self.saver.wait()
        last = self.reader.state.data_step
        self.passed.append((last - steps + 1, last))
        self.guard.rollbacks += 1
        found = self._last()
        if found is None:
            raise DivergedError(
                f"loss or gradient was not finite, or jumped, in {steps} steps in a row, up to step {step}, and there is no "
                "checkpoint to go back to: lower optimizer.learning_rate or lengthen schedule.warmup_steps"
            )
        self.reader.close()
        self.saver.begin_from(found)
        start, self.before = self._stand(found)
        ckpt.load(found, self.model, self.optimizers)
        self.guard.in_a_row = 0
        self.reader = self._read(start, self.before)
        if self.rank == 0:
            assert self.run_log is not None
            self.run_log.close()
            self.run_log = RunLog(self.folder, start, self._tell)
            self._tell(f"data steps {last - steps + 1} to {last} are passed over from now on")
        return start

    def _warn_of_skips(self, step: int) -> None:
        if self.recipe.data.skip:
            trained = {d.data_step for d in self.ledger.read(1, step)}
            for first, last in self.recipe.data.skip:
                if any(first <= s <= last for s in trained):
                    self._tell(
                        f"data.skip [{first}, {last}]: was trained on before step {step}, where this run stands: to train "
                        "without it, remove the checkpoints after it began"
                    )

    def _save(self, step: int) -> None:
        with self.interval.saving(step):
            self._begin_save(step)

    def _begin_save(self, step: int) -> None:
        """When none is under way any more."""
        last = self.saver.last
        parts: list[tuple[ReaderState, list[Draw]]] = [(ReaderState(), [])] * self.world
        torch.distributed.all_gather_object(parts, (self.reader.state, self.reader.take_draws()))
        parts = parts[:: self.recipe.parallel.tensor]  # the others read the same
        state = ReaderState.together([s for s, _ in parts], self.before.skipped)
        since = last.step if last else 0  # longer ago than an interval where a save has failed
        self.draws = [d for d in self.draws if d.step > since] + [d for _, draws in parts for d in draws]
        if self.rank == 0 and state.skipped > self.before.skipped:
            self._tell(f"{state.skipped:,} bad documents left out so far (data.on_bad_document=skip)")
        encoder = {"backend": self.job.train.encoder.backend, "identity": self.job.train.encoder.identity()}
        libraries = (sevenfold, torch, transformers, ray)
        extra = {
            "recipe": self.job.identity, "settings": self.recipe.model_dump(mode="json"), "reader": state.to_json(),
            "encoder": encoder, "guard": self.guard.state(), "passed": list(self.passed), "best": self.best.state(),
            "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in libraries}},
        }  # fmt: skip
        marks = (self.best.mark, self.best.before if self.job.post else None)  # the one before may have been reported
        self.saver.spared = [m.step for m in marks if m]
        self.saver.save(step, self.model, self.optimizers, extra, functools.partial(self._before_commit, self.draws))

    def _before_commit(self, draws: list[Draw]) -> None:
        """On rank 0, beside the training. Raises TakenOverError where the run was started once more, while this start was cut
        off from its driver, say."""
        assert self.run_log is not None
        if storage.read_json(self.folder.workers) != self.ranks:
            raise ckpt.TakenOverError(f"{self.folder.root}: this run was started once more, and goes on there: this start ends")
        self.ledger.write(draws)
        self.run_log.flush()

    def _noticed(self) -> Notice:
        """On rank 0, which is told what all are: SAVE once when a machine of this run will go, and once more when a save can
        just be done before the deadline."""
        if self.rank == 0 and self.job.bell is not None and self._asked():
            return Notice.END
        if self.rank == 0 and self.job.post is not None and (notice := self.job.post.notice()):
            return Notice(notice)
        # not ray.train.get_preemption_info(), whose value this is: that one is a barrier by way of an actor
        info = get_train_context().preemption_context.preemption_info if self.rank == 0 else None
        now = time.time()
        step, self.looked, told = now - self.looked, now, self.told
        if info is None:
            self.told = 0
            return Notice.NONE
        left = info.deadline_ms / 1000 - now if info.deadline_ms is not None else float("inf")
        self.told = max(told, 2 if left < 2 * (step + self.saver.seconds) + MARGIN else 1)
        return Notice.SAVE if self.told > told else Notice.NONE

    def _asked(self) -> bool:
        """Whether the run is to end. Before the first step it is not listened for, see train.Bell."""
        if self.bell is None and self.stepped:
            self.bell = self.job.bell.rung.remote()
        self.stepped = True
        return self.bell is not None and bool(ray.wait([self.bell], timeout=0)[0])

    def _settle(self) -> None:
        self.saver.wait()
        self.looked = time.time()  # that was no step

    def _validate(self, step: int) -> dict[str, float]:
        out: dict[str, float] = {}
        if self.held_out:
            told: list[tuple[int, int]] | None = [] if self.objective.judges else None
            nats, targets, size = evaluate(self.model, self.held_out, self.token_bytes, told)
            out = {"validation/loss": nats / max(1, targets)}
            if self.recipe.objective in ("causal", "sft"):
                out["validation/bits_per_byte"] = bits_per_byte(nats, max(1, size))
            if told is not None:
                out |= self._judged(told)
        if self.recipe.objective in ("sft", "seq2seq") and self.job.validation and self.recipe.validation.generate:
            out |= self._generate(step)
        if out:
            self._log(step, out)
            if self.run_log is not None:
                self.run_log.flush()  # its step's save may be committed before
        return out

    def _judged(self, told: list[tuple[int, int]]) -> dict[str, float]:
        """How often the model was right; of classes macro F1, too."""
        parts: list[list[tuple[int, int]]] = [[]] * self.world
        torch.distributed.all_gather_object(parts, told)
        pairs = [p for part in parts[:: self.recipe.parallel.tensor] for p in part]
        out = {"validation/accuracy": sum(a == b for a, b in pairs) / max(1, len(pairs))}
        if self.recipe.objective == "classify" and pairs:
            names = self.recipe.data.classes
            true, taken = ([names[i] for i in column] for column in zip(*pairs, strict=True))
            out["validation/f1_macro"] = classification(taken, true, names)["f1_macro"]
        return out

    def _generate(self, step: int) -> dict[str, float]:
        """ROUGE, BLEU and chrF of greedy completions of the first held-out prompts, each rank doing its part."""
        assert self.job.validation is not None
        settings, stream = self.recipe.validation, self.job.validation
        encoder = stream.encoder
        assert isinstance(encoder, ConversationEncoder | PairEncoder)
        pairs = first_pairs(stream, settings.generate)
        share = -(-len(pairs) // self.world)
        mine = (pairs[self.rank :: self.world] + pairs[:1] * share)[:share]  # as many on every rank
        room = stream.sequence_length - settings.max_new_tokens
        made = complete(
            self.model, self.tokenizer, [encoder.prompt(p, room) for p, _, _ in mine], settings.max_new_tokens,
            synced=self.world > 1,
        )  # fmt: skip
        parts: list[list[str]] = [[]] * self.world
        torch.distributed.all_gather_object(parts, [m.text for m in made])
        predictions = [parts[i % self.world][i // self.world] for i in range(len(pairs))]
        if self.run_log:
            shown = "\n\n".join(f"**{r}**  \n{p}" for p, (_, _, r) in list(zip(predictions, pairs, strict=True))[:5])
            self.run_log.text("validation/samples", shown, step)
        references = [r for _, _, r in pairs]
        scores = rouge(predictions, references) | bleu(predictions, references, settings.bleu_tokenize)
        return {f"validation/{k}": v for k, v in scores.items() if not isinstance(v, str)}

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        while self.reader.complaints:
            wrong = self.reader.complaints.pop()
            self._tell(f"left out {wrong.count} bad documents of a window, the first: {wrong.first}")
        if self.run_log is None:
            return
        self.run_log.add(step, metrics)
        self._tell((step, metrics))

    def _say(self, sentence: str) -> None:
        if self.rank == 0:
            self._tell(sentence)

    def _tell(self, what: str | tuple[int, dict[str, float]]) -> None:
        if self.job.queue is not None:
            self.job.queue.actor.put_nowait.remote(what)  # not awaited: the step does not wait for a watcher
        elif isinstance(what, str):
            log.warning(what)

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        saved = self.saver.wait() if self.job.post is not None else self.saver.last
        self.reported = {"step": step, "checkpoint": saved.path if saved else None, **metrics}
        if self.job.post is None:
            ray.train.report(self.reported)
            return
        self.reported |= self._best()
        if self.rank == 0:
            self.job.post.report(self.recipe, self.folder, self.reported)

    def _best(self) -> dict[str, Any]:
        """Of the best validation that was saved: its metrics, step and checkpoint; empty where none is kept."""
        if not self.best.kept:
            return {}
        committed = self.saver.committed()
        self.best.settle(committed)
        mark = self.best.mark
        return {**mark.metrics, "best_step": mark.step, "checkpoint": committed[mark.step]} if mark else {}


def first_pairs(stream: Stream, limit: int | None = None, shuffle: bool = False) -> list[tuple[str, str, str]]:
    """Of the first documents, all without a limit: as ConversationEncoder.asked. shuffle: as Stream.documents."""
    encoder = stream.encoder
    assert isinstance(encoder, ConversationEncoder | PairEncoder)
    pairs = (pair for columns in stream.documents(shuffle) for pair in encoder.asked(columns))
    return list(itertools.islice(pairs, limit))
