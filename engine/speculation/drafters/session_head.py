"""A draft head whose vocabulary and prior follow each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from engine.config import DynamicConfig, EngineConfig
from engine.draft_vocab.bigram_graph import BigramGraph, BigramGraphError
from engine.draft_vocab.resources import LIGHT_DRAFT_WEIGHTS, Resources, core_mask
from engine.draft_vocab.running_texts import RunningTexts
from engine.draft_vocab.vocab import DraftVocab
from engine.loader import LoadedModel
from engine.models.config import ModelError
from engine.request import Request
from engine.sampling.choose import all_greedy, choose_tokens
from engine.speculation.drafters.head import ChainVocabularies, DraftHead, any_token, make_tails, next_positions
from engine.speculation.drafters.own_head import OwnHead
from engine.text.tokenizer import Tokenizer
from kernels.head_rows import TailMemory
from kernels.native_chain import ChainResult
from kernels.upload import upload

if TYPE_CHECKING:
    from engine.draft_vocab.semantic import SemanticIndex

log = structlog.get_logger(__name__)

GRAPH_FILE = "bigrams.safetensors"
"""Next to a draft: what follows what in text that the target generated."""


class SessionHead(DraftHead):
    """A core, each running sequence's tail, and its prior.

    Args:
        loaded: whose head it is.
        token_ids: [K] int64 on the CPU, ascending: the core; None for all tokens of the head.
        tails: of the sequences; None where they have none.
        vocab: what is in them.
        own: as for ``DraftHead``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        token_ids: torch.Tensor | None,
        tails: TailMemory | None,
        vocab: DraftVocab,
        own: OwnHead | None = None,
    ) -> None:
        super().__init__(loaded, token_ids, tails, own)
        self.vocab: DraftVocab = vocab
        self.num_bytes += vocab.num_bytes
        if own is None:
            core = "full" if token_ids is None else str(len(token_ids))
            self.description = f"dynamic:{core}+{0 if tails is None else tails.slots}"
        else:
            self.description += ", with a prior"

    def choose_for(self, hidden: torch.Tensor, requests: Sequence[Request]) -> list[int]:
        """The next draft token of each request, by its own vocabulary and prior."""
        if not requests[0].draft_token_ids:
            self.vocab.before_drafts(requests)
        if self.vocab.drafted.wants_hidden:
            self.vocab.drafted.remember(requests, hidden.float().cpu().numpy())
        logits, token_ids = self.candidates(hidden, self.vocab.slabs(requests) if self.has_tails else None)
        params = [request.sampling for request in requests]
        if self.vocab.uses_prior:
            if hidden.is_cuda:
                token_ids, logits = token_ids.cpu(), logits.cpu()

            def logits_of(rows: NDArray[np.int32], tokens: NDArray[np.int32]) -> torch.Tensor:
                places, wanted = upload(hidden.device, rows, tokens)
                return self.logits(hidden.index_select(0, places), wanted).cpu()

            best = self.vocab.drafted.choose_with_prior(requests, token_ids, logits, logits_of)
            if all_greedy(params):
                return best
            logits, token_ids = upload(hidden.device, logits.numpy(), token_ids.numpy())
        elif all_greedy(params):
            return any_token(token_ids[:, 0].tolist())
        return any_token(choose_tokens(logits, params, next_positions(requests), token_ids, self.team))

    def _of_chains(self, requests: Sequence[Request]) -> ChainVocabularies:
        self.vocab.before_drafts(requests)
        slabs = self.vocab.slabs(requests) if self.has_tails else None
        if not self.vocab.uses_prior:
            return ChainVocabularies(slabs)
        states = [request.draft_state for request in requests]
        return ChainVocabularies(slabs, [state.session for state in states], [state.text for state in states])

    def _take_chains(self, requests: Sequence[Request], lengths: Sequence[int], result: ChainResult) -> None:
        if self.vocab.drafted.wants_hidden:
            hidden = result.hidden.float().numpy()
            for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
                request.draft_state.hidden = list(hidden[:length, row])


def make_session_head(
    config: EngineConfig,
    loaded: LoadedModel,
    directory: Path,
    tokenizer: Tokenizer,
    token_ids: torch.Tensor | None,
    slots: int,
    own: OwnHead | None = None,
) -> SessionHead:
    """The head of vocabulary dynamic:K+S.

    Args:
        config: all options.
        loaded: whose head it is.
        directory: where the draft's graph is.
        tokenizer: the model's.
        token_ids: [K] the core; None for all tokens of the head.
        slots: S, of each tail.
        own: the draft's own head (None: the model's).

    Raises:
        ModelError: the graph or the semantic index cannot be used.
    """
    options = config.speculation.dynamic
    update: dict[str, Any] = {"max_sessions": min(options.max_sessions, config.scheduler.max_num_seqs)}
    waits_for_drafts = config.speculation.method == "draft_model" or not loaded.cuda_graphs
    if loaded.device.type == "cuda" and waits_for_drafts and "prior" not in options.model_fields_set:
        update["prior"] = "off"  # on the host, which would wait twice for each token
    options = options.model_copy(update=update)
    tails = _allocate_tails(loaded, options.max_sessions + 1, slots, own)
    in_core = own.token_ids if own is not None and token_ids is None else token_ids
    core = None if in_core is None else in_core.numpy()
    resources = Resources(
        core=core_mask(tokenizer.vocab_size, core),
        fingerprint=tokenizer.fingerprint(),
        tails=tails,
        graph=_load_graph(options, directory, tokenizer.vocab_size),
        semantic=_open_index(config, loaded, core, own) if options.semantic and slots else None,
        # A draft model copies from the text by itself, so its prior has to show that it helps.
        start_weights=None if config.speculation.method == "draft_model" else LIGHT_DRAFT_WEIGHTS,
    )
    texts = RunningTexts(2 * config.scheduler.max_num_seqs)
    return SessionHead(loaded, token_ids, tails, DraftVocab(options, resources, texts), own)


def _allocate_tails(loaded: LoadedModel, count: int, slots: int, own: OwnHead | None) -> TailMemory | None:
    if not slots:
        return None
    if own is not None or loaded.all_ranks is None:
        return make_tails(loaded, count, slots, own)
    return loaded.all_ranks.make_tails(count, slots)


def _load_graph(options: DynamicConfig, directory: Path, vocab_size: int) -> BigramGraph | None:
    path = directory / GRAPH_FILE
    if not options.graph:
        return None
    if not path.is_file():
        log.info("no general bigram graph, only the tenants' own (evospec vocab build makes one)", path=str(path))
        return None
    try:
        return BigramGraph.load(path, vocab_size)
    except BigramGraphError as error:
        raise ModelError(str(error)) from error


def _open_index(
    config: EngineConfig, loaded: LoadedModel, core: NDArray[np.int64] | None, own: OwnHead | None
) -> SemanticIndex:
    """Over the head rows outside the core: those inside need no retrieval."""
    from engine.draft_vocab.semantic import open_semantic_index

    outside = np.setdiff1d(np.arange(loaded.spec.vocab_size), () if core is None else core)
    rows_of = loaded.model.head_rows if own is None else own.rows
    rows = rows_of(torch.from_numpy(outside.astype(np.int32))).float().cpu().numpy()
    fingerprint = blake2b(rows.tobytes() + outside.tobytes(), digest_size=16).hexdigest()
    directory = config.model.cache_dir.expanduser() / "semantic"
    try:
        return open_semantic_index(directory, fingerprint, lambda: (outside, rows), torch.get_num_threads())
    except OSError as error:
        raise ModelError(f"{directory}: the semantic index cannot be kept: {error}") from error
