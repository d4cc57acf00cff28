"""Typed options of online alignment. Imports no torch.

Engine, worker and server read the same section: what is logged and where, the layout of the weight channel, how the
worker trains. It is here, not in ``adapters``, because the server's settings hold it and may not import ``adapters``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from evospec.engine.online.adapter_control import KeyScope
from evospec.engine.options import Section
from evospec.engine.redis_clients import check_url

RedisUrl = Annotated[str, AfterValidator(check_url)]

LoraTarget = Literal["q", "k", "v", "o", "down"]
"""Projections of the draft that an adapter can change; q, k and v are rows of one matrix."""


def shared_memory() -> Path:
    """Where files are shared best: a tmpfs, if there is one."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path.home() / ".cache"


class TokenLogConfig(Section):
    """What the engine logs of its verify steps."""

    in_code_only = frozenset(
        (
            *("top_k", "kl_threshold", "sample_share", "cost_share", "max_records", "context_tokens", "ring_rows"),
            "interval_seconds",
        )
    )

    stream: str = "evospec:token-log"
    """Redis key of the token log."""
    top_k: int = Field(default=16, ge=2, le=64)
    """Tokens of the target's distribution at a position."""
    kl_threshold: float = Field(default=1.0, ge=0)
    """A step without rejection teaches if its KL divergence is above (nats)."""
    sample_share: float = Field(default=1.0, gt=0, le=1)
    """Share of steps logged whatever happens in them; the guard counts these. Less than 1 saves records of a draft that
    is mostly right, and leaves holes in what the worker takes for context."""
    cost_share: float = Field(default=0.008, ge=0, le=1)
    """Share of the steps' time that logging may take. Requests that begin when it is used up are not logged, but those
    that the base draft drafts for."""
    control_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of requests that the base draft drafts for, to compare with."""
    max_records: int = Field(default=8192, ge=100)
    """Records that the stream keeps, which are more than the ring has features of."""
    context_tokens: int = Field(default=256, ge=0)
    """Tokens before a request's first draft that are logged with it: the draft attends to them."""
    ring_rows: int = Field(default=16384, ge=64)
    """Feature rows in shared memory."""
    interval_seconds: float = Field(default=1.0, gt=0, le=1)
    """How long few records wait to be sent, and the worker before it looks for more: each time takes a core from the
    engine for some milliseconds. At most 1: so often the worker reports."""


class TrainingConfig(Section):
    """How the worker trains."""

    learning_rate: float = Field(default=4e-3, gt=0)
    """Of AdamW."""
    weight_decay: float = Field(default=3.0, ge=0)
    """Of an adapter, by AdamW, times the learning rate: without it what is learned of some text spoils what the base
    draft knows of others."""
    beta: float = Field(default=0.3, ge=0)
    """How much more seldom later steps are trained the worse the first one is; 0: all alike."""
    temperature: float = Field(default=1.0, gt=0)
    """Softens both distributions of the loss."""
    horizon: int = Field(default=4, ge=1, le=8)
    """Draft steps that are trained, at most."""
    batch_positions: int = Field(default=256, ge=1)
    """Positions of an update, at least."""
    random_rows: int = Field(default=1024, ge=0)
    """Random rows of the head that an update counts as wrong answers."""
    history_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of an update that is older positions; 0, and updates_per_batch 1: as the paper does."""
    updates_per_batch: int = Field(default=4, ge=1)
    """Updates for each batch of new positions: the first learns from them, the others from older ones, when there is
    time."""
    updates_per_version: int = Field(default=16, ge=1)
    """Updates before a version is scored and published."""


class ReplayConfig(Section):
    """What the worker keeps of each key's traffic, in memory only."""

    recent_segments: int = Field(default=16, ge=1)
    """Segments kept in their order."""
    history_segments: int = Field(default=48, ge=0)
    """Segments of an unbiased sample of everything before."""
    held_out_segments: int = Field(default=64, ge=1)
    """Most recent segments that versions are scored on; more where they are short."""
    held_out_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of requests never trained on."""
    segment_positions: int = Field(default=256, ge=8)
    """Positions of a segment, its prompt not counted; an answer, if it is no longer."""
    context_positions: int = Field(default=64, ge=0)
    """Of these, taken over from the segment before."""
    sampled_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the logged steps without rejection or surprise that is learned."""
    memory_bytes: int = Field(default=2**30, ge=1)
    """Features of all keys that are kept, at most."""
    max_rows: int = Field(default=2**16, ge=1)
    """Positions of a key's segments, their context counted."""


class GuardConfig(Section):
    """When a version is refused, and when it is taken back."""

    min_held_out: int = Field(default=256, ge=1)
    """Fewest held-out positions to score a version on."""
    agreement_margin: float = Field(default=0.01, ge=0)
    """Tokens by which a version's agreement may be below the base's and the current's for sure."""
    min_agreement: float = Field(default=0.0, ge=0)
    """Right tokens a chain, on held-out positions, from which on a version pays."""
    min_gain: float = Field(default=0.0, ge=0)
    """Of them, what a version must have more than the current."""
    min_acceptance: float = Field(default=0.0, ge=0)
    """Acceptance of first drafts below which a version is bad, whatever the base's."""
    watched_records: int = Field(default=512, ge=64)
    """Records of the unbiased sample after which a version counts as good."""
    min_watched: int = Field(default=64, ge=16)
    """The same before another may follow a version that drafted at all."""
    control_margin: float = Field(default=0.03, ge=0)
    """Acceptance of first drafts below the base's, at the same time, that is no matter."""
    history_margin: float = Field(default=0.15, ge=0)
    """The same against the version before, whose traffic may have been easier."""
    sigmas: float = Field(default=3.0, gt=0)
    """Standard errors beyond the margin that take a version back."""


