"""What a model is, as far as the engine must know; the families read it from files. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Literal

Activation = Literal["silu", "gelu_tanh", "swiglu_oai"]
"""What a gate goes through before it multiplies; gpt-oss' clamps both, and adds one to what is multiplied"""
MAX_LAYERS = 1024
MAX_EXPERTS = 1024
MAX_EXPERTS_OF_ALL_LAYERS = 1 << 15
"""Each has a place in a table of weights, which is made before any of them is looked for."""
MAX_SIZE = 1 << 20
"""Of whatever else has a size: a vocabulary, a width, a number of heads. No model comes near it."""


class ModelError(Exception):
    """A model cannot be found, fetched, read or served; the message names the file and the reason."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: a ``.gguf`` file, or a directory with ``config.json`` and ``*.safetensors``."""

    name: str
    path: Path
    format: Literal["gguf", "safetensors"]


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding (RoFormer, arXiv 2104.09864) of the two-halves kind.

    Of each head the first ``dim`` dimensions turn: dimensions i and i + dim / 2 together, by the angle
    position * theta ** (-2 * i / dim) / factors[i].
    """

    theta: float
    dim: int
    factors: tuple[float, ...] | None = None
    """[dim / 2]; None: all 1"""
    long_factors: tuple[float, ...] | None = None
    """Those of an engine whose sequences may be longer than ``original_context`` (LongRoPE); None: the same"""
    original_context: int = 0
    scale: float = 1.0
    """Multiplies cosines and sines (the attention factor of YaRN)"""

    def __post_init__(self) -> None:
        if self.theta <= 0 or self.scale <= 0:
            raise ModelError(f"rope: theta {self.theta}, attention factor {self.scale}, must be positive")
        if self.dim <= 0 or self.dim % 2:
            raise ModelError(f"rope: {self.dim} dimensions turn, must be a positive even number")
        for factors in (self.factors, self.long_factors):
            if factors is not None and (len(factors) != self.dim // 2 or min(factors) <= 0):
                raise ModelError(f"rope: {len(factors)} frequency factors, need {self.dim // 2}, all positive")

    def factors_for(self, max_positions: int) -> tuple[float, ...] | None:
        """[dim / 2] of an engine with sequences of up to so many tokens, the same for all of them; None: all 1."""
        is_long = self.long_factors is not None and max_positions > self.original_context
        return self.long_factors if is_long else self.factors


@dataclass(frozen=True)
class LayerSpec:
    """What sets a layer apart from the others of its model."""

    rope: Rope | None
    """None: it sees the order of tokens by its mask alone (NoPE)"""
    sliding_window: int | None = None
    """So many tokens are attended to, the token itself included; None: all"""

    def __post_init__(self) -> None:
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise ModelError(f"sliding_window is {self.sliding_window}, must be positive")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of each layer's MLP."""

    count: int
    per_token: int
    """How many of them each token goes through: those that its router scores highest"""
    normalized: bool
    """Whether the weights of a token's experts are made to sum to one"""
    bias: bool = False
    """Whether router and experts have biases"""

    def __post_init__(self) -> None:
        if not 0 < self.per_token <= self.count <= MAX_EXPERTS:
            raise ModelError(f"{self.per_token} of {self.count} experts, must be 1 or more of up to {MAX_EXPERTS}")


def check_heads(num_heads: int, num_kv_heads: int, head_dim: int, ropes: Iterable[Rope | None]) -> None:
    """Whether heads of attention can share their keys and values, and are as large as what turns in them.

    Raises:
        ModelError: they cannot, or are not.
    """
    if num_heads % num_kv_heads:
        raise ModelError(f"{num_heads} heads cannot share {num_kv_heads} key-value heads evenly")
    if any(rope is not None and rope.dim > head_dim for rope in ropes):
        raise ModelError(f"rope: more dimensions turn than the {head_dim} of a head")


