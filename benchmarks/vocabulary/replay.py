"""Draft vocabularies and priors compared on recorded answers: ``python -m benchmarks.vocabulary.replay``.

For choosing options: seconds a mode instead of minutes, by the engine's own ``DraftVocab`` on the logits that
``benchmarks.common.draft_traces`` has recorded. The first run records the prompts' answers (a few minutes). Greedy; the
draft's ``WIDTH`` best tokens of each place stand for all. Prompts are the trial prompts of
``benchmarks.prompts.streams``, never evaluation prompts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from operator import eq
from typing import Annotated, Any

import numpy as np
import torch
import typer
from msgspec.structs import replace
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.common.acceptance import table
from benchmarks.common.draft_traces import DEPTH, Trace, recorded
from benchmarks.common.drafting import Drafting
from benchmarks.vocabulary.modes import FR_SPEC, FULL, Mode, make_mode, sizes_of
from evospec.engine.config import ModelConfig, SpeculationConfig
from evospec.engine.draft_vocab.bigram_graph import BigramGraph
from evospec.engine.draft_vocab.resources import LIGHT_DRAFT_WEIGHTS, Resources, core_mask
from evospec.engine.draft_vocab.running_texts import RunningTexts
from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.messages import SamplingParams, SessionState
from evospec.engine.models.registry import resolve_model
from evospec.engine.request import Request
from evospec.engine.speculation.build import counts_directory
from evospec.engine.speculation.drafters.head import CANDIDATES, read_token_counts, static_vocabulary
from evospec.engine.speculation.drafters.session_head import GRAPH_FILE
from evospec.engine.step import Proposal, ScheduledSequence, Verification
from evospec.engine.text.tokenizer import Tokenizer

_GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0.0)


class _Tail:
    """Which tokens the one sequence has of its own; stands for the memory of head rows."""

    def __init__(self, slots: int, vocab_size: int) -> None:
        self.slots, self.num_bytes = slots, 0
        self._ids: NDArray[np.int64] = np.full(slots, -1)
        self._vocab_size = vocab_size

    def write(self, slab: Sequence[int], slots: Sequence[int], token_ids: Sequence[int]) -> None:
        self._ids[list(slots)] = token_ids

    def clear(self, slab: int) -> None:
        self._ids[:] = -1

    def mask(self) -> NDArray[np.bool_]:
        found = np.zeros(self._vocab_size, bool)
        found[self._ids[self._ids >= 0]] = True
        return found


def verification(request: Request, kept: Sequence[int], drafts: Sequence[int]) -> Verification:
    """A step that verified these drafts of a request, and kept these tokens."""
    tokens, proposal = [request.all_token_ids[-1], *drafts], Proposal([*drafts])
    sequence = ScheduledSequence(
        request, request.num_tokens - 1, tokens, len(drafts), 0, len(tokens), array("i"), proposal
    )
    verified = Verification(sequence, 0, kept=[*kept])
    return replace(verified, num_accepted=sum(verified.outcomes(drafts)))


class Replay:
    """One mode on one trace after another; a domain's traces are a session.

    Args:
        speculation: the vocabulary, and the switches of dynamic ones.
        cold: every trace is a new tenant's first.
        core: [K] the tokens that can always be drafted; None for all.
        graph: the draft's; None without.
        vocab_size: token ids are below.
        start_weights: of the prior of a tenant's first session; None: zeros.
    """

    def __init__(
        self,
        speculation: SpeculationConfig,
        cold: bool,
        core: NDArray[np.int64] | None,
        graph: BigramGraph | None,
        vocab_size: int,
        start_weights: Sequence[float] | None,
    ) -> None:
        slots = int(speculation.vocabulary.partition("+")[2] or 0)
        self._core = core_mask(vocab_size, core)
        self._tail = _Tail(slots, vocab_size) if slots else None
        self._vocab: DraftVocab | None = None
        if speculation.vocabulary.startswith("dynamic:"):
            options = speculation.dynamic.model_copy(update={"max_sessions": 1, "semantic": False})
            resources = Resources(self._core, "", self._tail, graph, start_weights=start_weights)
            self._vocab = DraftVocab(options, resources, RunningTexts(1))
        self._cold, self._count = cold, 0
        self._snapshots: dict[str, bytes] = {}

    def run(self, trace: Trace) -> tuple[int, int]:
        """Drafts of ``DEPTH`` tokens verified, and draft tokens accepted."""
        request, end = self._begin(trace), len(trace.prompt) + len(trace.answer)
        num_steps = num_accepted = 0
        while request.num_tokens + DEPTH < end and (row := request.num_tokens - len(trace.prompt) - 1) < len(
            trace.draft_ids
        ):
            drafts = self._draft(request, trace, row)
            number = sum(map(eq, drafts, trace.answer[row + 1 :]))
            kept = trace.answer[row + 1 : row + 2 + number]
            num_steps, num_accepted = num_steps + 1, num_accepted + number
            self._observe(
                request, kept, drafts + [-1] * (DEPTH - len(drafts)), trace.likely[row + 1 : row + 1 + len(kept)]
            )
        self._finish(request, trace)
        return num_steps, num_accepted

    def _begin(self, trace: Trace) -> Request:
        self._count += 1
        tenant = str(self._count) if self._cold else trace.domain
        request = Request(str(self._count), b"", tenant, _GREEDY, trace.prompt, domain=trace.domain)
        snapshot = b"" if self._cold else self._snapshots.get(trace.domain, b"")
        request.session = SessionState(snapshot=snapshot, domain=trace.domain)
        self._observe(request, trace.answer[:1], [], trace.likely[:1])
        return request

    def _draft(self, request: Request, trace: Trace, row: int) -> list[int]:
        """Draft tokens up to the first wrong one: those after it are never looked at."""
        if self._vocab is not None:
            self._vocab.before_drafts([request])
        mask = self._core if self._tail is None else self._core | self._tail.mask()
        drafts: list[int] = []
        for depth, wanted in enumerate(trace.answer[row + 1 : row + 1 + DEPTH]):
            drafts.append(
                self._choose(request, drafts, mask, trace.draft_ids[row, depth], trace.draft_logits[row, depth])
            )
            if drafts[-1] != wanted:
                break
        return drafts

    def _choose(
        self,
        request: Request,
        drafts: list[int],
        mask: NDArray[np.bool_],
        known: NDArray[np.int32],
        own: NDArray[np.float16],
    ) -> int:
        """One draft token; a token that is not among the ``known`` ones has the logit of the last of them."""
        places = np.flatnonzero(mask[known])[:CANDIDATES]
        token_ids, logits = np.full((1, CANDIDATES), -1, np.int32), np.full((1, CANDIDATES), -np.inf, np.float32)
        token_ids[0, : len(places)], logits[0, : len(places)] = known[places], own[places]
        if self._vocab is None or not self._vocab.uses_prior:
            return int(token_ids[0, 0])

        def logits_of(_rows: NDArray[np.int32], wanted: NDArray[np.int32]) -> torch.Tensor:
            found = wanted[:, None] == known
            logits = np.where(found.any(axis=1), own[found.argmax(axis=1)], own[-1])
            return torch.from_numpy(logits.astype(np.float32))

        candidates = torch.from_numpy(token_ids), torch.from_numpy(logits)
        return self._vocab.choose_with_prior([request], [drafts], *candidates, logits_of)[0]

    def _observe(self, request: Request, kept: list[int], drafts: list[int], likely: NDArray[np.int32]) -> None:
        if self._vocab is not None:
            self._vocab.follow([verification(request, kept, drafts)], lambda _: likely)
        request.output_token_ids += kept
        request.all_token_ids += kept

    def _finish(self, request: Request, trace: Trace) -> None:
        if self._vocab is not None:
            request.all_token_ids = [*trace.prompt, *trace.answer]
            self._snapshots[trace.domain] = self._vocab.leave(request)[0] or b""
            self._vocab.end(request)


def runs_of_mode(mode: Mode, model: str, traces: Sequence[Trace]) -> Iterator[dict[str, Any]]:
    """For ``benchmarks.common.acceptance.table``."""
    speculation = mode.config.speculation
    directory = counts_directory(model, speculation.draft or model)
    tokenizer = Tokenizer.from_files(resolve_model(ModelConfig(name=model)))
    rows = speculation.vocabulary.partition(":")[2].partition("+")[0]
    core = None
    if rows not in ("", FULL):
        counts = read_token_counts(directory, tokenizer.vocab_size)
        core = static_vocabulary(counts, int(rows), tokenizer.eos_token_ids).numpy()
    graph = BigramGraph.load(directory / GRAPH_FILE, tokenizer.vocab_size)
    start_weights = LIGHT_DRAFT_WEIGHTS if speculation.method == "eagle3" else None
    replay = Replay(speculation, mode.cold, core, graph, tokenizer.vocab_size, start_weights)
    for number, trace in enumerate(traces):
        drafts, accepted = replay.run(trace)
        yield {"mode": mode.name, "set": trace.domain, "number": number, "drafts": drafts, "accepted": accepted}


def main(
    mode: Annotated[list[str] | None, typer.Option(help="Repeatable, see benchmarks/vocabulary/modes.py.")] = None,
    reference: Annotated[str, typer.Option(help="Mode to compare with.")] = FULL,
    model: Annotated[str, typer.Option(help="The target.")] = "smollm2-135m",
    draft: Annotated[str | None, typer.Option(help="A draft model; default: the shipped EAGLE-3 draft.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Of each domain.")] = 40,
    max_tokens: Annotated[int, typer.Option(min=8, help="Of an answer.")] = 128,
) -> None:
    """Prints acceptance lengths as ratios to the reference's, by trial prompts."""
    traces, sizes = recorded(model, prompts, max_tokens, draft), sizes_of(model)
    names = list(dict.fromkeys([reference, *(mode or [f"{FR_SPEC}{sizes.fr_spec}", sizes.ours])]))
    drafting = Drafting("eagle3" if draft is None else "draft_model", draft, DEPTH)
    modes = [make_mode(name, model, drafting, sizes.num_special) for name in names]
    runs = [run for each in modes for run in runs_of_mode(each, model, traces)]
    Console(width=160).print(table(runs, f"{model}, trial prompts"))


if __name__ == "__main__":
    typer.run(main)
