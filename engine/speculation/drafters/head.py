"""From a draft's hidden states to draft tokens, over the whole head, or a core of it and the tails of sessions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.loader import LoadedModel
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelError
from evospec.engine.models.native_decoder import NativeDecoder
from evospec.engine.models.native_eagle3 import NativeEagle3
from evospec.engine.request import Request
from evospec.engine.sampling.choose import all_greedy, choose_tokens, row_sampling
from evospec.engine.speculation.drafters.gpu_head import GpuHead
from evospec.engine.speculation.drafters.own_head import OwnHead
from evospec.engine.speculation.length.policy import EarlyStop
from evospec.engine.step import DraftSlot, Proposal
from evospec.kernels.batched_lora import LoraRows
from evospec.kernels.draft_head import draft_head_topk
from evospec.kernels.head_rows import Core, HeadRows, TailMemory, TailSlabs
from evospec.kernels.native_chain import ChainBatch, NativeChain, UnreadTokens
from evospec.kernels.native_decoder import KvCache
from evospec.kernels.upload import upload

COUNTS_FILE = "token_counts.safetensors"
"""Next to a draft: one tensor ``counts`` [vocab] int64, how often the target generated each token."""
CANDIDATES = 64
"""Tokens of each row that are chosen among: those with the largest logits."""


class DraftHead:
    """A model's output projection over all tokens or over a core, the tails of sessions, and their priors.

    Args:
        loaded: whose head it is; the full head is shared, never copied.
        token_ids: [K] int64 on the CPU, ascending: the tokens that every row can draft; None: all of the model's.
        tails: further tokens, session by session (None: no tails); not with the model's full head.
        own: the draft's own head, whose tokens the core is of (None: it has the model's).
        vocab: the tails and priors of running sequences; None for a vocabulary that is the same for all.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        token_ids: torch.Tensor | None = None,
        tails: TailMemory | None = None,
        own: OwnHead | None = None,
        vocab: DraftVocab | None = None,
    ) -> None:
        self._model, self._own, self.vocab = loaded.model, own, vocab
        if own is None:
            slab = loaded.model.head_slab(token_ids)
        else:
            assert token_ids is not None
            slab = own.slab_of(token_ids)
        ids = None if token_ids is None else token_ids.to(loaded.device, torch.int32)
        self._core, self._packed = Core(slab.project, ids, slab.rows), slab.packed
        self._find, self.team = slab.find, loaded.team
        self.has_tails = tails is not None
        """Whether every row needs the number of its tail."""
        self._tails = tails if isinstance(tails, TailSlabs) else None
        self._slabs: Sequence[int] | None = None
        self._of_rows: torch.Tensor | None = None
        """``_slabs``, of the last rows with a tail each, as a tensor."""
        self.num_bytes = slab.num_bytes + sum(one.num_bytes for one in (tails, vocab) if one is not None)
        """Memory of its own."""
        num_core, num_slots = None if ids is None else len(ids), None if tails is None else tails.slots
        self.description = _describe(num_core, num_slots, own, has_prior=vocab is not None)

    def draft(self, hidden: torch.Tensor, proposals: Mapping[Request, Proposal]) -> None:
        """Append the next draft token of each sequence to its proposal; ``hidden`` [N, hidden] has a row for each."""
        choices = self.choose_for(hidden, list(proposals), list(proposals.values()))
        for proposal, token_id in zip(proposals.values(), choices, strict=True):
            proposal.token_ids.append(token_id)

    def choose_for(self, hidden: torch.Tensor, requests: Sequence[Request], proposals: Sequence[Proposal]) -> list[int]:
        """The next draft token of each request, by its own vocabulary and prior.

        Args:
            hidden: [N, hidden], as the model's ``compute_logits`` takes it.
            requests: one a row.
            proposals: of each, with the drafts before this one; takes the hidden states where these are kept.
        """
        params, drafts = [request.sampling for request in requests], [proposal.token_ids for proposal in proposals]
        positions: Sequence[int] = ()
        if not all_greedy(params):
            positions = [one.num_tokens + len(before) for one, before in zip(requests, drafts, strict=True)]
        vocab = self.vocab
        if vocab is None:
            return self.choose(hidden, params, positions)
        if not drafts[0]:
            vocab.before_drafts(requests)
        if vocab.keeps_hidden:
            for proposal, row in zip(proposals, hidden.float().cpu().numpy(), strict=True):
                proposal.hidden.append(row)
        slabs = vocab.slabs(requests) if self.has_tails else None
        if not vocab.uses_prior:
            return self.choose(hidden, params, positions, slabs)
        logits, token_ids = (one.cpu() for one in self.candidates(hidden, slabs))

        def logits_of(rows: NDArray[np.int32], tokens: NDArray[np.int32]) -> torch.Tensor:
            places, wanted = upload(hidden.device, rows, tokens)
            return self.logits(hidden.index_select(0, places), wanted).cpu()

        best = vocab.choose_with_prior(requests, drafts, token_ids, logits, logits_of)
        if all_greedy(params):
            return best
        logits, token_ids = upload(hidden.device, logits.numpy(), token_ids.numpy())
        return any_token(choose_tokens(logits, params, positions, token_ids, self.team))

    def choose(
        self,
        hidden: torch.Tensor,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        slabs: Sequence[int] | None = None,
    ) -> list[int]:
        """One draft token for each row, by the target's rule and with the target's own noise at that position.

        With that noise, draft and target agree as often as two distributions can without knowing of each other
        (Daliri, Musco, Suresh, arXiv 2408.07978). Penalties, bias and grammar are the target's business. A token that
        is not among the ``CANDIDATES`` of its row is not chosen.

        Args:
            hidden: [N, hidden], as the model's ``compute_logits`` takes it.
            params: one a row.
            positions: index of the chosen token in its sequence, one a row; not looked at where all rows are greedy.
            slabs: the tail of each row, where there are tails.
        """
        if all_greedy(params):
            return any_token(self.candidates(hidden, slabs, 1)[1][:, 0].tolist())
        logits, token_ids = self.candidates(hidden, slabs)
        return any_token(choose_tokens(logits, params, positions, token_ids, self.team))

    def on_gpu(self) -> GpuHead | None:
        """What chooses the same without the host; None: the host is needed."""
        keeps_hidden = self.vocab is not None and self.vocab.keeps_hidden
        if self._core.rows is None or self._find is not None or keeps_hidden:
            return None
        rows = self._model.head_slab(None).rows if self._own is None else self._own.slab.rows
        assert rows is not None
        head = HeadRows(rows, None if self._own is None else self._own.row_of)
        return GpuHead(self._core, self._tails, head, self.vocab, CANDIDATES)

    def logits(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Of one token [n] int32 for each row of hidden [n, hidden]: [n] float32, NaN for one that the head lacks."""
        if self._own is not None:
            return self._own.logits(hidden, token_ids)
        return (self._model.head_rows(token_ids).float() * hidden.float()).sum(dim=1)

    def make_chain(self, network: NativeEagle3, target: NativeDecoder, cache: KvCache) -> NativeChain | None:
        """Chains of a draft with its ``cache`` in one call; None: this head is not of the compiled kernels."""
        if self._packed is None:
            return None
        head = target.head if self._own is None else self._own.slab.packed
        assert head is not None
        vocab = self.vocab if self.vocab is not None and self.vocab.uses_prior else None
        return NativeChain(
            team=network.team,
            layer=network.layer,
            norm=network.output_norm,
            embedding=network.embedding or target.embedding,
            head=head,
            core=self._packed,
            cache=cache,
            core_ids=self._core.token_ids,
            tails=self._tails,
            sessions=None if vocab is None else (vocab.sessions, vocab.texts.texts),
            candidates=CANDIDATES,
            row_of=None if self._own is None else self._own.row_of,
            shift=network.shift,
            norm_output=network.norm_output,
        )

    def draft_chains(
        self,
        chain: NativeChain,
        unread: UnreadTokens,
        slots: Sequence[DraftSlot],
        tables: NDArray[np.int32],
        lora: LoraRows | None,
        stop: EarlyStop | None,
    ) -> list[Proposal]:
        """Drafts of each sequence, as many tokens as it wants or ``stop`` allows, the longest chain first.

        Args:
            chain: of this head.
            unread: known tokens that it reads first.
            slots: one a row.
            tables: [S, max_blocks], blocks of theirs, and of further sequences of ``unread``.
            lora: what the draft's tokens are adapted by, one a row.
            stop: None: all chains get their length, and nothing is known of how sure the draft is.
        """
        result = chain.run(self._chain_batch(slots, tables, lora, stop), unread)
        hidden = result.hidden.float().numpy() if self.vocab is not None and self.vocab.keeps_hidden else None
        proposals = []
        for row, (slot, tokens) in enumerate(zip(slots, result.tokens, strict=True)):
            proposal = Proposal(tokens[: slot.num_tokens])
            if result.confidence is not None:
                proposal.confidence = result.confidence[row][: slot.num_tokens]
            if hidden is not None:
                proposal.hidden = list(hidden[: len(proposal.token_ids), row])
            proposals.append(proposal)
        return proposals

    def _chain_batch(
        self, slots: Sequence[DraftSlot], tables: NDArray[np.int32], lora: LoraRows | None, stop: EarlyStop | None
    ) -> ChainBatch:
        requests, lengths = [slot.request for slot in slots], [slot.num_tokens for slot in slots]
        vocab, slabs, sessions, texts = self.vocab, None, None, None
        if vocab is not None:
            vocab.before_drafts(requests)
            slabs = vocab.slabs(requests) if self.has_tails else None
            if vocab.uses_prior:
                sessions, texts = vocab.slots(requests), vocab.texts.slots(requests)
        positions = [request.num_tokens - 1 for request in requests]
        sampling = row_sampling([request.sampling for request in requests])
        rule, tenants, acceptance = None, list[int](), list[list[float]]()
        if stop is not None:
            rule, tenants = stop.rule, [stop.tenants[request] for request in requests]
            by_place = [stop.acceptance[request] for request in requests]
            acceptance = [[*chances, *[0.0] * (lengths[0] - len(chances))] for chances in by_place]
        return ChainBatch(lengths, positions, tables, sampling, slabs, sessions, texts, lora, rule, tenants, acceptance)

    def candidates(
        self, hidden: torch.Tensor, slabs: Sequence[int] | None = None, count: int = CANDIDATES
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``count`` largest logits [N, C] float32 of each row and their token ids [N, C] int32.

        In descending order; a row with fewer tokens ends in -inf and -1. Arguments as for ``choose``.
        """
        if slabs != self._slabs:  # seldom: most drafts are for the same sequences as those before
            self._slabs = slabs
            self._of_rows = None if slabs is None else upload(hidden.device, np.array(slabs, np.int32))[0]
        if self._find is not None:
            return self._find(hidden, count, self._of_rows)
        return draft_head_topk(hidden, self._core, count, self._tails, self._of_rows, self.team)


def _describe(num_core: int | None, num_slots: int | None, own: OwnHead | None, has_prior: bool) -> str:
    """The vocabulary as it is configured; ``num_core`` None: all tokens of a model; ``num_slots`` None: no tails."""
    size = "full" if num_core is None else str(num_core)
    if own is None and has_prior:
        return f"dynamic:{size}+{num_slots or 0}"
    core = size if num_core is None else f"static:{size}"
    if own is not None and num_core == len(own.token_ids):
        core = f"of its own {size} tokens"
    tails = "" if num_slots is None else f" + {num_slots}"
    return core + tails + (", with a prior" if has_prior else "")


def any_token(choices: list[int]) -> list[int]:
    """Choices without -1, an empty place, which is what is left where no score is a number: any token does there."""
    return choices if min(choices) >= 0 else [max(token_id, 0) for token_id in choices]


def static_vocabulary(
    counts: torch.Tensor, size: int, always: Collection[int], among: torch.Tensor | None = None
) -> torch.Tensor:
    """The ``size`` most frequent tokens, in ascending order.

    Args:
        counts: [vocab], occurrences of each token; equals go by token id.
        size: how many; at most the whole vocabulary.
        always: tokens that must be among them, such as those that end an answer.
        among: [n] int64, the only tokens there are; None: all.
    """
    ranked = counts.clone()
    ranked[list(always)] = torch.iinfo(counts.dtype).max
    tokens = torch.arange(len(counts)) if among is None else among
    return tokens[ranked[tokens].argsort(descending=True, stable=True)[:size]].sort().values


def read_token_counts(directory: Path, vocab_size: int) -> torch.Tensor:
    """The ``COUNTS_FILE`` of a directory: [vocab] int64.

    Raises:
        ModelError: there is none, it is damaged, or for another vocabulary.
    """
    path = directory / COUNTS_FILE
    if not path.is_file():
        raise ModelError(f"a static draft vocabulary needs token counts, but there is no {path} (evospec vocab build)")
    try:
        with safe_open(path, framework="pt") as file:
            counts: torch.Tensor = file.get_tensor("counts")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if counts.dtype != torch.int64:
        raise ModelError(f"{path}: counts are {counts.dtype}, must be int64")
    if counts.shape != (vocab_size,):
        raise ModelError(f"{path}: counts of {counts.numel()} tokens, but the model has {vocab_size}")
    return counts
