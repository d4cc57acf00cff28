"""The engine process: ``python -m evospec.engine.process``. A ROUTER socket around the step loop, in one thread."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import structlog
import torch
import zmq

from evospec.engine import messages
from evospec.engine.config import CONFIG_VARIABLE, EngineConfig
from evospec.engine.core import EngineCore, Outputs
from evospec.engine.log import configure_logging_from_environment
from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.models.registry import known_sums, resolve_model, validate_model_files
from evospec.engine.models.verify import DAMAGED_STATUS, FileCheck
from evospec.engine.online.shared_file import SharedMemoryError, claim_directory
from evospec.engine.speculation.draft_files import choose_method, draft_model_config

log = structlog.get_logger(__name__)

_REPORT_SECONDS = 0.25
_RECEIVING_SECONDS = 0.005
"""How long messages are taken before another step: those who run wait meanwhile. The others stay in the socket."""


_MOST_UNSENT = 10_000
"""Messages that wait for a server that does not read: some minutes of steps."""


class EngineProcess:
    """Receives requests, steps while there is work, and sends each client its outputs.

    Every client gets the statistics too, at least every half second: silence means that the engine is gone.
    """

    def __init__(self, address: str, core: EngineCore, verification: FileCheck) -> None:
        self._core, self._verification = core, verification
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _MOST_UNSENT)  # a slow client's outputs wait here, never the step loop
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 5_000)  # milliseconds: a server's machine may vanish without a word
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30_000)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error for clients that have gone, not silence
        self._socket.bind(address)
        self._decoder = msgspec.msgpack.Decoder(messages.ClientMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self._clients: set[bytes] = set()
        self._steps: list[messages.StepTimings] = []
        self._last_report = 0.0

    def run(self) -> None:
        """Serve until the process is killed, or ends itself because the model's files are damaged."""
        log.info("engine ready", **msgspec.to_builtins(self._core.introduction))
        while True:
            self._receive(self._core.patience())
            outputs, timings = self._core.step()
            if timings is not None:
                self._steps.append(timings)
            self._emit(outputs)

    def _receive(self, patience: float) -> None:
        if patience and not self._socket.poll(int(patience * 1000)):
            return
        end = time.monotonic() + _RECEIVING_SECONDS
        while True:
            try:
                client, payload = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(client, payload)
            if time.monotonic() >= end:
                return

    def _handle(self, client: bytes, payload: bytes) -> None:
        try:
            message = self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.error("undecodable message", client=client.hex(), error=str(error))
            return
        match message:
            case messages.Hello():
                self._clients.add(client)
                self._send(client, self._core.introduction)
            case messages.EngineRequest():
                self._core.add(client, message)
            case messages.AbortRequests():
                self._core.abort(client, message.request_ids)

    def _emit(self, outputs: Outputs) -> None:
        """Outputs to their clients at once; statistics to every client now and then."""
        now = time.monotonic()
        report_due = now - self._last_report >= _REPORT_SECONDS
        for client in list(self._clients if report_due else outputs):
            message = messages.EngineOutputs(
                epoch=self._core.introduction.epoch,
                outputs=outputs.get(client, []),
                stats=self._core.stats() if report_due else None,
                steps=self._steps if report_due else [],
            )
            self._send(client, message)
        if report_due:
            self._last_report = now
            self._steps = []
            if self._verification.has_failed():
                sys.exit(DAMAGED_STATUS)

    def _send(self, client: bytes, message: messages.EngineMessage) -> None:
        try:
            self._socket.send_multipart((client, self._encoder.encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            reason = "it does not read" if error.errno == zmq.EAGAIN else "it has gone away"
            log.warning("a client's requests end", client=client.hex(), reason=reason)
            self._clients.discard(client)
            self._core.abort_client(client)


def _sums(config: EngineConfig, files: ModelFiles, max_model_len: int) -> dict[Path, str]:
    """Of what was fetched for the model, and for a draft model."""
    sums = known_sums(config.model, files)
    if choose_method(config, files)[0] == "draft_model":
        draft = draft_model_config(config, max_model_len)
        sums |= known_sums(draft, resolve_model(draft, progress=False))
    return sums


def main() -> None:
    """Load the model named by the configuration, then serve it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as process 1 of a container it would ignore it
    configure_logging_from_environment()
    config = EngineConfig.model_validate_json(os.environ[CONFIG_VARIABLE])
    try:
        _load_and_serve(config)
    except torch.OutOfMemoryError as error:
        advice = "end other processes on the GPU, or lower cache.memory_fraction or scheduler.max_batched_tokens"
        log.error("the GPU's memory is used up", reason=str(error).partition("\n")[0], advice=advice)
        sys.exit(1)


def _load_and_serve(config: EngineConfig) -> None:
    try:
        if config.alignment.is_on:
            claim_directory(config.alignment.shared_directory)
        files = resolve_model(config.model, progress=False)
        core = EngineCore(config, files, validate_model_files(files))
        core.start_grammars()
        sums = _sums(config, files, core.introduction.max_model_len) if config.model.verify else {}
        gc.freeze()  # what there is now stays: collections need not look at it, least of all between two tokens
    except (ModelError, SharedMemoryError) as error:
        log.error("the model cannot be served", reason=str(error))
        sys.exit(1)
    EngineProcess(config.address, core, FileCheck(sums)).run()


if __name__ == "__main__":
    main()
