"""The draft that the configuration asks for, who drafts with it, and who learns from its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import structlog
import torch

from evospec.engine.config import EngineConfig
from evospec.engine.draft_vocab.running_texts import RunningTexts
from evospec.engine.learner import Drafter, Learner
from evospec.engine.loader import LoadedModel, load
from evospec.engine.model_runner import ModelRunner
from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.eagle3_weights import load_weights, without_copies
from evospec.engine.models.lora import draft_fingerprint
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.models.weights import open_weights
from evospec.engine.online.adapters import EagleAdapters
from evospec.engine.online.whole_draft import WholeDraft, growing_config, growing_fingerprint
from evospec.engine.optional_parts import OptionalParts
from evospec.engine.speculation import draft_files
from evospec.engine.speculation.draft_files import (
    check_same_tokens,
    check_vocabulary,
    choose_method,
    draft_model_config,
)
from evospec.engine.speculation.drafters.base import Draft
from evospec.engine.speculation.drafters.draft_model import DraftModel
from evospec.engine.speculation.drafters.eagle import EagleDraft
from evospec.engine.speculation.drafters.head import COUNTS_FILE, DraftHead, read_token_counts, static_vocabulary
from evospec.engine.speculation.drafters.lookup import NgramDraft, NgramProposer, PromptLookup
from evospec.engine.speculation.drafters.own_head import OwnHead
from evospec.engine.speculation.drafters.session_head import make_session_head
from evospec.engine.speculation.length.adaptive import AdaptiveLength
from evospec.engine.speculation.length.cost_meter import CostMeter
from evospec.engine.speculation.length.costs import StepCosts
from evospec.engine.speculation.length.policy import LengthPolicy
from evospec.engine.speculation.speculator import AcceptanceAlarm, Speculator
from evospec.engine.text.tokenizer import Tokenizer
from evospec.kernels.session_library import missing_reason

log = structlog.get_logger(__name__)

_SMALL_VOCABULARY = 4096
"""Tokens of a target whose head costs little."""
_DEFAULT_SESSIONS, _OF_GROWING = "dynamic:512+512", "dynamic:4096+512"
"""Of EAGLE-3 drafts, and of those that grow for a model of which nothing was counted."""
_OF_OWN_HEADS, _OF_OWN_HEADS_ALONE = "dynamic:full+512", "dynamic:full+0"
_DEFAULT_OF_MODELS, _LARGE_VOCABULARY = "dynamic:32768+512", 100_000
"""Of draft models, which lose more by tokens that they cannot say (docs/decisions/009-dynamic-vocabulary.md)."""


def load_draft(config: EngineConfig, target: LoadedModel, files: ModelFiles, tokenizer: Tokenizer) -> Draft | None:
    """Load the draft for ``target``, whose files and tokenizer are given; None without speculation.

    Raises:
        ModelError: the draft cannot be had, or does not fit the target.
    """
    method, directory = choose_method(config, files)
    if method in ("ngram", "grow") and config.speculation.method == "auto":
        log.info("no draft is shipped for this model: repeats are copied", model=files.name, grows=method == "grow")
    if config.speculation.draft is None and directory is not None and directory.name != files.name:
        log.info("the draft of a model of the same shape is used", model=files.name, draft=directory.name)
    reason = missing_reason()
    if method != "none" and reason is not None:
        if config.speculation.method != "auto":
            raise ModelError(f"speculation: {reason}")
        log.warning("no speculation", reason=reason)
        return None
    if method == "ngram":
        return NgramDraft()
    speculation = config.speculation.model_copy(update={"method": method})
    config = config.model_copy(update={"speculation": speculation})
    if method == "draft_model":
        return _load_draft_model(config, target, files, tokenizer)
    if method == "grow":
        return _grow_eagle(config, target, files, tokenizer)
    return None if directory is None else _load_eagle(config, target, directory, tokenizer)


def make_head(
    config: EngineConfig, loaded: LoadedModel, directory: Path, tokenizer: Tokenizer, own: OwnHead | None = None
) -> DraftHead:
    """The head of a model, or a draft's own, over the configured vocabulary; token counts are in ``directory``."""
    vocabulary, has_counts = config.speculation.vocabulary, (directory / COUNTS_FILE).is_file()
    is_auto = vocabulary == "auto"
    if is_auto and own is not None:
        vocabulary = _OF_OWN_HEADS if own.fit_lacking() else _OF_OWN_HEADS_ALONE
    elif is_auto:
        vocabulary = default_vocabulary(config.speculation.method, has_counts, tokenizer.vocab_size)
    check_vocabulary(vocabulary, own is not None)
    kind, _, size = vocabulary.partition(":")
    core, _, slots = size.partition("+")
    token_ids = None if own is None else own.token_ids
    if kind != "full" and core != "full":
        is_known = has_counts or not is_auto
        counts = read_token_counts(directory, tokenizer.vocab_size) if is_known else learned_first(tokenizer)
        token_ids = static_vocabulary(counts, int(core), tokenizer.eos_token_ids, among=token_ids)
    if kind != "dynamic":
        return DraftHead(loaded, token_ids, own=own)
    if own is not None and int(slots) and not is_auto:  # which has fitted it
        own.fit_lacking()
    return make_session_head(config, loaded, directory, tokenizer, token_ids, int(slots), own)


