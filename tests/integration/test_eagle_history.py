"""What the EAGLE-3 draft computes is what it would compute from scratch, whatever a sequence has been through.

Errors in its bookkeeping would cost acceptance only, so outputs cannot show them. Here an engine serves made-up traffic
with a draft that is right now and then, and every hidden state from which a draft token was chosen is compared with
that of a plain computation over the whole sequence, without cache, in float32.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from msgspec import structs

from evospec.engine.attention.base import AttentionSpec
from evospec.engine.attention.torch_paged import TorchPagedAttention
from evospec.engine.config import CacheConfig, EngineConfig, ModelConfig, RuntimeConfig, SpeculationConfig
from evospec.engine.loader import LoadedModel, load
from evospec.engine.messages import SamplingParams
from evospec.engine.model_runner import build_batch
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.decoder import RotaryEmbedding
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.registry import validate_model_files
from evospec.engine.request import Request
from evospec.engine.speculation.drafters import kv as entries
from evospec.engine.speculation.drafters.base import Proposer
from evospec.engine.speculation.drafters.eagle import EagleDraft
from evospec.engine.speculation.drafters.head import DraftHead
from evospec.engine.speculation.drafters.kv import Chunk
from evospec.engine.speculation.length.policy import EarlyStop
from evospec.engine.step import DraftSlot, Proposal, Proposals, Step
from tests.tiny_drafts import Engine, Setting, random_draft
from tests.tiny_models import make_directory

TOLERANCE = 1e-4
"""Largest difference against the largest value; float32 sums in another order differ by about 1e-6."""
NUM_TOKENS = 40
MAX_DRAFTS = 6
SETTING = Setting(prefix_caching=True, max_num_seqs=5, max_batched_tokens=30, num_blocks=14)


class OracleHead(DraftHead):
    """Chooses the token that the target will choose, most of the time, and keeps the hidden states it is shown."""

    def __init__(self, loaded: LoadedModel, truth: dict[int, list[int]], chance: random.Random) -> None:
        super().__init__(loaded)
        self._truth, self._chance = truth, chance
        self.hidden: dict[tuple[int, int], torch.Tensor] = {}
        """By the request's seed and the position of the token chosen."""

    def choose_for(self, hidden: torch.Tensor, requests: Sequence[Request], proposals: Sequence[Proposal]) -> list[int]:
        choices = []
        for row, (request, proposal) in enumerate(zip(requests, proposals, strict=True)):
            seed, position = request.sampling.seed, request.num_tokens + len(proposal.token_ids)
            self.hidden[seed, position] = hidden[row].clone()
            truth = self._truth[seed]
            is_right = position < len(truth) and self._chance.random() < 0.8
            choices.append(truth[position] if is_right else self._chance.randrange(512))
        return choices


@dataclass(frozen=True)
class Observation:
    """A draft token was chosen from ``hidden``, after known tokens and other drafts."""

    token_ids: list[int]
    drafts: list[int]
    hidden: torch.Tensor


class Watcher(Proposer):
    """Varies draft lengths, with long pauses, and takes down what every draft token was chosen from."""

    def __init__(self, draft: EagleDraft, head: OracleHead, chance: random.Random) -> None:
        self._draft, self._head, self._chance = draft, head, chance
        self.description, self.costs, self.vocab = draft.description, draft.costs, draft.vocab
        self.observations: list[Observation] = []
        self._paused = 0

    def make_proposer(self, num_blocks: int) -> Proposer:
        self._proposer = self._draft.make_proposer(num_blocks)
        self.capture_layers, self.stops_early = self._proposer.capture_layers, False
        return self

    def num_unread(self, request: Request) -> int:
        return self._proposer.num_unread(request)

    def propose(self, slots: Sequence[DraftSlot], stop: EarlyStop | None = None) -> Proposals:
        if self._paused == 0 and self._chance.random() < 0.05:
            self._paused = self._chance.randrange(30)
        self._paused = max(self._paused - 1, 0)
        longest = 0 if self._paused else MAX_DRAFTS
        slots = [structs.replace(s, num_tokens=min(s.num_tokens, self._chance.randint(0, longest))) for s in slots]
        self._head.hidden.clear()
        proposals = self._proposer.propose(slots)
        for slot in slots:
            if slot.request not in proposals:
                continue
            tokens, drafts = slot.request.all_token_ids, proposals[slot.request].token_ids
            assert len(drafts) <= slot.num_tokens
            for index in range(len(drafts)):
                hidden = self._head.hidden[slot.request.sampling.seed, len(tokens) + index]
                self.observations.append(Observation(tokens.copy(), drafts[:index], hidden))

        return proposals

    def learn(self, step: Step) -> None:
        self._proposer.learn(step)

    def preempt(self, request: Request) -> None:
        self._proposer.preempt(request)

    def end(self, request: Request) -> None:
        self._proposer.end(request)