class PaceConfig(Section):
    """How much of the machine the worker may take."""

    in_code_only = frozenset(("threads", "niceness", "step_seconds", "outlook_seconds", "first_steps"))

    first_steps: int = Field(default=2000, ge=0)
    """Verify steps before the worker starts, in a pause; without one it starts after ten times as many."""
    threads: int = Field(default=1, ge=1)
    """Compute threads."""
    niceness: int = Field(default=19, ge=0, le=19)
    """Of the process."""
    spare_cores: float | None = Field(default=None, ge=0)
    """Training goes on only while so many cores are idle; default: all but a quarter of one."""
    busy_share: float = Field(default=0.03, ge=0, le=1)
    """Share of the time in which it trains after five minutes without so many idle cores; 0: never."""
    step_seconds: float = Field(default=0.02, gt=0)
    """What one verify step saved is worth, in seconds of the worker's time."""
    outlook_seconds: float = Field(default=3600.0, gt=0)
    """How long what is learned will be of use."""


class GrowthConfig(Section):
    """How a whole draft grows, for a model without one."""

    one_step_positions: int = Field(default=100_000, ge=0)
    """Positions trained by one step each, before several are unrolled."""
    memory_bytes: int = Field(default=500_000_000, ge=1)
    """Features that the worker keeps, at most."""
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """From one checkpoint to the next, at least."""
    training: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(
            learning_rate=5e-4, horizon=4, batch_positions=256, updates_per_batch=8, updates_per_version=64
        )
    )
    guard: GuardConfig = Field(
        default_factory=lambda: GuardConfig(min_held_out=512, min_agreement=0.25, min_gain=0.05, min_acceptance=0.1)
    )


class AdaptersConfig(Section):
    """Online alignment: a worker trains adapters of the draft from live traffic."""

    in_code_only = frozenset(("training", "replay", "guard", "growth"))

    enabled: bool = True
    """Learn from live traffic, where the model drafts with a draft of this project. Tokens of requests are kept in
    memory only: the last steps in Redis, for an hour at most, and some in the worker. On disk is what was learned, as
    weights. Given explicitly, a model without a draft grows one (docs/growing.md)."""
    synthetic_answers: bool = False
    """Where a draft grows, let the idle engine answer prompts again that it has had, to learn from. The worker keeps
    the last 256 tokens of the last 1,024 prompts for that, in memory only."""
    key_scope: KeyScope = "tenant"
    """Who shares an adapter: each tenant, each tenant and domain, or everybody."""
    num_slots: int = Field(default=8, ge=1, le=64)
    """Adapters in the engine at a time."""
    rank: int = Field(default=32, ge=1, le=256)
    """Rank of an adapter."""
    targets: tuple[LoraTarget, ...] = Field(default=("q", "v", "o", "down"), min_length=1)
    """Projections of the draft that it changes."""
    redis_url: RedisUrl | None = None
    """Redis or Valkey of the token log; default: the server's."""
    shared_directory: Path = Field(default_factory=lambda: shared_memory() / f"evospec-{os.getuid()}")
    """Where shared memory files are, best on tmpfs; `evospec serve` makes one of its own."""
    state_directory: Path = Path.home() / ".cache" / "evospec" / "adapters"
    """Where versions are kept."""
    share_versions: bool = True
    """Give what is learned to all servers of the same model and draft that have the same Redis. One of them learns each
    key."""
    log: TokenLogConfig = Field(default_factory=TokenLogConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    replay: ReplayConfig = Field(default_factory=ReplayConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    pace: PaceConfig = Field(default_factory=PaceConfig)
    growth: GrowthConfig = Field(default_factory=GrowthConfig)

    def for_growth(self, recorded_size: int) -> AdaptersConfig:
        """The same where a whole draft grows, from rows of so many values: one draft, which no request does without."""
        growth = self.growth
        most = growth.memory_bytes // (2 * recorded_size)
        changes = {
            "num_slots": 1,
            "log": self.log.model_copy(update={"control_share": 0.0}),
            "replay": self.replay.model_copy(update={"history_segments": most, "memory_bytes": growth.memory_bytes}),
            "training": growth.training,
            "guard": growth.guard,
        }
        return self.model_copy(update=changes)

    def with_rows_of(self, num_values: int) -> AdaptersConfig:
        """The same, where each key keeps as many rows of so many bf16 values as its part of the memory holds."""
        max_rows = max(self.replay.memory_bytes // self.num_slots // (2 * num_values), 1)
        return self.model_copy(update={"replay": self.replay.model_copy(update={"max_rows": max_rows})})

    @property
    def is_on(self) -> bool:
        """Whether an engine learns: there has to be a Redis, which an engine by itself does not have."""
        return self.enabled and self.redis_url is not None

    @property
    def ring_path(self) -> Path:
        return self.shared_directory / "features"

    @property
    def channel_path(self) -> Path:
        return self.shared_directory / "weights"
