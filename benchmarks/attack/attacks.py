"""All attacks by name: what each runs, and what its figures must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.attack import (
    acceptance,
    channel_bytes,
    compiling,
    determinism,
    disconnects,
    drain,
    forge_channel,
    grammar_fuzz,
    http_fuzz,
    in_place,
    keyless,
    large_bodies,
    masks,
    soak,
    starving,
    tokenize_flood,
)
from benchmarks.attack.bars import Bars


@dataclass(frozen=True)
class Options:
    """What is attacked, and how much is done.

    ``source`` is the checkout whose server is attacked; ``seconds`` and ``seed`` are the fuzzers', ``seeds`` those of
    the requests of ``determinism``; ``soak`` takes ``minutes`` and writes its checkpoints to a file.
    """

    source: Path
    seconds: float
    seed: int
    seeds: tuple[int, ...]
    minutes: float
    checkpoints: Path


@dataclass(frozen=True)
class Attack:
    """``run`` gives the figures that ``bars`` are about."""

    run: Callable[[Options], dict[str, float]]
    bars: Bars


ATTACKS = {
    "masks": Attack(lambda of: masks.run(of.source), masks.BARS),
    "compiling": Attack(lambda of: compiling.run(of.source), compiling.BARS),
    "starve_kv": Attack(lambda of: starving.run_kv(of.source), starving.BARS),
    "starve_slots": Attack(lambda of: starving.run_slots(of.source), starving.BARS),
    "keyless": Attack(lambda of: keyless.run(of.source), keyless.BARS),
    "tokenize_flood": Attack(lambda of: tokenize_flood.run(of.source), tokenize_flood.BARS),
    "large_bodies": Attack(lambda of: large_bodies.run(of.source), large_bodies.BARS),
    "disconnects": Attack(lambda of: disconnects.run(of.source), disconnects.BARS),
    "drain": Attack(lambda of: drain.run(of.source), drain.BARS),
    "acceptance": Attack(lambda of: acceptance.run(of.source), acceptance.BARS),
    "forge_channel": Attack(lambda of: forge_channel.run(of.source), forge_channel.BARS),
    "channel_bytes": Attack(lambda of: channel_bytes.run(of.seconds, of.seed), channel_bytes.BARS),
    "grammar_fuzz": Attack(lambda of: grammar_fuzz.run(of.source, of.seconds, of.seed), grammar_fuzz.BARS),
    "in_place": Attack(lambda of: in_place.run(of.seconds, of.seed), in_place.BARS),
    "http_fuzz": Attack(lambda of: http_fuzz.run(of.source, of.seconds, of.seed), http_fuzz.BARS),
    "determinism": Attack(lambda of: determinism.run(of.source, of.seeds), determinism.BARS),
    "soak": Attack(lambda of: soak.run(of.source, of.minutes, of.seed, of.checkpoints), soak.BARS),
}
