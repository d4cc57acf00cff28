"""Engines on an emulated CUDA device: what they say is what a CPU says, and a step has few waits and launches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import pytest

from evospec.engine.draft_vocab.resources import LIGHT_DRAFT_WEIGHTS
from tests.emulated_engine import Job, Ran, StepCost, begin, layer_launches, run_all

MOST_WAITS, MOST_LAUNCHES, MOST_LAUNCHES_A_LAYER = 4, 40, 12
BATCHES = [1, 8, 64]
LATE_MASKS = re.compile(r"engine/verifier\.py:\d+ index")
"""Where some rows are left out, because a grammar's masks are not there yet."""
KINDS = ("greedy", "plain", "truncated", "penalties", "bias and min_p", "grammar", "calls")


class Device:
    """The process that has it, as the emulation changes torch."""

    def __init__(self, process: Pool, directory: Path) -> None:
        self._process, self._directory = process, directory

    def run(self, job: Job) -> list[Ran]:
        return self._process.apply_async(run_all, (self._directory, job)).get(timeout=300)

    def layer_launches(self, family: str) -> int:
        return self._process.apply_async(layer_launches, (self._directory, family)).get(timeout=300)


@pytest.fixture(scope="module")
def process() -> Iterator[Pool]:
    with get_context("spawn").Pool(1, begin) as process:
        yield process


@pytest.fixture
def device(process: Pool, tmp_path: Path) -> Device:
    return Device(process, tmp_path)


def settled(ran: Ran) -> StepCost:
    """A step that decodes, and records no graph."""
    return ran.steps[-1]


def test_a_steps_waits_and_launches_do_not_grow_with_the_batch(device: Device) -> None:
    runs = device.run(Job(BATCHES, kinds=("plain",), longest_prompt=7, max_tokens=100, num_steps=12))
    costs = [settled(ran) for ran in runs]
    assert [cost.num_sequences for cost in costs] == BATCHES
    assert all(cost.num_tokens > 3 * cost.num_sequences for cost in costs)
    for cost in costs:
        assert sum(cost.waits.values()) <= MOST_WAITS, cost.waits
        assert sum(cost.launches.values()) <= MOST_LAUNCHES, cost.launches
        assert cost.replays == 4
    assert costs[0].waits.keys() == costs[1].waits.keys() == costs[2].waits.keys()


def test_every_feature_at_once_is_within_them(device: Device) -> None:
    runs = device.run(Job([7, 21], kinds=KINDS, logprobs=3, longest_prompt=7, max_tokens=100, num_steps=18))
    costs = [settled(ran) for ran in runs]
    assert [cost.num_sequences for cost in costs] == [7, 21]
    assert sum(costs[0].waits.values()) <= MOST_WAITS, costs[0].waits
    assert sum(costs[0].launches.values()) <= MOST_LAUNCHES, costs[0].launches
    few, many = ({line: n for line, n in cost.launches.items() if not LATE_MASKS.fullmatch(line)} for cost in costs)
    assert few == many
    assert costs[0].waits == costs[1].waits


@pytest.mark.parametrize("family", ["llama, yarn", "qwen3", "gemma3"])
def test_a_layer_launches_few_kernels(device: Device, family: str) -> None:
    """Also where heads have norms (Qwen 3), and what is added to the residual stream (Gemma 3)."""
    assert 8 <= device.layer_launches(family) <= MOST_LAUNCHES_A_LAYER


@pytest.mark.parametrize(
    "job",
    [
        Job([7], kinds=KINDS, logprobs=3, adapters=True, check="outputs", max_tokens=8),
        Job([7], kinds=KINDS, method="draft_model", vocabulary="full", check="outputs", max_tokens=8),
        Job([7], kinds=("greedy", "plain"), family="gpt_oss", check="outputs", max_tokens=8),
    ],
    ids=["eagle3", "draft model", "experts and sinks"],
)
def test_outputs_are_a_cpus(device: Device, job: Job) -> None:
    """In float32, with every feature; a draft model that is the target itself is right where nothing is random."""
    [ran] = device.run(job)
    assert ran.expected is not None
    assert ran.outputs == ran.expected.outputs
    assert ran.num_drafted > 0
    if job.method == "draft_model":
        assert ran.num_accepted > ran.num_drafted / 3
    elif job.family is None:  # which experts a step needs is found out on the CPU
        waits = max(sum(step.waits.values()) for step in ran.steps[-3:])
        assert waits <= MOST_WAITS + 1  # what is logged of the step


@pytest.mark.parametrize("batch", [3, 21])
def test_outputs_of_4_bits_are_a_cpus(batch: int, device: Device) -> None:
    """Which expands them when it loads. Prompts of few tokens, or of more than are multiplied as they are."""
    job = Job([batch], kinds=KINDS, way="gptq", check="outputs", max_tokens=8, longest_prompt=7 if batch == 3 else 40)
    [ran] = device.run(job)
    assert ran.expected is not None
    assert ran.outputs == ran.expected.outputs
    launched = {line.partition(" ")[2] for step in ran.steps for line in step.launches}
    assert launched >= {"_int4_kernel"}
    assert ("_expand_kernel" in launched) == (batch == 21)


def test_priors_are_a_cpus(device: Device) -> None:
    """They propose the same tokens, and learn the same from what became of them."""
    [ran] = device.run(Job([3], kinds=("greedy", "plain", "truncated"), check="drafts", max_tokens=40))
    assert ran.expected is not None
    assert ran.outputs == ran.expected.outputs
    assert (ran.num_drafted, ran.num_accepted) == (ran.expected.num_drafted, ran.expected.num_accepted)
    for weights, expected in zip(ran.weights, ran.expected.weights, strict=True):
        assert weights == pytest.approx(expected, abs=1e-3)
    assert any(weights != list(LIGHT_DRAFT_WEIGHTS) for weights in ran.weights)
