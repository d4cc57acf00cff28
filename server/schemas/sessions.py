"""/v1/sessions."""

from __future__ import annotations

from typing import Literal

import msgspec
from pydantic import Field

from evospec.server.schemas.body import Body
from evospec.server.session_ids import MAX_NAME_CHARS

DOMAIN_PATTERN = "^[a-z0-9][a-z0-9_-]{0,31}$"


class CreateSessionRequest(Body):
    """Start a session. All fields may be left out."""

    domain: str | None = Field(
        default=None,
        pattern=DOMAIN_PATTERN,
        description="Its subject, such as law: sessions of one share what they learn.",
    )
    ttl_seconds: int | None = Field(
        default=None, ge=1, description="Seconds it lives after its last use; the server has a default and a limit."
    )
    user: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_NAME_CHARS,
        description="The session of this value of `user`, where the server keeps such.",
    )


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A session. Times are Unix seconds; each use moves ``expires_at``."""

    id: str
    object: Literal["session"] = "session"
    domain: str | None
    created: int
    expires_at: int


class DeletedSession(msgspec.Struct, frozen=True, kw_only=True):
    """Response of DELETE: nothing of the session is left."""

    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: bool = True
