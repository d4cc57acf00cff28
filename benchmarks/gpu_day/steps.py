"""Steps of an engine on a GPU, with random weights: what they take, and how often the host waits in them.

``python -m benchmarks.gpu_day.steps --shape 8b``; ``--check`` compares outputs with and without drafts instead, and
``--roof`` measures the card's own speeds, against which kernels are to be seen.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from evospec.engine import loader
from evospec.engine.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from evospec.engine.core import EngineCore
from evospec.engine.messages import EngineRequest, SamplingParams
from evospec.engine.models.config import ModelFiles, ModelSpec
from evospec.engine.models.eagle3 import Eagle3, save_draft
from evospec.engine.models.eagle3_config import Eagle3Config
from evospec.engine.models.families.known import spec_from_config
from evospec.engine.models.weights import ALL, QuantizedTensor, WeightSource
from evospec.engine.speculation.drafters.head import COUNTS_FILE
from tests.tiny_models import make_directory, tiny_config

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
    },
    "tiny": {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 512},
}
BATCHES = {"8b": (1, 8, 64, 256), "tiny": (1, 8)}
VOCABULARIES = {"8b": ("none", "static:32768", "dynamic:512+512"), "tiny": ("none", "static:128", "dynamic:64+32")}
PROMPT_TOKENS, NUM_DRAFTED = 64, 3
WARM_UP, MEASURED = 12, 30
_CLIENT = b"gpu day"


class RandomWeights(WeightSource):
    """Of a shape, made on the GPU: to read as many from a disk would take minutes."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._shapes, self._device = spec.tensor_shapes(), device

    def dequantized(self, name: str, rows: slice = ALL) -> torch.Tensor:
        height, *width = self._shapes[name]
        shape = (len(range(height)[rows]), *width)
        if len(shape) == 1:
            return torch.ones(shape, device=self._device)
        return torch.randn(shape, device=self._device, dtype=torch.bfloat16).mul_((2 / shape[-1]) ** 0.5)

    def quantized(self, name: str) -> QuantizedTensor | None:
        return None


class Machine:
    """A target, loaded once, and engines that draft for it in several ways."""

    def __init__(self, directory: Path, shape: str) -> None:
        self._directory = directory
        self.files, self.spec = _model(directory / "model", SHAPES[shape])
        self.draft = _draft(directory / "draft", self.spec, self.files.name)
        loader.open_weights = lambda files: RandomWeights(self.spec, torch.device("cuda:0"))  # type: ignore[attr-defined]
        started = time.monotonic()
        self._target = loader.load(self._config("none", 1), self.files, self.spec)
        print(f"loaded in {time.monotonic() - started:.1f} s, {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB free")

    def _config(self, vocabulary: str, batch: int) -> EngineConfig:
        speculation = SpeculationConfig(method="none")
        if vocabulary != "none":
            drafted: dict[str, Any] = {"num_speculative_tokens": NUM_DRAFTED, "adaptive": False}
            speculation = SpeculationConfig(method="eagle3", draft=str(self.draft), vocabulary=vocabulary, **drafted)
        blocks = batch * 24 + 64
        return EngineConfig(
            model=ModelConfig(cache_dir=self._directory),
            cache=CacheConfig(num_blocks=blocks, prefix_caching=False),
            scheduler=SchedulerConfig(max_num_seqs=max(batch, 8), max_batched_tokens=max(8192, 72 * batch)),
            speculation=speculation,
            runtime=RuntimeConfig(device="cuda", attention_backend="flashinfer", threads=1),
        )

    def engine(self, vocabulary: str, batch: int, temperature: float, max_tokens: int) -> EngineCore:
        """With a batch of requests added. Nobody may hold an earlier one: its memory is given back first."""
        gc.collect()
        torch.cuda.empty_cache()
        core = EngineCore(self._config(vocabulary, batch), self.files, self.spec, target=self._target)
        generator = torch.Generator().manual_seed(0)
        for index in range(batch):
            prompt = torch.randint(3, 400, (PROMPT_TOKENS,), generator=generator).tolist()
            length: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True}
            sampling = SamplingParams(**length, seed=index, temperature=temperature)
            request = EngineRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling, tenant="gpu day")
            core.add(_CLIENT, request)
        return core


