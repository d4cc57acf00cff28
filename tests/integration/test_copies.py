"""Copied drafts: taken where they promise more than the draft does, and never seen in an output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest

from evospec.engine.config import MAX_COPIED_TOKENS, MAX_SPECULATIVE_TOKENS, SpeculationConfig
from evospec.engine.core import Outputs
from evospec.engine.draft_vocab.running_texts import RunningTexts
from evospec.engine.messages import EngineOutput, SamplingParams, SessionState, StepTimings
from evospec.engine.models.config import ModelFiles
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.eagle import EagleProposer
from evospec.engine.speculation.drafters.lookup import PromptLookup
from evospec.engine.speculation.length.cost_meter import CostMeter
from evospec.engine.speculation.length.costs import Curve, StepCosts
from evospec.engine.step import Copy
from tests.tiny_drafts import Engine, Setting, make_draft_directory
from tests.tiny_models import make_directory

NUM_TOKENS = 48
FREE_VERIFICATION = Curve([(1, 1.0)])
DRAFTS_NEVER_PAY = StepCosts(FREE_VERIFICATION, first_draft=Curve([(1, 100.0)]), next_draft=Curve([(1, 100.0)]))
DRAFTS_COST_LITTLE = StepCosts(FREE_VERIFICATION, first_draft=Curve([(1, 0.05)]), next_draft=Curve([(1, 0.01)]))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("model"))


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Texts that repeat themselves; every way of choosing tokens, of few, so that answers repeat themselves too."""
    rng = np.random.default_rng(3)
    prompts = [[*piece, *piece, *piece[:4]] for piece in rng.integers(4, 500, (8, 12)).tolist()]
    few = {10: 50.0, 11: 50.0, 12: 50.0}
    ways = [
        SamplingParams(max_tokens=NUM_TOKENS, seed=1, temperature=0.0, logit_bias=few),
        SamplingParams(max_tokens=NUM_TOKENS, seed=2, temperature=0.3, logit_bias=few),
        SamplingParams(max_tokens=NUM_TOKENS, seed=3, temperature=0.8, frequency_penalty=0.4, logit_bias=few),
        SamplingParams(max_tokens=NUM_TOKENS, seed=4, temperature=0.0, num_speculative_tokens=2, logit_bias=few),
    ]
    return prompts, [ways[number % len(ways)] for number in range(len(prompts))]


def engine(
    files: ModelFiles,
    directory: Path,
    costs: StepCosts,
    patch: pytest.MonkeyPatch,
    copies: bool,
    vocabulary: str = "dynamic:96+32",
    seed: int = 0,
) -> Engine:
    patch.setattr(CostMeter, "measure", lambda _: costs)
    speculation = SpeculationConfig(
        method="eagle3",
        draft=str(make_draft_directory(directory, files, seed)),
        vocabulary=vocabulary,
        copies=copies,
    )
    return Engine(files, Setting(max_num_seqs=4), speculation)


def recorded(copying: Engine) -> list[EngineOutput]:
    """The outputs of all its steps from now on."""
    outputs: list[EngineOutput] = []
    step = copying.core.step

    def recorded_step() -> tuple[Outputs, StepTimings | None]:
        of_step, timings = step()
        outputs.extend(chain.from_iterable(of_step.values()))
        return of_step, timings

    copying.core.step = recorded_step  # type: ignore[method-assign]
    return outputs


def outputs_of(copying: Engine, prompts: list[list[int]], sampling: list[SamplingParams]) -> list[EngineOutput]:
    """Of all steps."""
    outputs = recorded(copying)
    copying.generate(prompts, sampling)
    return outputs


@pytest.mark.parametrize("vocabulary", ["dynamic:96+32", "static:96", "full"])
@pytest.mark.parametrize("costs", [DRAFTS_NEVER_PAY, DRAFTS_COST_LITTLE])
def test_outputs_are_those_without_speculation(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, costs: StepCosts, vocabulary: str
) -> None:
    plain = Engine(files, Setting(max_num_seqs=4)).generate(*requests())
    copying = engine(files, tmp_path, costs, monkeypatch, copies=True, vocabulary=vocabulary)
    assert copying.generate(*requests()) == plain
    assert copying.generate_alone(*requests()) == plain
    assert copying.num_accepted > 0


