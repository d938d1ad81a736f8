"""`swaa-local eval`: the same questions under several schedules of one model, with the time that reading them takes.

Plans the questions, asks them, and keeps every answer in a results file from which a stopped run continues. Tables and
plots are made of what it returns (`table`, `plot`).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swaa_local.engine.options import EngineOptions
from swaa_local.errors import SWAAError
from swaa_local.eval.log import EvalLog
from swaa_local.eval.results import AnswerRecord, Cell, Evaluation, QuestionRecord
from swaa_local.eval.watch import SILENT, Watch
from swaa_local.files.fingerprint import fingerprint
from swaa_local.model_file.adapter import adapter_remarks, read_adapter
from swaa_local.model_file.model_info import ModelInfo, read_model_info
from swaa_local.model_file.schedule_keys import read_schedule
from swaa_local.schedule.config import default_n_ubatch
from swaa_local.schedule.variants import FILE, FULL, NAIVE, Variant, parse_variants, whole_in_window, without_schedule
from swaa_local.tasks import Question, Task, make_tasks, needs_haystack
from swaa_local.tasks.datasets import Dataset, read_dataset
from swaa_local.tasks.essay import read_essay
from swaa_local.tasks.scoring import MISS, Metric, Score, score

_WARM_UP_TOKENS = 64


class EvalError(SWAAError, ValueError):
    """An evaluation that cannot be made as asked."""


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    results: the file of all answers; it is continued if it exists. lengths: of prompts with their answers, in tokens.
    samples: questions of each task and length. variants: see `variants`; None compares what the file allows. dataset:
    instead of tasks. n_ctx: tokens at most, for datasets; None is the model's own context. skip_long: leave out what
    does not fit it. think, think_tokens: see `answering`. max_tokens: of an answer, instead of the task's own.
    """

    model: Path
    results: Path
    tasks: Sequence[str] = ("facts",)
    lengths: Sequence[int] = (4096,)
    samples: int = 50
    variants: str | None = None
    dataset: Path | None = None
    haystack: Path | None = None
    n_ctx: int | None = None
    skip_long: bool = False
    seed: int = 0
    think: bool | None = None
    think_tokens: int = 2048
    max_tokens: int | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True)
class _Batch:
    """Questions that share a task and a length, and so a context. length: None for a dataset."""

    task: str
    length: int | None
    questions: list[QuestionRecord]
    distractors: list[tuple[str, ...]]


def evaluate(request: EvalRequest, watch: Watch = SILENT) -> Evaluation:
    """Ask what the results file lacks, and return all of it. Raises `SWAAError`; what was answered is in the file."""
    info = read_model_info(request.model)
    of_file = read_schedule(request.model)
    names = request.variants or f"{FULL},{NAIVE},{FILE}"
    if request.variants is None and (of_file is None or of_file.is_full):
        names, why = without_schedule(info.unsupported)
        watch.note(f"{request.model.name} has no schedule; {why}")
    variants = parse_variants(names, info.layers, of_file)
    if any(not variant.is_full for variant in variants) and info.unsupported:
        raise EvalError(info.unsupported)
    _check_memory(request, info, variants)
    if request.engine.lora is not None:
        adapter = read_adapter(request.engine.lora.path)
        for remark in adapter_remarks(adapter, request.model, [variant.schedule for variant in variants]):
            watch.note(remark)
    source = _Source(request, [variant.think for variant in variants], info.n_ctx_train, watch)
    with closing(source), EvalLog(request.results, source.config()) as log:
        batches = list(source.batches())
        if note := whole_in_window(variants, max(q.prompt_tokens for batch in batches for q in batch.questions)):
            watch.note(note)
        for variant in variants:
            log.add_variant(variant)
        for batch in batches:
            for question in batch.questions:
                log.add_question(question)
        cells = [
            Cell(batch.task, batch.length, variant.name, tuple(question.id for question in batch.questions))
            for batch in batches
            for variant in variants
        ]
        watch.begin(cells, log)
        for batch in batches:
            _run_batch(request, source, batch, variants, log, watch)
        watch.end()
        asked = {id for cell in cells for id in cell.questions}
        return Evaluation(
            model=request.model.name,
            variants=tuple(variants),
            cells=tuple(cells),
            questions={id: question for id, question in log.questions.items() if id in asked},
            answers={key: log.answers[key] for cell in cells for key in cell.keys},
        )


