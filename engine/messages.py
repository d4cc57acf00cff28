"""Messages between the API server and the engine process (ZMQ + MessagePack).

The engine binds one ROUTER socket; every API server connects a DEALER socket.
Client to engine: ``Hello``, ``EngineRequest``, ``AbortRequests``.
Engine to client: ``EngineReady``, ``EngineOutputs``.

This module imports neither torch nor zmq, so that the server can use it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "error", "aborted"]
ErrorKind = Literal["invalid", "overloaded", "internal"]


class Grammar(msgspec.Struct, frozen=True):
    """Constrained output: any JSON object, or what ``schema`` says.

    It is the text of a JSON Schema, of a regular expression, of a grammar in xgrammar's EBNF, or of a structural tag of
    xgrammar, which the server has made of schemas that it has checked.
    """

    kind: Literal["json_object", "json_schema", "regex", "ebnf", "structural_tag"]
    schema: str | None = None


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How the tokens of one sequence are chosen and when it ends; already validated.

    ``top_k`` 0, ``top_p`` 1, ``min_p`` 0, ``repetition_penalty`` 1 mean "off".
    ``temperature`` 0 is greedy. ``seed`` is always set: the server draws one if the client did not.
    ``logprobs`` is the number of alternatives to report beside the chosen token (None: no logprobs).
    ``prompt_logprobs`` is the same for the prompt's own tokens (``echo`` with ``logprobs``).
    ``embedding``: whether the prompt's embedding is wanted.
    ``num_speculative_tokens`` caps the draft tokens of a step (0: no drafts, None: the engine's own limit).
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    embedding: bool = False
    grammar: Grammar | None = None
    num_speculative_tokens: int | None = None


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a client; answered by ``EngineReady`` once the model is loaded."""


class SessionState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What the request's session brings along.

    ``snapshot`` is the engine's own encoding, which the server keeps; empty for a session that has none yet.
    ``domain`` is the client's name for the session's subject, "" if it gave none.
    """

    snapshot: bytes = b""
    domain: str = ""


class EngineRequest(msgspec.Struct, frozen=True, tag="request", kw_only=True):
    """One sequence to generate. ``request_id`` is unique per client connection.

    ``tenant`` salts the prefix cache and is the unit of fair admission. ``session`` None: one that ends with the
    request, so that no snapshot of it is wanted. ``prediction_token_ids``: what the output may be, to draft from.
    ``learn``: whether the adapters worker may see its tokens. ``is_synthetic``: nobody waits for it, it is only to be
    learned from; it ends, "overloaded", as soon as a request that is not comes, and does not begin beside one.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    tenant: str
    session: SessionState | None = None
    prediction_token_ids: list[int] = []
    learn: bool = True
    is_synthetic: bool = False


class AbortRequests(msgspec.Struct, frozen=True, tag="abort"):
    """The client no longer wants these; the engine frees their blocks and sends nothing more."""

    request_ids: list[str]


ClientMessage = Hello | EngineRequest | AbortRequests


class EngineReady(msgspec.Struct, frozen=True, tag="ready", kw_only=True):
    """The engine's introduction. ``epoch`` differs after every restart of the process. ``device``: for people.

    ``kv_bytes`` is the size of the target's KV cache. ``draft`` names what proposes tokens (None: no speculation), at
    most ``num_speculative_tokens`` for a sequence and step; ``draft_bytes`` are its weights and KV cache.
    ``vocabulary`` is the fingerprint of the model's tokens that snapshots of sessions carry.
    """

    epoch: str
    model: str
    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    dtype: str
    attention_backend: str
    device: str = "CPU"
    kv_bytes: int = 0
    draft: str | None = None
    num_speculative_tokens: int = 0
    draft_bytes: int = 0
    vocabulary: str = ""


TokenSource = Literal["target", "draft", "session", "copied", "prediction"]
"""Who proposed a token of an answer: the target itself; the draft, from the tokens that all sequences can draft or from
the session's own; the text before it, where the same words had come; or the client, who had predicted them."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token and, if asked for, of the most likely alternatives.

    Natural logarithm of the target model's own distribution at temperature 1, before penalties.
    ``top`` holds (token id, logprob), most likely first. ``source``: who proposed it.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    source: TokenSource = "target"


class VocabularyCounts(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How a sequence's draft vocabulary fared.

    ``tail_tokens``: in its tail at the end. Of ``verified_tokens``, ``covered_tokens`` could have been drafted.
    ``events``: steps with one that could not. ``insertions``: tokens put into the tail, by the source that named them;
    ``hits``: accepted drafts that were in the tail, by the source that had put them there.
    """

    tail_tokens: int = 0
    verified_tokens: int = 0
    covered_tokens: int = 0
    events: int = 0
    insertions: dict[str, int] = {}
    hits: dict[str, int] = {}


