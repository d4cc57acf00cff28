"""A draft never changes an output: float32 engines with and without one, token for token, on a tiny random model.

Drafts: an EAGLE-3 layer and a model of random weights, which are hardly ever right, the target itself, which is nearly
always, and what the text repeats, with and without an EAGLE-3 layer for sequences without a repeat. Vocabularies: all
512 tokens, 64, and 4. Settings: one request at a time, a batch, prompts cut into chunks, too few blocks (preemption),
and a second time with all prefixes cached.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.vocabulary.hard_switch import switch_hard
from evospec.engine.config import SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.engine.speculation import draft_files
from evospec.engine.speculation.drafters.head import COUNTS_FILE
from evospec.kernels import native
from tests.combinations import pairwise
from tests.exactness import SETTINGS, make_sampling
from tests.tiny_drafts import Engine, make_draft_directory
from tests.tiny_models import make_directory

COPYING = ("n-grams", "n-grams, else eagle3")
DRAFTS = ("eagle3", "other model", "target itself", *COPYING)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("target") / "target")


@pytest.fixture(scope="module")
def drafts(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SpeculationConfig]:
    """What to draft with, by name."""
    eagle = make_draft_directory(tmp_path_factory.mktemp("draft") / "eagle", files)
    other = make_directory(tmp_path_factory.mktemp("draft") / "other", seed=1, num_hidden_layers=1)
    of_layer = SpeculationConfig(method="eagle3", draft=str(eagle), adaptive=False)
    of_model, of_target = (
        SpeculationConfig(method="draft_model", draft=str(model.path), adaptive=False) for model in (other, files)
    )
    of_text = SpeculationConfig(method="ngram", adaptive=False)
    return dict(zip(DRAFTS, (of_layer, of_model, of_target, of_text, of_layer), strict=True))


@pytest.fixture
def shipped(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of shipped drafts that holds nothing but token counts, which draft models need too."""
    monkeypatch.setattr(draft_files, "DRAFTS", tmp_path)
    (tmp_path / files.name).mkdir()
    save_file({"counts": torch.arange(512)}, tmp_path / files.name / COUNTS_FILE)
    return tmp_path


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """1 to 90 random tokens; some share a prefix of two blocks, two are the same."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 400, (90,), generator=generator).tolist()
    others = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in (1, 7, 15, 16, 17)]
    return [text, text, text[:40], text[:33] + others[1], *others]


@pytest.fixture(scope="module")
def repeating(prompts: list[list[int]]) -> list[list[int]]:
    """Texts that repeat themselves, and some that do not."""
    return [
        prompts[0][:7] * 10,
        prompts[0][:7] * 10,
        prompts[0],
        prompts[0][:40] * 2,
        prompts[0][:5] * 3,
        *prompts[4:8],
    ]


@pytest.fixture(scope="module")
def sampling(prompts: list[list[int]]) -> dict[str, list[SamplingParams]]:
    return {kind: make_sampling(kind, len(prompts)) for kind in ("greedy", "sampled")}


@pytest.fixture(scope="module")
def texts(prompts: list[list[int]], repeating: list[list[int]]) -> dict[str, list[list[int]]]:
    """The prompts, by what is to draft: n-grams want texts that repeat themselves."""
    return {draft: repeating if draft in COPYING else prompts for draft in DRAFTS}


@pytest.fixture(scope="module")
def expected(
    files: ModelFiles, prompts: list[list[int]], repeating: list[list[int]], sampling: dict[str, list[SamplingParams]]
) -> dict[tuple[bool, str], list[list[int]]]:
    """Without speculation, by whether the text repeats itself and the kind of sampling."""
    engine = Engine(files, SETTINGS["alone"])
    outputs = {
        (repeats, kind): engine.generate_alone(texts, params)
        for repeats, texts in ((False, prompts), (True, repeating))
        for kind, params in sampling.items()
    }
    assert len({tuple(output) for output in outputs[False, "greedy"]}) == len(prompts) - 1
    return outputs


def make_engine(
    files: ModelFiles, speculation: SpeculationConfig, setting: str, length: int, vocabulary: str
) -> Engine:
    update = {"num_speculative_tokens": length, "vocabulary": vocabulary}
    return Engine(files, SETTINGS[setting], speculation.model_copy(update=update))


def check(
    engine: Engine, setting: str, prompts: list[list[int]], sampling: list[SamplingParams], expected: list[list[int]]
) -> None:
    """The outputs are those expected, and the setting did what it is for."""
    assert engine.generate(prompts, sampling) == expected
    if setting == "cached":
        assert engine.generate(prompts, sampling) == expected
        assert engine.num_cached_tokens > len(prompts) * 16
    assert (engine.core.stats().preemptions > 0) == (setting == "preemption")
    assert (engine.largest_batch > 1) == (setting != "alone")


@pairwise(
    setting=SETTINGS,
    draft=DRAFTS,
    vocabulary=["full", "static:64", "static:4"],
    length=[0, 1, 2, 4, 6],
    kind=["greedy", "sampled"],
)
@pytest.mark.usefixtures("shipped")
def test_outputs_are_those_without_speculation(
    files: ModelFiles,
    drafts: dict[str, SpeculationConfig],
    texts: dict[str, list[list[int]]],
    sampling: dict[str, list[SamplingParams]],
    expected: dict[tuple[bool, str], list[list[int]]],
    setting: str,
    draft: str,
    vocabulary: str,
    length: int,
    kind: str,
) -> None:
    engine = make_engine(files, drafts[draft], setting, length, vocabulary)
    if draft == "n-grams, else eagle3" and length:
        switch_hard(engine.core)
    check(engine, setting, texts[draft], sampling[kind], expected[draft in COPYING, kind])
    assert (engine.num_drafted > 0) == (length > 0)
    if draft == "target itself" and vocabulary == "full" and kind == "greedy":
        assert engine.num_accepted == engine.num_drafted
    elif draft == "target itself" and vocabulary == "full" and length:
        assert engine.num_accepted > engine.num_drafted / 10  # drafts leave out unlikely tokens


def test_adaptive_lengths(
    files: ModelFiles,
    drafts: dict[str, SpeculationConfig],
    prompts: list[list[int]],
    sampling: dict[str, list[SamplingParams]],
    expected: dict[tuple[bool, str], list[list[int]]],
) -> None:
    """Costs are measured with made-up sequences, which leave nothing behind that matters."""
    engine = Engine(files, SETTINGS["cached"], drafts["eagle3"].model_copy(update={"adaptive": True}))
    check(engine, "cached", prompts, sampling["greedy"], expected[False, "greedy"])


@pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))
def test_compiled_kernels_alone(tmp_path: Path, prompts: list[list[int]]) -> None:
    """In bf16 too, to the bit: steps of up to 8 tokens multiply each row as if it were alone."""
    files = make_directory(tmp_path / "target", hidden_size=128, head_dim=32)
    draft = str(make_draft_directory(tmp_path / "draft", files))
    speculation = SpeculationConfig(method="eagle3", draft=draft, adaptive=False, num_speculative_tokens=6)
    engine = Engine(files, SETTINGS["alone"], speculation, dtype="auto")
    plain = Engine(files, SETTINGS["alone"], dtype="auto")
    params = make_sampling("greedy", len(prompts))
    assert engine.generate_alone(prompts, params) == plain.generate_alone(prompts, params)
    assert engine.num_drafted > 0
