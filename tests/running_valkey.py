"""The embedded Valkey, kept alive as the launcher keeps it, that a test may hurt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from evospec.server.processes import embedded_valkey
from evospec.server.supervisor import SupervisedProcess


@asynccontextmanager
async def running_valkey(directory: Path) -> AsyncIterator[SupervisedProcess]:
    valkey = embedded_valkey(directory)
    await valkey.start()
    keeper = asyncio.create_task(valkey.keep_alive())
    try:
        yield valkey
    finally:
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper
        await valkey.stop(grace=5)