def test_where_drafts_never_pay_there_are_copies_alone(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def propose(*_: object) -> None:
        raise AssertionError("the draft was asked")

    monkeypatch.setattr(EagleProposer, "propose", propose)
    copying = engine(files, tmp_path, DRAFTS_NEVER_PAY, monkeypatch, copies=True)
    outputs = [output for output in outputs_of(copying, *requests()) if output.num_draft_tokens]
    assert outputs
    assert all(output.copied for output in outputs)
    without = engine(files, tmp_path, DRAFTS_NEVER_PAY, monkeypatch, copies=False)
    without.generate(*requests())
    assert without.num_drafted == 0


@pytest.mark.parametrize(("vocabulary", "drafted"), [("dynamic:96+32", "session"), ("dynamic:full+0", "draft")])
def test_each_token_says_who_proposed_it(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: str, drafted: str
) -> None:
    """Of two drafts: a random one may never be right."""
    prompts, sampling = requests()
    with_logprobs = [msgspec.structs.replace(one, logprobs=0) for one in sampling]
    seen: Counter[str] = Counter()
    copying = (
        engine(files, tmp_path, DRAFTS_COST_LITTLE, monkeypatch, copies=True, vocabulary=vocabulary, seed=seed)
        for seed in (1, 2)
    )
    for output in chain.from_iterable(outputs_of(one, prompts, with_logprobs) for one in copying):
        sources = [entry.source for entry in output.logprobs or []]
        assert len(sources) == len(output.token_ids)
        accepted, rest = sources[: output.num_accepted_tokens], sources[output.num_accepted_tokens :]
        assert set(accepted) <= ({"copied"} if output.copied else {"draft", "session"})
        assert set(rest) <= {"target"}
        seen.update(sources)
    assert set(seen) == {"copied", drafted, "target"}


@pytest.mark.parametrize("method", ["eagle3", "ngram"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_predicted_comes_in_few_steps_and_the_answer_is_the_same(
    files: ModelFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Literal["eagle3", "ngram"],
    temperature: float,
) -> None:
    """However wrong the prediction is: it goes on where it is right again."""
    costs = DRAFTS_NEVER_PAY if method == "eagle3" else DRAFTS_COST_LITTLE  # by this method, drafts are copies
    monkeypatch.setattr(CostMeter, "measure", lambda _: costs)
    draft = str(make_draft_directory(tmp_path, files)) if method == "eagle3" else None
    predicting = Engine(files, Setting(max_num_seqs=4), SpeculationConfig(method=method, draft=draft))
    prompt = list(range(40, 60))
    sampling = SamplingParams(max_tokens=90, seed=5, temperature=temperature, ignore_eos=True, logprobs=0)
    outputs = recorded(predicting)

    def answer(prediction: Sequence[int]) -> tuple[list[int], int, Counter[str]]:
        outputs.clear()
        request_id = predicting.add(prompt, sampling, prediction=prediction)
        while predicting.is_busy:
            predicting.step()
        sources = Counter[str](entry.source for output in outputs for entry in output.logprobs or [])
        assert sources["prediction"] == sum(output.num_predicted_tokens for output in outputs)
        return predicting.output(request_id), len(outputs), sources

    alone, steps, sources = answer(())
    assert "prediction" not in sources
    most = MAX_COPIED_TOKENS if method == "eagle3" else MAX_SPECULATIVE_TOKENS
    for wrong, allowed in (((), 0), ((30,), 6), (range(0, 90, 2), steps), (range(90), steps)):
        prediction = [token_id + 1 if place in wrong else token_id for place, token_id in enumerate(alone)]
        again, needed, sources = answer(prediction)
        assert again == alone
        assert needed <= 2 + 90 / most + allowed
        assert set(sources) == {"target", "prediction"} or wrong


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_session_copies_from_its_earlier_answers(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    repeating = engine(files, tmp_path, DRAFTS_NEVER_PAY, monkeypatch, copies=True)
    prompt = list(range(40, 60))
    sampling = SamplingParams(max_tokens=90, seed=5, temperature=temperature, ignore_eos=True)

    def answer(session: SessionState) -> tuple[str, list[int], int]:
        request_id, steps = repeating.add(prompt, sampling, session=session), 0
        while repeating.is_busy:
            repeating.step()
            steps += 1
        return request_id, repeating.output(request_id), steps

    first, text, _ = answer(SessionState())
    _, again, few = answer(SessionState(snapshot=repeating.snapshots[first]))
    _, elsewhere, many = answer(SessionState())
    assert again == elsewhere == text
    assert few <= 2 + 90 / MAX_COPIED_TOKENS
    assert many > 2 * few


def test_a_draft_model_knows_which_drafts_were_its_own(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has computed no entries of copied tokens. As good as its target, it is refused only if it thinks it has."""
    dear = StepCosts(FREE_VERIFICATION, first_draft=Curve([(1, 0.8)]), next_draft=Curve([(1, 0.8)]))
    monkeypatch.setattr(CostMeter, "measure", lambda _: dear)
    speculation = SpeculationConfig(method="draft_model", draft=str(files.path), vocabulary="full")
    prompts, _ = requests()
    greedy = SamplingParams(max_tokens=4 * NUM_TOKENS, seed=1, temperature=0.0, ignore_eos=True)
    outputs = outputs_of(Engine(files, Setting(max_num_seqs=4), speculation), prompts, [greedy] * len(prompts))
    assert any(output.copied and output.num_accepted_tokens for output in outputs)
    drafted = [output for output in outputs if output.num_draft_tokens and not output.copied]
    accepted = sum(output.num_accepted_tokens for output in drafted)
    assert accepted > 0.95 * sum(output.num_draft_tokens for output in drafted)  # 0.85 if it thinks so; ties may differ


def request_of(token_ids: list[int]) -> Request:
    return Request("a", b"", "tests", SamplingParams(max_tokens=99, seed=0, temperature=0.0), token_ids)


def look(lookup: PromptLookup, request: Request, limit: int) -> Copy | None:
    (copy,) = lookup.look([request], [limit])
    return copy


def test_a_copy_goes_on_as_the_longest_repeat_did() -> None:
    lookup = PromptLookup(RunningTexts(8))
    request = request_of([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3])
    copy = look(lookup, request, 5)
    assert copy is not None
    assert copy.token_ids == [4, 9, 2, 3, 5]
    assert copy.levels == [2, 3, 4, 5, 6]  # three tokens agreed before the first, four before the second
    request.all_token_ids += [4, 9]
    beyond = look(lookup, request, 9)
    assert beyond is not None
    assert beyond.token_ids == [2, 3, 5, 1, 2, 3, 4, 9, 2]  # beyond its end the text repeats
    request.all_token_ids += [7, 8]
    assert look(lookup, request, 5) is None
    assert look(lookup, request_of([1, 2, 3, 1, 2, 3]), 0) is None


def test_a_prediction_follows_the_prompts_end() -> None:
    lookup, request = PromptLookup(RunningTexts(8)), request_of([7, 5, 6, 7, 8])
    request.prediction = [20, 21, 22, 23, 24, 25]
    copy = look(lookup, request, 4)
    assert copy is not None
    assert copy.token_ids == [20, 21, 22, 23]
    request.all_token_ids += [20, 30, 22, 23, 24]
    copy = look(lookup, request, 1)
    assert copy is not None
    assert copy.token_ids == [25]


def test_a_long_prediction_leaves_room_for_the_prompts_end() -> None:
    lookup, request = PromptLookup(RunningTexts(8)), request_of([*range(100, 9000), 1, 2, 3])
    request.prediction = [5] * 9000
    copy = look(lookup, request, 2)
    assert copy is not None
    assert copy.token_ids == [5, 5]


def test_only_the_end_of_a_long_prompt_is_looked_at() -> None:
    lookup = PromptLookup(RunningTexts(8))
    far = request_of([1, 2, 3, *range(10, 5010), 1, 2, 3])
    assert look(lookup, far, 4) is None
    near = request_of([*range(10, 5010), 1, 2, 3, 4, 1, 2, 3])
    copy = look(lookup, near, 2)
    assert copy is not None
    assert copy.token_ids == [4, 1]