def _model(directory: Path, shape: dict[str, int]) -> tuple[ModelFiles, ModelSpec]:
    """A tokenizer and a configuration; the weights beside them are a tiny model's, which nobody reads."""
    files, config = make_directory(directory), tiny_config("llama", **shape)
    (directory / "config.json").write_text(json.dumps(config))
    return files, spec_from_config(config, {})


def _draft(directory: Path, spec: ModelSpec, name: str) -> Path:
    save_draft(Eagle3(Eagle3Config.for_target(spec, name, (0, 1, 2), spec.intermediate_size)), directory)
    save_file({"counts": torch.arange(spec.vocab_size)}, directory / COUNTS_FILE)
    return directory


def _step_costs(machine: Machine, shape: str) -> None:
    for batch in BATCHES[shape]:
        for vocabulary in VOCABULARIES[shape]:
            core = machine.engine(vocabulary, batch, 1.0, 10 * (WARM_UP + MEASURED))
            for _ in range(WARM_UP):
                core.step()
            torch.cuda.synchronize()
            seconds, host, tokens, waits = [], [], 0, 0
            for _ in range(MEASURED):
                started, cpu = time.perf_counter(), time.thread_time()
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    outputs, _ = core.step()
                seconds.append(time.perf_counter() - started)
                host.append(time.thread_time() - cpu)
                waits += sum("synchroniz" in str(one.message) for one in seen)
                tokens += sum(len(one.token_ids) for one in outputs[_CLIENT])
            free = torch.cuda.mem_get_info()[0] / 2**30
            print(
                f"{batch:4d} sequences, {vocabulary:16s} {1e3 * median(seconds):8.2f} ms a step, host "
                f"{1e3 * median(host):6.2f} ms, {waits / MEASURED:5.1f} waits, {tokens / sum(seconds):8.0f} tokens/s, "
                f"{free:6.1f} GiB free",
                flush=True,
            )
            del core


def _check(machine: Machine, shape: str) -> None:
    """Outputs with drafts against those without; in bfloat16 rounding may differ, which is counted."""
    batch, of_each = 8, {}
    for vocabulary in VOCABULARIES[shape]:
        core = machine.engine(vocabulary, batch, 1.0, 24)
        outputs: list[list[int]] = [[] for _ in range(batch)]
        while any(len(tokens) < 24 for tokens in outputs):
            for one in core.step()[0][_CLIENT]:
                outputs[int(one.request_id)] += one.token_ids
        of_each[vocabulary] = outputs
        del core
    plain = of_each.pop("none")
    for vocabulary, outputs in of_each.items():
        same = sum(ours == theirs for ours, theirs in zip(outputs, plain, strict=True))
        print(f"{vocabulary}: {same} of {batch} outputs are those without drafts")


def _roof() -> None:
    """Bytes and products a second, and what a launch and a wait take."""
    device = torch.device("cuda:0")
    large = torch.empty(2**30, dtype=torch.uint8, device=device)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    print(f"copy {2 * large.numel() / _seconds(large.clone) / 1e12:.2f} TB/s")
    print(f"product {2 * 8192**3 / _seconds(lambda: a @ a) / 1e12:.0f} TFLOP/s")
    one = torch.zeros(1, device=device)
    print(f"launch {1e6 * _seconds(lambda: one.add_(1), 1000) / 1000:.1f} µs, wait {1e6 * _seconds(one.item):.1f} µs")


def _seconds(run: Callable[[], object], times: int = 1) -> float:
    """The best of some runs of so many calls."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(times):
            run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def main(
    shape: Annotated[str, typer.Option(help="8b or tiny.")] = "8b",
    check: Annotated[bool, typer.Option(help="Compare outputs.")] = False,
    roof: Annotated[bool, typer.Option(help="Measure the card.")] = False,
) -> None:
    if roof:
        _roof()
        return
    torch.cuda.set_sync_debug_mode("warn")
    with tempfile.TemporaryDirectory() as directory:
        machine = Machine(Path(directory), shape)
        (_check if check else _step_costs)(machine, shape)


if __name__ == "__main__":
    typer.run(main)
