"""The engine with its arithmetic replaced, so that what is left of a step's time is the host's work.

Replaced are the target's and the draft's networks, the head projections with the choice of the largest logits, and the
choice of a token from the target's logits. All else is the product: scheduler, speculator, entries and slots of the
draft, the sessions' vocabularies with what they learn, the sampler's bookkeeping, commit. It takes the way that a GPU's
host takes, with graphs for steps and for chains of drafts, of which the replays are stubs: they compute what was
recorded once more. The priors are in those graphs, and are replaced, too.

What the networks say is made up, but follows real text. Every sequence has a text, which is made of the committed
evaluation prompts and of quotes of itself, and the target says its next token whatever the sequence has read. The draft
gives that token the largest logit at a fixed, random 60 of 100 places, and the fourth largest at the others. It can say
a token only if that is in the sequence's vocabulary: in the core, or in the tail as the engine has filled it. So 50 to
60 of 100 first drafts are accepted, and vocabularies meet as many new, repeated and missing tokens as in answers. The
target's other likely tokens are what it says elsewhere, and the draft's other candidates are any tokens of the core.

All stubs know the place in the texts from their input: it is the first value of a hidden state, and of a row of logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, cycle, islice
from typing import cast
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common.stubbed_networks import (
    HIDDEN,
    StubAttention,
    StubEagle,
    StubPrior,
    StubRecorder,
    StubTarget,
    stub,
)
from benchmarks.prompts.build import read_eval
from evospec.engine.config import CacheConfig, EngineConfig
from evospec.engine.core import EngineCore
from evospec.engine.loader import LoadedModel
from evospec.engine.model_runner import attention_spec
from evospec.engine.models.config import LayerSpec, Rope
from evospec.engine.models.eagle3_config import Eagle3Config
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.speculation.build import make_head
from evospec.engine.speculation.draft_files import DRAFTS
from evospec.engine.speculation.drafters.base import DraftCosts
from evospec.engine.speculation.drafters.eagle import EagleDraft, EagleProposer
from evospec.engine.speculation.drafters.eagle_network import EagleNetwork
from evospec.engine.speculation.drafters.head import DraftHead
from evospec.engine.text.tokenizer import Tokenizer
from evospec.kernels.head_rows import Core, TailSlabs

DOMAINS = ["code", "general"]
NEW_TOKENS, QUOTED_TOKENS = 24, 16
"""A text is so many tokens of the prompts and so many that it has said before, in turn: with that, default vocabularies
hold nine tokens of ten, as many as of served answers."""
KNOWN = 0.6
"""Share of the places at which the draft is right, if it may say the token."""
_RANK_WHERE_WRONG = 3
_STRIDE = 997
"""Between places of which nobody can tell that they have to do with each other."""


class Texts:
    """What sequences say: ``count`` texts of ``length`` tokens, of which the first is the text's number.

    A place is a text's number times ``length``, plus a position in it.
    """

    def __init__(self, tokenizer: Tokenizer, count: int, length: int) -> None:
        contents = (prompt.messages[-1]["content"] for prompt in read_eval(DOMAINS))
        tokens = list(chain.from_iterable(map(tokenizer.encode, contents)))
        rng = np.random.default_rng(0)
        texts = [[number, *_text(rng, tokens, number * len(tokens) // count, length - 1)] for number in range(count)]
        self.length, self.tokens = length, torch.tensor(texts).flatten()
        self.is_known = torch.from_numpy(rng.random(count * length) < KNOWN)
        self._all_ids = torch.arange(tokenizer.vocab_size, dtype=torch.int32)

    def prompts(self, length: int) -> list[list[int]]:
        beginnings: list[list[int]] = self.tokens.view(-1, self.length)[:, :length].tolist()
        return beginnings

    @contextmanager
    def said(self) -> Iterator[None]:
        """Put the stubs of the kernels in their place for as long as the context lasts."""
        with (
            patch("evospec.kernels.choose_tokens.choose_tokens", self._choose),
            patch("evospec.engine.speculation.drafters.head.draft_head_topk", self._candidates),
            patch("evospec.engine.speculation.drafters.gpu_head.draft_head_topk", self._candidates),
            patch("evospec.engine.speculation.drafters.gpu_head.GpuPrior", StubPrior),
            patch("evospec.engine.speculation.drafters.gpu_chain.CudaGraphRecorder", StubRecorder),
            patch("evospec.engine.step_graphs.CudaGraphRecorder", StubRecorder),
            patch("evospec.engine.attention.flashinfer.FlashInferAttention", StubAttention),
            patch("evospec.engine.step.topk_rows_on_host", self._likely),
        ):
            yield

    def following(self, places: torch.Tensor) -> torch.Tensor:
        return self.tokens[(places + 1) % len(self.tokens)]

    @stub
    def _choose(self, logits: torch.Tensor, *_: object) -> list[int]:
        """In place of ``kernels.choose_tokens``: what the target says after each row."""
        choices: list[int] = self.following(logits[:, 0].long()).tolist()
        return choices

    @stub
    def _likely(
        self, logits: torch.Tensor, k: int, _team: object = None, rows: Sequence[int] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """In place of ``topk_rows_on_host``: the target's most likely tokens [n, k], the text's own first."""
        logits = logits if rows is None else logits[list(rows)]
        places = logits[:, 0].long()
        return logits[:, :k].numpy(), self.following(places[:, None] + _STRIDE * torch.arange(k)).numpy()

    @stub
    def _candidates(
        self,
        hidden: torch.Tensor,
        core: Core,
        k: int,
        tails: TailSlabs | None = None,
        slabs: torch.Tensor | None = None,
        *_: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of ``draft_head_topk``: the draft's candidates [N, k], from the vocabulary of each row."""
        places = hidden[:, 0].long()
        wanted, rows = self.following(places), torch.arange(len(places))
        any_ids = self._all_ids if core.token_ids is None else core.token_ids
        # A search through all tokens would leave nothing of the host's own data in the processor's caches.
        can_say = torch.ones_like(wanted, dtype=torch.bool)
        if core.token_ids is not None:
            can_say = torch.isin(wanted, core.token_ids)
        if tails is not None and slabs is not None:
            can_say |= (tails.token_ids[slabs.long()] == wanted[:, None]).any(1)
        ids = any_ids[(places[:, None] + torch.arange(max(k, _RANK_WHERE_WRONG + 1))) % len(any_ids)].int()
        ranks = torch.where(self.is_known[places], 0, _RANK_WHERE_WRONG)
        ids[rows[can_say], ranks[can_say]] = wanted[can_say].int()
        return (8 - 2 * torch.arange(k).sqrt()).expand(len(ids), k).contiguous(), ids[:, :k].contiguous()


