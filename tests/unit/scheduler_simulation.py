"""A scheduler driven by a made-up model and proposer, checked at every step."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence

from evospec.engine.config import CacheConfig, SchedulerConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.request import Request
from evospec.engine.scheduler import Scheduler
from evospec.engine.step import Batch, Decodes, DraftSlot, Proposal, ScheduledSequence
from tests.unit.simulated_kv import SimulatedKV

BLOCK_SIZE = 16


def next_token(token_ids: Sequence[int]) -> int:
    """The model: any function of the whole prefix."""
    return zlib.crc32(bytes(token_ids)) % 5


def make_request(
    request_id: str,
    num_prompt: int = 4,
    max_tokens: int = 4,
    tenant: str = "a",
    prompt_logprobs: int | None = None,
    token_ids: list[int] | None = None,
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, prompt_logprobs=prompt_logprobs)
    return Request(request_id, b"client", tenant, sampling, token_ids or [1] * num_prompt)


class Simulation:
    """Runs steps.

    Draft tokens are right with probability ``accuracy``. With probability ``stalling`` no token can be chosen for a
    sequence in a step, or it has to wait after one; it is then stalled for some steps.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        max_batched_tokens: int = 32,
        max_waiting: int = 1000,
        max_model_len: int = 256,
        prefix_caching: bool = True,
        num_drafts: int = 0,
        accuracy: float = 0.5,
        stalling: float = 0.0,
        reads_prompts_apart: bool = False,
    ) -> None:
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens, max_waiting=max_waiting
        )
        cache = CacheConfig(block_size=BLOCK_SIZE, prefix_caching=prefix_caching)
        sizes = num_blocks, max_model_len
        self.scheduler = Scheduler(self.config, cache, *sizes, reads_prompts_apart=reads_prompts_apart)
        self._reads_prompts_apart = reads_prompts_apart
        self.max_model_len = max_model_len
        self.kv = SimulatedKV(BLOCK_SIZE)
        self.finished: list[Request] = []
        self._num_drafts = num_drafts
        self._accuracy = accuracy
        self._stalling = stalling
        self._stalled: dict[Request, int] = {}  # steps left
        self._proposals: dict[Request, Proposal] = {}
        self._random = random.Random(0)

    def step(self, abort: str | None = None) -> Batch:
        """One step; ``abort``: a request id that is aborted between schedule and commit."""
        decodes = self.scheduler.begin_step()
        slots = self.scheduler.plan(decodes, self._lengths(decodes))
        self._proposals = {slot.request: self._draft(slot) for slot in slots}
        output = self.scheduler.fill(slots, self._proposals)
        self._check(output)
        self._end_stalls()
        sampled = [self._forward(sequence) for sequence in output.sequences]
        if abort is not None:
            self.scheduler.abort(abort)
        for sequence, token_ids in zip(output.sequences, sampled, strict=True):
            self._commit(sequence, token_ids, aborted=sequence.request.request_id == abort)
        return output

    def run(self, max_steps: int) -> list[Batch]:
        """Step until all is done."""
        outputs = []
        while self.scheduler.has_work():
            outputs.append(self.step())
            assert len(outputs) <= max_steps, "starved"
        assert self.scheduler.stats().blocks_used == 0
        return outputs

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Step until something is so."""
        while not is_done():
            self.step()

    def abort(self, request: Request) -> None:
        """End a request between steps."""
        self.scheduler.abort(request.request_id)
        self._stalled.pop(request, None)

    def _check(self, output: Batch) -> None:
        sequences = output.sequences
        assert sequences or self._stalled, "a step must do something"
        assert not any(s.request.is_stalled for s in sequences)
        assert len({s.request.request_id for s in sequences}) == len(sequences) <= self.config.max_num_seqs
        assert output.num_tokens == sum(len(s.token_ids) for s in sequences) <= self.config.max_batched_tokens
        assert not {s.request for s in sequences} & set(output.preempted)
        assert [s.decodes for s in sequences] == sorted((s.decodes for s in sequences), reverse=True)
        for sequence in sequences:
            request, known = sequence.request, sequence.request.all_token_ids
            end = sequence.start + len(sequence.token_ids) - sequence.num_draft_tokens
            assert sequence.start == request.num_computed_tokens < end <= len(known)
            drafts = self._proposals[request].token_ids if request in self._proposals else []
            assert sequence.token_ids == known[sequence.start : end] + drafts
            assert sequence.num_sampled == (1 + sequence.num_draft_tokens if end == len(known) else 0)
            assert sequence.start + len(sequence.token_ids) < self.max_model_len

    def _forward(self, sequence: ScheduledSequence) -> list[int]:
        """Accepted drafts and the new token; empty while prefill is unfinished."""
        request, start = sequence.request, sequence.start
        token_ids = request.all_token_ids[:start] + sequence.token_ids
        num_prompt = len(request.prompt_token_ids) if self._reads_prompts_apart else None
        as_prompt = num_prompt is None or start < num_prompt
        self.kv.check(sequence.block_ids, request.tenant, token_ids[:start], num_prompt)
        self.kv.write(sequence.block_ids, request.tenant, token_ids, start, as_prompt)
        if sequence.num_sampled == 0:
            return []
        sampled: list[int] = []
        for draft in [*sequence.draft_token_ids, None]:
            sampled.append(next_token(request.all_token_ids + sampled))
            if sampled[-1] != draft:
                break
        return sampled

    def _commit(self, sequence: ScheduledSequence, sampled: list[int], aborted: bool) -> None:
        request = sequence.request
        if sampled and self._stalling and self._random.random() < self._stalling:
            self._stall(request)
            if self._random.random() < 0.5:
                self.scheduler.postpone(sequence)
                return
        room = min(request.sampling.max_tokens, self.max_model_len - len(request.prompt_token_ids))
        kept = sampled[: room - len(request.output_token_ids)]
        finished = bool(kept) and len(request.output_token_ids) + len(kept) == room
        self.scheduler.commit(sequence, kept, finished)
        if finished and not aborted:
            self.finished.append(request)

    def _stall(self, request: Request) -> None:
        request.is_stalled = True
        self._stalled[request] = self._random.randint(1, 5)

    def _end_stalls(self) -> None:
        for request in list(self._stalled):
            self._stalled[request] -= 1
            if not self._stalled[request]:
                request.is_stalled = False
                del self._stalled[request]

    def _lengths(self, decodes: Decodes) -> list[int]:
        stats, requests = self.scheduler.stats(), decodes.requests
        assert 0 <= decodes.num_joining <= stats.num_running - len(requests) + stats.num_waiting
        assert all(request.num_tokens - request.num_computed_tokens == 1 for request in requests)
        return [min(limit, self._num_drafts) for limit in decodes.limits]

    def _draft(self, slot: DraftSlot) -> Proposal:
        request, drafts = slot.request, list[int]()
        assert request.num_tokens + slot.num_tokens <= len(slot.block_ids) * BLOCK_SIZE
        for _ in range(slot.num_tokens):
            right = next_token(request.all_token_ids + drafts)
            drafts.append(right if self._random.random() < self._accuracy else 9)
        return Proposal(drafts)


def plan_step(scheduler: Scheduler) -> Batch:
    """A step without drafts."""
    decodes = scheduler.begin_step()
    return scheduler.fill(scheduler.plan(decodes, [0] * len(decodes.requests)), {})


def expected_output(prompt: list[int], count: int) -> list[int]:
    """What the model generates, whatever the scheduler does."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]
