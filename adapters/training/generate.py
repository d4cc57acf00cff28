"""The target answers training prompts through our own engine, which records its features."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import structlog
import torch
import typer

from evospec.adapters.training.conversations import (
    CACHE,
    Conversation,
    data_directory,
    read_shard,
    shard_paths,
    text_directory,
    write_shard,
    written_keys,
)
from evospec.engine.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from evospec.engine.core import EngineCore
from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.messages import EngineOutput, EngineRequest, SamplingParams
from evospec.engine.models.eagle3_config import recorded_layers
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.request import engine_request_id
from evospec.engine.speculation.drafters.base import DraftCosts, Proposer
from evospec.engine.step import Step
from evospec.engine.text.tokenizer import Tokenizer

log = structlog.get_logger(__name__)

TRAINING_DOMAINS = ("code", "general")
"""Law and medicine are left out on purpose: they are the shift that online alignment must close."""
GREEDY_SHARE, TEMPERATURE = 0.6, 0.8
SHARD_CONVERSATIONS = 64
LOOP_CHECK_TOKENS, LOOP_PERIODS, MAX_LOOP_PERIOD = 32, 4, 64
_CLIENT = b"generate"


@dataclass(frozen=True)
class Job:
    """One answer to make; ``round`` numbers the passes over all prompts. A ``given`` answer is read instead."""

    prompt_id: str
    text: str
    round: int
    given: str | None = None
    domain: str = ""

    @property
    def key(self) -> int:
        """A name for prompt and round that is the same in every run; fits int64."""
        return _hash("job", self.prompt_id, str(self.round)) >> 1

    def sampling(self, max_tokens: int) -> SamplingParams:
        greedy = self.round == 0 and _hash("greedy", self.prompt_id) / 2**64 < GREEDY_SHARE
        return SamplingParams(max_tokens=max_tokens, seed=self.key % 2**31, temperature=0.0 if greedy else TEMPERATURE)


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def read_prompts(path: Path) -> list[Job]:
    """The training prompts in the domains that may be trained on, as jobs of round 0."""
    rows = map(json.loads, path.read_text().splitlines())
    return [
        Job(
            row["id"],
            row["messages"][0]["content"],
            round=0,
            given=next((message["content"] for message in row["messages"][1:]), None),
            domain=row["domain"],
        )
        for row in rows
        if row["split"] == "train" and row["domain"] in TRAINING_DOMAINS
    ]


def jobs_of(prompts: Sequence[Job], rounds: int) -> Iterator[Job]:
    """Each round over all prompts in an order of its own."""
    for number in range(rounds):
        for job in sorted(prompts, key=lambda job: _hash("order", str(number), job.prompt_id)):
            yield replace(job, round=number)


def answered_by(directory: Path, tokenizer: Tokenizer, jobs: Iterable[Job]) -> Iterator[Job]:
    """The jobs that another model has done, its answers to be read: words by the faster one, labels by the target.

    ``directory`` has the other's shards, and ``tokenizer`` is the other's.
    """
    conversations = chain.from_iterable(map(read_shard, shard_paths(directory)))
    answers = {c.key: c.token_ids[c.prompt_length :].tolist() for c in conversations}
    return (replace(job, given=tokenizer.decode(answers[job.key])) for job in jobs if answers.get(job.key))


def left_of(jobs: Iterable[Job], skip: int, domains: Collection[str], done: Collection[int]) -> Iterator[Job]:
    """Without the first ``skip``, whatever their domain, those of other domains, and those whose key is ``done``."""
    return (job for job in islice(jobs, skip, None) if job.domain in domains and job.key not in done)


def loop_start(token_ids: Sequence[int]) -> int | None:
    """Where a loop at the end begins to repeat for the last time but one; None where the end does not loop.

    A loop is ``LOOP_PERIODS`` equal runs of at most ``MAX_LOOP_PERIOD`` tokens.
    """
    size = len(token_ids)
    for period in range(1, MAX_LOOP_PERIOD + 1):
        span = max(LOOP_PERIODS * period, 16)
        if span > size:
            return None
        if all(token_ids[i] == token_ids[i - period] for i in range(size - 1, size - span + period - 1, -1)):
            return size - span
    return None


class FeatureRecorder(Proposer):
    """A draft that drafts nothing and keeps the outputs of some layers. It needs an engine without prefix cache."""

    description = "feature recorder"
    costs = DraftCosts(weight_bytes=0, bytes_per_block=0)
    vocab: DraftVocab | None = None

    def __init__(self, capture_layers: tuple[int, ...]) -> None:
        self.capture_layers = capture_layers
        self._rows: dict[str, list[torch.Tensor]] = {}

    def make_proposer(self, num_blocks: int) -> Proposer:
        return self

    def learn(self, step: Step) -> None:
        """Append each sequence's rows, as bf16."""
        assert step.features is not None
        sequences = step.batch.sequences
        lengths = [len(sequence.token_ids) for sequence in sequences]
        rows = torch.split_with_sizes(step.features.values.to("cpu", torch.bfloat16, copy=True), lengths)
        for sequence, own in zip(sequences, rows, strict=True):
            if sequence.start == 0:  # also a preempted sequence, which is computed again
                self._rows[sequence.request.request_id] = []
            self._rows[sequence.request.request_id].append(own)

    def take(self, request_id: str) -> torch.Tensor:
        """The rows of a request so far, ended or not: [tokens computed, len(capture_layers) * hidden] bf16. They are
        dropped here.
        """
        return torch.cat(self._rows.pop(request_id))


