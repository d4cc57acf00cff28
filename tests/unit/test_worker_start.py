"""When ``evospec serve`` starts the adapters worker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.models.config import ModelFiles
from evospec.server import launcher, processes
from evospec.server.settings import ConfigurationError, Settings

LOOK_SECONDS = 0.001


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server whose engine is ready and has nothing to do."""
    monkeypatch.setattr(processes, "_LOOK_SECONDS", LOOK_SECONDS)
    engine = SimpleNamespace(ready=True, in_flight=0)
    metrics = SimpleNamespace(engine=SimpleNamespace(alignment=SimpleNamespace(num_steps=0, layout="ours")))
    adapters = SimpleNamespace(others_have_learned=AsyncMock(return_value=False))
    serving = SimpleNamespace(engine=engine, metrics=metrics, adapters=adapters)
    return SimpleNamespace(state=SimpleNamespace(serving=serving))


async def starts(app: Any, directory: Path, **options: bool) -> bool:
    """Whether it starts within a hundred looks."""
    settings = Settings()
    settings.engine.alignment = AdaptersConfig(state_directory=directory, **options)
    wait_before = processes.worker_process(settings, app)._wait_before
    assert wait_before is not None
    try:
        await asyncio.wait_for(wait_before(), 100 * LOOK_SECONDS)
    except TimeoutError:
        return False
    return True


async def test_it_starts_in_a_pause_after_traffic(app: Any, tmp_path: Path) -> None:
    assert not await starts(app, tmp_path)
    app.state.serving.metrics.engine.alignment.num_steps = AdaptersConfig().pace.first_steps
    assert await starts(app, tmp_path)
    app.state.serving.engine.in_flight = 1
    assert not await starts(app, tmp_path)


async def test_what_was_learned_before_comes_in_force_without_traffic(app: Any, tmp_path: Path) -> None:
    (tmp_path / "draft" / "key").mkdir(parents=True)
    (tmp_path / "draft" / "key" / "revision-3.safetensors").touch()
    assert await starts(app, tmp_path)
    app.state.serving.engine.ready = False
    assert not await starts(app, tmp_path)


async def test_what_another_server_has_learned_comes_in_force_without_traffic(app: Any, tmp_path: Path) -> None:
    app.state.serving.adapters.others_have_learned.side_effect = lambda layout: layout == "ours"
    assert await starts(app, tmp_path)
    assert not await starts(app, tmp_path, share_versions=False)


UNWRITABLE = Path("/dev/null/state")


def test_where_nothing_learned_can_be_kept_no_port_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "validated_files", lambda config: ModelFiles("tiny", Path("/"), "gguf"))
    monkeypatch.setattr(launcher, "_listen", lambda host, port: pytest.fail("it listens"))
    settings = Settings()
    settings.engine.alignment = AdaptersConfig(enabled=True, state_directory=UNWRITABLE)
    with pytest.raises(ConfigurationError, match=r"^engine\.alignment\.state_directory cannot be written: .*/dev/null"):
        launcher.serve(settings, with_engine=True)


def test_where_nobody_asked_it_to_learn_and_nothing_can_be_kept_the_draft_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "can_learn", lambda engine, files: True)
    monkeypatch.setattr(processes, "_ROOM_TO_LEARN", 0)
    settings = Settings()
    settings.engine.alignment = AdaptersConfig()
    settings.engine.alignment.state_directory = UNWRITABLE
    settings.engine.alignment.model_fields_set.clear()
    processes.learn_where_possible(settings, ModelFiles("tiny", Path("/"), "gguf"))
    assert not settings.engine.alignment.enabled