def _check_memory(request: EvalRequest, info: ModelInfo, variants: Sequence[Variant]) -> None:
    """Before questions of that length are made, which takes memory too. Raises `ContextTooLarge`."""
    from swaa_local.engine.context_length import gpu_layers
    from swaa_local.engine.memory import check_fits, header_cost

    engine = request.engine
    if request.dataset is not None or info.unsupported is not None:
        return
    for variant in variants:
        cost = header_cost(
            info,
            variant.schedule,
            n_ubatch=engine.n_ubatch or default_n_ubatch(variant.schedule, gpu=False),
            type_k=engine.type_k or "f16",
            type_v=engine.type_v or "f16",
            n_gpu_layers=gpu_layers(engine.n_gpu_layers, workers=bool(engine.rpc_servers), verbose=engine.verbose),
        )
        check_fits(cost, max(request.lengths))


class _Source:
    """Makes the questions. Tokens are counted with the model's vocabulary alone: weights are loaded when needed."""

    def __init__(
        self, request: EvalRequest, thinks: Sequence[bool | None], n_ctx_train: int | None, watch: Watch
    ) -> None:
        from swaa_local.generation.answer import Answerer
        from swaa_local.llama import Llama

        self._request = request
        self._watch = watch
        self._n_ctx_train = n_ctx_train or (1 << 30)
        self.dataset: Dataset | None = None
        self.tasks: list[Task] = []
        if request.haystack is not None and (request.dataset is not None or not needs_haystack(request.tasks)):
            raise EvalError("nothing that is asked for needs a text; leave out --haystack")
        if request.dataset is not None:
            self.dataset = read_dataset(request.dataset)
        else:
            essay = None if request.haystack is None else read_essay(request.haystack)
            self.tasks = make_tasks(request.tasks, essay)
        self._llm = Llama(str(request.model), vocab_only=True, n_ctx=512, **request.engine.arguments())
        chosen = {request.think if think is None else think for think in thinks}
        self._answerers = [Answerer(self._llm, think=think) for think in chosen]
        template = self._answerers[0].template
        if template.is_fallback:
            watch.note("this model has no chat template, so ChatML is used; a base model answers poorly")
        if chosen != {None} and not template.has_thinking_switch:
            watch.note("this model's chat template has no switch for thinking, so asking for it changes nothing")

    def close(self) -> None:
        self._llm.close()

    def config(self) -> dict[str, Any]:
        """What the answers depend on, and their times. What the prompts depend on shows in the prompts."""
        import llama_cpp

        request = self._request
        return request.engine.for_log() | {
            "model": request.model.name,
            "model_sha256": fingerprint(request.model),
            "seed": request.seed,
            "think": {None: "auto", True: "on", False: "off"}[request.think],
            "think_tokens": request.think_tokens,
            "max_tokens": request.max_tokens,
            "n_threads": self._llm.n_threads,
            "n_threads_batch": self._llm.n_threads_batch,
            "engine": llama_cpp.__version__,
        }

    def count(self, message: str, answer_prefix: str = "") -> int:
        """Tokens of a prompt, in the variant that takes most."""
        return max(answerer.count(message, answer_prefix) for answerer in self._answerers)

    def batches(self) -> Iterator[_Batch]:
        """All questions, from short to long."""
        if self.dataset is not None:
            yield self._from_dataset(self.dataset)
            return
        lengths = sorted(set(self._request.lengths))
        self._note_length(lengths[-1])
        for length in lengths:
            for task in self.tasks:
                with self._watch.making(task.name, length, self._request.samples) as made:
                    questions = []
                    for index in range(self._request.samples):
                        rng = random.Random(f"{self._request.seed}/{task.name}/{length}/{index}")
                        questions.append(task.make(rng, length, index, self.count))
                        made(index + 1)
                yield self._batch(task.name, length, list(enumerate(questions)))

    def _from_dataset(self, dataset: Dataset) -> _Batch:
        limit = self._request.n_ctx or self._n_ctx_train
        self._note_length(limit)
        chosen: list[tuple[int, Question]] = []
        n_long = 0
        wanted = dataset.questions[: None if self._request.skip_long else self._request.samples]
        with self._watch.making(dataset.name, None, len(wanted)) as made:
            for index, question in enumerate(wanted):
                if len(chosen) == self._request.samples:
                    break
                needed = self.count(question.prompt, question.answer_prefix) + self._limit(question)
                if needed <= limit:
                    chosen.append((index, question))
                elif self._request.skip_long:
                    n_long += 1
                else:
                    raise EvalError(
                        f"question {index + 1} of {dataset.name} needs {needed} tokens with its answer but the context "
                        f"is {limit}; pass -c {needed}, or --skip-long to leave such questions out"
                    )
                made(index + 1)
        if not chosen:
            raise EvalError(f"no question of {dataset.name} fits a context of {limit} tokens; pass a larger -c")
        if n_long:
            self._watch.note(f"left out {n_long} questions of {dataset.name} that need more than {limit} tokens")
        if dataset.metric == "contains":
            self._watch.note(f"{dataset.name}: an answer is right if it contains the reference; no judge reads it")
        return self._batch(dataset.name, None, chosen)

    def _note_length(self, n_tokens: int) -> None:
        from swaa_local.engine.context_length import beyond_training

        if not self._request.engine.scales_rope and (said := beyond_training(n_tokens, self._n_ctx_train)):
            self._watch.note(said)

    def _limit(self, question: Question) -> int:
        return self._request.max_tokens or question.max_tokens

    def _batch(self, task: str, length: int | None, questions: list[tuple[int, Question]]) -> _Batch:
        count = self.count
        records = []
        for index, question in questions:
            after = None
            if question.needle_at is not None:
                after = count(question.prompt[question.needle_at :], question.answer_prefix)
            record = QuestionRecord(
                id="/".join(str(part) for part in (task, length, index) if part is not None),
                task=task,
                length=length,
                index=index,
                prompt=question.prompt,
                answer_prefix=question.answer_prefix,
                references=question.references,
                metric=question.metric,
                max_tokens=self._limit(question),
                prompt_tokens=count(question.prompt, question.answer_prefix),
                depth=question.depth,
                tokens_after=after,
            )
            records.append(record)
        return _Batch(task, length, records, [question.distractors for _, question in questions])

    def n_ctx(self, batch: _Batch) -> int:
        """Tokens of context: the prompts and their answers, and room for thoughts as far as the model was trained."""
        needed = max(question.prompt_tokens + question.max_tokens for question in batch.questions)
        thoughts = self._request.think_tokens if any(each.may_think for each in self._answerers) else 0
        return max(needed, min(needed + thoughts, self._request.n_ctx or self._n_ctx_train))


