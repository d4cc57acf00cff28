"""What the routes need, made once at start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from evospec.engine.messages import EngineReady
from evospec.engine.models.sampling_defaults import SamplingDefaults
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.adapter_control import AdapterControl
from evospec.server.body_room import BodyRoom
from evospec.server.engine_client import EngineClient, EngineDead
from evospec.server.metrics import Metrics
from evospec.server.rate_limit import RateLimiter
from evospec.server.responses.store import ResponseStore
from evospec.server.session_store import SessionStore
from evospec.server.tools.chat_format import ChatFormat
from evospec.server.work_shares import WorkShares


@dataclass(frozen=True)
class Serving:
    """The parts of a running server.

    ``model_root``: the model's own name, whatever it is served as. ``created`` is the start in Unix seconds.
    ``strict``: see ``HttpConfig``.
    """

    model: str
    model_root: str
    strict: bool
    created: int
    tokenizer: Tokenizer
    chat_format: ChatFormat
    sampling_defaults: SamplingDefaults
    engine: EngineClient
    rate_limiter: RateLimiter
    sessions: SessionStore
    responses: ResponseStore
    metrics: Metrics
    adapters: AdapterControl
    work: WorkShares
    bodies: BodyRoom

    @property
    def engine_info(self) -> EngineReady:
        """What the engine said about itself; raises ``EngineDead`` until it has."""
        if self.engine.info is None:
            raise EngineDead("The engine is starting. Try again soon.")
        return self.engine.info


async def get_serving(request: Request) -> Serving:
    """FastAPI dependency: the app's ``Serving``."""
    serving: Serving = request.app.state.serving
    return serving


CurrentServing = Annotated[Serving, Depends(get_serving)]
