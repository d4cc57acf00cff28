"""Bodies of /v1/adapters."""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.online.adapter_control import AdapterStatus, WorkerStatus


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter key, and what the worker reports of it."""

    key: str
    status: AdapterStatus


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    """All keys that the worker has in hand, and the worker itself; None if none ever ran."""

    object: Literal["list"] = "list"
    worker: WorkerStatus | None
    data: list[Adapter]


class AcceptedCommand(msgspec.Struct, frozen=True, kw_only=True):
    """The worker will carry it out within seconds, or when it is back."""

    object: Literal["adapter.command"] = "adapter.command"
    key: str
    action: str
