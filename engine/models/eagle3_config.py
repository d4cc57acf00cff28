"""What an EAGLE-3 draft is, read from its directory and checked against its target. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from evospec.engine.models.config import MAX_SIZE, ModelError, ModelSpec, Rope, check_heads
from evospec.engine.models.quantization.base import FLOATS
from evospec.engine.models.safetensors_spec import Header, read_header

WEIGHTS_FILE = "draft.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Variant:
    """What drafts do in another way than ``Eagle3`` describes.

    Those that are trained here have norms of features, and of queries and keys where the target has them. The rest is
    for drafts of other projects.
    """

    target_hidden_size: int | None = None
    """Width of each of the target's features; None: the draft's own"""
    rope: Rope | None = None
    """None: the target's"""
    sliding_window: int | None = None
    """So many tokens are attended to, the token itself included; None: all"""
    qk_norm: bool = False
    """Whether each head of queries and keys has an RMS norm before its rotary embedding"""
    feature_norms: Literal["none", "all", "each"] = "none"
    """What has an RMS norm before it is fused: the features side by side, or each of them"""
    norm_before_residual: bool = False
    """Whether the normalised g is what the layer adds to, not g"""
    norm_output: bool = False
    """Whether the next unrolled step takes the normalised a, not a"""
    head_size: int | None = None
    """Tokens of its own head; None: it has the target's"""
    own_embedding: bool = False
    first_token_has_entry: bool = True
    """Whether a sequence's first token has keys and values, though nothing comes before it"""

    def __post_init__(self) -> None:
        for name in ("sliding_window", "head_size"):
            if (size := getattr(self, name)) is not None and size <= 0:
                raise ModelError(f"{name} is {size}, must be positive")


