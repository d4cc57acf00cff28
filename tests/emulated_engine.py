"""Engines on an emulated CUDA device: what they said and what their steps cost.

They run in a process of their own, in which ``begin`` comes first.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from tests import emulated_driver, emulated_flashinfer
from tests.emulated_cuda import COUNTS, CUDA

if TYPE_CHECKING:
    from evospec.engine.config import EngineConfig
    from evospec.engine.core import EngineCore
    from evospec.engine.models.config import ModelFiles


class Job(msgspec.Struct):
    """Engines to run one after the other."""

    batches: list[int]
    """Sequences of each."""
    kinds: tuple[str, ...] = ("greedy",)
    """Of sampling; sequences have them in turn."""
    method: Literal["eagle3", "draft_model", "ngram", "none"] = "eagle3"
    vocabulary: str = "dynamic:64+32"
    num_drafted: int = 3
    max_tokens: int = 12
    longest_prompt: int = 40
    num_steps: int = 1000
    """At most."""
    logprobs: int | None = None
    adapters: bool = False
    family: str | None = None
    """One of ``tests.tiny_families``; None: plain Llama."""
    way: str | None = None
    """How it is quantised, one of ``tests.quantized_models``."""
    check: Literal["nothing", "outputs", "drafts"] = "nothing"
    """What a CPU computes, too: the same without drafts, or with them."""


class StepCost(msgspec.Struct):
    """What a step cost; by line and reason."""

    num_sequences: int
    num_tokens: int
    waits: dict[str, int]
    launches: dict[str, int]
    uploads: dict[str, int]
    replays: int


class Ran(msgspec.Struct):
    """One engine's run; a CPU's too is told of as ``expected``."""

    steps: list[StepCost]
    outputs: list[list[int]]
    weights: list[list[float]]
    """Of the priors with which sequences end."""
    num_drafted: int = 0
    num_accepted: int = 0
    expected: Ran | None = None


def run(directory: Path, job: Job, batch: int) -> Ran:
    """An engine with so many sequences."""
    from evospec.engine.core import EngineCore
    from evospec.engine.models.registry import validate_model_files
    from tests.quantized_models import WAYS
    from tests.tiny_families import FAMILIES
    from tests.tiny_models import make_directory

    size: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 512}
    make = make_directory if job.family is None else FAMILIES[job.family].make
    files = make(directory / "target", **size) if job.way is None else WAYS[job.way].make(directory)[0]
    spec = validate_model_files(files)
    expected = None
    if job.check != "nothing":
        expected = _generate(EngineCore(_config(directory, files, job, batch, "cpu"), files, spec), job, batch)
    core = EngineCore(_config(directory, files, job, batch, "cuda"), files, spec)
    assert core.introduction.attention_backend == "flashinfer"
    if job.adapters:
        _put_adapter_in_force(core)
    return msgspec.structs.replace(_generate(core, job, batch), expected=expected)


def _config(directory: Path, files: ModelFiles, job: Job, batch: int, device: Any) -> EngineConfig:
    from evospec.engine.adapters_config import AdaptersConfig
    from evospec.engine.config import (
        CacheConfig,
        EngineConfig,
        ModelConfig,
        RuntimeConfig,
        SchedulerConfig,
        SpeculationConfig,
    )
    from evospec.engine.draft_vocab.bigram_graph import build_bigram_graph
    from evospec.engine.models.registry import validate_model_files
    from evospec.engine.speculation.drafters.session_head import GRAPH_FILE
    from tests.tiny_drafts import make_draft_directory

    eagle = make_draft_directory(directory / "draft", files)
    text = np.random.default_rng(0).integers(3, 60, 2000).astype(np.int32)
    build_bigram_graph([text], validate_model_files(files).vocab_size).save(eagle / GRAPH_FILE)
    draft = str({"eagle3": eagle, "draft_model": files.path}.get(job.method))
    speculation = SpeculationConfig(method="none")
    on_gpu = device == "cuda"
    if job.method != "none" and (on_gpu or job.check == "drafts"):
        speculation = SpeculationConfig(
            method=job.method,
            draft=None if job.method == "ngram" else draft,
            vocabulary=job.vocabulary,
            num_speculative_tokens=job.num_drafted,
            adaptive=False,
        )
    alignment = AdaptersConfig()
    if on_gpu and job.adapters:
        alignment = AdaptersConfig(
            enabled=True, redis_url="redis://127.0.0.1:1/0", shared_directory=directory / "shared", rank=8
        )
    return EngineConfig(
        model=ModelConfig(dtype="float32", cache_dir=directory / "cache"),
        cache=CacheConfig(prefix_caching=False, num_blocks=16 * batch + 16),
        scheduler=SchedulerConfig(max_num_seqs=max(batch, 8), max_batched_tokens=max(512, 48 * batch)),
        speculation=speculation,
        runtime=RuntimeConfig(device=device, attention_backend="flashinfer" if on_gpu else "torch", threads=1),
        alignment=alignment,
    )


def _put_adapter_in_force(core: EngineCore) -> None:
    """An adapter with random weights drafts for everybody."""
    import torch

    from evospec.engine.online.adapter_control import adapter_key
    from evospec.engine.online.adapters import Assignment

    adapters: Any = core._drafter._proposer._adapters  # type: ignore[attr-defined]
    key = adapter_key(adapters.config.key_scope, "tests", None)
    adapters.refresh = lambda: None
    adapters._in_force[0] = Assignment(0, key, 1)
    adapters._by_key = {key: adapters._in_force[0]}
    for weights in adapters._tensors[0].values():
        weights.copy_((torch.randn(weights.shape) * 0.05).to(weights.dtype).to(weights.device))


def _generate(core: EngineCore, job: Job, batch: int) -> Ran:
    import torch

    from evospec.engine.draft_vocab.snapshot import SessionSnapshot
    from evospec.engine.messages import EngineRequest, SamplingParams, SessionState
    from tests.exactness import SAMPLED
    from tests.tiny_drafts import CLIENT

    generator = torch.Generator().manual_seed(0)
    kinds: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, **SAMPLED}
    for index in range(batch):
        num_tokens = int(torch.randint(5, job.longest_prompt, (1,), generator=generator))
        prompt = torch.randint(3, 400, (num_tokens,), generator=generator).tolist()
        kind = kinds[job.kinds[index % len(job.kinds)]]
        common: dict[str, Any] = {"max_tokens": job.max_tokens, "ignore_eos": True, "seed": index}
        common["logprobs"] = job.logprobs
        session = SessionState(snapshot=b"", domain="")
        sampling = SamplingParams(**(common | kind))
        request = EngineRequest(
            request_id=str(index), prompt_token_ids=prompt, sampling=sampling, tenant="tests", session=session
        )
        core.add(CLIENT, request)
    while core._grammars.waiting:  # so that all begin together
        core._follow_grammars()
        time.sleep(0.001)
    ran, num_done = Ran([], [[] for _ in range(batch)], [[] for _ in range(batch)]), 0
    while num_done < batch and len(ran.steps) < job.num_steps:
        COUNTS.reset()
        of_clients, timings = core.step()
        if timings is not None:
            counts = dict(COUNTS.waits), dict(COUNTS.launches), dict(COUNTS.uploads)
            ran.steps.append(StepCost(timings.num_sequences, timings.num_tokens, *counts, COUNTS.replays))
        for output in of_clients[CLIENT]:
            assert output.error is None, output.error
            ran.outputs[int(output.request_id)] += output.token_ids
            num_done += output.finish_reason is not None
            ran.num_drafted += output.num_draft_tokens
            ran.num_accepted += output.num_accepted_tokens
            if output.session_snapshot is not None:
                snapshot = msgspec.msgpack.decode(output.session_snapshot, type=SessionSnapshot)
                ran.weights[int(output.request_id)] = snapshot.weights
    return ran


def install() -> None:
    """From here on the engine finds a GPU, with flashinfer, which computes in float32 too: then outputs are a CPU's."""
    emulated_driver.install()
    emulated_flashinfer.install()
    import torch

    from evospec.engine import gpu, loader
    from evospec.engine.attention import flashinfer

    flashinfer._DTYPES = loader._INT4_DTYPES = (torch.float32, torch.bfloat16)
    loader.choose_device = lambda runtime: CUDA if runtime.device == "cuda" else torch.device("cpu")
    gpu.why_not_flashinfer = lambda: None  # type: ignore[assignment]


