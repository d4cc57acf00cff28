"""Names of sessions: made by the server, and telling whose they are.

An id is ``sess_`` (made for ``POST /v1/sessions``) or ``user_`` (of one value of ``user``), 32 hexadecimal digits, and
16 more that follow from the tenant and the rest. So an id that is mistyped or another tenant's is known without
Redis, even while Redis is down. Nothing depends on its secrecy: keys in Redis have the tenant in them.
"""

from __future__ import annotations

import hashlib
import re
import secrets

_ID = re.compile(r"(?P<body>(?:sess|user)_[0-9a-f]{32})(?P<check>[0-9a-f]{16})")


def new_session_id(tenant: str) -> str:
    """An id for a new session of ``tenant``."""
    return _with_check(tenant, f"sess_{secrets.token_hex(16)}")


def user_session_id(tenant: str, user: str) -> str:
    """The one id of ``tenant``'s session for ``user``; the name itself, perhaps a person's, is not in it."""
    return _with_check(tenant, f"user_{_digest(tenant, user)[:32]}")


def is_user_session(session_id: str) -> bool:
    """Whether the id follows from a value of ``user``."""
    return session_id.startswith("user_")


def belongs_to(session_id: str, tenant: str) -> bool:
    """Whether ``session_id`` was made by a server, for ``tenant``."""
    match = _ID.fullmatch(session_id)
    return match is not None and session_id == _with_check(tenant, match["body"])


def session_key(tenant: str, model: str, session_id: str) -> str:
    """The key in Redis. The model is in it, because a snapshot is made of one model's token ids."""
    return f"evospec:session:{_digest(tenant)[:32]}:{_digest(model)[:8]}:{session_id}"


def _with_check(tenant: str, body: str) -> str:
    return body + _digest(tenant, body)[:16]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
