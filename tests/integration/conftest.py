"""A tiny model and an API server around a scripted engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.models.config import ModelFiles
from engine.text.tokenizer import Tokenizer
from tests.integration.running_api import running_api
from tests.tiny_models import make_directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("api") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny_model: ModelFiles) -> Tokenizer:
    return Tokenizer.from_files(tiny_model)


@pytest.fixture
def serve(tiny_model: ModelFiles, tokenizer: Tokenizer, valkey_url: str, tmp_path: Path) -> Any:
    """``async with serve(script, *options, draft=None) as api``."""
    return lambda script, *options, draft=None: running_api(
        script, tiny_model, tokenizer, valkey_url, tmp_path, *options, draft=draft
    )
