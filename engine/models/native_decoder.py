"""Decoders of all families on the compiled CPU kernels, with quantised weights multiplied as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, groupby

import numpy as np
import numpy.typing as npt
import torch

from evospec.engine.attention.base import AttentionBackend
from evospec.engine.attention.native_cpu import NativeAttention
from evospec.engine.batch import ForwardBatch, ForwardOutput
from evospec.engine.models.config import Experts, ModelSpec
from evospec.engine.models.decoder import HeadSlab, RotaryEmbedding, rotary_tables
from evospec.engine.models.eagle3_config import Eagle3Config
from evospec.engine.models.weights import WeightSource
from evospec.kernels.native import BF16_FORMAT, MatrixPart, PackedMatrix, Team, linear, packed_format
from evospec.kernels.native_decoder import Decoder, LayerWeights, PassOutputs, unpack_rows
from evospec.kernels.native_experts import MixtureWeights
from evospec.kernels.screened_head import ScreenedHead, is_worth_it


def unsupported_sizes(*sizes: tuple[str, int]) -> str | None:
    """Why the kernels cannot run a network that has these; None where they can."""
    odd = (f"{name} {size} is not a multiple of 32" for name, size in sizes if size % 32)
    return next(odd, None)


def unsupported_shape(spec: ModelSpec) -> str | None:
    """Why the kernels cannot run this model; None where they can."""
    sizes = [(name, getattr(spec, name)) for name in ("hidden_size", "intermediate_size", "head_dim")]
    turning = [("number of turning dimensions", layer.rope.dim) for layer in spec.layers if layer.rope is not None]
    return unsupported_sizes(*sizes, *turning)


def gate_up_rows(intermediate_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where rows of gate and of up go: groups of 16 in turn, so that one work item has what SwiGLU multiplies."""
    rows = np.arange(intermediate_size)
    gate_rows = rows // 16 * 32 + rows % 16
    return gate_rows, gate_rows + 16


def make_decoder(
    team: Team, shape: ModelSpec | Eagle3Config, layers: Sequence[LayerWeights], target: ModelSpec
) -> Decoder:
    """The compiled stack of these layers: the target's own, or a draft's for it, which shares its embedding."""
    return Decoder(
        team,
        hidden=shape.hidden_size,
        intermediate=shape.intermediate_size,
        heads=shape.num_heads,
        kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        norm_eps=shape.rms_norm_eps,
        layers=layers,
        gate=shape.activation if isinstance(shape, ModelSpec) else "silu",
        attention_scale=shape.attention_scale if isinstance(shape, ModelSpec) else None,
        embedding_scale=target.embedding_scale,
    )


_DIGITS_OF_LAST_LAYER = 2
"""What the last layer rounds goes straight into the logits (docs/decisions/004-integer-products.md)."""


class NativeDecoder:
    """Same interface and mathematics as ``engine.models.decoder.TorchDecoder``.

    Products take bf16 activations and the file's own weights and accumulate in float32; the residual stream is
    float32. ``attention`` must be a ``NativeAttention`` of the same ``team``.
    """

    def __init__(self, source: WeightSource, spec: ModelSpec, team: Team, max_model_len: int, digits: int = 2) -> None:
        self.spec, self._team = spec, team
        self._pack = pack = _Packer(source, spec, digits)
        self.embedding = pack.matrix("model.embed_tokens.weight")
        self.head = self.embedding if spec.tie_word_embeddings else pack.matrix("lm_head.weight")
        self._screened = ScreenedHead(team, self.head) if is_worth_it(self.head) else None
        self._logits = torch.empty(0, spec.vocab_size)
        self._first_logits: dict[int, torch.Tensor] = {}
        """The first rows of these, by their number."""
        self._norm = source.dequantized("model.norm.weight")
        last = _Packer(source, spec, _DIGITS_OF_LAST_LAYER)
        rotary = rotary_tables(spec.layers, max_model_len, torch.device("cpu"))
        layers = [
            (last if index == spec.num_layers - 1 else pack).layer(index, of_layer)
            for index, of_layer in enumerate(rotary)
        ]
        self._decoder = make_decoder(team, spec, layers, target=spec)
        matrices = [matrix for layer in layers for matrix in layer.matrices]
        tied = self.head is self.embedding
        self.weight_bytes = sum(m.num_bytes for m in (*matrices, self.head, *(() if tied else (self.embedding,))))
        self.weight_bytes += 0 if self._screened is None else self._screened.num_bytes

    def forward(self, batch: ForwardBatch, attention: AttentionBackend, capture: Sequence[int] = ()) -> ForwardOutput:
        """Hidden states and features are bf16."""
        assert isinstance(attention, NativeAttention)
        attention.plan(batch)
        residual = self.embed(batch.token_ids)
        outputs = PassOutputs(residual.shape[0], self._norm, capture)
        self._decoder.forward(attention.batch, attention.cache, residual, outputs=outputs)
        return ForwardOutput(outputs.hidden, outputs.features if capture else None)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._decoder.embed(self.embedding, token_ids)

    def compute_logits(self, hidden: torch.Tensor, only_largest: bool = False) -> torch.Tensor:
        # The memory is used again: fresh pages for megabytes of logits cost more than the product itself. So are its
        # views: to make one takes 20 microseconds after a pass over the weights
        # (docs/decisions/008-one-call-for-a-chain.md).
        count = hidden.shape[0]
        if count > self._logits.shape[0]:
            self._logits = torch.empty(count, self.spec.vocab_size)
            self._first_logits.clear()
        if count not in self._first_logits:
            self._first_logits[count] = self._logits[:count]
        out = self._first_logits[count]
        if only_largest and self._screened is not None:
            return self._screened.logits(hidden, out)
        return linear(self._team, self.head, hidden, out)

    def head_slab(self, token_ids: torch.Tensor | None) -> HeadSlab:
        if token_ids is None:
            return HeadSlab(self.compute_logits, 0, packed=self.head)
        name = "model.embed_tokens.weight" if self.spec.tie_word_embeddings else "lm_head.weight"
        rows = self._pack.selected(name, token_ids, lambda: self.head_rows(token_ids.int()))
        return HeadSlab(lambda hidden: linear(self._team, rows, hidden), rows.num_bytes, packed=rows)

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        return unpack_rows(self._team, self.head, token_ids)


