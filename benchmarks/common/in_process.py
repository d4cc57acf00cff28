"""The engine in this process, without server and HTTP, so that what is measured is the engine.

Engines that are compared share the target's weights (``load_target``) and take steps in turn (``take_turns``): where
weights happen to lie in memory alone makes 5 % of a step, and a machine that others use changes within seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol, TypeVar

from benchmarks.prompts.build import Prompt
from evospec.engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculationConfig
from evospec.engine.core import EngineCore
from evospec.engine.loader import LoadedModel, load
from evospec.engine.messages import EngineOutput, EngineRequest, SamplingParams, SessionState, StepTimings
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.speculation.drafters.base import Draft
from evospec.engine.text.tokenizer import Tokenizer

PARTS = ("draft", "verify", "sample", "overhead")
"""Of a step, as in the metric ``evospec:engine_step_seconds``."""
MAX_MODEL_LEN = 2048
MAX_SEQUENCES = 64
KV_BYTES = 512 * 2**20
"""Of each engine: several are in memory at once."""
CLIENT = b"benchmark"


def engine_config(model: str, speculation: SpeculationConfig) -> EngineConfig:
    """An engine without prefix cache, so that a prompt costs the same in every round."""
    return EngineConfig(
        model=ModelConfig(name=model, max_model_len=MAX_MODEL_LEN),
        cache=CacheConfig(prefix_caching=False, max_bytes=KV_BYTES),
        scheduler=SchedulerConfig(max_num_seqs=MAX_SEQUENCES),
        speculation=speculation,
    )


@dataclass(frozen=True)
class Turn:
    """A request: its prompt's tokens, whose it is, and what its session brings along (None: it has none)."""

    prompt: list[int]
    tenant: str = "benchmark"
    session: SessionState | None = None


@dataclass
class Generation:
    """Answers to some prompts, in order, and what making them took."""

    answers: list[list[int]]
    snapshots: list[bytes | None] = field(default_factory=list)
    """Of each answer's session, as the engine wants it back with the next request; None without a session."""
    decode_steps: list[StepTimings] = field(default_factory=list)
    """Those that computed no prompt."""
    seconds: float = 0.0
    verified: list[tuple[int, int]] = field(default_factory=list)
    """Draft tokens and how many of them were accepted, for each sequence and step that had any."""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.answers))

    def add_step(self, outputs: Sequence[EngineOutput], timings: StepTimings) -> None:
        self.verified += [(o.num_draft_tokens, o.num_accepted_tokens) for o in outputs if o.num_draft_tokens]
        if timings.num_tokens == sum(1 + output.num_draft_tokens for output in outputs):
            self.decode_steps.append(timings)


def load_target(config: EngineConfig) -> LoadedModel:
    """The target of several engines whose configurations differ in other things."""
    files = resolve_model(config.model)
    return load(config, files, validate_model_files(files))


class _Timed(Protocol):
    seconds: float


TimedT = TypeVar("TimedT", bound=_Timed)


def take_turns(runs: Sequence[Iterator[TimedT]]) -> list[TimedT]:
    """What each run of steps gives at its end: the next step is always of the one that has had least time."""
    results = [next(run) for run in runs]
    unfinished = dict(enumerate(runs))
    while unfinished:
        place = min(unfinished, key=lambda place: results[place].seconds)
        if next(unfinished[place], None) is None:
            del unfinished[place]
    return results


class Engine:
    """An ``EngineCore`` and its tokenizer; ``target`` and ``draft`` may be loaded already.

    Raises:
        ValueError: the configuration asks for speculation, but there is no draft for the model.
    """

    def __init__(self, config: EngineConfig, target: LoadedModel | None = None, draft: Draft | None = None) -> None:
        files = resolve_model(config.model)
        self.tokenizer = Tokenizer.from_files(files)
        self.core = EngineCore(config, files, validate_model_files(files), draft, target)
        if self.core.introduction.draft is None and config.speculation.method != "none":
            raise ValueError(f"there is no {config.speculation.method} draft for {config.model.name}")
        self._ids = count()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams, concurrency: int) -> Generation:
        """Answer all prompts, ``concurrency`` at a time."""
        turns = [Turn(self.tokenizer.encode_messages(prompt.messages)) for prompt in prompts]
        [result] = take_turns([self.answering(turns, sampling, concurrency)])
        return result

    def answering(self, turns: Sequence[Turn], sampling: SamplingParams, concurrency: int) -> Iterator[Generation]:
        """Answer requests of tenants and sessions: what there is before the first step and after each.

        Its time is that of the steps.
        """
        result = Generation([[] for _ in turns], [None] * len(turns))
        waiting = list(enumerate(turns))[::-1]
        running: dict[str, int] = {}
        yield result
        while waiting or running:
            started = time.perf_counter()
            while waiting and len(running) < concurrency:
                place, turn = waiting.pop()
                running[self.start(turn, sampling)] = place
            outputs, timings = self.step()
            for output in outputs:
                place = running[output.request_id]
                result.answers[place] += output.token_ids
                if output.finish_reason is not None:
                    result.snapshots[place] = output.session_snapshot
                    del running[output.request_id]
            result.seconds += time.perf_counter() - started
            if timings is not None:
                result.add_step(outputs, timings)
            yield result

    def start(self, turn: Turn, sampling: SamplingParams) -> str:
        """Hand a request to the engine; its id."""
        request_id = str(next(self._ids))
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=turn.prompt,
            sampling=sampling,
            tenant=turn.tenant,
            session=turn.session,
        )
        self.core.add(CLIENT, request)
        return request_id

    def step(self) -> tuple[list[EngineOutput], StepTimings | None]:
        """One of the engine's; what it gave each request, and what it took (None: there was nothing to do).

        Raises:
            RuntimeError: the engine refused a request.
        """
        outputs, timings = self.core.step()
        for output in outputs[CLIENT]:
            if output.error is not None:
                raise RuntimeError(f"the engine refused a prompt: {output.error}")
        return outputs[CLIENT], timings
