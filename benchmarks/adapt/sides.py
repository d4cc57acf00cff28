"""What ``benchmarks.adapt`` compares: servers with and without alignment, each a real one with a directory of its own.

A side is a string: ``static``, or with a vocabulary of its own ``static:K``; ``vocabulary`` (follows sessions, with the
learned prior), ``alignment`` (the static vocabulary, and a worker that learns), ``both``, ``osd`` (alignment of all the
draft's weights); after a slash, options of ``engine.alignment``: ``alignment/rank=8,key_scope=global``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from benchmarks.common.drafting import Drafting
from benchmarks.common.in_process import KV_BYTES, MAX_MODEL_LEN, MAX_SEQUENCES
from engine.online.adapter_control import KeyScope

STATIC, VOCABULARY, ALIGNMENT, BOTH, OSD = "static", "vocabulary", "alignment", "both", "osd"
KINDS = (STATIC, VOCABULARY, ALIGNMENT, BOTH, OSD)
NEVER = "pace.busy_share=0,pace.spare_cores=99"
FORGETFUL = "training.history_share=0,training.updates_per_batch=1"
"""Learns from everything once, as the paper does."""
SIDES = {
    "gain": [STATIC, VOCABULARY, ALIGNMENT, BOTH, OSD],
    "switch": [STATIC, ALIGNMENT, f"{ALIGNMENT}/{FORGETFUL}"],
    "tenants": [STATIC, ALIGNMENT, f"{ALIGNMENT}/key_scope=global"],
    "memory": [STATIC, ALIGNMENT, OSD],
    "load": [STATIC, f"{ALIGNMENT}/{NEVER}", ALIGNMENT],
}
"""Compared in each part, where none are given. The second of ``load`` logs, and its worker never learns."""
_SCOPE = "key_scope"
_OSD = (f"{_SCOPE}=global", "log.control_share=0")
"""It changes the draft of everybody at once."""


@dataclass(frozen=True)
class Vocabularies:
    """As in ``SpeculationConfig.vocabulary``: that of the sides whose vocabulary is fixed, and of the others."""

    static: str
    dynamic: str


@dataclass(frozen=True)
class Side:
    """One side of the comparison. ``options`` are of ``engine.alignment``."""

    name: str
    vocabulary: str
    follows_sessions: bool
    aligns: bool
    options: dict[str, str]
    trains_all_weights: bool = False
    """Whether the worker trains the whole draft, not an adapter."""

    @property
    def key_scope(self) -> KeyScope:
        """Who shares an adapter."""
        return cast(KeyScope, self.options.get(_SCOPE, "tenant"))  # the server refuses others


def make_side(name: str, vocabularies: Vocabularies, common: Sequence[str] = ()) -> Side:
    """What a name means.

    Args:
        name: as the module describes.
        vocabularies: of the two kinds.
        common: options as NAME=VALUE that all aligning sides have, unless their name says otherwise.

    Raises:
        ValueError: it means nothing.
    """
    vocabulary, _, switches = name.partition("/")
    kind, _, size = vocabulary.partition(":")
    if kind not in KINDS or (size and not (kind == STATIC and size.isdigit())):
        raise ValueError(f"no such side: {kind}; there are {', '.join(KINDS)}")
    aligns = kind in (ALIGNMENT, BOTH, OSD)
    words = [*common, *(_OSD if kind == OSD else []), *filter(None, switches.split(","))]
    if (switches and not aligns) or not all("=" in word for word in words):
        raise ValueError(f"{name}: expected options of engine.alignment as NAME=VALUE behind an aligning side")
    options = {key: value for key, _, value in (word.partition("=") for word in words)} if aligns else {}
    follows = kind in (VOCABULARY, BOTH)
    of_kind = vocabularies.dynamic if follows else vocabularies.static
    return Side(name, vocabulary if size else of_kind, follows, aligns, options, kind == OSD)


def arguments(side: Side, model: str, drafting: Drafting, directory: Path, shared: Path) -> list[str]:
    """Options of ``evospec serve``; ``directory`` and ``shared`` are the side's own."""
    options = {
        "model": model,
        "engine.model.max_model_len": MAX_MODEL_LEN,
        "engine.cache.max_bytes": KV_BYTES,
        "engine.scheduler.max_num_seqs": MAX_SEQUENCES,
        "engine.speculation.method": drafting.method,
        "engine.speculation.draft": drafting.draft,
        "engine.speculation.vocabulary": side.vocabulary,
        "engine.speculation.num_speculative_tokens": drafting.num_tokens,
    }
    if side.aligns:
        options |= {"engine.alignment.state_directory": directory, "engine.alignment.shared_directory": shared}
        options |= {f"engine.alignment.{key}": value for key, value in side.options.items()}
    # No copies: it is vocabulary and weights that are compared.
    flags = ["--no-engine.cache.prefix_caching", "--no-engine.speculation.copies"]
    flags += [] if drafting.adaptive else ["--no-engine.speculation.adaptive"]
    flags += [] if side.follows_sessions else ["--no-sessions.from_user"]
    flags += ["--alignment.enabled" if side.aligns else "--no-alignment.enabled"]
    return flags + [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
