"""What operators may ask of the adapters worker, and what it tells about itself, both through Redis. No torch.

    STREAM:commands   list of commands, RPUSH by the server, LPOP by the worker, oldest first
    STREAM:status     hash: field "" is the worker's state, every other field an adapter key's

STREAM is the key of the token log, which no other engine has.

Both hold MessagePack: ``AdapterCommand``; ``WorkerStatus`` and ``AdapterStatus``. A command waits as long as no worker
runs, or its disk is full; it is carried out at most once. The worker writes the hash anew each second, in one
transaction; it counts as gone when ``WorkerStatus.updated_at`` is some seconds old.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal
from urllib.parse import quote

import msgspec

WORKER_FIELD = b""

KeyScope = Literal["tenant", "tenant+domain", "global"]
Stage = Literal["adapting", "growing", "serving"]
"""Of a key: an adapter of a draft that there is, a whole draft that does not pay yet, or one that drafts."""
MAX_KEY_BYTES = 128
"""Longest adapter key, in UTF-8."""


def commands_key(stream: str) -> str:
    return f"{stream}:commands"


def status_key(stream: str) -> str:
    return f"{stream}:status"


def learned_key(layout: str) -> str:
    """The key that is there where a server has let others have adapters of this layout."""
    return f"evospec:adapters:{layout}"


def adapter_key(scope: KeyScope, tenant: str, domain: str | None) -> str:
    """The key of the adapter that drafts for, and learns from, a tenant's requests: equal for no two tenants.

    ``tenant``, ``tenant/domain`` or ``*``; other characters than letters, digits and ``_.-~`` are percent-encoded, and
    what would be too long ends in a hash.
    """
    if scope == "global":
        return "*"
    key = quote(tenant, safe="")
    if scope == "tenant+domain" and domain:
        key += "/" + quote(domain, safe="")
    if len(key) <= MAX_KEY_BYTES:
        return key
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    return f"{key[: MAX_KEY_BYTES - 33]}~{digest}"


class AdapterCommand(msgspec.Struct, frozen=True):
    """``rollback``: back to the good version before, or the base draft. ``freeze``: learn no more, ``unfreeze``: learn
    again. ``reset``: forget everything of the key and draft with the base."""

    action: Literal["rollback", "freeze", "unfreeze", "reset"]
    key: str


class AdapterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one adapter key. ``revision`` 0 is the base draft; revisions only grow.

    ``slot`` and ``channel_version`` say where the engine finds the revision; None and 0 while it is not published.
    Acceptance is that of first draft tokens in the unbiased sample of records, since the revision was published; None
    without records.
    """

    stage: Stage = "adapting"
    revision: int = 0
    good_revision: int = 0
    slot: int | None = None
    channel_version: int = 0
    is_frozen: bool = False
    num_records: int = 0
    num_synthetic_records: int = 0
    """Of answers that the idle engine has written to be learned from; the others are of traffic."""
    num_trained_positions: int = 0
    num_updates: int = 0
    num_published: int = 0
    num_refused: int = 0
    num_rolled_back: int = 0
    gate_rate: float = 0.0
    """Share of records that teach."""
    loss: float | None = None
    """The last update's loss, on positions before they are learned from."""
    agreement: float | None = None
    """Right tokens a verification on held-out positions, of the weights scored last: what they would gain."""
    update_seconds: float | None = None
    acceptance: float | None = None
    control_acceptance: float | None = None
    previous_acceptance: float | None = None
    last_refusal: str = ""

    @property
    def is_growing(self) -> bool:
        """Whether it is a whole draft that does not pay yet."""
        return self.stage == "growing"


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the worker. Numbers are since its start; ``lag``: records not read yet, None: unknown."""

    updated_at: float
    """Seconds since the epoch."""
    started_at: float
    pid: int
    lag: int | None
    num_records: int
    num_lapsed: int
    """Records whose features were overwritten before they were read."""
    num_unusable: int
    """Records that contradict themselves or are of another model."""
    num_trimmed: int
    num_without_slot: int
    """Records of keys for which there was no slot."""
    is_attached: bool
    """Whether there is a weight channel to publish in."""
    is_paused: bool
    """Whether there was work and the machine was too busy for it."""
    resident_bytes: int


def encode_status(worker: WorkerStatus, adapters: Mapping[str, AdapterStatus]) -> dict[bytes, bytes]:
    """The fields of the state's hash."""
    fields = {key.encode(): msgspec.msgpack.encode(status) for key, status in adapters.items()}
    return {WORKER_FIELD: msgspec.msgpack.encode(worker)} | fields


def decode_status(fields: Mapping[bytes, bytes]) -> tuple[WorkerStatus | None, dict[str, AdapterStatus]]:
    """The state in the fields of its hash, the worker's None if none ever ran.

    Raises:
        msgspec.MsgspecError: it is no state.
    """
    worker = msgspec.msgpack.decode(fields[WORKER_FIELD], type=WorkerStatus) if WORKER_FIELD in fields else None
    adapters = {
        key.decode(): msgspec.msgpack.decode(data, type=AdapterStatus)
        for key, data in fields.items()
        if key != WORKER_FIELD
    }
    return worker, adapters
