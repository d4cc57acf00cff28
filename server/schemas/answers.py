"""What the answers of both completion endpoints have in common.

``metrics`` has the shape of vLLM (pull request 48915), which load generators read.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """``cached_tokens``: prompt tokens whose keys and values came from the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """What became of a prediction, over all choices: its tokens that were taken into the answers, and those left."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Prompts are counted once each, however many choices they have."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class SpeculativeDecoding(msgspec.Struct, frozen=True, kw_only=True):
    """How a request's draft tokens fared.

    ``mean_acceptance_length``: tokens a verification step, the target's own included; 1 if there was no step.
    ``draft_acceptance_rate``: accepted over drafted tokens; 0 if none was drafted.
    ``acceptance_histogram``: entry ``j`` counts the steps that accepted exactly ``j`` draft tokens.
    ``num_spec_steps``: steps that verified drafts. ``num_spec_tokens``: most draft tokens a step.
    ``draft_version``: of the adapter that drafted last; 0: the base draft.
    """

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    draft_version: int = 0


class ResponseMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """``metrics`` of a response, or of the last chunk of a stream with ``include_usage``.

    There only while the server speculates, and only for a request of one sequence.
    """

    speculative_decoding: SpeculativeDecoding


class AnswerBody(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, or one event of a stream."""

    id: str
    object: str = ""
    created: int
    model: str
    choices: list[Any]
    usage: Usage | None = None
    metrics: ResponseMetrics | UnsetType = UNSET
