"""Body of GET /v1/overview."""

from __future__ import annotations

import msgspec


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Draft tokens at one place of their drafts, and how many of them were accepted."""

    drafted: int
    accepted: int


class DomainOverview(msgspec.Struct, frozen=True, kw_only=True):
    """How drafts fared in a tenant's domain ("" without one) since the server started.

    Of ``draft_tokens`` in ``drafts``, one for a sequence and step, ``accepted_tokens`` were accepted; those copied from
    the text are among both. ``places``: the same by place in the draft, first to last. Of ``verified_tokens`` of
    sequences with a vocabulary of their own, ``covered_tokens`` could be drafted. ``tail_hits``: accepted drafts from
    sessions' own tokens, by what had named them.
    """

    domain: str
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    copied_tokens: int
    accepted_copied_tokens: int
    places: list[Place]
    verified_tokens: int
    covered_tokens: int
    tail_hits: dict[str, int]


class TenantOverview(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant's traffic since the server started."""

    tenant: str
    prompt_tokens: int
    generation_tokens: int
    domains: list[DomainOverview]


class EngineOverview(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine does now."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant's own traffic; with the admin key, or without keys, everybody's, and the engine's load."""

    object: str = "overview"
    model: str
    draft: str | None
    tenants: list[TenantOverview]
    engine: EngineOverview | None
