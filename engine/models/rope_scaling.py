"""Rotary embeddings from a model's configuration: plain, linear, Llama 3's, YaRN, LongRoPE. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from evospec.engine.models.config import MAX_SIZE, ModelError, Rope
from evospec.engine.models.config_keys import ConfigKeys


@dataclass(frozen=True)
class _Context:
    """What a scaling is read from, and what it scales."""

    keys: ConfigKeys
    theta: float
    dim: int
    max_positions: int
    original: int

    @property
    def factor(self) -> float:
        """By how much the context was made longer."""
        factor = self.keys.number("factor", float, self.max_positions / self.original)
        if factor <= 0:
            raise ModelError(f"rope scaling: factor is {factor}, must be positive")
        return factor


def read_rope(
    config: ConfigKeys, scaling: ConfigKeys, head_dim: int, default_theta: float = 10_000, theta_key: str = "rope_theta"
) -> Rope:
    """The rotary embedding that a configuration describes.

    Args:
        config: of the whole model.
        scaling: its section about the embedding, maybe empty.
        head_dim: width of a head, of which all turns or a share.
        default_theta: the family's base.
        theta_key: what ``config`` calls the base, where ``scaling`` does not have it.

    Raises:
        ModelError: a scaling that is not supported, or numbers that make no sense.
    """
    share = scaling.number("partial_rotary_factor", float, config.number("partial_rotary_factor", float, 1.0))
    dim = int(round(head_dim * share, 3))  # of a GGUF file, which has their number, it may be just short of that
    if dim > MAX_SIZE:
        raise ModelError(f"rope: {dim} dimensions turn, must be at most {MAX_SIZE}")
    theta = scaling.number("rope_theta", float, config.number(theta_key, float, default_theta))
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in _KINDS:
        raise ModelError(f"rope scaling {kind!r} is not supported (supported: {', '.join(_KINDS)})")
    if theta <= 1:
        raise ModelError(f"rope_theta is {theta}, must be more than 1")
    longest = config.number("max_position_embeddings", int)
    original = scaling.number("original_max_position_embeddings", int, longest)
    # Phi-3 has it outside, where it counts for more.
    original = config.number("original_max_position_embeddings", int, original)
    if original <= 1 or longest <= 0:
        raise ModelError(f"rope scaling: original_max_position_embeddings is {original}, must be more than 1")
    try:
        return _KINDS[kind](_Context(scaling, theta, dim, longest, original))
    except (ArithmeticError, ValueError) as error:
        raise ModelError(f"rope scaling {kind!r}: its numbers make no sense: {error}") from None


def _default(context: _Context) -> Rope:
    return Rope(context.theta, context.dim)


def _linear(context: _Context) -> Rope:
    return Rope(context.theta, context.dim, factors=(context.factor,) * (context.dim // 2))


def _llama3(context: _Context) -> Rope:
    keys = context.keys
    if "factors" in keys.values:  # of a GGUF file, which has them as a tensor
        return Rope(context.theta, context.dim, keys.numbers("factors"))
    factor = context.factor
    low, high = keys.number("low_freq_factor", float), keys.number("high_freq_factor", float)
    if high <= low:
        raise ModelError(f"rope scaling: low_freq_factor {low}, high_freq_factor {high}")
    factors = []
    for index in range(0, context.dim, 2):
        wavelength = 2 * math.pi * context.theta ** (index / context.dim)
        smooth = min(max((context.original / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return Rope(context.theta, context.dim, tuple(factors))


def _yarn(context: _Context) -> Rope:
    """YaRN (arXiv 2309.00071): low frequencies are interpolated, high ones kept, and scores made larger."""
    keys, factor, half = context.keys, context.factor, context.dim // 2
    rotations = keys.number("beta_fast", float, 32.0), keys.number("beta_slow", float, 1.0)
    if min(rotations) <= 0:
        raise ModelError(f"rope scaling: beta_fast {rotations[0]}, beta_slow {rotations[1]}, must be positive")
    low, high = (
        context.dim * math.log(context.original / (count * 2 * math.pi)) / (2 * math.log(context.theta))
        for count in rotations
    )
    if keys.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, context.dim - 1)
    ramp = (min(max((index - low) / ((high - low) or 0.001), 0.0), 1.0) for index in range(half))
    factors = tuple(1 / (share / factor + 1 - share) for share in ramp)
    return Rope(context.theta, context.dim, factors, scale=_yarn_scale(keys, factor))


def _yarn_scale(keys: ConfigKeys, factor: float) -> float:
    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    given, weight, all_dims = (keys.optional(key, float) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return given
    return of(weight) / of(all_dims) if weight and all_dims else of(1.0)


def _longrope(context: _Context) -> Rope:
    """LongRoPE (arXiv 2402.13753): factors of its own for each dimension, found by search; and larger scores."""
    keys, factor = context.keys, context.factor
    scale = keys.optional("attention_factor", float)
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(context.original)) if factor > 1 else 1.0
    short, long = keys.numbers("short_factor"), keys.numbers("long_factor")
    return Rope(context.theta, context.dim, short, long, context.original, scale)


_KINDS: dict[str, Callable[[_Context], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
