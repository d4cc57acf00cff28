"""Typed options of the engine process. ``server.settings.Settings`` holds one as ``engine``.

Imports no torch: the launcher and the command line read it too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from evospec.engine import gpu
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.models.config import ModelError, ModelSpec
from evospec.engine.options import Section

CONFIG_VARIABLE = "EVOSPEC_ENGINE_CONFIG"
"""Environment variable in which the engine process finds its ``EngineConfig``, as JSON."""

"""There where a GPU is."""
_CACHE_ON_GPU = {"memory_fraction": 0.95, "max_bytes": None}
_SCHEDULER_ON_GPU = {"max_batched_tokens": 8192}
_DEFAULT_MAX_MODEL_LEN = 8192
MAX_SPECULATIVE_TOKENS = 8
"""Most draft tokens that a step may verify for a sequence; of copied ones ``MAX_COPIED_TOKENS``."""
MAX_COPIED_TOKENS = 32
"""A copy costs nothing to make, and a long one is often right to its end."""
MAX_TAIL_TOKENS = 2048
"""Most tokens of a session's own in its draft vocabulary."""


class ModelConfig(Section):
    """Which model is served and in what precision."""

    name: str = "smollm2-135m"
    """Registry name, path of a .gguf file or safetensors directory, or Hugging Face hub id."""
    served_name: str | None = None
    """Name shown to clients; default: the model's name."""
    revision: str | None = None
    """Revision of a hub id."""
    cache_dir: Path = Path.home() / ".cache" / "evospec"
    """Where downloads and derived files are kept."""
    verify: bool = True
    """After each start, hash the files that were downloaded, beside the engine at the lowest priority, and end the
    server if one is damaged."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Activations and KV cache; auto: bfloat16 where the device is fast at it."""
    max_model_len: int | None = Field(default=None, ge=32)
    """Longest prompt + output in tokens; default: the model's own limit, at most 8192."""

    def longest_sequence(self, spec: ModelSpec) -> int:
        """Most tokens of a sequence, as asked for or by default; ``ModelError`` if the model cannot have them."""
        limit, asked = spec.max_position_embeddings, self.max_model_len
        if asked is not None and asked > limit:
            raise ModelError(f"model.max_model_len is {asked}, but the model's limit is {limit}")
        return asked or min(limit, _DEFAULT_MAX_MODEL_LEN)


