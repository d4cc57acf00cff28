"""Makes a draft head whose vocabulary and prior follow each sequence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from evospec.engine.config import DynamicConfig, EngineConfig
from evospec.engine.draft_vocab.bigram_graph import BigramGraph
from evospec.engine.draft_vocab.resources import LIGHT_DRAFT_WEIGHTS, Resources, core_mask
from evospec.engine.draft_vocab.running_texts import RunningTexts
from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.loader import LoadedModel
from evospec.engine.models.config import ModelError
from evospec.engine.speculation.drafters.head import DraftHead
from evospec.engine.speculation.drafters.own_head import OwnHead
from evospec.engine.text.tokenizer import Tokenizer
from evospec.kernels.head_rows import TailMemory, TailSlabs

if TYPE_CHECKING:
    from evospec.engine.draft_vocab.semantic import SemanticIndex

log = structlog.get_logger(__name__)

GRAPH_FILE = "bigrams.safetensors"
"""Next to a draft: what follows what in text that the target generated."""


def make_session_head(
    config: EngineConfig,
    loaded: LoadedModel,
    directory: Path,
    tokenizer: Tokenizer,
    token_ids: torch.Tensor | None,
    slots: int,
    own: OwnHead | None = None,
) -> DraftHead:
    """The head of vocabulary dynamic:K+S, of a model or a draft's ``own``; the draft's graph is in ``directory``.

    ``token_ids`` [K]: the core; None for all tokens of the model. ``slots``: S, of each tail.

    Raises:
        ModelError: the graph or the semantic index cannot be used.
    """
    options = config.speculation.dynamic
    update: dict[str, Any] = {"max_sessions": min(options.max_sessions, config.scheduler.max_num_seqs)}
    waits_for_drafts = config.speculation.method == "draft_model" or not loaded.cuda_graphs
    if loaded.device.type == "cuda" and waits_for_drafts and "prior" not in options.model_fields_set:
        update["prior"] = "off"  # on the host, which would wait twice for each token
    options = options.model_copy(update=update)
    tails = make_tails(loaded, options.max_sessions + 1, slots, own) if slots else None
    core = None if token_ids is None else token_ids.numpy()
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
    return DraftHead(loaded, token_ids, tails, own, DraftVocab(options, resources, texts))


def make_tails(loaded: LoadedModel, num_slabs: int, slots: int, own: OwnHead | None = None) -> TailMemory:
    """Memory for ``num_slabs`` tails of ``slots`` tokens each, rows of the draft's own head or of the model's."""
    if own is None and loaded.all_ranks is not None:
        return loaded.all_ranks.make_tails(num_slabs, slots)
    rows, width = (loaded.model.head_rows, loaded.spec.hidden_size) if own is None else (own.rows, own.width)
    return TailSlabs(rows, num_slabs, slots, width, loaded.dtype, loaded.device)


def _load_graph(options: DynamicConfig, directory: Path, vocab_size: int) -> BigramGraph | None:
    path = directory / GRAPH_FILE
    if not options.graph:
        return None
    if not path.is_file():
        log.info("no general bigram graph, only the tenants' own (evospec vocab build makes one)", path=str(path))
        return None
    return BigramGraph.load(path, vocab_size)


def _open_index(
    config: EngineConfig, loaded: LoadedModel, core: NDArray[np.int64] | None, own: OwnHead | None
) -> SemanticIndex:
    """Over the head rows outside the core: those inside need no retrieval."""
    from evospec.engine.draft_vocab.semantic import open_semantic_index

    outside = np.setdiff1d(np.arange(loaded.spec.vocab_size), () if core is None else core)
    rows_of = loaded.model.head_rows if own is None else own.rows
    rows = rows_of(torch.from_numpy(outside.astype(np.int32))).float().cpu().numpy()
    directory = config.model.cache_dir.expanduser() / "semantic"
    try:
        return open_semantic_index(directory, outside, rows, torch.get_num_threads())
    except OSError as error:
        raise ModelError(f"{directory}: the semantic index cannot be kept: {error}") from error
