"""The server's end of the connection to the engine process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec
import structlog
import zmq
from zmq.utils.monitor import recv_monitor_message

from evospec.engine.config import EngineConfig
from evospec.engine.fair_queue import equal_share
from evospec.engine.messages import (
    AbortRequests,
    ClientMessage,
    EngineMessage,
    EngineOutput,
    EngineOutputs,
    EngineReady,
    EngineRequest,
    Hello,
)
from evospec.server.engine_metrics import EngineMetrics
from evospec.server.errors import ApiError, bad_request

log = structlog.get_logger(__name__)

HELLO_INTERVAL = 0.5
_AT_A_TIME = 32
"""Outputs handed out before the event loop looks for anything else: formatting one takes up to a millisecond."""


class EngineDead(ApiError):
    """The engine is not there, or died while it worked on the request."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message, code="engine_unavailable", retry_after=5)


class Overloaded(ApiError):
    """As many sequences as allowed are running or waiting."""

    def __init__(self) -> None:
        super().__init__(503, "The server is overloaded. Try again later.", code="overloaded", retry_after=1)


class _Inbox:
    """Outputs of the sequences of one HTTP request that nobody has taken yet."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self._outputs: list[EngineOutput] = []
        self._error: ApiError | None = None
        self._wakeup = asyncio.Event()

    def put(self, output: EngineOutput) -> None:
        self._outputs.append(output)
        self._wakeup.set()

    def fail(self, error: ApiError) -> None:
        self._error = error
        self._wakeup.set()

    async def take(self) -> list[EngineOutput]:
        """All outputs so far, at least one; raises the error once there are none."""
        await self._wakeup.wait()
        if not self._outputs:
            assert self._error is not None
            raise self._error
        outputs, self._outputs = self._outputs, []
        if self._error is None:
            self._wakeup.clear()
        return outputs


class EngineClient:
    """Sends requests to the engine, hands out their outputs, and knows whether the engine lives.

    The engine counts as dead when its connection closes, when its epoch changes (a restart) or when it is
    silent for ``timeout`` seconds; then every request in flight ends with ``EngineDead``. The client goes on
    introducing itself and is ``ready`` again once an engine answers whose tokens have the fingerprint ``vocabulary``:
    for any other, this server's token ids would be another text. ``last_message``: when it last sent anything
    (``time.monotonic``). ``leaving``: this server ends, so an engine that goes is none that is lost.

        client = EngineClient(config, timeout=60, metrics=metrics.engine, vocabulary=tokenizer.fingerprint())
        task = asyncio.create_task(client.run())
        async with aclosing(client.generate([request])) as steps:
            async for outputs in steps: ...
    """

    def __init__(self, config: EngineConfig, timeout: float, metrics: EngineMetrics, vocabulary: str) -> None:
        self.info: EngineReady | None = None
        self.ready = self.leaving = False
        self._address = config.address
        self._max_in_flight = config.scheduler.max_waiting + config.scheduler.max_num_seqs
        self._timeout = timeout
        self._metrics = metrics
        self._vocabulary = vocabulary
        self._refused_epoch: str | None = None
        self._inboxes: dict[str, _Inbox] = {}
        self._aborted: dict[str, Callable[[bytes], None]] = {}
        """Requests that were aborted and of which the engine has not said the last: who keeps what they learned."""
        self._arrived: deque[EngineOutput] = deque()
        self.last_message = 0.0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineMessage)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        # Nothing is queued for an engine that is not there: a new one must not get requests of the old one's time.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )

    @property
    def in_flight(self) -> int:
        """Sequences sent to the engine and not finished."""
        return len(self._inboxes)

    async def run(self) -> None:
        """Stay connected until cancelled."""
        # NOTE: plain sockets and the loop's own readers rather than zmq.asyncio, which adds a future to every message.
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.fileno(), self._receive)
        loop.add_reader(self._monitor.fileno(), self._watch_connection)
        self._watch_connection()  # a ZMQ reader is only woken after it has once found nothing
        self._socket.connect(self._address)
        try:
            await self._watch_heartbeat()
        finally:
            loop.remove_reader(self._socket.fileno())
            loop.remove_reader(self._monitor.fileno())
            self.leaving = True
            self._lose_engine("The server is shutting down.")
            self._socket.disable_monitor()
            self._monitor.close()
            self._socket.close()

    async def generate(
        self, requests: Sequence[EngineRequest], keep: Callable[[bytes], None] | None = None
    ) -> AsyncGenerator[list[EngineOutput], None]:
        """Outputs of all ``requests`` as they come, until each has finished.

        Yields what has arrived since the last time, so a slow consumer gets several steps at once. Closing
        the iterator aborts what has not finished; ``keep`` is then called with what their sessions have learned, later,
        when the engine has told it. Raises ``EngineDead`` and ``Overloaded``, and
        ``ApiError`` for more than this server ever takes.
        """
        if len(requests) > self._max_in_flight:
            raise bad_request(
                f"The request asks for {len(requests)} sequences, more than the {self._max_in_flight} that this server "
                "takes at a time (prompts times n).",
                "n",
            )
        if not self.ready:
            raise EngineDead("The engine is starting or restarting. Try again soon.")
        tenant = requests[0].tenant
        if self._is_full(tenant, len(requests)):
            raise Overloaded
        inbox = _Inbox(tenant)
        unfinished = {request.request_id for request in requests}
        self._inboxes.update(dict.fromkeys(unfinished, inbox))
        try:
            for request in requests:
                self._send(request)
            while unfinished:
                outputs = await inbox.take()
                unfinished.difference_update(output.request_id for output in outputs if output.finish_reason)
                yield outputs
        finally:
            aborted = [request_id for request_id in unfinished if self._inboxes.pop(request_id, None)]
            if keep is not None:
                self._aborted.update(dict.fromkeys(aborted, keep))
            self._abort(aborted)

    def _is_full(self, tenant: str, count: int) -> bool:
        """Whether ``count`` sequences more are too many; a tenant with less than an equal share may have them."""
        if len(self._inboxes) + count <= self._max_in_flight:
            return False
        in_flight = Counter(inbox.tenant for inbox in self._inboxes.values())
        return in_flight[tenant] + count > equal_share(self._max_in_flight, in_flight, tenant)

    def _send(self, message: ClientMessage) -> None:
        """Send now; raises ``EngineDead`` if there is no connection."""
        try:
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise EngineDead("The engine cannot be reached. Try again soon.") from error
        # The socket's file descriptor tells of a change once; sending may have used that up.
        asyncio.get_running_loop().call_soon(self._receive)

    def _abort(self, request_ids: list[str]) -> None:
        if request_ids:
            with contextlib.suppress(EngineDead):  # then there is nothing left to abort
                self._send(AbortRequests(request_ids))

    def _receive(self) -> None:
        """Handle everything that has arrived: of what stays unread the descriptor does not tell again."""
        while not self._socket.closed and _has_input(self._socket):
            payload = self._socket.recv(zmq.NOBLOCK)
            self.last_message = time.monotonic()
            try:
                message = self._decoder.decode(payload)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:  # whose tokens were in it, nobody knows
                log.error("undecodable message", num_bytes=len(payload), error=str(error))
                self._lose_engine("A message of the engine cannot be read.")
            else:
                self._handle(message)

    def _handle(self, message: EngineReady | EngineOutputs) -> None:
        if isinstance(message, EngineReady):
            self._on_ready(message)
        elif self.info is not None and message.epoch == self.info.epoch:
            self._on_outputs(message)
        else:
            self._lose_engine("The engine was restarted while it worked on the request.")

    def _on_ready(self, info: EngineReady) -> None:
        if info.vocabulary != self._vocabulary:
            self._refuse(info)
            return
        if self.info is not None and self.info.epoch != info.epoch:
            self._lose_engine("The engine was restarted while it worked on the request.")
            self._metrics.restarts.inc()
        if not self.ready:
            log.info("engine ready", epoch=info.epoch, max_model_len=info.max_model_len)
        self.info = info
        self.ready = True
        self._metrics.observe_ready(info)

    def _refuse(self, info: EngineReady) -> None:
        """Not ready, and one line for the operator, though this engine answers every greeting."""
        self._lose_engine("The engine was restarted while it worked on the request.")
        if info.epoch != self._refused_epoch:
            self._refused_epoch = info.epoch
            log.error(
                "engine has another model than this server",
                epoch=info.epoch,
                engine_model=info.model,
                engine_vocabulary=info.vocabulary,
                vocabulary=self._vocabulary,
            )

    def _on_outputs(self, message: EngineOutputs) -> None:
        was_empty = not self._arrived
        self._arrived.extend(message.outputs)
        if was_empty:
            self._hand_out_some()
        try:
            self._metrics.observe(message)
        except Exception:
            log.exception("what the engine reports of itself cannot be shown")

    def _hand_out_some(self) -> None:
        self._hand_out(_AT_A_TIME)
        if self._arrived:
            asyncio.get_running_loop().call_soon(self._hand_out_some)

    def _hand_out(self, count: int) -> None:
        """Put the first ``count`` outputs that have arrived into their inboxes."""
        for _ in range(min(count, len(self._arrived))):
            output = self._arrived.popleft()
            inbox = self._inboxes.get(output.request_id)
            if inbox is None:  # aborted
                keep = self._aborted.pop(output.request_id, None) if output.finish_reason else None
                if keep is not None and output.session_snapshot is not None:
                    keep(output.session_snapshot)
                continue
            if output.finish_reason:
                del self._inboxes[output.request_id]
            inbox.put(output)

    def _watch_connection(self) -> None:
        """Handle connects and disconnects since the last time."""
        while _has_input(self._monitor):
            event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._lose_engine("The engine stopped while it worked on the request.")
            else:
                self._greet()

    async def _watch_heartbeat(self) -> None:
        while True:
            await asyncio.sleep(min(HELLO_INTERVAL, self._timeout / 4))
            if not self.ready:
                self._greet()
            elif time.monotonic() - self.last_message > self._timeout:
                self._lose_engine("The engine does not answer.")

    def _greet(self) -> None:
        with contextlib.suppress(EngineDead):  # not connected yet
            self._send(Hello())

    def end_requests(self, error: ApiError) -> None:
        """End every request in flight with this error. An engine that is only slow is told to forget them."""
        self._hand_out(len(self._arrived))
        inboxes, self._inboxes = self._inboxes, {}
        self._abort(list(inboxes))
        for inbox in set(inboxes.values()):
            inbox.fail(error)

    def _lose_engine(self, reason: str) -> None:
        if self.ready and (self._inboxes or not self.leaving):
            report = log.error if self._inboxes else log.info
            report("engine lost", reason=reason, in_flight=len(self._inboxes))
        self.ready = False
        self._metrics.lost()
        self.end_requests(EngineDead(reason))
        self._aborted.clear()


def _has_input(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
