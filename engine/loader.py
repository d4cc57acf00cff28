"""Chooses device, precision, kernels and attention backend, and loads the model for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import structlog
import torch

from evospec.engine import gpu
from evospec.engine.attention import flashinfer
from evospec.engine.attention.base import AttentionBackend, AttentionSpec
from evospec.engine.attention.native_cpu import NativeAttention
from evospec.engine.attention.torch_paged import TorchPagedAttention
from evospec.engine.batch import ForwardBatch, ForwardOutput
from evospec.engine.config import EngineConfig, RuntimeConfig
from evospec.engine.machine import available_cores
from evospec.engine.models.config import ModelError, ModelFiles, ModelSpec
from evospec.engine.models.decoder import HeadSlab, load_model
from evospec.engine.models.native_decoder import NativeDecoder, unsupported_shape
from evospec.engine.models.weights import open_weights
from evospec.engine.tensor_parallel.ranks import Ranks
from evospec.kernels import native
from evospec.kernels.head_rows import TailMemory

log = structlog.get_logger(__name__)

_FIRST_WITH_FP8 = (8, 9)
"""Compute capability, Ada's"""
_INT4_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16,)
"""Of activations that matrices of 4 bits are multiplied with as they are"""

BackendName = Literal["torch", "native", "flashinfer"]


class CausalLM(Protocol):
    """What the model runner and drafts need of a model."""

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights."""

    def forward(self, batch: ForwardBatch, attention: AttentionBackend, capture: Sequence[int] = ()) -> ForwardOutput:
        """Run all layers; ``capture``: those whose output is wanted as features, in ascending order."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding: [T] int32 → [T, hidden]."""

    def compute_logits(self, hidden: torch.Tensor, only_largest: bool = False) -> torch.Tensor:
        """[L, hidden] → [L, vocab] float32, maybe valid until the next call only.

        ``only_largest``: of each row only the largest has to be right; the others may be estimates that are smaller.
        """

    def head_slab(self, token_ids: torch.Tensor | None) -> HeadSlab:
        """``compute_logits`` for these tokens [K] int64 only; None for all of them, with nothing copied."""

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the output projection: [n] int32 → [n, hidden] floating-point."""


class AllRanks(Protocol):
    """A model whose parts are on several ranks, as rank 0 sees it."""

    def allocate(self, num_blocks: int) -> AttentionBackend:
        """Make the KV cache at all ranks; returns the part that is here."""

    def make_tails(self, num_slabs: int, slots: int) -> TailMemory:
        """Make the tails of a draft's head at all ranks."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and how to make the KV cache that goes with it."""

    model: CausalLM
    spec: ModelSpec
    max_model_len: int
    dtype: torch.dtype
    device: torch.device
    backend: BackendName
    make_attention: Callable[[AttentionSpec], AttentionBackend]
    team: native.Team | None = None
    """The threads of the native kernels, where those are used."""
    digits: int = 2
    """Of 8 bits each, of activations in the native kernels."""
    cuda_graphs: bool = False
    """Whether small steps are to be CUDA graphs."""
    num_ranks: int = 1
    """Processes that each have a share of the heads, and of the KV cache."""
    all_ranks: AllRanks | None = None
    """At rank 0 of several."""

    @property
    def reads_prompts_apart(self) -> bool:
        """Whether tokens of prompts are rounded otherwise than tokens that are decoded."""
        return self.team is not None and native.has_amx()


