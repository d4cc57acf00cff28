"""Decoders of all families in plain PyTorch: the reference every faster implementation is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evospec.engine.attention.base import AttentionBackend
from evospec.engine.batch import ForwardBatch, ForwardOutput
from evospec.engine.models.config import LayerSpec, ModelSpec, Rope
from evospec.engine.models.mlp import MixtureOfExperts, Mlp
from evospec.engine.models.projection import Projection
from evospec.engine.models.weight_reader import WeightReader
from evospec.engine.models.weights import WeightSource
from evospec.engine.tensor_parallel.ranks import Ranks
from evospec.kernels.between_products import add_and_norm, add_normed, prepare_heads, rms_norm, rotate
from evospec.kernels.heads import HeadNorms, Heads, Rotation
from evospec.kernels.native import PackedMatrix


class RotaryEmbedding:
    """The tables of a ``Rope`` for positions 0 .. max_positions - 1, and so many ``beyond`` them, in float32."""

    def __init__(self, rope: Rope, max_positions: int, device: torch.device, beyond: int = 0) -> None:
        exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
        inverse_frequencies = 1.0 / rope.theta**exponents
        factors = rope.factors_for(max_positions)
        if factors is not None:
            inverse_frequencies = inverse_frequencies / torch.tensor(factors)
        angles = torch.outer(torch.arange(max_positions + beyond, dtype=torch.float32), inverse_frequencies)
        self.cos_sin = (torch.cat((angles.cos(), angles.sin()), dim=1) * rope.scale).to(device)
        """[max_positions + beyond, rope.dim]: cosines, then sines"""

    def __call__(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate [T, heads, head_dim] at positions [T]; the same shape and dtype."""
        return rotate(heads, Rotation(self.cos_sin, positions))


def rotary_tables(
    layers: Sequence[LayerSpec], max_positions: int, device: torch.device
) -> list[RotaryEmbedding | None]:
    """Of each layer; layers with the same embedding share its tables."""
    ropes = {layer.rope for layer in layers if layer.rope is not None}
    tables = {rope: RotaryEmbedding(rope, max_positions, device) for rope in ropes}
    return [None if layer.rope is None else tables[layer.rope] for layer in layers]


@dataclass(frozen=True)
class HeadSlab:
    """An output projection, or some rows of one, copied together."""

    project: Callable[[torch.Tensor], torch.Tensor]
    """[L, hidden] → [L, rows] float32, maybe valid until the next call only"""
    num_bytes: int
    """Memory of its own"""
    rows: torch.Tensor | None = None
    """[rows, hidden], where they are floating-point numbers as they are"""
    packed: PackedMatrix | None = None
    """The same as the compiled kernels have it"""
    find: Callable[[torch.Tensor, int, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]] | None = None
    """``draft_head_topk`` of hidden states, a number of logits, and tails; None: all rows and tails are here"""


@dataclass(frozen=True)
class DecoderLayer:
    """One transformer block. Query, key and value share a matrix. Norms are float32."""

    spec: ModelSpec
    index: int
    rotary: RotaryEmbedding | None
    input_norm: torch.Tensor
    """[hidden]"""
    qkv_proj: Projection
    """[(num_heads + 2 * num_kv_heads) * head_dim, hidden]"""
    head_norms: HeadNorms | None
    o_proj: Projection
    """[hidden, num_heads * head_dim]"""
    sinks: torch.Tensor | None
    """[num_heads]"""
    attention_norm: torch.Tensor | None
    """[hidden], of what attention adds to the residual stream"""
    mlp_norm: torch.Tensor
    """[hidden], of the MLP's input"""
    mlp: Mlp | MixtureOfExperts
    output_norm: torch.Tensor | None
    """[hidden], of what the MLP adds"""
    ranks: Ranks | None
    """Those that have the other heads and parts of the MLP, whose number is left out of ``spec``; None: nobody"""

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend) -> torch.Tensor:
        """The residual stream after this layer: [T, hidden] → [T, hidden]."""
        spec, eps = self.spec, self.spec.rms_norm_eps
        qkv = self.qkv_proj(rms_norm(hidden, self.input_norm, eps))
        shape = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        rotation = None if self.rotary is None else Rotation(self.rotary.cos_sin, positions)
        q, k, v = prepare_heads(qkv, shape, self.head_norms, rotation)
        attended = attention.forward(self.index, q, k, v, self.sinks)
        added = self._sum(self.o_proj(attended.flatten(1)))
        hidden, normed = add_and_norm(hidden, added, self.attention_norm, self.mlp_norm, eps)
        return add_normed(hidden, self._sum(self.mlp.forward(normed)), self.output_norm, eps)

    def _sum(self, part: torch.Tensor) -> torch.Tensor:
        """Of what all ranks add to the residual stream."""
        return part if self.ranks is None else self.ranks.sum(part)


