"""Live traffic, made up, of a tiny random draft.

The target's taste lies a low-rank change ("teacher") away from the draft, which therefore can learn it; the features
that the target's layers would give are what the teacher's layer gives, and noise. ``MadeUpEngine`` shares with a worker
what the real one does: a token log, a feature ring and a weight channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from evospec.adapters.alignment.chains import ChainDrafter, collate
from evospec.adapters.alignment.records import Segment
from evospec.adapters.alignment.updates import Lora
from evospec.adapters.target_parts import load_target_parts
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.models.eagle3 import load_draft
from evospec.engine.models.lora import draft_fingerprint, lora_layout
from evospec.engine.models.registry import validate_model_files
from evospec.engine.online.feature_ring import FeatureRing
from evospec.engine.online.token_log import TokenLog
from evospec.engine.online.verify_record import VerifyRecord, pack_top_k
from evospec.engine.online.weight_channel import WeightChannel
from evospec.kernels.session_options import NUM_FEATURES
from tests.tiny_drafts import make_draft_directory
from tests.tiny_models import make_directory

TOP_K = 8
LENGTH = 48
NUM_DRAFTS = 4
_RENEWAL = 6


@dataclass(frozen=True)
class Answer:
    """``LENGTH`` positions of a sequence, and the token after them."""

    token_ids: torch.Tensor
    inputs: torch.Tensor
    top_ids: torch.Tensor
    top_logits: torch.Tensor

    def segment(self, request_id: str = "r") -> Segment:
        return Segment(
            request_id,
            torch.arange(1, LENGTH + 1),
            self.token_ids[:LENGTH],
            self.inputs,
            self.top_ids,
            self.top_logits,
            torch.full((LENGTH,), -1, dtype=torch.int32),
            torch.ones(LENGTH, dtype=torch.bool),
            torch.zeros(LENGTH, NUM_FEATURES, dtype=torch.float16),
        )


class DriftingTraffic:
    """Answers of a target.

    Args:
        base: the base draft.
        drift: size of the teacher's change; 0: the target is the draft.
        seed: of the teacher and all answers.
    """

    def __init__(self, base: ChainDrafter, drift: float = 2.0, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        change = Lora.fresh(base.draft.config, ("q", "v"), 4, f"teacher {seed}")
        for name, tensor in change.tensors.items():
            if name.endswith(".b"):
                tensor.copy_(torch.empty(tensor.T.shape).normal_(0, drift, generator=self._generator).T)
        self._teacher = replace(base, lora=change)

    @torch.no_grad()
    def answers(self, number: int) -> list[Answer]:
        """Some more, each an own sequence."""
        hidden, vocab = self._teacher.draft.config.hidden_size, len(self._teacher.target.head)
        tokens = torch.randint(0, vocab, (number, LENGTH + 1), generator=self._generator)
        noise = torch.randn(number, LENGTH, hidden, generator=self._generator)
        inputs = noise.bfloat16()
        logits = torch.zeros(number, LENGTH, vocab)
        for position in range(LENGTH):
            empty = torch.zeros(LENGTH, TOP_K)
            so_far = [Answer(tokens[row], inputs[row], empty.int(), empty.half()).segment() for row in range(number)]
            states = self._teacher.walk(collate(so_far, 1)).head_input.view(number, LENGTH, hidden)
            state = states[:, position]
            logits[:, position] = state @ self._teacher.target.head.float().T
            tokens[:, position + 1] = logits[:, position].argmax(-1)
            if position % _RENEWAL == _RENEWAL - 1:  # or all answers would end in the same few loops
                tokens[:, position + 1] = torch.randint(0, vocab, (number,), generator=self._generator)
            if position + 1 < LENGTH:
                inputs[:, position + 1] = (state + 0.3 * noise[:, position + 1]).bfloat16()
        top = logits.topk(TOP_K)
        return [
            Answer(tokens[row], inputs[row], top.indices[row].int(), top.values[row].half()) for row in range(number)
        ]


@dataclass(frozen=True)
class TinyDraft:
    """A tiny target and a random draft for it, on disk and loaded."""

    model: Path
    directory: Path
    drafter: ChainDrafter
    base: str

    @classmethod
    def make(cls, directory: Path) -> TinyDraft:
        """The head's weights are large, so that distributions are as sharp as a real model's."""
        files = make_directory(directory / "model")
        weights = load_file(files.path / "model.safetensors")
        weights["lm_head.weight"] *= 3
        save_file(weights, files.path / "model.safetensors", metadata={"format": "pt"})
        make_draft_directory(directory / "draft", files)
        eagle = load_draft(directory / "draft", torch.float32, torch.device("cpu"))
        drafter = ChainDrafter(eagle, load_target_parts(files, validate_model_files(files)))
        return cls(files.path, directory / "draft", drafter, draft_fingerprint(directory / "draft"))


class MadeUpEngine:
    """Drafts answers with what the channel holds, verifies them, and logs each step.

    Args:
        config: where everything is; the ring's rows are fused features.
        base: the base draft.
        fingerprint: the base draft's.
    """

    def __init__(self, config: AdaptersConfig, base: ChainDrafter, fingerprint: str) -> None:
        assert config.redis_url is not None
        self._config, self._base = config, base
        config.shared_directory.mkdir(parents=True, exist_ok=True)
        self.log = TokenLog(config.redis_url, config.log.stream, interval=config.log.interval_seconds)
        self.ring = FeatureRing(config.ring_path, config.log.ring_rows, base.draft.config.hidden_size)
        layout = lora_layout(base.draft.config, config.rank, config.targets, fingerprint)
        self.channel = WeightChannel.create(config.channel_path, layout, config.num_slots)
        self._adapter = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in layout.tensors}
        self._requests = count()

    def version(self, tenant: str) -> int:
        """Of the tenant's adapter; 0: it has none."""
        return next((slot.version for slot in self.channel.slots() if slot.key == tenant), 0)

    def serve(self, answers: Sequence[Answer], tenant: str = "t", is_control: bool = False) -> int:
        """Draft and verify these answers, and log each step; how many there were."""
        version, drafter = (0, self._base) if is_control else self._drafter(tenant)
        num_steps = 0
        for answer in answers:
            request_id = f"{tenant}-{next(self._requests)}"
            for start, drafted, accepted in self._steps(answer, drafter):
                num_steps += 1
                self.log.log(self._record(answer, start, drafted, accepted, request_id, tenant, version))
        return num_steps

    def acceptance(self, answers: Sequence[Answer], tenant: str = "t") -> float:
        """Mean accepted tokens a step for these answers, which are not logged."""
        _, drafter = self._drafter(tenant)
        accepted = [step[2] for answer in answers for step in self._steps(answer, drafter)]
        return sum(accepted) / len(accepted)

    def close(self) -> None:
        """Stop, as an engine does that is restarted."""
        self.log.close()
        self.ring.close()
        self.channel.close()

    def _drafter(self, tenant: str) -> tuple[int, ChainDrafter]:
        for index, slot in enumerate(self.channel.slots()):
            if slot.key == tenant:
                state = self.channel.read_into(index, self._adapter)
                adapter = Lora.of_published(self._base.draft.config, self._adapter)
                return state.version, replace(self._base, lora=adapter)
        return 0, self._base

    @torch.no_grad()
    def _steps(self, answer: Answer, drafter: ChainDrafter) -> Iterator[tuple[int, tuple[int, ...], int]]:
        """Row of the last token, drafted tokens, and how many of them are right, of each verify step."""
        batch = collate([answer.segment()], NUM_DRAFTS)
        steps = drafter.steps(batch, torch.arange(len(drafter.target.head)))
        drafts = torch.stack([step.logits.argmax(-1) for step in steps], dim=1)
        start = 0
        while start + NUM_DRAFTS < LENGTH:
            drafted = tuple(drafts[start].tolist())
            right = answer.token_ids[start + 1 : start + 1 + NUM_DRAFTS].tolist()
            accepted = next((i for i in range(NUM_DRAFTS) if drafted[i] != right[i]), NUM_DRAFTS)
            yield start, drafted, accepted
            start += accepted + 1

    def _record(
        self,
        answer: Answer,
        start: int,
        drafted: tuple[int, ...],
        accepted: int,
        request_id: str,
        tenant: str,
        version: int,
    ) -> VerifyRecord:
        rows = slice(start, start + accepted + 1)
        slot, generation = self.ring.write(answer.inputs[rows])
        top_ids, top_logits = pack_top_k(answer.top_ids[rows].numpy(), answer.top_logits[rows].numpy())
        return VerifyRecord(
            request_id=request_id,
            tenant=tenant,
            adapter_key=tenant if version else None,
            domain=None,
            position=start + 2,
            last_token=int(answer.token_ids[start]),
            drafted=drafted,
            num_accepted=accepted,
            next_token=int(answer.token_ids[start + accepted + 1]),
            draft_version=version,
            top_k=TOP_K,
            top_ids=top_ids,
            top_logits=top_logits,
            is_hard_example=False,
            feature_slot=slot,
            feature_generation=generation,
            num_features=accepted + 1,
            first_right=accepted > 0,
        )