def _text(rng: np.random.Generator, tokens: Sequence[int], start: int, length: int) -> list[int]:
    """Tokens from ``start`` on, around the end, with quotes of what came before."""
    text: list[int] = []
    source = islice(cycle(tokens), start, None)
    while len(text) < length:
        text += islice(source, NEW_TOKENS)
        place = rng.integers(len(text) - QUOTED_TOKENS)
        text += text[place : place + QUOTED_TOKENS]
    return text[:length]


class StubDraft(EagleDraft):
    """An ``EagleDraft`` of which only the network is a stub."""

    def __init__(self, target: LoadedModel, head: DraftHead, cache: CacheConfig) -> None:
        self.target, self.head, self.adapters, self._cache = target, head, None, cache
        self.config = Eagle3Config.for_target(target.spec, "stub", (0,), intermediate_size=1)
        self.network, self.embed = cast(EagleNetwork, StubEagle()), target.model.embed
        self.stores_fused, self.stored_width, self.on_gpu = True, self.config.hidden_size, head.on_gpu()
        self.description, self.vocab, self.costs = head.description, head.vocab, DraftCosts(0, 0)

    def make_proposer(self, num_blocks: int) -> EagleProposer:
        """Allocate the features, and a block that is nobody's."""
        attention = self.target.make_attention(attention_spec(self.target, self._cache, num_blocks + 1))
        return EagleProposer(self, attention)


def make_engine(config: EngineConfig, texts: Texts) -> EngineCore:
    """An engine without arithmetic, whose sequences say ``texts``; to be used within ``texts.said``."""
    files = resolve_model(config.model)
    spec, tokenizer = validate_model_files(files), Tokenizer.from_files(files)
    layer = LayerSpec(Rope(spec.rope.theta, HIDDEN))
    spec = replace(spec, hidden_size=HIDDEN, layers=(layer,), num_heads=1, num_kv_heads=1, head_dim=HIDDEN)
    attention = partial(StubAttention, length=texts.length)
    model, device = StubTarget(spec.vocab_size), torch.device("cpu")
    target = LoadedModel(model, spec, texts.length, torch.float32, device, "flashinfer", attention, cuda_graphs=True)
    draft = None
    if config.speculation.method != "none":
        head = make_head(config, target, DRAFTS / files.name, tokenizer)
        draft = StubDraft(target, head, config.cache)
    return EngineCore(config, files, spec, draft, target)
