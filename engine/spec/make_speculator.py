"""Puts an engine's speculation together: proposer, policy of lengths, copies, vocabularies."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.spec.controller import AdaptiveLength
from engine.spec.copies import Copier
from engine.spec.costs import CostMeter
from engine.spec.eagle import EagleProposer
from engine.spec.length_policy import FixedLength
from engine.spec.ngram import NgramProposer, SwitchingProposer
from engine.spec.proposer import Draft, Proposer
from engine.spec.speculator import Speculator
from engine.spec.step_costs import StepCosts
from engine.spec.vocab_follower import VocabFollower
from engine.vocab.running_texts import RunningTexts


def make_speculator(
    config: EngineConfig, draft: Draft, runner: ModelRunner, max_model_len: int
) -> tuple[Speculator, StepCosts | None]:
    """An engine's speculator, and what its steps cost on this machine; None where lengths are fixed.

    Args:
        config: all options.
        draft: who drafts.
        runner: of the target; measuring costs makes up entries in its KV cache.
        max_model_len: longest sequence in tokens.
    """
    speculation, proposer = config.speculation, draft.make_proposer(runner.num_blocks)
    follower = None if draft.vocab is None else VocabFollower(draft.vocab, speculation.dynamic)
    costs = _measured(config, proposer, runner, max_model_len, follower) if speculation.adaptive else None
    policy = FixedLength() if costs is None else AdaptiveLength(costs, stops_early=proposer.stops_early)
    copies_itself = isinstance(proposer, NgramProposer | SwitchingProposer)
    texts = draft.vocab.texts if draft.vocab is not None else RunningTexts(2 * config.scheduler.max_num_seqs)
    copier = Copier(texts) if speculation.copies and speculation.adaptive and not copies_itself else None
    verify_log = proposer.verify_log if isinstance(proposer, EagleProposer) else None
    most = speculation.num_speculative_tokens
    return Speculator(proposer, policy, most, copier, follower, verify_log), costs


def _measured(
    config: EngineConfig, proposer: Proposer, runner: ModelRunner, max_model_len: int, follower: VocabFollower | None
) -> StepCosts:
    # Where n-grams always match, as in made-up text, they cost nothing.
    dearest = proposer.otherwise if isinstance(proposer, SwitchingProposer) else proposer
    size, most = config.cache.block_size, config.scheduler.max_batched_tokens
    return CostMeter(runner, dearest, size, most, max_model_len, follower).measure()