class _Packer:
    """Packs a model's matrices in the precision they have in the file, or as bf16."""

    def __init__(self, source: WeightSource, spec: ModelSpec, digits: int) -> None:
        self._source, self._spec, self._digits = source, spec, digits
        self._shapes = spec.tensor_shapes()

    def matrix(self, *names: str, places: Sequence[npt.NDArray[np.int64]] | None = None) -> PackedMatrix:
        """Weights with their biases, where they have them, in one matrix.

        ``places``: where the rows of each go; None: they lie one below the other. Weights of several storage formats
        become bf16.
        """
        if places is None:
            ends = list(accumulate(self._shapes[name][0] for name in names))
            places = [np.arange(end - self._shapes[name][0], end) for name, end in zip(names, ends, strict=True)]
        keep, num_rows = len({self._format(name) for name in names}) == 1, sum(map(len, places))
        parts = [self._part(name, rows, keep) for name, rows in zip(names, places, strict=True)]
        biases, bias = [name.removesuffix("weight") + "bias" for name in names], None
        if biases[0] in self._shapes:
            bias = torch.empty(num_rows)
            for name, rows in zip(biases, places, strict=True):
                bias[torch.from_numpy(rows)] = self._source.dequantized(name)
        return PackedMatrix(num_rows, self._shapes[names[0]][1], parts, bias, self._digits)

    def selected(self, name: str, token_ids: torch.Tensor, unpacked: Callable[[], torch.Tensor]) -> PackedMatrix:
        """Some rows of one matrix, in the order given; ``unpacked`` gives them as float32."""
        tensor, row_map = self._source.quantized(name), np.arange(len(token_ids))
        if tensor is None or self._format(name) == BF16_FORMAT:
            part = MatrixPart(row_map, values=unpacked())
        else:
            part = MatrixPart(row_map, int(tensor.type), blocks=tensor.blocks(token_ids.numpy()))
        return PackedMatrix(len(token_ids), self._shapes[name][1], [part], None, self._digits)

    def layer(self, index: int, rotary: RotaryEmbedding | None) -> LayerWeights:
        spec, prefix = self._spec, f"model.layers.{index}."
        qkv = [f"{prefix}self_attn.{letter}_proj.weight" for letter in "qkv"]

        def norm(name: str, exists: bool) -> torch.Tensor | None:
            return self._source.dequantized(f"{prefix}{name}.weight") if exists else None

        return LayerWeights(
            qkv=[self.matrix(*names) for _, names in groupby(qkv, key=self._format)],
            output=self.matrix(prefix + "self_attn.o_proj.weight"),
            mlp=self._mlp(prefix + "mlp.") if spec.experts is None else self._mixture(prefix + "mlp.", spec.experts),
            input_norm=self._source.dequantized(f"{prefix}input_layernorm.weight"),
            mlp_norm=self._source.dequantized(f"{prefix}{spec.mlp_norm}.weight"),
            cos_sin=None if rotary is None else rotary.cos_sin,
            q_norm=norm("self_attn.q_norm", spec.qk_norm),
            k_norm=norm("self_attn.k_norm", spec.qk_norm),
            attention_norm=norm("post_attention_layernorm", spec.output_norms),
            output_norm=norm("post_feedforward_layernorm", spec.output_norms),
            sinks=self._source.dequantized(f"{prefix}self_attn.sinks.weight") if spec.attention_sinks else None,
            window=spec.layers[index].sliding_window,
        )

    def _mlp(self, prefix: str) -> tuple[PackedMatrix, PackedMatrix]:
        gate_up = [f"{prefix}{name}_proj.weight" for name in ("gate", "up")]
        places = gate_up_rows(self._spec.intermediate_size)
        return self.matrix(*gate_up, places=places), self.matrix(prefix + "down_proj.weight")

    def _mixture(self, prefix: str, experts: Experts) -> MixtureWeights:
        router = self._source.dequantized(prefix + "gate.weight")
        bias = self._source.dequantized(prefix + "gate.bias") if experts.bias else None
        mlps = [self._mlp(f"{prefix}experts.{index}.") for index in range(experts.count)]
        return MixtureWeights(router, mlps, experts.per_token, experts.normalized, bias)

    def _part(self, name: str, row_map: npt.NDArray[np.int64], keep: bool) -> MatrixPart:
        tensor = self._source.quantized(name)
        if keep and tensor is not None and self._format(name) != BF16_FORMAT:
            return MatrixPart(row_map, int(tensor.type), blocks=tensor.blocks)
        return MatrixPart(row_map, values=partial(self._source.dequantized, name))

    def _format(self, name: str) -> int:
        """The packed format that holds the tensor exactly; bf16 for floats and where there is none."""
        tensor = self._source.quantized(name)
        return BF16_FORMAT if tensor is None else packed_format(int(tensor.type))
