"""A tiny model and an API server around a scripted engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evospec.engine.models.config import ModelFiles
from evospec.engine.text.tokenizer import Tokenizer
from tests.integration.running_api import running_api
from tests.integration.tools_model import TEMPLATE, Serve
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


@pytest.fixture
def tools_api(tmp_path_factory: pytest.TempPathFactory, valkey_url: str, tmp_path: Path) -> Serve:
    """``async with tools_api(script, *options) as api``: the model's template knows tools and thoughts."""
    files = make_directory(tmp_path_factory.mktemp("tools") / "tiny")
    (files.path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    tokenizer = Tokenizer.from_files(files)
    return lambda script, *options: running_api(
        script, files, tokenizer, valkey_url, tmp_path, *options, max_model_len=1024
    )