def load(
    config: EngineConfig,
    files: ModelFiles,
    spec: ModelSpec,
    team: native.Team | None = None,
    ranks: Ranks | None = None,
) -> LoadedModel:
    """Load the weights of ``files``, whose shape is ``spec``.

    Args:
        config: precision, device and kernels.
        team: threads for native kernels, shared with a model loaded before (None: new ones).
        ranks: of which this process loads one share (None: all is loaded here).

    Raises:
        ModelError: the file cannot be read, or the options ask for what model or machine cannot do.
    """
    device = choose_device(config.runtime)
    threads = config.runtime.threads or max(available_cores() // config.runtime.tensor_parallel_size, 1)
    backend = _backend(config, spec, device)
    # The native kernels have threads of their own; torch's would only wait for cores that those keep busy.
    torch.set_num_threads(1 if backend == "native" else threads)
    # Partial sums in bfloat16 would differ with the number of rows, which decides how a product is split.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    dtype = _dtype(config, backend, device)
    max_model_len = config.model.longest_sequence(spec)
    source = open_weights(files)
    if backend == "native":
        team, digits = team or native.Team(threads), native.DIGITS_OF_BITS[int(config.runtime.activation_bits)]
        decoder = NativeDecoder(source, spec, team, max_model_len, digits)
        make_attention = partial(NativeAttention, team=team)
        return LoadedModel(decoder, spec, max_model_len, dtype, device, backend, make_attention, team, digits)
    # Which experts a step needs is only known while it is computed; and ranks are told on the CPU what to compute.
    has_graphs = backend == "flashinfer" and config.runtime.cuda_graphs and spec.experts is None and ranks is None
    has_int4 = device.type == "cuda" and dtype in _INT4_DTYPES
    model = load_model(
        source, spec, dtype, device, max_model_len, ranks, _multiplies_fp8(dtype, device), multiplies_int4=has_int4
    )
    attention = flashinfer.FlashInferAttention if backend == "flashinfer" else TorchPagedAttention
    num_ranks = 1 if ranks is None else ranks.size
    return LoadedModel(
        model, spec, max_model_len, dtype, device, backend, attention, cuda_graphs=has_graphs, num_ranks=num_ranks
    )


def choose_device(runtime: RuntimeConfig) -> torch.device:
    """Where the model runs; raises ``ModelError`` where that is a GPU, and it cannot. A GPU left alone is logged."""
    if runtime.is_on_gpu:
        if (reason := runtime.why_not_gpu) is not None:
            raise ModelError(f"the model cannot run on a GPU: {reason}")
        if not torch.cuda.is_available():
            raise ModelError("the model cannot run on a GPU: torch finds none")
        return torch.device("cuda")
    if runtime.device == "auto" and gpu.has_gpu():
        log.warning("the model runs on the CPU, although there is a GPU", reason=runtime.why_not_gpu)
    return torch.device("cpu")


def _backend(config: EngineConfig, spec: ModelSpec, device: torch.device) -> BackendName:
    """The backend asked for, or the best that works here; a fallback is logged once, with its reason."""
    asked = config.runtime.attention_backend
    best: BackendName = "flashinfer" if device.type == "cuda" else "native"
    wanted = best if asked == "auto" else asked
    if wanted == "torch":
        return "torch"
    reason = (_why_not_flashinfer if wanted == "flashinfer" else _why_not_native)(config, spec, device)
    if reason is None:
        return wanted
    if asked != "auto":
        raise ModelError(f"runtime.attention_backend {asked} cannot be used: {reason}")
    if wanted == "flashinfer":
        raise ModelError(
            f"{reason}; with runtime.attention_backend torch it runs there, slowly, or with runtime.device cpu"
        )
    log.warning("using the slower torch backend", reason=reason)
    return "torch"


def _multiplies_fp8(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has products of FP8, with a scale for each row of both sides, for this device."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) >= _FIRST_WITH_FP8


def _why_not_flashinfer(config: EngineConfig, spec: ModelSpec, device: torch.device) -> str | None:
    heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
    smallest = AttentionSpec(1, *heads, 1, config.cache.block_size, _dtype(config, "flashinfer", device), device)
    return flashinfer.unsupported_reason(smallest) or gpu.why_not_flashinfer()


def _why_not_native(config: EngineConfig, spec: ModelSpec, device: torch.device) -> str | None:
    if device.type != "cpu":
        return "the model runs on a GPU"
    if config.model.dtype == "float32":
        return "model.dtype is float32"
    if config.runtime.tensor_parallel_size > 1:
        return "the compiled kernels are for one process, not for runtime.tensor_parallel_size"
    return unsupported_shape(spec) or native.unsupported_reason()


def _dtype(config: EngineConfig, backend: BackendName, device: torch.device) -> torch.dtype:
    if config.model.dtype != "auto":
        return torch.float32 if config.model.dtype == "float32" else torch.bfloat16
    fast_bf16 = device.type == "cuda" or backend == "native" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast_bf16 else torch.float32
