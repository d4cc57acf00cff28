"""Draft tokens of a model's head over core and tails, against its full logits."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType

from evospec.engine.config import EngineConfig, ModelConfig
from evospec.engine.loader import LoadedModel, load
from evospec.engine.messages import SamplingParams
from evospec.engine.models.registry import validate_model_files
from evospec.engine.sampling.choose import choose_tokens
from evospec.engine.speculation.drafters.head import CANDIDATES, DraftHead
from evospec.engine.speculation.drafters.session_head import make_tails
from evospec.kernels import native
from evospec.kernels.head_rows import TailSlabs
from tests.tiny_models import VOCAB_SIZE, make_directory, make_gguf

HIDDEN = 128
TOLERANCE = {"torch": 0.0, "native": 0.02}
"""Of logits of size 1 or so: rows of a tail are rounded to bfloat16, those of the core have the file's precision."""
GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
ROWS = 6
CORE = torch.arange(3, VOCAB_SIZE, 11)


@pytest.fixture(scope="module", params=[("torch", "llama"), ("native", "llama"), ("native", "qwen2")])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """In float32, or on the compiled kernels with 4-bit weights; with a head of its own (llama) or a tied one."""
    backend, architecture = request.param
    if backend == "native" and native.unsupported_reason() is not None:
        pytest.skip(str(native.unsupported_reason()))
    directory = tmp_path_factory.mktemp(architecture)
    files = make_directory(directory, architecture, hidden_size=HIDDEN, head_dim=32)
    config = ModelConfig(name=str(directory), dtype="float32")
    if backend == "native":
        files = make_gguf(directory / "model.gguf", directory, GGMLQuantizationType.Q4_1)
        config = ModelConfig(name=str(files.path))
    model = load(EngineConfig(model=config), files, validate_model_files(files))
    assert model.backend == backend
    return model


def hidden_states(loaded: LoadedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(ROWS, HIDDEN, generator=generator).to(loaded.dtype)


def test_full_head_is_greedy_over_all_tokens(loaded: LoadedModel) -> None:
    hidden = hidden_states(loaded)
    expected = loaded.model.compute_logits(hidden).argmax(dim=1).tolist()
    head = DraftHead(loaded)
    assert head.description == "full"
    assert head.num_bytes == 0
    assert head.choose(hidden, [GREEDY] * ROWS, range(ROWS)) == expected


def test_rows_draft_from_the_core_and_their_own_tail(loaded: LoadedModel) -> None:
    """The best token of each row goes into the tail of one session, and out again."""
    hidden = hidden_states(loaded)
    logits = loaded.model.compute_logits(hidden).clone()
    outside = logits.clone()
    outside[:, CORE] = -torch.inf
    tails = make_tails(loaded, num_slabs=3, slots=7)
    assert isinstance(tails, TailSlabs)
    tails.write(2, range(7), outside[:2].topk(4, dim=1).indices.flatten()[:7].tolist())
    head = DraftHead(loaded, CORE, tails)
    assert head.description == f"static:{len(CORE)} + 7"
    assert head.num_bytes >= tails.num_bytes > 3 * 7 * HIDDEN
    for slabs in ([0] * ROWS, [2] * ROWS, [0, 2, 1, 2, 0, 2]):
        _check_greedy(loaded, head.choose(hidden, [GREEDY] * ROWS, range(ROWS), slabs), logits, tails.token_ids[slabs])
    tails.write(2, [0, 3], [int(outside[5].argmax()), int(outside[4].argmax())])
    _check_greedy(
        loaded, head.choose(hidden, [GREEDY] * ROWS, range(ROWS), [2] * ROWS), logits, tails.token_ids[[2] * ROWS]
    )
    tails.clear(2)
    without = DraftHead(loaded, CORE).choose(hidden, [GREEDY] * ROWS, range(ROWS))
    assert head.choose(hidden, [GREEDY] * ROWS, range(ROWS), [2] * ROWS) == without


def _check_greedy(loaded: LoadedModel, chosen: list[int], logits: torch.Tensor, tail_ids: torch.Tensor) -> None:
    for row, token_id in enumerate(chosen):
        allowed = [*CORE.tolist(), *(i for i in tail_ids[row].tolist() if i >= 0)]
        assert token_id in allowed
        assert logits[row, token_id] >= logits[row, allowed].max() - TOLERANCE[loaded.backend]


@pytest.mark.parametrize("loaded", [("torch", "llama")], indirect=True)
def test_samples_are_those_of_the_allowed_tokens(loaded: LoadedModel) -> None:
    """With as many candidates as tokens, the choice is that of the full logits with all others excluded.

    In float32: rows that are rounded give scores that change places.
    """
    hidden = hidden_states(loaded).repeat(40, 1)
    tail = [1, 200, 201, 510]
    tails = make_tails(loaded, num_slabs=2, slots=8)
    assert isinstance(tails, TailSlabs)
    tails.write(1, [0, 2, 3, 7], tail)
    assert len(CORE) + len(tail) <= CANDIDATES
    params = [
        SamplingParams(max_tokens=1, seed=i, top_p=0.8 if i % 3 == 0 else 1.0, temperature=1.3)
        for i in range(len(hidden))
    ]
    full = loaded.model.compute_logits(hidden)
    masked = torch.full_like(full, -torch.inf)
    allowed = [*CORE.tolist(), *tail]
    masked[:, allowed] = full[:, allowed]
    chosen = DraftHead(loaded, CORE, tails).choose(hidden, params, range(len(hidden)), [1] * len(hidden))
    assert chosen == choose_tokens(masked, params, range(len(hidden)))
    assert {*chosen} & {*tail}


def test_every_row_needs_a_tail(loaded: LoadedModel) -> None:
    head = DraftHead(loaded, CORE, make_tails(loaded, num_slabs=1, slots=4))
    for slabs in (None, [0] * (ROWS - 1)):
        with pytest.raises(ValueError, match="tail"):
            head.choose(hidden_states(loaded), [GREEDY] * ROWS, range(ROWS), slabs)