def default_vocabulary(method: str, has_counts: bool, vocab_size: int) -> str:
    """What ``auto`` is: the fastest with the drafts at hand (docs/decisions/009-dynamic-vocabulary.md).

    ``has_counts``: whether it is known what the target, or a draft model, says often.
    """
    if vocab_size <= _SMALL_VOCABULARY:
        return "full"
    if not has_counts:
        return _OF_GROWING if method == "grow" else "full"
    if method == "draft_model":
        return _DEFAULT_OF_MODELS if vocab_size >= _LARGE_VOCABULARY else "full"
    return _DEFAULT_SESSIONS


def learned_first(tokenizer: Tokenizer) -> torch.Tensor:
    """Counts [vocab] where nothing was counted: 1 for each token of text.

    Equals go by their ids, and a BPE tokenizer gives the lowest to what it learned first, the most frequent pieces.
    """
    return torch.tensor([len(tokenizer.token_bytes(token_id)) > 0 for token_id in range(tokenizer.vocab_size)]).long()


def counts_directory(target: str, draft: str) -> Path:
    """Where the counts for a draft model are: the target's, or its own, as what it says often is close to them."""
    of_target = draft_files.DRAFTS / target
    return of_target if (of_target / COUNTS_FILE).is_file() else draft_files.DRAFTS / draft


def _load_eagle(config: EngineConfig, target: LoadedModel, directory: Path, tokenizer: Tokenizer) -> EagleDraft:
    layers = config.speculation.capture_layers
    weights = load_weights(directory, target.spec, layers, target.dtype, target.device)
    weights = without_copies(weights, target.spec.vocab_size, target.model.head_rows, target.model.embed)
    draft, own = weights.network, None if weights.head is None else OwnHead(weights.head, target)
    head = make_head(config, target, directory, tokenizer, own)
    adapters = None
    if config.alignment.is_on:
        adapters = EagleAdapters(config.alignment, draft, draft_fingerprint(directory))
    asked = config.speculation.draft
    name = directory.name if asked is None or Path(asked).expanduser().is_dir() else asked
    return EagleDraft(draft, name, target, config.cache, head, adapters, weights.embedding)


def _grow_eagle(config: EngineConfig, target: LoadedModel, files: ModelFiles, tokenizer: Tokenizer) -> EagleDraft:
    """A draft without weights: nothing is drafted with it until the worker has trained some."""
    shape = growing_config(target.spec, files.name)
    with torch.device("meta"):
        draft = Eagle3(shape)
    draft = draft.to(target.dtype).to_empty(device=target.device).requires_grad_(False)
    for weight in draft.parameters():
        weight.zero_()
    counts = draft_files.shipped_draft(files) or draft_files.DRAFTS / files.name
    head = make_head(config, target, counts, tokenizer)
    fingerprint = growing_fingerprint(open_weights(files), target.spec)
    whole_draft = WholeDraft(config.alignment.for_growth(shape.recorded_size), draft, fingerprint)
    return EagleDraft(draft, f"growing for {files.name}", target, config.cache, head, whole_draft)


def _load_draft_model(config: EngineConfig, target: LoadedModel, files: ModelFiles, tokenizer: Tokenizer) -> DraftModel:
    model = draft_model_config(config, target.max_model_len)
    own_files = resolve_model(model, progress=False)
    spec = validate_model_files(own_files)
    check_same_tokens(model.name, Tokenizer.from_files(own_files), tokenizer)
    loaded = load(config.model_copy(update={"model": model}), own_files, spec, target.team)
    head = make_head(config, loaded, counts_directory(files.name, own_files.name), tokenizer)
    return DraftModel(loaded, model.name, config.cache, head)


@dataclass(frozen=True)
class Speculation:
    """Who drafts in an engine's steps, and who learns from them, in this order; without a draft nobody does."""

    drafter: Drafter = field(default_factory=Drafter)
    learners: list[Learner] = field(default_factory=list)
    costs: StepCosts | None = None
    """What steps cost on this machine; None without drafts, or where their lengths are fixed."""
    capture_layers: tuple[int, ...] = ()
    """The target's layers whose output the draft wants."""


def make_speculation(
    config: EngineConfig, draft: Draft | None, runner: ModelRunner, max_model_len: int, parts: OptionalParts
) -> Speculation:
    """An engine's drafter and learners: a new one is a line here.

    To measure what steps cost makes up entries in the KV cache of ``runner``, the target's.
    """
    if draft is None:
        return Speculation()
    speculation, proposer, vocab = config.speculation, draft.make_proposer(runner.num_blocks), draft.vocab
    costs = CostMeter(runner, proposer, config, max_model_len, vocab).measure() if speculation.adaptive else None
    policy = LengthPolicy() if costs is None else AdaptiveLength(costs, stops_early=proposer.stops_early)
    texts = vocab.texts if vocab is not None else RunningTexts(2 * config.scheduler.max_num_seqs)
    copies = speculation.copies and speculation.adaptive and not isinstance(proposer, NgramProposer)
    lookup = PromptLookup(texts) if copies else None
    learners: list[Learner] = [proposer, policy, AcceptanceAlarm()]
    if proposer.verify_log is not None:
        learners.append(proposer.verify_log)
    if vocab is not None:
        vocab.begins_later = lambda request: not policy.drafts_for_most(request.tenant)
        learners.append(vocab)
    learners.append(texts)
    drafter = Speculator(proposer, policy, speculation.num_speculative_tokens, parts, lookup, vocab)
    return Speculation(drafter, learners, costs, proposer.capture_layers)
