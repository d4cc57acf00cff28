"""The worker's own parts, fed with recorded answers instead of a server's log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.alignment_replay.recordings import DEPTH, Recording, drafted_right
from evospec.adapters.alignment.aligner import KeyAligner
from evospec.adapters.alignment.chains import ChainDrafter
from evospec.adapters.alignment.records import Assembler
from evospec.adapters.alignment.replay import starts_chains, teaches
from evospec.adapters.alignment.store import AdapterStore
from evospec.adapters.alignment.updates import Updater
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.online.feature_ring import FeatureRing, FeatureRingReader
from evospec.engine.online.verify_record import VerifyRecord, pack_ids, pack_top_k

_KEY = "replay"
_ALWAYS_PAYS = 1e30


def configured(options: Sequence[str]) -> AdaptersConfig:
    """The defaults but for NAME=VALUE, e.g. ``log.context_tokens=0``."""
    # Every update pays: here steps come as fast as the machine is, so what pays would depend on what else it does.
    values: dict[str, object] = {"pace": {"step_seconds": _ALWAYS_PAYS}}
    for option in options:
        name, _, value = option.partition("=")
        *sections, last = name.split(".")
        section = values
        for each in sections:
            section = section.setdefault(each, {})  # type: ignore[assignment]
        section[last] = value
    return AdaptersConfig.model_validate(values)


class Replay:
    """A worker's only key, and a ring that nobody else writes to."""

    def __init__(self, base: ChainDrafter, config: AdaptersConfig, directory: Path) -> None:
        self._config, hidden = config, base.draft.config.hidden_size
        self.updater = Updater(base, config, _KEY, "")
        self.aligner = KeyAligner(_KEY, base, self.updater, AdapterStore(directory, self.updater.layout), config)
        self._ring = FeatureRing(directory / "ring", config.log.ring_rows, hidden)
        self._reader = FeatureRingReader(directory / "ring")
        sizes = len(base.target.head), base.target.max_positions
        self._assembler = Assembler(config.replay, config.log.top_k, *sizes)
        self._version = 0

    def serve(self, recording: Recording, name: str) -> None:
        """Log an answer's steps, and do what there is to do before the next one."""
        records = list(self._records(recording, name))
        share, is_held_out = self._config.replay.sampled_share, self.aligner.replay.holds_out(name)
        are_teaching = [teaches(each, self._config.log.kl_threshold, share) for each in records]
        taught = list(zip(records, are_teaching, strict=True))
        self._assembler.add(
            [(_KEY, each, starts_chains(each, is_useful, is_held_out)) for each, is_useful in taught], self._reader
        )
        for each, is_useful in taught:
            self.aligner.count(each, is_useful)
        for _, segment in self._assembler.flush():
            self.aligner.add(segment)
        self.aligner.tick()
        while self.aligner.wants_work:
            self.aligner.work()
            if self.aligner.is_unpublished:
                self._version += 1
                self.aligner.published(self._version)

    def _records(self, recording: Recording, name: str) -> Iterator[VerifyRecord]:
        """As an engine with the base draft logs them: what it drafts has no influence on the positions' contents."""
        tokens, first = recording.prompt + recording.answer, len(recording.prompt)
        at, context = first, max(0, first - self._config.log.context_tokens)
        while at + DEPTH + 1 < len(tokens):
            drafted = recording.drafted[at - first].tolist()
            right = drafted_right(drafted, tokens[at + 1 :])
            end = at + right + 1
            slot, generation = self._ring.write(recording.inputs[context:end])
            top_ids, top_logits = pack_top_k(recording.top_ids[at:end].numpy(), recording.top_logits[at:end].numpy())
            yield VerifyRecord(
                request_id=name,
                tenant=_KEY,
                adapter_key=_KEY,
                domain=None,
                position=at + 1,
                last_token=tokens[at],
                drafted=tuple(drafted),
                num_accepted=right,
                next_token=tokens[end],
                draft_version=self._version,
                top_k=recording.top_ids.shape[1],
                top_ids=top_ids,
                top_logits=top_logits,
                is_hard_example=False,
                feature_slot=slot + at - context,
                feature_generation=generation,
                num_features=right + 1,
                context=pack_ids(tokens[context:at]),
                first_right=right > 0,
            )
            at = context = end


@torch.inference_mode()
def acceptance_length(drafter: ChainDrafter, recordings: Sequence[Recording]) -> float:
    """Tokens that a verification gives, drafts starting where the one before ended."""
    num_tokens = num_steps = 0
    for recording in recordings:
        drafted = recording.drafts(drafter)
        at, answer = 0, recording.answer
        while at + DEPTH + 1 < len(answer):
            num_steps, at = num_steps + 1, at + 1 + drafted_right(drafted[at].tolist(), answer[at + 1 :])
        num_tokens += at
    return num_tokens / num_steps
