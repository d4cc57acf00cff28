"""A network between a client and a server of this machine: it can be cut, and it can be one with TLS."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from benchmarks.common.process import free_port


class Proxy:
    """Passes connections to ``port`` on to a server. While it is cut, all are silent, new ones too: none is closed."""

    def __init__(self, server: int | Path, certificate: Path | None = None, port: int | None = None) -> None:
        self.port = port or free_port()
        self.server = server
        self._certificate = certificate
        self._is_whole = asyncio.Event()
        self.mend()

    def cut(self) -> None:
        self._is_whole.clear()

    def mend(self) -> None:
        self._is_whole.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        tls = None
        if self._certificate is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(self._certificate)
        listener = await asyncio.start_server(self._connect, "127.0.0.1", self.port, ssl=tls)
        try:
            yield self
        finally:
            listener.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if isinstance(self.server, int):
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self.server)
        else:
            from_server, to_server = await asyncio.open_unix_connection(self.server)
        with suppress(asyncio.CancelledError):  # the test is over
            await asyncio.gather(self._pass_on(reader, to_server), self._pass_on(from_server, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._is_whole.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


def make_certificate(directory: Path) -> Path:
    """A certificate of 127.0.0.1, signed by itself, with its key."""
    path = directory / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "-", "-subj", "/CN=valkey", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    path.write_bytes(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    return path
