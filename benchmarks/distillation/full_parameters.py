"""A baseline: full-parameter online distillation (Online Speculative Decoding, arXiv 2310.07177).

``python -m benchmarks.distillation.full_parameters`` is ``evospec`` with a worker that trains all weights of the
draft, and an engine that takes them over. It needs ``key_scope`` global and ``log.control_share`` 0.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import replace

import torch

from benchmarks.common import experiments
from evospec.adapters.alignment import worker
from evospec.adapters.alignment.chains import ChainDrafter, ChainStep, SegmentBatch
from evospec.adapters.alignment.updates import Updater
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.online.whole_draft import whole_layout
from evospec.server import processes

_RATE = 0.01
"""All weights at once need smaller steps than two thin matrices, one of them zero at first."""
_ENGINE, _WORKER = "evospec.engine.process", "evospec.adapters.alignment.worker"


class FullParameterUpdater(Updater):
    """Adam on all weights of a copy of the draft, every step of a chain the same weight, over the whole head."""

    trains_fusion = True

    def __init__(self, base: ChainDrafter, config: AdaptersConfig, key: str, fingerprint: str) -> None:
        super().__init__(base, config, key, fingerprint)
        self.layout = whole_layout(base.draft.config, fingerprint)
        self._learning_rate *= _RATE

    def published(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().bfloat16() for name, weight in self.trained.draft.named_parameters()}

    def drafter(self, published: Mapping[str, torch.Tensor]) -> ChainDrafter:
        draft = copy.deepcopy(self._base.draft).float()
        draft.load_state_dict(published)
        return replace(self._base, draft=draft)

    def _start(self, published: Mapping[str, torch.Tensor] | None) -> torch.optim.Optimizer:
        self.trained = self.drafter(self._base.draft.state_dict() if published is None else published)
        """The draft in training."""
        return torch.optim.Adam(self.trained.draft.requires_grad_().parameters())

    def _steps(self, batch: SegmentBatch) -> list[ChainStep]:
        return self.trained.steps(batch, torch.arange(len(self._base.target.head)))

    def _follow(self) -> None:
        pass  # what was trained last is published


def main() -> None:
    """Be the worker, or the command line that starts this as its worker."""
    if sys.argv[1:] == [_WORKER]:
        worker.main(FullParameterUpdater)
    else:
        processes.ENGINE_COMMAND = [sys.executable, "-m", "benchmarks.distillation.whole_draft", _ENGINE]
        processes.WORKER_COMMAND = [sys.executable, "-m", "benchmarks.distillation.full_parameters", _WORKER]
        experiments.main()


if __name__ == "__main__":
    main()