class EngineOutput(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What one step added to one sequence.

    ``token_ids`` and ``logprobs`` are already truncated by ``engine.truncation``.
    ``stop_reason`` is the stop string or stop token id that ended the sequence (None: EOS).
    ``text_length`` is set when a stop string ended it: how many characters of the whole
    output text to keep.
    ``prompt_logprobs`` has one entry per prompt token after the first, on the sequence's first output: in pieces of
    some hundred, each the MessagePack of ``list[TokenLogprob]``. As objects those of a long prompt take ten times the
    memory, and all others would wait until they are read.
    ``embedding``, on the first output as well, is the mean of the prompt's last hidden states, of length 1: float32,
    little-endian.
    ``queue_seconds`` comes with its first output: how long it waited for a place.
    ``num_draft_tokens`` were verified in this step; ``num_accepted_tokens`` of them are among ``token_ids``.
    ``draft_version`` is that of the adapter that drafted them, 0: the base draft.
    ``copied``: they were copied from the sequence's own text instead.
    ``num_predicted_tokens`` of the accepted ones were copied, and predicted by the client.
    ``session_snapshot`` comes with the last output of a sequence that has a session: what to keep of it.
    ``vocabulary`` comes with the last output of a sequence that had a draft vocabulary of its own.
    ``error`` explains ``finish_reason`` "error" in words fit for the client; ``error_kind`` says
    whose fault it is: the request's ("invalid", 400), a full queue ("overloaded", 503, try later)
    or the engine's own ("internal", 500).
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[bytes] | None = None
    embedding: bytes | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text_length: int | None = None
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    draft_version: int = 0
    copied: bool = False
    num_predicted_tokens: int = 0
    session_snapshot: bytes | None = None
    vocabulary: VocabularyCounts | None = None
    error: str | None = None
    error_kind: ErrorKind = "internal"


class StepTimings(msgspec.Struct, frozen=True, array_like=True):
    """Seconds spent in each part of one engine step, and its size in tokens and sequences.

    ``draft`` is the time spent proposing tokens and keeping the draft's own state; the other parts leave it out.
    ``vocabulary`` is the part of it in which the sessions' vocabularies and priors learned from what was verified.
    """

    schedule: float
    forward: float
    sample: float
    commit: float
    num_tokens: int
    num_sequences: int
    draft: float = 0.0
    vocabulary: float = 0.0


class AlignmentStats(msgspec.Struct, frozen=True, kw_only=True):
    """Online alignment as the engine sees it: gauges now, and counters since it started.

    ``layout`` names the shape of the adapters and the draft they are of. ``versions``: of those in force, by key;
    ``channel_version`` grows with each publication. ``loads`` of adapters, and ``failed_loads`` of damaged ones. Of
    ``steps``, verify steps of a drafted sequence, ``records_hard`` were logged because they teach, ``records_sampled``
    whatever happened in them. Of these records ``records_written`` reached Redis; the others wait, or were dropped
    because the queue was full, their features could not be stored, or Redis failed.
    """

    layout: str
    channel_version: int
    versions: dict[str, int]
    loads: int
    failed_loads: int
    steps: int
    records_hard: int
    records_sampled: int
    records_written: int
    records_dropped_by_queue: int
    records_dropped_by_redis: int


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges now, and counters since the engine started.

    Synthetic requests are not counted among those that wait and run. ``vocabularies_used`` of ``vocabularies_total``
    sequences have a draft vocabulary of their own. ``nonfinite_sequences`` ended because the model computed logits that
    are not finite. ``snapshots_refused``: of sessions, because they were damaged. ``alignment``: None where it is off.
    ``faults`` of parts that only make the engine faster, by part; those ``switched_off`` have failed again and again.
    ``failed_steps``: steps that the model could not compute; each has ended the requests that were in it.
    """

    num_waiting: int
    num_running: int
    blocks_used: int
    blocks_total: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    nonfinite_sequences: int = 0
    waiting_by_tenant: dict[str, int] = {}
    vocabularies_used: int = 0
    vocabularies_total: int = 0
    snapshots_refused: int = 0
    alignment: AlignmentStats | None = None
    faults: dict[str, int] = {}
    switched_off: list[str] = []
    failed_steps: int = 0


class EngineOutputs(msgspec.Struct, frozen=True, tag="outputs", kw_only=True, omit_defaults=True):
    """All outputs of one step for one client. Sent without outputs as a heartbeat when idle."""

    epoch: str
    outputs: list[EngineOutput] = []
    stats: EngineStats | None = None
    steps: list[StepTimings] = []


EngineMessage = EngineReady | EngineOutputs