class Generator:
    """Keeps ``batch`` answers going in one engine, and yields each with its features as it ends."""

    def __init__(
        self,
        core: EngineCore,
        recorder: FeatureRecorder,
        tokenizer: Tokenizer,
        batch: int,
        max_tokens: int,
        max_prompt: int,
    ) -> None:
        self._core, self._recorder, self._tokenizer, self._batch = core, recorder, tokenizer, batch
        self._max_tokens, self._max_prompt = max_tokens, max_prompt
        self._running: dict[str, tuple[Job, list[int], list[int]]] = {}

    def run(self, jobs: Iterator[Job]) -> Iterator[tuple[Conversation, torch.Tensor]]:
        """Conversations up to the last token that the engine computed, and their features [tokens, width]."""
        while True:
            while len(self._running) < self._batch and (job := next(jobs, None)) is not None:
                self._start(job)
            if not self._running:
                return
            outputs, _ = self._core.step()
            for output in outputs[_CLIENT]:
                conversation = self._take(output)
                if conversation is not None:
                    features = self._recorder.take(engine_request_id(_CLIENT, output.request_id))
                    tokens = conversation.token_ids[: len(features)]
                    yield replace(conversation, token_ids=tokens), features[: len(tokens)]

    def _start(self, job: Job) -> None:
        prompt = self._tokenizer.encode_messages([{"role": "user", "content": job.text}])
        if len(prompt) > self._max_prompt:
            return
        # A given answer goes in with the prompt. The one token made after it has no features, so it is cut off again.
        given = [] if job.given is None else self._tokenizer.encode(job.given, add_special_tokens=False)
        sampling = job.sampling(1 if given else self._max_tokens)
        request_id = str(job.key)
        self._running[request_id] = job, prompt, given
        request = EngineRequest(
            request_id=request_id, prompt_token_ids=[*prompt, *given], sampling=sampling, tenant="train"
        )
        self._core.add(_CLIENT, request)

    def _take(self, output: EngineOutput) -> Conversation | None:
        if output.error is not None:
            raise RuntimeError(f"the engine refused a training prompt: {output.error}")
        job, prompt, answer = self._running[output.request_id]
        checked = len(answer) // LOOP_CHECK_TOKENS
        answer += output.token_ids
        finished = output.finish_reason is not None
        if not finished and len(answer) // LOOP_CHECK_TOKENS == checked:
            return None
        cut = loop_start(answer)
        if cut is not None:
            # One more round of the loop stays: served text has loops too, and a draft should follow them.
            self._core.abort(_CLIENT, [output.request_id])
        elif not finished:
            return None
        del self._running[output.request_id]
        return Conversation(job.key, len(prompt), np.array([*prompt, *answer], dtype=np.int32))


