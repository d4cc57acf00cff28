"""Drafts of other projects propose what their definitions say, and change no output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM

from evospec.engine.config import SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.engine.speculation import speculator
from evospec.engine.speculation.drafters.eagle import EagleProposer
from evospec.engine.speculation.drafters.head import COUNTS_FILE, DraftHead
from evospec.engine.speculation.length.policy import EarlyStop
from evospec.engine.step import DraftSlot, Proposals
from evospec.kernels import native
from tests.exactness import SAMPLED, SETTINGS
from tests.foreign_drafts import CHECKPOINTS, NUM_LAYERS, VOCAB, Checkpoint
from tests.reference.eagle3 import ReferenceDraft
from tests.tiny_drafts import Engine, Setting
from tests.tiny_models import make_directory

NUM_TOKENS, NUM_DRAFTS = 12, 4
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, ignore_eos=True)
SETTING = Setting(max_num_seqs=3, max_batched_tokens=30, num_blocks=64)

Drafted = list[tuple[list[int], list[int]]]
"""Known tokens, and the drafts after them."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("target") / "target", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 400, (length,), generator=generator).tolist() for length in (1, 2, 15, 16, 17, 41)]


@pytest.fixture(scope="module")
def without(files: ModelFiles, prompts: list[list[int]]) -> list[list[int]]:
    return Engine(files, SETTING).generate(prompts, [GREEDY] * len(prompts))


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> Drafted:
    """All that is drafted in the test."""
    taken: Drafted = []
    propose = EagleProposer.propose

    def recorded(proposer: EagleProposer, slots: Sequence[DraftSlot], stop: EarlyStop | None = None) -> Proposals:
        proposals = propose(proposer, slots, stop)
        for slot in slots:
            drafts = proposals[slot.request].token_ids if slot.request in proposals else []
            taken.append((slot.request.all_token_ids.copy(), drafts.copy()))
        return proposals

    monkeypatch.setattr(EagleProposer, "propose", recorded)
    return taken


@pytest.fixture(scope="module")
def states(files: ModelFiles, prompts: list[list[int]], without: list[list[int]]) -> dict[int, list[torch.Tensor]]:
    """By a sequence's first token: the target's states after 0, 1, ... layers, by ``transformers``."""
    target = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    of_first = {}
    for prompt, output in zip(prompts, without, strict=True):
        with torch.inference_mode():
            hidden = target(torch.tensor([prompt + output]), output_hidden_states=True).hidden_states
        of_first[prompt[0]] = [one[0] for one in hidden]
    return of_first


def speculation_of(directory: Path, vocabulary: str = "full", **more: object) -> SpeculationConfig:
    return SpeculationConfig(
        draft=str(directory), vocabulary=vocabulary, num_speculative_tokens=NUM_DRAFTS, adaptive=False, **more
    )