@dataclass(frozen=True)
class ModelSpec:
    """Shape and constants of a decoder. The defaults are those of Llama; its family says what is different."""

    architecture: str
    """``model_type`` of its family in a config.json"""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Of the MLP, or of each expert"""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    attention_scale: float
    """Of the products of queries and keys"""
    attention_bias: bool = False
    """Whether the q, k and v projections have a bias"""
    output_bias: bool = False
    """Whether what attention adds to the residual stream has one"""
    attention_sinks: bool = False
    """Whether each head has a score that takes a part of its attention to nothing"""
    qk_norm: bool = False
    """Whether each head of queries and keys has an RMS norm before its rotary embedding"""
    output_norms: bool = False
    """Whether what attention and MLP add to the residual stream has an RMS norm"""
    activation: Activation = "silu"
    """Of the MLP's gate"""
    embedding_scale: float = 1.0
    """Multiplies rows of the embedding, but not of the head that is tied to it"""
    experts: Experts | None = None
    """None: layers have an MLP"""

    def __post_init__(self) -> None:
        for name in ("rms_norm_eps", "max_position_embeddings"):
            if getattr(self, name) <= 0:
                raise ModelError(f"{name} is {getattr(self, name)}, must be positive")
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim, [layer.rope for layer in self.layers])
        for token_id in (*self.eos_token_ids, *([] if self.bos_token_id is None else [self.bos_token_id])):
            if not 0 <= token_id < self.vocab_size:
                raise ModelError(f"token id {token_id} is outside of the vocabulary of {self.vocab_size}")
        if self.experts is not None and self.output_norms:
            raise ModelError("experts in a layer whose MLP's output has a norm are not supported")
        if self.experts is not None and self.num_layers * self.experts.count > MAX_EXPERTS_OF_ALL_LAYERS:
            raise ModelError(
                f"{self.num_layers} layers of {self.experts.count} experts, must be up to "
                f"{MAX_EXPERTS_OF_ALL_LAYERS} experts in all"
            )
        if all(layer.rope is None for layer in self.layers):
            raise ModelError("no layer has a rotary embedding")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return tuple(layer.sliding_window for layer in self.layers)

    @property
    def window(self) -> int | None:
        """How many tokens any layer attends to at most; None: all."""
        windows = [window for window in self.windows if window is not None]
        return max(windows) if len(windows) == self.num_layers else None

    @property
    def rope(self) -> Rope:
        """Of the layers that see all of the context, where they have one: a draft's layer has the same."""
        ropes = [(layer.sliding_window is not None, layer.rope) for layer in self.layers if layer.rope is not None]
        return min(ropes, key=itemgetter(0))[1]

    @property
    def mlp_norm(self) -> str:
        """What the norm of the MLP's input is called: Gemma gives Llama's name to the norm of attention's output."""
        return "pre_feedforward_layernorm" if self.output_norms else "post_attention_layernorm"

    @property
    def mlps(self) -> list[str]:
        """What the names of a layer's MLPs begin with: there is one, or each expert is one."""
        return ["mlp."] if self.experts is None else [f"mlp.experts.{index}." for index in range(self.experts.count)]

    def share(self, size: int) -> ModelSpec:
        """What each of ``size`` ranks has: some of the heads, and a part of each MLP.

        Raises:
            ModelError: they cannot be shared evenly.
        """
        shares = {}
        for name in ("num_heads", "num_kv_heads", "intermediate_size"):
            shares[name], rest = divmod(getattr(self, name), size)
            if rest:
                raise ModelError(
                    f"runtime.tensor_parallel_size is {size}, by which the model's {name} ({getattr(self, name)}) "
                    "cannot be divided"
                )
        return replace(self, **shares)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight the model needs, by its Hugging Face name."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        of_layer = self._layer_shapes()
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, q_size, kv_size = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norms = ["input_layernorm", self.mlp_norm]
        if self.output_norms:
            norms += ["post_attention_layernorm", "post_feedforward_layernorm"]
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in norms}
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            shapes[f"self_attn.{name}_proj.weight"] = (size, hidden)
            if self.attention_bias:
                shapes[f"self_attn.{name}_proj.bias"] = (size,)
        if self.qk_norm:
            shapes |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        shapes["self_attn.o_proj.weight"] = (hidden, q_size)
        if self.output_bias:
            shapes["self_attn.o_proj.bias"] = (hidden,)
        if self.attention_sinks:
            shapes["self_attn.sinks.weight"] = (self.num_heads,)
        return shapes | self._mlp_shapes()

    def _mlp_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {}
        if self.experts is not None:
            shapes["mlp.gate.weight"] = (self.experts.count, hidden)
        for prefix in self.mlps:
            shapes |= {f"{prefix}{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
            shapes[f"{prefix}down_proj.weight"] = (hidden, inner)
        if self.experts is not None and self.experts.bias:
            shapes |= {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()}
        return shapes