class CacheConfig(Section):
    """The paged KV cache."""

    block_size: Literal[16, 32, 64] = 16
    """Tokens per KV block."""
    memory_fraction: float = Field(default=0.5, gt=0, lt=1)
    """Share of the memory free after loading given to KV blocks; on a GPU: 0.95 of what steps and CUDA graphs leave of
    it."""
    max_bytes: int | None = Field(default=2 * 1024**3, gt=0)
    """Upper bound on KV memory in bytes; on a GPU: none."""
    num_blocks: int | None = Field(default=None, ge=2)
    """Exact number of blocks, instead of sizing by memory."""
    prefix_caching: bool = True
    """Share KV blocks of equal prefixes within a tenant."""

    def num_blocks_in(self, budget: int, bytes_per_block: int, longest: int) -> int:
        """Blocks in ``budget`` bytes; raises ``ModelError`` if they do not hold one sequence of ``longest`` tokens."""
        num_blocks = budget // bytes_per_block
        if num_blocks < -(-longest // self.block_size):
            raise ModelError(
                f"{budget / 2**20:.0f} MiB for the KV cache hold {num_blocks * self.block_size} tokens, but one "
                f"sequence may have {longest}: raise cache.max_bytes or lower model.max_model_len"
            )
        return num_blocks


class SchedulerConfig(Section):
    """Continuous batching."""

    max_num_seqs: int = Field(default=256, ge=1)
    """Most sequences in one step."""
    max_batched_tokens: int = Field(default=512, ge=16)
    """Most tokens in one step (prefill is cut to fit); on a GPU: 8192."""
    prompt_ms: int = Field(default=90, ge=1)
    """While sequences decode, prompts are read in chunks that make a step longer by about so many milliseconds: less,
    and streams run evenly; more, and first tokens come sooner."""
    max_waiting: int = Field(default=1024, ge=1)
    """Most requests waiting; more are refused with 503, but for tenants with less than an equal share."""

    @property
    def most_extra_rows(self) -> int:
        """Rows of logits of a step beyond one for each sequence, of drafts and prompts: there is memory for as many."""
        return max(self.max_num_seqs * MAX_SPECULATIVE_TOKENS, 16 * MAX_COPIED_TOKENS)

    @model_validator(mode="after")
    def _one_token_for_each(self) -> SchedulerConfig:
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError("max_batched_tokens must be at least max_num_seqs: each sequence needs a token a step")
        return self


class DynamicConfig(Section):
    """What fills the tails of vocabulary dynamic:K+S, and the prior on its tokens."""

    in_code_only = frozenset(
        ("in_context", "target_signal", "semantic", "graph", "tenant_memory", "prior", "prior_order", "replacement")
    )

    max_sessions: int = Field(default=64, ge=1)
    """Most running sequences with a vocabulary of their own; others draft from the core."""
    in_context: bool = True
    """The prompt's and the answer's own tokens enter the tail."""
    target_signal: Literal["off", "events", "every"] = "events"
    """The target's most likely tokens enter the tail: at verified positions whose token could not be drafted (events),
    or at every one."""
    semantic: bool = False
    """At events, tokens whose head rows are nearest to the draft's hidden state enter."""
    graph: bool = True
    """At events, tokens that often follow enter; in the prior, they are preferred."""
    tenant_memory: bool = True
    """Start from the tokens and the prior that the tenant's last sessions ended with."""
    prior: Literal["off", "fixed", "learned"] = "learned"
    """Prefer what followed before in the session, by fixed weights or by weights learned while serving."""
    prior_order: Literal[1, 2, 3] = 3
    """Most tokens in a row that the prior counts."""
    replacement: Literal["arc", "lru"] = "arc"
    """What leaves a full tail."""


class SpeculationConfig(Section):
    """Speculative decoding. It never changes an output, only how fast it comes."""

    method: Literal["auto", "none", "eagle3", "draft_model", "ngram", "grow"] = "auto"
    """What proposes tokens; auto: what speculation.draft names is, or else the draft shipped for the model or for one
    of its shape, ngram if there is none; ngram: what followed the same tokens earlier in the sequence, for any model;
    grow: a draft that the model's traffic teaches from the start, and ngram meanwhile."""
    draft: str | None = None
    """Directory or hub id of an EAGLE-3 draft, or a draft model's name or path as in model.name; default: the one
    shipped for the model."""
    capture_layers: tuple[int, ...] | None = None
    """Layers of the model, counted from 0, whose outputs an EAGLE-3 draft of another project takes; default: those that
    its files name."""
    vocabulary: str = Field(
        default="auto", pattern=r"^(auto|full|static:[1-9][0-9]*|dynamic:(full|[1-9][0-9]*)\+[0-9]+)$"
    )
    """Tokens a draft can propose: auto, dynamic:512+512 where a draft comes with counts of tokens (dynamic:32768+512 by
    a draft model with 100,000 tokens or more), else full; full; static:K, the K most frequent; dynamic:K+S, these and
    up to S of each session's own, with a prior. dynamic:full+0: the prior alone. A draft model uses its own counts
    where the target has none. For an EAGLE-3 draft with a head of its own, full is that head's tokens, and auto is
    dynamic:full+512 where the model's head tells what it lacks, else dynamic:full+0."""
    dynamic: DynamicConfig = Field(default_factory=DynamicConfig)
    num_speculative_tokens: int = Field(default=MAX_SPECULATIVE_TOKENS, ge=0, le=MAX_SPECULATIVE_TOKENS)
    """Most tokens drafted for a sequence a step; where tokens are copied, up to 32."""
    adaptive: bool = True
    """Draft fewer tokens, down to none, where measured costs and acceptance say so."""
    copies: bool = True
    """Where lengths adapt: copy what followed the longest repeat in a sequence's own text, where that promises more
    tokens a second than the draft."""

    @model_validator(mode="after")
    def _tail_within_bounds(self) -> SpeculationConfig:
        if self.vocabulary.startswith("dynamic:") and int(self.vocabulary.partition("+")[2]) > MAX_TAIL_TOKENS:
            raise ValueError(f"vocabulary {self.vocabulary}: a tail has at most {MAX_TAIL_TOKENS} tokens")
        return self

    @model_validator(mode="after")
    def _ngrams_need_no_draft(self) -> SpeculationConfig:
        if self.method in ("ngram", "grow") and self.draft is not None:
            raise ValueError(f"draft: method {self.method} has none")
        return self


class RuntimeConfig(Section):
    """Devices, processes and threads."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: on a GPU where there is one, with all that serving on it takes, else on the CPU."""
    attention_backend: Literal["auto", "torch", "native", "flashinfer"] = "auto"
    """auto: flashinfer on CUDA, native on a CPU with AVX2, torch otherwise."""
    activation_bits: Literal["8", "15"] = "8"
    """On a CPU, bits of activations in products with weights of 4 to 8 bits. With 8, products take half of the
    instructions; with AVX2, those of weights of 7 and 8 bits keep 15. With AMX, prompts are multiplied in bf16."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Processes that compute the model together, each with a share of its heads, MLPs and vocabulary: on as many GPUs
    of this machine, or, for tests, on its CPU."""
    cuda_graphs: bool = True
    """With flashinfer on one GPU, steps of up to 256 tokens are CUDA graphs, recorded when needed."""
    threads: int = Field(default=0, ge=0)
    """Compute threads; 0: one for each core this process may use, by affinity and quota."""

    @property
    def why_not_gpu(self) -> str | None:
        """What keeps the model from a GPU; None: nothing does."""
        needs_flashinfer = self.attention_backend in ("auto", "flashinfer")
        return gpu.why_not_gpu() or (gpu.why_not_flashinfer() if needs_flashinfer else None)

    @property
    def is_on_gpu(self) -> bool:
        """Whether that is where it runs."""
        return self.device == "cuda" or (self.device == "auto" and gpu.has_gpu() and self.why_not_gpu is None)

    @model_validator(mode="after")
    def _ranks_use_torch(self) -> RuntimeConfig:
        if self.tensor_parallel_size > 1 and self.attention_backend == "native":
            raise ValueError("tensor_parallel_size: with attention_backend native, which is for one process, only 1")
        return self


def _private_address() -> str:
    """An address that no other user can take first, unlike a fixed name in /tmp."""
    directory = os.environ.get("XDG_RUNTIME_DIR") or Path.home() / ".cache" / "evospec"
    return f"ipc://{directory}/evospec-engine.sock"


class EngineConfig(Section):
    """Everything the engine process needs to know."""

    address: str = Field(default_factory=_private_address, pattern=r"^(ipc://.+|tcp://.+:\d+)$")
    """ZMQ address the engine binds, ipc://PATH or tcp://HOST:PORT; default: a Unix socket in a directory of this user's
    own."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    speculation: SpeculationConfig = Field(default_factory=SpeculationConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    alignment: AdaptersConfig = Field(default_factory=AdaptersConfig)

    @model_validator(mode="after")
    def _sized_for_the_device(self) -> EngineConfig:
        """Where the model runs on a GPU: as much as one has, in place of defaults for a CPU.

        Attention in plain torch takes memory that nothing is kept free for, and so keeps to those.
        """
        if self.runtime.is_on_gpu and self.runtime.attention_backend != "torch":
            for section, sizes in ((self.cache, _CACHE_ON_GPU), (self.scheduler, _SCHEDULER_ON_GPU)):
                for name, size in sizes.items():
                    if name not in section.model_fields_set:
                        setattr(section, name, size)
        return self

    @property
    def must_learn(self) -> bool:
        """Whether alignment was asked for, and is not only on by default, where it can be."""
        asked = "enabled" in self.alignment.model_fields_set or self.speculation.method == "grow"
        return self.alignment.enabled and asked

    @model_validator(mode="after")
    def _alignment_sees_all_drafts(self) -> EngineConfig:
        method = self.speculation.method
        if self.must_learn and method not in ("auto", "eagle3", "grow"):
            raise ValueError(f"alignment: with speculation.method eagle3 or grow only, not {method}")
        if method == "grow" and not self.alignment.enabled:
            raise ValueError("speculation: method grow needs alignment.enabled")
        return self