@dataclass(frozen=True)
class Eagle3Config:
    """Shape of a draft. Head shapes and rotary base are the target's, but for a ``variant``; ``target`` names it."""

    target: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    capture_layers: tuple[int, ...]
    rms_norm_eps: float
    vocab_size: int
    num_target_layers: int
    attention_bias: bool = False
    """Whether queries, keys and values have a bias, as the target's own may"""
    variant: Variant = Variant()

    def __post_init__(self) -> None:
        sizes = "hidden_size num_heads num_kv_heads head_dim intermediate_size vocab_size num_target_layers"
        for name in sizes.split():
            if not 0 < getattr(self, name) <= MAX_SIZE:
                raise ModelError(f"{name} is {getattr(self, name)}, must be 1 to {MAX_SIZE}")
        if not 0 < len(self.capture_layers) <= self.num_target_layers:
            raise ModelError(f"{len(self.capture_layers)} capture_layers of {self.num_target_layers} layers")
        if not 0 < self.rms_norm_eps < 1:
            raise ModelError(f"rms_norm_eps is {self.rms_norm_eps}")
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim, [self.variant.rope])

    @property
    def fused_size(self) -> int:
        """Width of the features that are fused, side by side."""
        return len(self.capture_layers) * (self.variant.target_hidden_size or self.hidden_size)

    @property
    def num_feature_norms(self) -> int:
        """How many norms a position's features have, side by side, where there are any."""
        return len(self.capture_layers) if self.variant.feature_norms == "each" else 1

    @property
    def recorded_size(self) -> int:
        """Width of what the draft can be trained from: the features, and the output of the target's last layer."""
        return self.fused_size + self.hidden_size

    @classmethod
    def for_target(
        cls, spec: ModelSpec, target: str, capture_layers: tuple[int, ...], intermediate_size: int
    ) -> Eagle3Config:
        """The shape that a draft is given when it is trained here."""
        return cls(
            target=target,
            hidden_size=spec.hidden_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            intermediate_size=intermediate_size,
            capture_layers=capture_layers,
            rms_norm_eps=spec.rms_norm_eps,
            vocab_size=spec.vocab_size,
            num_target_layers=spec.num_layers,
            attention_bias=spec.attention_bias,
            variant=Variant(qk_norm=spec.qk_norm, feature_norms="each"),
        )

    def fits(self, spec: ModelSpec) -> bool:
        """Whether the draft was made for a model of this shape."""
        sizes = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
        same_sizes = all(getattr(self, name) == getattr(spec, name) for name in sizes)
        # A GGUF holds the norm's epsilon in float32, a config.json in decimal digits.
        same_eps = math.isclose(self.rms_norm_eps, spec.rms_norm_eps, rel_tol=1e-6)
        has_layers = all(0 <= layer < spec.num_layers for layer in self.capture_layers)
        return same_sizes and same_eps and has_layers and self.num_target_layers == spec.num_layers

    def check_target(self, spec: ModelSpec, directory: Path) -> None:
        """Raises ModelError unless the draft was made for a model of this shape."""
        layers = self.capture_layers
        if layers != tuple(sorted(set(layers))):
            raise ModelError(f"{directory}: the draft's capture_layers must ascend, not {layers}")
        if not self.fits(spec):
            raise ModelError(f"{directory}: the draft is for {self.target}, whose shape differs from the model's")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the draft but its own head and embedding, by its name in ``Eagle3``."""
        hidden, intermediate, heads_size = self.hidden_size, self.intermediate_size, self.num_heads * self.head_dim
        qkv_size = heads_size + 2 * self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, self.fused_size),
            "qkv_proj.weight": (qkv_size, 2 * hidden),
            "o_proj.weight": (hidden, heads_size),
            "gate_up_proj.weight": (2 * intermediate, hidden),
            "down_proj.weight": (hidden, intermediate),
        }
        norms = ("embedding_norm", "hidden_norm", "post_attention_norm", "output_norm")
        shapes |= dict.fromkeys(norms, (hidden,))
        if self.attention_bias:
            shapes["qkv_proj.bias"] = (qkv_size,)
        if self.variant.qk_norm:
            shapes |= dict.fromkeys(("q_norm", "k_norm"), (self.head_dim,))
        if self.variant.feature_norms != "none":
            shapes["feature_norm"] = (self.fused_size,)
        return shapes


def recorded_layers(spec: ModelSpec) -> tuple[int, ...]:
    """Low, middle and high layer, whose outputs a draft sees, and the last one, whose output is what it should say.

    The high one is the input of the last layer, from which a draft's layer starts. A target of few layers has fewer.
    """
    high = spec.num_layers - 2
    return (*sorted({min(2, high), max(spec.num_layers // 2 - 1, 0), high}), high + 1)


def read_draft(directory: Path) -> Eagle3Config:
    """The configuration of a draft, whose weights are there and of its shapes, as far as their header tells.

    Raises:
        ModelError: a file is missing, damaged, absurd, or does not fit the other.
    """
    try:
        config = msgspec.json.decode((directory / CONFIG_FILE).read_bytes(), type=Eagle3Config)
        if replace(config.variant, qk_norm=False, feature_norms="none") != Variant():
            raise ModelError("variant: only drafts of other projects have more than norms")
        header = read_header(directory / WEIGHTS_FILE)
    except (OSError, ValueError, ModelError) as error:
        raise ModelError(f"{directory}: not an EAGLE-3 draft: {error}") from error
    check_tensors(directory, config.tensor_shapes(), header)
    return config


def check_tensors(directory: Path, wanted: Mapping[str, tuple[int, ...]], header: Header) -> None:
    """Raises ``ModelError`` unless a draft has these floating-point tensors, and no others."""
    for name in sorted(wanted.keys() | header.keys()):
        shape, dtype = header.get(name, (None, None))
        if wanted.get(name) != shape:
            raise ModelError(f"{directory}: {name} has the shape {shape}, must be {wanted.get(name)}")
        if dtype not in FLOATS:
            raise ModelError(f"{directory}: {name} is of type {dtype}, must be of {FLOATS}")