def _run_batch(
    request: EvalRequest, source: _Source, batch: _Batch, variants: Sequence[Variant], log: EvalLog, watch: Watch
) -> None:
    from swaa_local.engine.adapter import AdapterWarning
    from swaa_local.engine.context_length import TrainedLengthWarning
    from swaa_local.generation.answer import Answerer
    from swaa_local.llama import Llama

    todo = {
        variant.name: [i for i, q in enumerate(batch.questions) if (q.id, variant.name) not in log.answers]
        for variant in variants
    }
    if not any(todo.values()):
        return
    with warnings.catch_warnings():
        # the watch has said so
        warnings.simplefilter("ignore", TrainedLengthWarning)
        warnings.simplefilter("ignore", AdapterWarning)
        # The model's own windows are kept in one way, so that the schedules alone make the difference.
        options = {"swa_full": False, "on_prefill": watch.on_prefill, **request.engine.arguments()}
        llm = Llama(str(request.model), n_ctx=source.n_ctx(batch), **options)
    with closing(llm):
        for variant in variants:
            if not (indices := todo[variant.name]):
                continue
            think = request.think if variant.think is None else variant.think
            answerer = Answerer(llm, think=think, think_tokens=request.think_tokens)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AdapterWarning)
                llm.set_schedule(variant.schedule)
            llm.on_prefill = None
            _warm_up(answerer, batch.questions[indices[0]])
            llm.on_prefill = watch.on_prefill
            for i in indices:
                question = batch.questions[i]
                watch.asking(variant.name, question)
                prompt = answerer.prompt(question.prompt, question.answer_prefix)
                answer = answerer.ask(prompt, question.max_tokens)
                verdict = judge(question, answer.text, answer.finish, batch.distractors[i])
                record = AnswerRecord(
                    question=question.id,
                    variant=variant.name,
                    answer=answer.text,
                    thinking=answer.thinking,
                    finish=answer.finish,
                    share=verdict.share,
                    correct=verdict.correct,
                    prefill_s=answer.stats.prefill_s,
                    generated_tokens=answer.stats.generated_tokens,
                    decode_s=answer.stats.decode_s,
                    kv_bytes=llm.kv_bytes,
                )
                log.add_answer(record)
                watch.answered(record)


def judge(question: QuestionRecord, answer: str, finish: str, distractors: Sequence[str] = ()) -> Score:
    """The score of an answer. Thinking that does not end is a miss, and so is, for a value, an answer that does not.

    RULER cuts answers at their limit and scores what is there; so do its measures here.
    """
    metric: Metric = question.metric  # type: ignore[assignment]
    if finish == "thinking" or (finish == "length" and metric == "value"):
        return MISS
    return score(answer, question.references, metric, distractors)


def _warm_up(answerer: Any, question: QuestionRecord) -> None:
    """A new context's first evaluation also reads weights and compiles kernels; that is no prefill time."""
    answerer.llm.reset()  # where only the tail has changed, the context is the old one
    answerer.llm.eval(answerer.prompt(question.prompt).tokens[:_WARM_UP_TOKENS])
    answerer.llm.reset()


def default_results(model: Path) -> Path:
    """Where the answers go where the user does not say: in the current directory, named after the model."""
    return Path(f"{model.stem}.eval.jsonl")
