"""Rows of tokens that a draft's own head lacks, from the target's."""

from __future__ import annotations

import pytest
import torch

from evospec.engine.config import EngineConfig, ModelConfig
from evospec.engine.loader import LoadedModel, load
from evospec.engine.models.eagle3_weights import DraftRows
from evospec.engine.models.registry import validate_model_files
from evospec.engine.speculation.drafters.own_head import OwnHead
from evospec.kernels import native
from tests.tiny_models import VOCAB_SIZE, make_directory

HIDDEN, WIDTH = 64, 96
"""Of the target's rows, and of the draft's."""
TOKENS = torch.arange(VOCAB_SIZE)[::2]


@pytest.fixture(scope="module", params=["float32", "auto"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """In plain torch, and on the compiled kernels."""
    if request.param == "auto" and native.unsupported_reason() is not None:
        pytest.skip(str(native.unsupported_reason()))
    files = make_directory(tmp_path_factory.mktemp("target"), hidden_size=HIDDEN, head_dim=32)
    config = EngineConfig(model=ModelConfig(name=str(files.path), dtype=request.param))
    return load(config, files, validate_model_files(files))


def all_rows(target: LoadedModel, noise: float) -> torch.Tensor:
    """[vocab, WIDTH]: a linear map of the target's rows, and noise of so many times their size."""
    generator = torch.Generator().manual_seed(1)
    theirs = target.model.head_rows(torch.arange(VOCAB_SIZE, dtype=torch.int32)).float()
    mapped = theirs @ torch.randn(HIDDEN, WIDTH, generator=generator)
    return mapped + noise * mapped.std() * torch.randn(mapped.shape, generator=generator)


def test_what_it_lacks_comes_from_the_targets_rows(target: LoadedModel) -> None:
    rows = all_rows(target, noise=0.1)
    head = OwnHead(DraftRows(TOKENS, rows[TOKENS].to(target.dtype)), target)
    assert head.fit_lacking()
    found = head.rows(torch.arange(VOCAB_SIZE, dtype=torch.int32)).float()
    assert found.shape == (VOCAB_SIZE, WIDTH)
    difference = (found - rows).std(dim=1) / rows.std()
    assert difference[TOKENS].max() < 0.02
    assert difference[1::2].mean() < 0.2


def test_a_head_that_is_no_map_of_the_targets_keeps_to_its_tokens(target: LoadedModel) -> None:
    head = OwnHead(DraftRows(TOKENS, all_rows(target, noise=3.0)[TOKENS].to(target.dtype)), target)
    assert not head.fit_lacking()


def test_a_head_with_all_tokens_lacks_none(target: LoadedModel) -> None:
    rows = all_rows(target, noise=0.1).to(target.dtype)
    head = OwnHead(DraftRows(torch.arange(VOCAB_SIZE), rows), target)
    assert not head.fit_lacking()
    hidden = rows[:5]
    logits = head.logits(hidden, torch.arange(5, dtype=torch.int32))
    assert torch.allclose(logits, (rows[:5].float() ** 2).sum(dim=1), rtol=0.02)


def test_some_of_its_rows_are_a_core(target: LoadedModel) -> None:
    rows = all_rows(target, noise=0.1).to(target.dtype)
    head = OwnHead(DraftRows(TOKENS, rows[TOKENS]), target)
    hidden, some = rows[:7], TOKENS[3:40:5]
    expected = hidden.float() @ rows[some].float().T
    difference = head.slab_of(some).project(hidden).float() - expected
    assert difference.std() < 0.02 * expected.std()
