"""Tiny random EAGLE-3 drafts for tests, and an engine in this process that speculates with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, repeat
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from evospec.engine.core import EngineCore, Outputs
from evospec.engine.messages import EngineRequest, SamplingParams, SessionState, VocabularyCounts
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.eagle3 import Eagle3, save_draft
from evospec.engine.models.eagle3_config import Eagle3Config
from evospec.engine.models.registry import validate_model_files
from evospec.engine.speculation.drafters.base import Draft
from evospec.engine.speculation.drafters.head import COUNTS_FILE

CLIENT = b"test"
WEIGHTS = {
    "qkv": "qkv_proj.weight",
    "output": "o_proj.weight",
    "down": "down_proj.weight",
}
"""Weights of a draft, by the names of its matrices in ``kernels.batched_lora``."""


def random_draft(files: ModelFiles, seed: int = 0, feature_norms: Literal["none", "each"] = "each") -> Eagle3:
    """Of the shape that fits a tiny model."""
    config = Eagle3Config.for_target(validate_model_files(files), files.name, (0, 1, 2), intermediate_size=192)
    torch.manual_seed(seed)
    draft = Eagle3(replace(config, variant=replace(config.variant, feature_norms=feature_norms))).requires_grad_(False)
    for weight in draft.parameters():
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5)
    return draft


def make_draft_directory(directory: Path, files: ModelFiles, seed: int = 0) -> Path:
    """A random draft with random token counts."""
    save_draft(random_draft(files, seed), directory)
    counts = torch.randint(0, 1000, (validate_model_files(files).vocab_size,))
    save_file({"counts": counts}, directory / COUNTS_FILE)
    return directory


def with_draft(files: ModelFiles, directory: Path) -> SpeculationConfig:
    """A random EAGLE-3 draft, whose vocabulary follows the sessions."""
    return SpeculationConfig(
        method="eagle3",
        draft=str(make_draft_directory(directory, files)),
        vocabulary="dynamic:64+32",
        num_speculative_tokens=4,
        adaptive=False,
    )


@dataclass(frozen=True)
class Setting:
    """How an engine schedules, and what its prompts must go through."""

    prefix_caching: bool = False
    max_num_seqs: int = 8
    max_batched_tokens: int = 512
    num_blocks: int = 128


class Engine:
    """An ``EngineCore``, stepped until its requests are done. ``speculation`` None: none."""

    def __init__(
        self,
        files: ModelFiles,
        setting: Setting,
        speculation: SpeculationConfig | None = None,
        draft: Draft | None = None,
        dtype: Literal["float32", "auto"] = "float32",
        cache_dir: Path | None = None,
        alignment: AdaptersConfig | None = None,
        num_ranks: int = 1,
    ) -> None:
        config = EngineConfig(
            model=ModelConfig(
                name=str(files.path), dtype=dtype, **({} if cache_dir is None else {"cache_dir": cache_dir})
            ),
            cache=CacheConfig(prefix_caching=setting.prefix_caching, num_blocks=setting.num_blocks),
            scheduler=SchedulerConfig(max_num_seqs=setting.max_num_seqs, max_batched_tokens=setting.max_batched_tokens),
            speculation=speculation or SpeculationConfig(method="none"),
            runtime=RuntimeConfig(
                device="cpu",
                attention_backend="torch" if dtype == "float32" else "native",
                threads=1,
                tensor_parallel_size=num_ranks,
            ),
            alignment=alignment or AdaptersConfig(),
        )
        self.core = EngineCore(config, files, validate_model_files(files), draft)
        self._ids = count()
        self._outputs: dict[str, list[int]] = {}
        self._unfinished: set[str] = set()
        self.snapshots: dict[str, bytes] = {}
        """Of the sessions of the last ``generate``, by request."""
        self.counts: dict[str, VocabularyCounts] = {}
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_cached_tokens = 0
        self.largest_batch = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._unfinished)

    def add(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        tenant: str = "tests",
        session: SessionState | None = None,
        prediction: Sequence[int] = (),
        learn: bool = True,
    ) -> str:
        request_id = str(next(self._ids))
        self._unfinished.add(request_id)
        self._outputs[request_id] = []
        self.core.add(
            CLIENT,
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=list(prompt),
                sampling=sampling,
                tenant=tenant,
                session=session,
                prediction_token_ids=list(prediction),
                learn=learn,
            ),
        )
        return request_id

    def abort(self, request_id: str) -> None:
        self._unfinished.discard(request_id)
        self.core.abort(CLIENT, [request_id])

    def step(self) -> None:
        outputs, timings = self.core.step()
        if timings is not None:
            self.largest_batch = max(self.largest_batch, timings.num_sequences)
        self.take(outputs)

    def take(self, outputs: Outputs) -> None:
        """Those of a step of the core."""
        for output in outputs[CLIENT]:
            assert output.error is None, output.error
            self._outputs[output.request_id] += output.token_ids
            self.num_drafted += output.num_draft_tokens
            self.num_accepted += output.num_accepted_tokens
            if output.finish_reason is not None:
                self.num_cached_tokens += output.num_cached_tokens
                self._unfinished.discard(output.request_id)
                if output.session_snapshot is not None:
                    self.snapshots[output.request_id] = output.session_snapshot
                if output.vocabulary is not None:
                    self.counts[output.request_id] = output.vocabulary

    def output(self, request_id: str) -> list[int]:
        return self._outputs[request_id]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        tenants: Sequence[str] | None = None,
        sessions: Sequence[SessionState] | None = None,
    ) -> list[list[int]]:
        """Output token ids of all prompts, given to the engine at once. ``sessions`` None: requests without one."""
        self.snapshots.clear()
        ids = [
            self.add(prompt, params, tenant, session)
            for prompt, params, tenant, session in zip(
                prompts, sampling, tenants or repeat("tests"), sessions or repeat(None), strict=False
            )
        ]
        while self.is_busy:
            self.step()
        assert self.core.stats().blocks_used == 0
        return [self.output(request_id) for request_id in ids]

    def generate_alone(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[list[int]]:
        """The same, one request after the other."""
        return [self.generate([prompt], [params])[0] for prompt, params in zip(prompts, sampling, strict=True)]
