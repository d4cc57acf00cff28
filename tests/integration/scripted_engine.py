"""The engine's end of the wire, scripted: for tests of what the server does with what an engine sends.

It speaks the real protocol over a real socket and computes nothing.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable

import msgspec
import zmq
import zmq.asyncio

from evospec.engine.messages import (
    AbortRequests,
    ClientMessage,
    EngineOutput,
    EngineOutputs,
    EngineReady,
    EngineRequest,
    EngineStats,
    Hello,
    StepTimings,
)
from tests.tiny_models import VOCABULARY

Script = Callable[[EngineRequest], Iterable[EngineOutput]]


class ScriptedEngine:
    """Answers each request with the outputs of ``script(request)``, one message each.

    ``requests``, ``aborted`` and ``num_greetings`` record what arrived. A script may end without a finish reason: then
    the request runs until someone ends it.
    """

    def __init__(
        self,
        address: str,
        script: Script,
        vocab_size: int,
        max_model_len: int = 64,
        draft: str | None = None,
        vocabulary: str = VOCABULARY,
    ) -> None:
        self.epoch = uuid.uuid4().hex
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.num_greetings = 0
        self.silent = False
        self._script = script
        self._info = EngineReady(
            epoch=self.epoch,
            model="scripted",
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            num_blocks=max(8, max_model_len // 16),
            block_size=16,
            max_num_seqs=4,
            dtype="float32",
            attention_backend="none",
            kv_bytes=1024,
            draft=draft,
            num_speculative_tokens=4,
            draft_bytes=512 if draft else 0,
            vocabulary=vocabulary,
        )
        self._decoder = msgspec.msgpack.Decoder(ClientMessage)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._peer = b""
        self._task = asyncio.create_task(self._run())

    async def send(
        self, *outputs: EngineOutput, stats: EngineStats | None = None, steps: Iterable[StepTimings] = ()
    ) -> None:
        """Outputs of one step."""
        message = EngineOutputs(epoch=self.epoch, outputs=list(outputs), stats=stats, steps=list(steps))
        await self._socket.send_multipart([self._peer, msgspec.msgpack.encode(message)])

    async def die(self) -> None:
        """Close the connection without a word, as a killed process does."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close(linger=0)

    async def _run(self) -> None:
        while True:
            self._peer, payload = await self._socket.recv_multipart()
            message = self._decoder.decode(payload)
            if self.silent:
                continue
            if isinstance(message, Hello):
                self.num_greetings += 1
                await self._socket.send_multipart([self._peer, msgspec.msgpack.encode(self._info)])
            elif isinstance(message, AbortRequests):
                self.aborted += message.request_ids
            else:
                self.requests.append(message)
                for output in self._script(message):
                    await self.send(output)
