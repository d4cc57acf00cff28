"""Answers that the idle engine writes for the worker, to prompts that it has had before: more to learn from.

They are requests like others, of the same tenants, but synthetic: whoever else comes ends them.
"""

from __future__ import annotations

import random
import time
import uuid
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

import msgspec
import zmq

from evospec.engine.messages import EngineMessage, EngineOutputs, EngineRequest, Hello, SamplingParams, SessionState
from evospec.engine.online.verify_record import VerifyRecord

_PROMPTS = 1024
"""Prompts kept, the latest ones of all tenants."""
_ANSWERS = 8
"""To each prompt, at most."""
_AT_A_TIME = 8
_MAX_TOKENS = 128
_TEMPERATURE = 0.8
"""As of the answers that drafts are trained with offline."""
_SILENCE = 60.0
"""Seconds without an output after which answers are given up: the engine has gone."""


@dataclass
class _Prompt:
    key: str
    tenant: str
    domain: str | None
    token_ids: list[int]
    num_answers: int = 0


class AnswerWriter:
    """Remembers prompts, in memory only, and asks the engine to answer some of them again.

    Args:
        address: the engine's; empty: nothing is remembered, and nobody is asked.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._prompts: OrderedDict[str, _Prompt] = OrderedDict()  # by request, the oldest first
        self._open: set[str] = set()  # answers that are not finished
        self._heard_at = 0.0
        self._socket: zmq.Socket[bytes] | None = None
        self._decoder = msgspec.msgpack.Decoder(EngineMessage)
        self._random = random.Random()

    def remember(self, key: str, record: VerifyRecord) -> None:
        """Keep the prompt of a request, or its end, if this is the first record of it: the others know no prompt."""
        is_known = record.is_synthetic or record.request_id in self._prompts
        if not self._address or is_known or not record.num_context:
            return
        token_ids = [*record.context_ids().tolist(), record.last_token]
        self._prompts[record.request_id] = _Prompt(key, record.tenant, record.domain, token_ids)
        if len(self._prompts) > _PROMPTS:
            self._prompts.popitem(last=False)

    def forget(self, key: str) -> None:
        self._prompts = OrderedDict((name, prompt) for name, prompt in self._prompts.items() if prompt.key != key)

    def is_writing(self) -> bool:
        """Whether answers are on their way."""
        while self._socket is not None and self._socket.poll(0):
            message = self._decoder.decode(self._socket.recv())
            if isinstance(message, EngineOutputs) and message.outputs:
                self._heard_at = time.monotonic()
                self._open -= {output.request_id for output in message.outputs if output.finish_reason is not None}
        if time.monotonic() - self._heard_at > _SILENCE:
            self._open.clear()
        return bool(self._open)

    def write(self, keys: Collection[str]) -> None:
        """Ask for some answers to prompts of these keys, to those first that have the fewest."""
        prompts = [prompt for prompt in self._prompts.values() if prompt.key in keys and prompt.num_answers < _ANSWERS]
        self._random.shuffle(prompts)
        chosen = sorted(prompts, key=lambda prompt: prompt.num_answers)[:_AT_A_TIME]
        if not chosen or not self._send(Hello()):
            return
        self._heard_at = time.monotonic()
        for prompt in chosen:
            request = EngineRequest(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=prompt.token_ids,
                sampling=SamplingParams(
                    max_tokens=_MAX_TOKENS, temperature=_TEMPERATURE, seed=self._random.getrandbits(31)
                ),
                tenant=prompt.tenant,
                session=SessionState(domain=prompt.domain) if prompt.domain else None,
                is_synthetic=True,
            )
            if self._send(request):
                prompt.num_answers += 1
                self._open.add(request.request_id)

    def close(self) -> None:
        """Leave the engine, which ends what it still writes."""
        if self._socket is not None:
            self._socket.close(linger=0)

    def _send(self, message: Hello | EngineRequest) -> bool:
        """Whether there is an engine to send it to."""
        if self._socket is None:
            self._socket = zmq.Context.instance().socket(zmq.DEALER)
            self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing waits for an engine that is not there
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.connect(self._address)
        try:
            self._socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True