def reference_of(checkpoint: Checkpoint, files: ModelFiles) -> ReferenceDraft:
    plain = {name.removeprefix("model."): tensor for name, tensor in checkpoint.tensors.items()}
    definition = replace(checkpoint.definition, layer=checkpoint.definition.layer.removeprefix("model."))
    return ReferenceDraft(definition, plain, load_file(files.path / "model.safetensors"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_same_chains_as_the_definition(
    name: str,
    files: ModelFiles,
    prompts: list[list[int]],
    without: list[list[int]],
    states: dict[int, list[torch.Tensor]],
    drafted: Drafted,
    tmp_path: Path,
) -> None:
    checkpoint = CHECKPOINTS[name]()
    speculation = speculation_of(checkpoint.write(tmp_path / "draft"))
    assert Engine(files, SETTING, speculation).generate(prompts, [GREEDY] * len(prompts)) == without
    reference, chains = reference_of(checkpoint, files), set()
    assert len(drafted) > len(prompts)
    for tokens, drafts in drafted:
        assert drafts == reference.chain(tokens, states[tokens[0]], len(drafts))
        chains.add(tuple(drafts))
    assert max(map(len, chains)) == NUM_DRAFTS
    assert len(chains) > len(prompts)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_layers_counted_in_another_way_are_seen(
    name: str, files: ModelFiles, prompts: list[list[int]], states: dict[int, list[torch.Tensor]], drafted: Drafted,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The same draft over the states of the next layer, as ``capture_layers`` can say, proposes something else."""
    checkpoint = CHECKPOINTS[name]()
    right = checkpoint.definition.boundaries
    layers = tuple(min(boundary, NUM_LAYERS - 2 - index) for index, boundary in enumerate(reversed(right)))[::-1]
    speculation = speculation_of(checkpoint.write(tmp_path / "draft"), capture_layers=layers)
    Engine(files, SETTING, speculation).generate(prompts[3:], [GREEDY] * len(prompts[3:]))
    moved = replace(checkpoint.definition, boundaries=tuple(layer + 1 for layer in layers))
    differing = 0
    for tokens, drafts in drafted:
        of_first = states[tokens[0]]
        assert drafts == reference_of(replace(checkpoint, definition=moved), files).chain(tokens, of_first, len(drafts))
        differing += drafts != reference_of(checkpoint, files).chain(tokens, of_first, len(drafts))
    assert differing > len(drafted) / 2


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("copied", ["lm_head", "embed_tokens"])
def test_copies_of_the_targets_rows_take_no_memory(
    copied: str, dtype: Literal["float32", "auto"], prompts: list[list[int]], drafted: Drafted, tmp_path: Path
) -> None:
    files = make_directory(tmp_path / "target", num_hidden_layers=NUM_LAYERS, head_dim=32)
    path = files.path / "model.safetensors"
    target = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(target, path)
    rows = target["lm_head.weight" if copied == "lm_head" else "model.embed_tokens.weight"]
    checkpoint, sizes, chains = CHECKPOINTS["headless"](head_dim=32), [], []
    for number, more in enumerate(({}, {f"{copied}.weight": rows}, {f"{copied}.weight": rows.flip(0)})):
        tensors = checkpoint.tensors | {name: one.clone() for name, one in more.items()}
        directory = replace(checkpoint, tensors=tensors).write(tmp_path / str(number))
        engine = Engine(files, SETTING, speculation_of(directory), dtype=dtype)
        engine.generate(prompts, [GREEDY] * len(prompts))
        sizes.append(engine.core.introduction.draft_bytes)
        chains.append(drafted.copy())
        drafted.clear()
    assert sizes[0] == sizes[1] < sizes[2]
    assert chains[0] == chains[1] != chains[2]


def test_a_draft_that_is_never_right_is_told(
    files: ModelFiles, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculator, "_ALARM_CHAINS", 20)
    speculation = speculation_of(CHECKPOINTS["specforge"]().write(tmp_path / "draft"))
    engine = Engine(files, SETTING, speculation)
    with capture_logs() as logs:
        engine.generate(prompts, [GREEDY] * len(prompts))
    assert [(entry["event"], entry["chains"]) for entry in logs] == [("the draft is hardly ever right", 20)]


ALL_KINDS = [GREEDY, *(SamplingParams(max_tokens=NUM_TOKENS, seed=7, **kind) for kind in SAMPLED.values())]


@pytest.fixture(scope="module")
def texts(prompts: list[list[int]]) -> list[list[int]]:
    """They repeat themselves."""
    return [prompt * 3 for prompt in prompts]


@pytest.fixture(scope="module")
def expected(files: ModelFiles, texts: list[list[int]]) -> list[list[int]]:
    """Outputs without drafts."""
    return Engine(files, SETTINGS["alone"]).generate(texts, ALL_KINDS)


VOCABULARIES = {
    "safeailab": ("auto", "its own 160 tokens, with a prior"),
    "angelslim": ("dynamic:full+24", "its own 160 tokens + 24, with a prior"),
    "speculators_qwen3": ("dynamic:64+24", "static:64 + 24, with a prior"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_outputs_do_not_change(
    name: str, setting: str, files: ModelFiles, texts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    """With the draft's own tokens, with tails beside them, and with tails beside some of them."""
    vocabulary, description = VOCABULARIES[name]
    directory = CHECKPOINTS[name]().write(tmp_path / "draft")
    save_file({"counts": torch.arange(VOCAB)}, directory / COUNTS_FILE)
    engine = Engine(files, SETTINGS[setting], speculation_of(directory, vocabulary))
    assert engine.generate(texts, ALL_KINDS) == expected
    assert engine.generate(texts, ALL_KINDS) == expected
    assert engine.num_drafted > 0
    assert (engine.core.introduction.draft or "").endswith(description)


@dataclass(frozen=True)
class KernelTarget:
    """A model that the compiled kernels run, what it answers without drafts, and the same by ``transformers``."""

    files: ModelFiles
    outputs: list[list[int]]
    reference: Any


@pytest.fixture(scope="module")
def kernel_target(texts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> KernelTarget:
    files = make_directory(tmp_path_factory.mktemp("kernels") / "target", num_hidden_layers=NUM_LAYERS, head_dim=32)
    outputs = Engine(files, SETTING, dtype="auto").generate(texts, [GREEDY] * len(texts))
    return KernelTarget(files, outputs, AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32))


@pytest.mark.skipif(native.unsupported_reason() is not None, reason="no compiled kernels")
@pytest.mark.parametrize(("name", "head_dim"), [*((name, 32) for name in CHECKPOINTS), ("safeailab", 16)])
def test_on_the_compiled_kernels(
    name: str,
    head_dim: int,
    kernel_target: KernelTarget,
    texts: list[list[int]],
    drafted: Drafted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounded, it mostly proposes what its definition says; in one call for a chain the same as token by token.

    A head of 16 dimensions is the one that the kernels lack.
    """
    files = kernel_target.files
    checkpoint = CHECKPOINTS[name](head_dim=head_dim)
    directory = checkpoint.write(tmp_path / "draft")
    outputs, runs = [], list[Drafted]()
    for vocabulary in ("full", "dynamic:full+0", "dynamic:full+0" if name == "headless" else "dynamic:full+24"):
        for one_call in (True, False):
            with monkeypatch.context() as patch:
                if not one_call:
                    patch.setattr(DraftHead, "make_chain", lambda *_: None)
                engine = Engine(files, SETTING, speculation_of(directory, vocabulary), dtype="auto")
                outputs.append(engine.generate(texts, [GREEDY] * len(texts)))
            runs.append(drafted.copy())
            drafted.clear()
    assert outputs == [kernel_target.outputs] * 6
    assert runs[0] == runs[1]
    assert runs[2] == runs[3]
    assert runs[4] == runs[5]
    reference, right = reference_of(checkpoint, files), 0
    for tokens, drafts in runs[0]:
        with torch.inference_mode():
            hidden = kernel_target.reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        right += drafts[:1] == reference.chain(tokens, [one[0] for one in hidden], 1)
    assert right > len(runs[0]) / 2