def make_generator(model: str, batch: int, max_tokens: int, max_prompt: int, threads: int) -> Generator:
    """A generator with an engine of its own; arguments as the options of ``main``."""
    config = EngineConfig(
        model=ModelConfig(name=model, max_model_len=2048),
        cache=CacheConfig(prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=batch, max_batched_tokens=max(512, 4 * batch)),
        speculation=SpeculationConfig(num_speculative_tokens=0, adaptive=False),
        runtime=RuntimeConfig(threads=threads),
    )
    files = resolve_model(config.model)
    spec = validate_model_files(files)
    recorder = FeatureRecorder(recorded_layers(spec))
    core = EngineCore(config, files, spec, draft=recorder)
    return Generator(core, recorder, Tokenizer.from_files(files), batch, max_tokens, max_prompt)


def write_conversations(
    conversations: Iterator[tuple[Conversation, torch.Tensor]], directory: Path, max_tokens: int, max_seconds: float
) -> None:
    """Write shards until there are no more conversations, or so many answer tokens, or so long has passed."""
    started, made = time.monotonic(), 0
    while some := list(islice(conversations, SHARD_CONVERSATIONS)):
        path = write_shard(directory, [conversation for conversation, _ in some], [rows for _, rows in some])
        made += sum(len(conversation.token_ids) - conversation.prompt_length for conversation, _ in some)
        seconds = time.monotonic() - started
        log.info("shard", path=path.name, answer_tokens=made, tokens_per_second=round(made / seconds))
        if made >= max_tokens or seconds > max_seconds:
            return


def main(
    model: Annotated[str, typer.Argument(help="Registry name, path or hub id of the target.")],
    tokens: Annotated[int, typer.Option(help="Stop at so many answer tokens, all runs together.")] = 5_000_000,
    prompts: Annotated[Path, typer.Option(help="Prompts of benchmarks.prompts.build.")] = CACHE / "prompts/train.jsonl",
    text: Annotated[Path | None, typer.Option(help="Read passages of benchmarks.prompts.text, answer nothing.")] = None,
    answers_of: Annotated[str | None, typer.Option(help="Read the answers that this model made.")] = None,
    batch: Annotated[int, typer.Option(help="Answers at a time.")] = 96,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 320,
    max_prompt: Annotated[int, typer.Option(help="Longer prompts are left out.")] = 700,
    rounds: Annotated[int, typer.Option(help="Answers to each prompt: the first mostly greedy.")] = 8,
    skip: Annotated[int, typer.Option(help="Leave out so many of the first prompts: answered elsewhere.")] = 0,
    domain: Annotated[list[str] | None, typer.Option(help="Only these; default: all that may be trained on.")] = None,
    threads: Annotated[int, typer.Option(help="Compute threads; 0: one a core.")] = 0,
    seconds: Annotated[float, typer.Option(help="Stop after so long.")] = float("inf"),
) -> None:
    """Writes shards of conversations; an interrupted run goes on where it was."""
    if text is not None and answers_of is not None:
        raise typer.BadParameter("--text and --answers-of: one at a time")
    if not (text or prompts).is_file():
        maker = "benchmarks.prompts.build --train" if text is None else "benchmarks.prompts.text"
        raise typer.BadParameter(f"{text or prompts} is not there: python -m {maker} makes it")
    name = resolve_model(ModelConfig(name=model)).name
    directory = data_directory(name) if text is None and answers_of is None else text_directory(name)
    all_jobs = jobs_of(read_prompts(text or prompts), rounds if text is None else 1)
    jobs = left_of(all_jobs, skip, domain or TRAINING_DOMAINS, written_keys(directory))
    if answers_of is not None:
        other = resolve_model(ModelConfig(name=answers_of))
        jobs = answered_by(data_directory(other.name), Tokenizer.from_files(other), jobs)
    generator = make_generator(model, batch, max_tokens, max_prompt, threads)
    write_conversations(generator.run(jobs), directory, tokens, seconds)


if __name__ == "__main__":
    typer.run(main)
