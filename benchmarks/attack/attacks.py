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
    """How much is done.

    ``seconds`` and ``seed`` are the fuzzers', ``seeds`` those of the requests of ``determinism``; ``soak`` takes
    ``minutes`` and writes its checkpoints to a file.
    """

    seconds: float
    seed: int
    seeds: tuple[int, ...]
    minutes: float
    checkpoints: Path


@dataclass(frozen=True)
class Attack:
    """``run`` takes the checkout whose server is attacked and gives the figures that ``bars`` are about."""

    run: Callable[[Path, Options], dict[str, float]]
    bars: Bars


ATTACKS = {
    "masks": Attack(lambda source, options: masks.run(source), masks.BARS),
    "compiling": Attack(lambda source, options: compiling.run(source), compiling.BARS),
    "starve_kv": Attack(lambda source, options: starving.run_kv(source), starving.BARS),
    "starve_slots": Attack(lambda source, options: starving.run_slots(source), starving.BARS),
    "keyless": Attack(lambda source, options: keyless.run(source), keyless.BARS),
    "tokenize_flood": Attack(lambda source, options: tokenize_flood.run(source), tokenize_flood.BARS),
    "large_bodies": Attack(lambda source, options: large_bodies.run(source), large_bodies.BARS),
    "drain": Attack(lambda source, options: drain.run(source), drain.BARS),
    "acceptance": Attack(lambda source, options: acceptance.run(source), acceptance.BARS),
    "forge_channel": Attack(lambda source, options: forge_channel.run(source), forge_channel.BARS),
    "channel_bytes": Attack(
        lambda source, options: channel_bytes.run(options.seconds, options.seed), channel_bytes.BARS
    ),
    "grammar_fuzz": Attack(
        lambda source, options: grammar_fuzz.run(source, options.seconds, options.seed), grammar_fuzz.BARS
    ),
    "in_place": Attack(lambda source, options: in_place.run(options.seconds, options.seed), in_place.BARS),
    "http_fuzz": Attack(lambda source, options: http_fuzz.run(source, options.seconds, options.seed), http_fuzz.BARS),
    "determinism": Attack(lambda source, options: determinism.run(source, options.seeds), determinism.BARS),
    "soak": Attack(
        lambda source, options: soak.run(source, options.minutes, options.seed, options.checkpoints), soak.BARS
    ),
}
