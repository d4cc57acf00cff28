"""Ids of sessions: made by the server, or of names that clients choose; each tells whose it is.

An id is ``sess_`` (made for ``POST /v1/sessions``), ``name_`` (of an id that the client sends) or ``user_`` (of a value
of ``user``), 32 hexadecimal digits, and 16 more that follow from the tenant and the rest. So an id that is mistyped or
another tenant's is known without Redis, even while Redis is down. A name, perhaps a person's, is only there as a hash
of tenant and name, so that tenants that choose the same name have two sessions. Nothing depends on an id's secrecy:
keys in Redis have the tenant in them.
"""

from __future__ import annotations

import hashlib
import re
import secrets

MAX_NAME_CHARS = 512
_ID = re.compile(r"(?P<body>(?:sess|name|user)_[0-9a-f]{32})(?P<check>[0-9a-f]{16})")


def new_session_id(tenant: str) -> str:
    """An id for a new session of ``tenant``."""
    return _with_check(tenant, f"sess_{secrets.token_hex(16)}")


def user_session_id(tenant: str, user: str) -> str:
    """The one id of ``tenant``'s session for ``user``."""
    return _with_check(tenant, f"user_{_digest(tenant, user)[:32]}")


def find_session_id(tenant: str, sent: str) -> str | None:
    """The id of the session that ``tenant`` means by ``sent``: that id, or any other name.

    None: it is an id of the server's form, but was not made for ``tenant``.
    """
    if match := _ID.fullmatch(sent):
        return sent if sent == _with_check(tenant, match["body"]) else None
    return _with_check(tenant, f"name_{_digest(tenant, sent)[:32]}")


def is_named(session_id: str) -> bool:
    """Whether the id follows from a name that a client chose."""
    return not session_id.startswith("sess_")


def session_key(tenant: str, model: str, session_id: str) -> str:
    """The key in Redis. The model is in it, because a snapshot is made of one model's token ids.

    In a cluster all sessions of a tenant and model are at one node, since scripts look at several.
    """
    return f"evospec:session:{{{_digest(tenant)[:32]}:{_digest(model)[:8]}}}:{session_id}"


def sessions_key(session_key: str) -> str:
    """The key in Redis of all sessions of the same tenant and model."""
    return session_key.rpartition(":")[0]


def _with_check(tenant: str, body: str) -> str:
    return body + _digest(tenant, body)[:16]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