class FromScratch:
    """The same hidden states by dense attention over a whole sequence."""

    def __init__(self, loaded: LoadedModel, draft: Eagle3) -> None:
        self._loaded, self._draft = loaded, draft
        self._rotary = RotaryEmbedding(loaded.spec.rope, loaded.max_model_len, loaded.device)
        self._text: list[int] = []
        self._of_text = torch.empty(0)

    @torch.inference_mode()
    def hidden(self, token_ids: list[int], drafts: list[int]) -> torch.Tensor:
        """[hidden]: what the head sees after the tokens and drafts."""
        fused = self._draft.fuse(self._features(token_ids))
        g = torch.cat((torch.zeros_like(fused[:1]), fused[:-1]))
        a = self._last(token_ids, g)
        for index in range(len(drafts)):
            g = torch.cat((g, a))
            a = self._last(token_ids + drafts[: index + 1], g)
        return self._draft.head_input(a)[0]

    def _features(self, token_ids: list[int]) -> torch.Tensor:
        """[tokens, features]; those of a text's beginning are the first of the text's, which is computed once."""
        if self._text[: len(token_ids)] != token_ids:
            self._text, self._of_text = token_ids, self._compute(token_ids)
        return self._of_text[: len(token_ids)]

    def _compute(self, token_ids: list[int]) -> torch.Tensor:
        spec = self._loaded.spec
        blocks = array("i", range(-(-len(token_ids) // 16)))
        shape = (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim, len(blocks), 16)
        attention = TorchPagedAttention(AttentionSpec(*shape, torch.float32, self._loaded.device))
        anybody = Request("", b"", "", SamplingParams(max_tokens=1, seed=0), token_ids)
        batch = build_batch([Chunk(0, token_ids, 0, blocks, anybody)], 16, self._loaded.device)
        features = self._loaded.model.forward(batch, attention, self._draft.config.capture_layers).features
        assert features is not None
        return features

    def _last(self, token_ids: list[int], g: torch.Tensor) -> torch.Tensor:
        """a [1, hidden] of the last token."""
        q, k, v = self._draft.qkv(self._loaded.model.embed(torch.tensor(token_ids)), g)
        positions = torch.arange(len(g))
        q, k = self._rotary(q, positions), self._rotary(k, positions)
        q, k, v = (tensor.transpose(0, 1) for tensor in (q[-1:], k, v))
        attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(0, 1)
        return self._draft.output(g[-1:], attended)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("target") / "target")


@pytest.fixture(scope="module")
def loaded(files: ModelFiles) -> LoadedModel:
    runtime = RuntimeConfig(device="cpu", attention_backend="torch", threads=1)
    config = EngineConfig(model=ModelConfig(dtype="float32"), runtime=runtime)
    return load(config, files, validate_model_files(files))


def greedy(seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=NUM_TOKENS, seed=seed, temperature=0.0, ignore_eos=True)


def make_traffic(files: ModelFiles, chance: random.Random) -> list[list[int]]:
    """Prompts and outputs: some start alike, some are the same, some continue another's output."""
    plain = Engine(files, Setting())
    beginnings = [[chance.randrange(3, 400) for _ in range(length)] for length in (70, 33)]
    conversations: list[list[int]] = []
    for _ in range(24):
        kind = chance.randrange(4)
        prompt = [chance.randrange(3, 400) for _ in range(chance.randint(1, 40))]
        if kind == 1:
            prompt = chance.choice(beginnings)[: chance.randint(16, 70)] + prompt
        elif kind == 2 and conversations:
            prompt = (chance.choice(conversations) + prompt)[:140]
        elif kind == 3 and conversations:
            prompt = chance.choice(conversations)[:-NUM_TOKENS]
        conversations.append(prompt + plain.generate([prompt], [greedy(0)])[0])
    return conversations


@pytest.mark.parametrize("seed", range(6))
def test_hidden_states_after_any_history(
    files: ModelFiles, loaded: LoadedModel, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "MAX_CATCH_UP_TOKENS", 50)  # so that prompts are caught up with in chunks
    chance = random.Random(seed)
    conversations = make_traffic(files, chance)
    network = random_draft(files, seed)
    head = OracleHead(loaded, dict(enumerate(conversations)), chance)
    watcher = Watcher(EagleDraft(network, "random", loaded, CacheConfig(), head), head, chance)
    speculation = SpeculationConfig(num_speculative_tokens=MAX_DRAFTS, adaptive=False)
    engine = Engine(files, SETTING, speculation, draft=watcher)
    waiting = list(enumerate(conversations))
    served: dict[str, int] = {}
    while waiting or engine.is_busy:
        if waiting and chance.random() < 0.7:
            index, conversation = waiting.pop(0)
            served[engine.add(conversation[:-NUM_TOKENS], greedy(index))] = index
        if chance.random() < 0.01 and served:
            request_id = chance.choice(list(served))
            engine.abort(request_id)
            del served[request_id]
        engine.step()

    for request_id, index in served.items():
        assert engine.output(request_id) == conversations[index][-NUM_TOKENS:]
    assert engine.core.stats().preemptions > 0
    assert engine.num_cached_tokens > 0
    assert 0.2 < engine.num_accepted / engine.num_drafted < 0.9
    reference = FromScratch(loaded, network)
    assert len(watcher.observations) > 200
    for observation in sorted(watcher.observations, key=lambda each: each.token_ids, reverse=True):  # long texts first
        expected = reference.hidden(observation.token_ids, observation.drafts)
        assert (observation.hidden - expected).abs().max() < TOLERANCE * expected.abs().max()
