"""What a draft thinks at every place of greedy answers: recorded once, replayed under any vocabulary.

A draft token counts only where all before it were right, so where they are the answer's own tokens. The draft's logits
at each position and depth, the answer's tokens given, are therefore all that acceptance of greedy drafts depends on.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common.in_process import CLIENT, Engine, Turn, engine_config, take_turns
from benchmarks.prompts.build import Prompt
from benchmarks.prompts.sources import CACHE
from benchmarks.prompts.streams import trial_prompts
from evospec.adapters.target_parts import TargetParts, fastest_dtype, load_target_parts
from evospec.adapters.training.dataset import Batch
from evospec.adapters.training.generate import FeatureRecorder
from evospec.adapters.training.learner import Unroller
from evospec.engine.config import ModelConfig, SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models import eagle3
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.eagle3_config import recorded_layers
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.request import engine_request_id
from evospec.engine.speculation.draft_files import DRAFTS
from evospec.engine.text.tokenizer import Tokenizer

DEPTH, WIDTH, TARGET_TOP_K = 4, 512, 10
"""Draft tokens of a chain, and how many of the draft's and of the target's most likely tokens are kept."""
_AT_ONCE = 16
_Recorded = TypeVar("_Recorded")


@dataclass(frozen=True)
class Trace:
    """One answer of A tokens.

    ``draft_ids`` [A', DEPTH, WIDTH] int32 and ``draft_logits`` (float16), the largest first: of the token after the
    first ``row + 1`` of the answer and ``depth`` more. ``likely`` [A'', TARGET_TOP_K] int32: the target's most likely
    tokens at each place of the answer.
    """

    domain: str
    prompt: list[int]
    answer: list[int]
    draft_ids: NDArray[np.int32]
    draft_logits: NDArray[np.float16]
    likely: NDArray[np.int32]


def kept(path: Path, make: Callable[[], Iterable[_Recorded]]) -> list[_Recorded]:
    """What ``make`` gives; from ``path``, in the cache of prompts, if it was made before."""
    path = CACHE / path
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(list(make())))
    found: list[_Recorded] = pickle.loads(path.read_bytes())
    return found


@dataclass(frozen=True)
class Answered:
    """A prompt's tokens, the greedy answer, and the features [T - 1, n * hidden] float32 of all T tokens but the last.

    Those of the draft's layers come first, then the output of the target's last layer.
    """

    prompt: Prompt
    text: list[int]
    answer: list[int]
    features: torch.Tensor


def load_target(model: str) -> TargetParts:
    """What a model's draft would share with it."""
    config = engine_config(model, SpeculationConfig())
    files = resolve_model(config.model)
    return load_target_parts(files, validate_model_files(files), config.model.max_model_len)


def load_parts(model: str) -> tuple[Eagle3, TargetParts]:
    """The shipped draft of a model as the worker has it, and what it shares with its target."""
    directory = DRAFTS / resolve_model(ModelConfig(name=model)).name
    return eagle3.load_draft(directory, fastest_dtype(), torch.device("cpu")), load_target(model)


def answers(model: str, prompts: Sequence[Prompt], max_tokens: int) -> Iterator[Answered]:
    """Answer prompts greedily, with up to ``max_tokens`` each."""
    tokenizer = Tokenizer.from_files(resolve_model(ModelConfig(name=model)))
    texts = [tokenizer.encode_messages(prompt.messages) for prompt in prompts]
    for prompt, text, (answer, features) in zip(prompts, texts, _run(model, texts, max_tokens), strict=True):
        yield Answered(prompt, text, answer, features[: len(text) + len(answer) - 1].float())


def _run(model: str, texts: Sequence[list[int]], max_tokens: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Greedy answers to texts, and the features of all tokens that were computed."""
    config = engine_config(model, SpeculationConfig(num_speculative_tokens=0, adaptive=False))
    recorder = FeatureRecorder(recorded_layers(validate_model_files(resolve_model(config.model))))
    engine = Engine(config, draft=recorder)
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)
    [made] = take_turns([engine.answering([Turn(text) for text in texts], sampling, _AT_ONCE)])
    for number, answer in enumerate(made.answers):
        yield answer, recorder.take(engine_request_id(CLIENT, str(number)))


def record(model: str, prompts: Sequence[Prompt], max_tokens: int) -> Iterator[Trace]:
    """Answer, then run the shipped draft over the answers; arguments as for ``answers``."""
    draft, target = load_parts(model)
    unroller, head = Unroller(draft, target), Head(target)
    for one in answers(model, prompts, max_tokens):
        yield _trace(unroller, head, one)


def record_draft_model(model: str, draft: str, prompts: Sequence[Prompt], max_tokens: int) -> Iterator[Trace]:
    """Answer, then let a smaller model read the answers; arguments as for ``answers``."""
    answered = list(answers(model, prompts, max_tokens))
    target, smaller = Head(load_target(model)), Head(load_target(draft))
    texts = [[*one.text, *one.answer] for one in answered]
    for one, (_, features) in zip(answered, _run(draft, texts, max_tokens=1), strict=True):
        yield _trace_of_model(target, smaller, one, features[len(one.text) : len(one.text) + len(one.answer)])


def recorded(model: str, prompts: int, max_tokens: int, draft: str | None = None) -> list[Trace]:
    """Traces of so many trial prompts of each domain: recorded when first asked for, then kept.

    ``draft``: the model that drafts; None: the EAGLE-3 draft shipped for the target.
    """

    def make() -> Iterator[Trace]:
        chosen = trial_prompts(model, prompts)
        if draft is None:
            return record(model, chosen, max_tokens)
        return record_draft_model(model, draft, chosen, max_tokens)

    drafted = "" if draft is None else f"-{draft}"
    return kept(Path("traces", f"{model}{drafted}-{prompts}x{max_tokens}.pickle"), make)


class Head:
    """A model's output projection, in float32: converted once."""

    def __init__(self, model: TargetParts) -> None:
        self._model, self._rows = model, model.head.float().T
        self.hidden = len(self._rows)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """Normalised states [n, hidden] float32 → logits [n, vocab]."""
        return states @ self._rows

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """[n, vocab] of features [n, m * hidden], whose last part is the output of the model's last layer."""
        return self.project(self._model.head_input(features[:, -self.hidden :].to(torch.bfloat16)).float())


@torch.inference_mode()
def _trace(unroller: Unroller, head: Head, answered: Answered) -> Trace:
    prompt, answer, features = answered.text, answered.answer, answered.features
    hidden, length = head.hidden, len(features) + 1
    inputs = torch.zeros(1, length, features.shape[1] - hidden)
    inputs[0, 1:] = features[:, :-hidden]
    token_ids = torch.zeros(1, length + DEPTH, dtype=torch.int64)
    token_ids[0, :length] = torch.tensor([*prompt, *answer])[:length]
    starts = torch.arange(len(prompt), length)
    batch = Batch(token_ids, torch.arange(length)[None], starts, inputs, labels=torch.zeros(0), lengths=length - starts)
    with unroller.precision():
        walk = unroller.walk(batch)
        states = [walk.head_input.float()]
        for _ in range(1, DEPTH):
            walk.advance(torch.ones_like(starts, dtype=torch.bool))
            states.append(walk.head_input.float())
    steps = [head.project(state).topk(WIDTH) for state in states]
    return Trace(
        answered.prompt.domain,
        prompt,
        answer,
        np.stack([indices.int().numpy() for _, indices in steps], axis=1),
        np.stack([values.half().numpy() for values, _ in steps], axis=1),
        _likely(head, answered),
    )


@torch.inference_mode()
def _trace_of_model(target: Head, draft: Head, answered: Answered, features: torch.Tensor) -> Trace:
    """``features`` [A, n * hidden]: the draft model's, of the answer's tokens."""
    best = draft.logits(features).topk(WIDTH)
    places = np.arange(len(features) - DEPTH + 1)[:, None] + np.arange(DEPTH)
    return Trace(
        answered.prompt.domain,
        answered.text,
        answered.answer,
        best.indices.int().numpy()[places],
        best.values.half().numpy()[places],
        _likely(target, answered),
    )


def _likely(target: Head, answered: Answered) -> NDArray[np.int32]:
    """[A, TARGET_TOP_K]: the target's most likely tokens at each place of the answer."""
    logits = target.logits(answered.features[len(answered.text) - 1 :])
    ids: NDArray[np.int32] = logits.topk(TARGET_TOP_K).indices.int().numpy()
    return ids