def begin() -> None:
    """Make this process one for ``run_all``."""
    install()
    import structlog
    import torch

    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))


def layer_launches(directory: Path, family: str) -> int:
    """Kernels that one more layer of a family's model launches."""
    from evospec.engine.attention.flashinfer import FlashInferAttention
    from evospec.engine.loader import load
    from evospec.engine.models.registry import validate_model_files
    from tests.ragged_batches import RaggedSequences, attention_spec
    from tests.tiny_families import FAMILIES

    counts, sequences = [], RaggedSequences(2, 64, 16)
    batch = sequences.step([3, 1]).on(CUDA)
    for num_layers in (3, 4):
        files = FAMILIES[family].make(directory / str(num_layers), num_hidden_layers=num_layers, head_dim=64)
        spec = validate_model_files(files)
        loaded = load(_config(directory, files, Job([1], method="none"), 1, "cuda"), files, spec)
        heads = spec.num_heads, spec.num_kv_heads
        shape = attention_spec(heads, spec.head_dim, sequences, loaded.dtype, CUDA, num_layers)
        COUNTS.reset()
        loaded.model.forward(batch, FlashInferAttention(shape))
        counts.append(sum(COUNTS.launches.values()))
    return counts[1] - counts[0]


def run_all(directory: Path, job: Job) -> list[Ran]:
    """A job's engines."""
    return [run(directory, job, batch) for batch in job.batches]