@dataclass(frozen=True)
class TorchDecoder:
    """A decoder with its embedding and output projection; its methods are those of ``engine.loader.CausalLM``.

    Inference only: no gradients. Where there are ``ranks``, each of which has some heads, a part of each MLP, and some
    rows of embedding and head, they call each method at once, and logits are whole at rank 0 only.
    """

    spec: ModelSpec
    embed_tokens: torch.Tensor
    """[vocab, hidden], or this rank's rows of it"""
    layers: list[DecoderLayer]
    norm: torch.Tensor
    """[hidden]"""
    lm_head: torch.Tensor
    """[vocab, hidden], or this rank's rows of it; the embedding itself where the model ties them"""
    weight_bytes: int
    ranks: Ranks | None

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, attention: AttentionBackend, capture: Sequence[int] = ()) -> ForwardOutput:
        attention.plan(batch)
        hidden = self.embed(batch.token_ids)
        captured = []
        for layer in self.layers:
            hidden = layer.forward(hidden, batch.positions, attention)
            if layer.index in capture:
                captured.append(hidden)
        features = torch.cat(captured, dim=1) if captured else None
        return ForwardOutput(rms_norm(hidden, self.norm, self.spec.rms_norm_eps), features)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows = self._rows(self.embed_tokens, token_ids)
        return rows if self.spec.embedding_scale == 1 else rows * self.spec.embedding_scale

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor, only_largest: bool = False) -> torch.Tensor:
        logits = F.linear(hidden, self.lm_head).float()
        if self.ranks is None:
            return logits
        lacking = -(-self.spec.vocab_size // self.ranks.size) - logits.shape[1]
        return self.ranks.gather(F.pad(logits, (0, lacking)))[:, : self.spec.vocab_size]

    def head_slab(self, token_ids: torch.Tensor | None) -> HeadSlab:
        if token_ids is None:
            return HeadSlab(self.compute_logits, 0, self.lm_head)
        rows = self.head_rows(token_ids)
        return HeadSlab(lambda hidden: F.linear(hidden, rows).float(), rows.nbytes, rows)

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._rows(self.lm_head, token_ids.to(self.lm_head.device))

    def _rows(self, matrix: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """[n, hidden]: each rank adds those that it has."""
        if self.ranks is None:
            return F.embedding(token_ids, matrix)
        places = token_ids.long() - self.ranks.share(self.spec.vocab_size).start
        is_elsewhere = (places < 0) | (places >= len(matrix))
        rows = F.embedding(places.masked_fill(is_elsewhere, 0), matrix)
        return self.ranks.sum(rows.masked_fill(is_elsewhere[:, None], 0))


def load_model(
    source: WeightSource,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int | None = None,
    ranks: Ranks | None = None,
    multiplies_fp8: bool = False,
    multiplies_int4: bool = False,
) -> TorchDecoder:
    """Dequantise matrices to ``dtype`` on ``device``, and norms to float32.

    ``max_model_len`` is the number of positions the rotary tables cover (default: the model's limit). With ``ranks``
    the weights are this rank's share of them. With ``multiplies_fp8``, which wants bfloat16, matrices of FP8 that have
    a scale a row, or one for all, stay as they are. With ``multiplies_int4`` those of Q4_0 and Q4_1, or of what Q4_1
    holds, do, where a rank has whole blocks of them.
    """
    weights = WeightReader(source, spec.tensor_shapes(), dtype, device, ranks, multiplies_fp8, multiplies_int4)
    spec = spec if ranks is None else spec.share(ranks.size)
    rotary = rotary_tables(spec.layers, max_model_len or spec.max_position_embeddings, device)
    embed_tokens = weights.rows("model.embed_tokens.weight")
    return TorchDecoder(
        spec=spec,
        embed_tokens=embed_tokens,
        layers=[_load_layer(weights, spec, index, rotary[index]) for index in range(spec.num_layers)],
        norm=weights.exact("model.norm.weight"),
        lm_head=embed_tokens if spec.tie_word_embeddings else weights.rows("lm_head.weight"),
        weight_bytes=weights.num_bytes,
        ranks=ranks,
    )


def _load_layer(weights: WeightReader, spec: ModelSpec, index: int, rotary: RotaryEmbedding | None) -> DecoderLayer:
    prefix = f"model.layers.{index}."
    attention = prefix + "self_attn."

    def norm(name: str) -> torch.Tensor:
        return weights.exact(name + ".weight")

    head_norms = None
    if spec.qk_norm:
        head_norms = HeadNorms(norm(attention + "q_norm"), norm(attention + "k_norm"), spec.rms_norm_eps)
    return DecoderLayer(
        spec=spec,
        index=index,
        rotary=rotary,
        input_norm=norm(prefix + "input_layernorm"),
        qkv_proj=weights.linear(*(f"{attention}{name}_proj" for name in "qkv")),
        head_norms=head_norms,
        o_proj=weights.linear_of_sum(attention + "o_proj"),
        sinks=weights.rows(attention + "sinks.weight") if spec.attention_sinks else None,
        attention_norm=norm(prefix + "post_attention_layernorm") if spec.output_norms else None,
        mlp_norm=norm(prefix + spec.mlp_norm),
        mlp=_load_mlp(weights, spec, prefix),
        output_norm=norm(prefix + "post_feedforward_layernorm") if spec.output_norms else None,
        ranks=weights.ranks,
    )


def _load_mlp(weights: WeightReader, spec: ModelSpec, prefix: str) -> Mlp | MixtureOfExperts:
    mlps = []
    for name in spec.mlps:
        gate_up, down = [f"{prefix}{name}{part}_proj" for part in ("gate", "up")], f"{prefix}{name}down_proj"
        mlps.append(
            Mlp(
                gate_up_proj=weights.linear(*gate_up),
                down_proj=weights.linear_of_sum(down),
                activation=spec.activation,
            )
        )
    if (experts := spec.experts) is None:
        return mlps[0]
    router, bias = (f"{prefix}mlp.gate.{kind}" for kind in ("weight", "bias"))
    router_bias = weights.exact(bias) if experts.bias else None
    return MixtureOfExperts(weights.exact(router), mlps, experts.per_token, experts.normalized, router_bias)
