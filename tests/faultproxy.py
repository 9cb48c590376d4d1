"""A proxy that puts faults between an S3 client and a real S3 server.

    with FaultProxy(server.host, server.port) as proxy:
        proxy.plan(["reset:1000", "status:503"])     # one per request, then `default`
        ...
        proxy.log                                     # (method, path, range, fault) of every request

Faults (N counts bytes of the answer's body): `ok`, `reset:N` (RST after N bytes), `fin:N` (the connection ends too
early), `stall:N` (N bytes, then silence), `flip:N` (byte N inverted), `hide:WORD` (it is crossed out wherever the
answer has it), `status:CODE` (an error answer), `reset-head` (RST before any answer), `delay:SECONDS`,
`rate:BYTES_PER_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

CODES = {403: "AccessDenied", 404: "NoSuchKey", 429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}
_PIECE = 1 << 16


@dataclass
class FaultProxy:
    host: str
    port_behind: int
    default: str = "ok"
    only: Callable[[str, str], bool] = lambda method, path: True
    """Which requests (method, path) faults apply to; the others pass."""
    choose: Callable[[str, str, str], str] | None = None
    """(method, path, range) -> fault, instead of a plan."""
    words: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Status -> the code and message of such an error answer."""
    log: list[tuple[str, str, str, str]] = field(default_factory=list)
    _plan: list[str] = field(default_factory=list, init=False)

    def plan(self, faults: list[str], default: str = "ok") -> None:
        """Faults for the next requests, one each; then `default`."""
        self._plan, self.default = list(faults), default
        self.log.clear()

    def __enter__(self) -> FaultProxy:
        self._plan.clear()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = 0
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def up(self) -> None:
        """Begins (again) to listen, on the same port."""

        async def start() -> None:
            self._server = await asyncio.start_server(self._serve, self.host, self.port, limit=1 << 20)
            self.port = self._server.sockets[0].getsockname()[1]

        asyncio.run_coroutine_threadsafe(start(), self._loop).result(10)

    def down(self) -> None:
        """The server is gone: new connections are refused, open ones are cut."""

        async def stop() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, EOFError):
            pass
        finally:
            with contextlib.suppress(Exception):
                writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Passes one request on; returns False when the connection is over."""
        lines, head = await _read_head(reader)
        method, path, _ = (part.decode() for part in lines[0].split(b" ", 2))
        fault = "ok"
        if self.only(method, path):
            wanted = head.get(b"range", b"").decode()
            if self.choose is not None:
                fault = self.choose(method, path, wanted)
            else:
                fault = self._plan.pop(0) if self._plan else self.default
            self.log.append((method, path, wanted, fault))
        kind, _, argument = fault.partition(":")
        if kind == "reset-head":
            _reset(writer)
            return False
        if kind == "delay":
            await asyncio.sleep(float(argument))
        if head.get(b"expect", b"").lower() == b"100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if kind == "status":
            async for _ in _body(reader, head, method):
                pass
            writer.write(_error(int(argument), method, self.words))
            await writer.drain()
            return True
        behind, to_server = await asyncio.open_connection(self.host, self.port_behind, limit=1 << 20)
        try:
            kept = [line for line in lines if not line.lower().startswith((b"expect:", b"connection:"))]
            to_server.write(b"\r\n".join(kept) + b"\r\nConnection: close\r\n\r\n")
            async for data in _body(reader, head, method):
                to_server.write(data)
                await to_server.drain()
            return await self._answer(behind, reader, writer, method, kind, argument)
        finally:
            to_server.close()

    async def _answer(
        self,
        behind: asyncio.StreamReader,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        method: str,
        kind: str,
        argument: str,
    ) -> bool:
        while True:
            lines, head = await _read_head(behind)
            status = int(lines[0].split(b" ")[1])
            if status != 100:
                break
        kept = [line for line in lines if not line.lower().startswith(b"connection:")]
        hidden = argument.encode() if kind == "hide" else b""
        writer.write(_without(b"\r\n".join(kept), hidden) + b"\r\n\r\n")
        limit, sent = int(argument) if kind in ("reset", "fin", "stall", "flip") else None, 0
        async for data in _body(behind, head, method, status):
            if kind == "rate":
                await asyncio.sleep(len(data) / float(argument))
            if limit is not None and kind == "flip" and sent <= limit < sent + len(data):
                data = data[: limit - sent] + bytes([data[limit - sent] ^ 0xFF]) + data[limit - sent + 1 :]
            elif limit is not None and kind != "flip" and sent + len(data) > limit:
                writer.write(data[: limit - sent])
                await writer.drain()
                if kind == "reset":
                    await asyncio.sleep(0.05)
                    _reset(writer)
                elif kind == "stall":
                    await reader.read(1)  # until the client gives up
                return False
            sent += len(data)
            writer.write(_without(data, hidden))
            await writer.drain()
        return True


def _without(text: bytes, word: bytes) -> bytes:
    return text.replace(word, b"x" * len(word)) if word else text


async def _read_head(reader: asyncio.StreamReader) -> tuple[list[bytes], dict[bytes, bytes]]:
    lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
    fields = (line.partition(b":") for line in lines[1:])
    return lines, {name.strip().lower(): value.strip() for name, _, value in fields}


async def _body(
    reader: asyncio.StreamReader, head: dict[bytes, bytes], method: str, status: int = 200
) -> AsyncIterator[bytes]:
    """The body as it is on the wire, in pieces."""
    if b"chunked" in head.get(b"transfer-encoding", b"").lower():
        size = -1
        while size:
            line = await reader.readline()
            size = int(line.split(b";")[0], 16)
            yield line
            if size:
                yield await reader.readexactly(size + 2)
        while (line := await reader.readline()) not in (b"\r\n", b""):
            yield line
        yield b"\r\n"
    elif method != "HEAD" and status not in (204, 304):
        left = int(head.get(b"content-length", b"0"))
        while left:
            data = await reader.read(min(left, _PIECE))
            if not data:
                raise EOFError
            left -= len(data)
            yield data


def _error(code: int, method: str, words: dict[int, tuple[str, str]]) -> bytes:
    name, message = words.get(code, (CODES.get(code, "Injected"), "injected"))
    body = f"<Error><Code>{name}</Code><Message>{message}</Message></Error>".encode()
    head = f"HTTP/1.1 {code} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else body)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes with RST instead of FIN."""
    connection: Any = writer.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
