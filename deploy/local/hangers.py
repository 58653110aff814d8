"""Clients that hang: some stop within their request, others never read what is streamed to them."""

import asyncio
import json
import urllib.parse

from fault_client import Case

LONG_ANSWER = 400


class Hangers:
    """Opens connections and holds them.

    Attributes:
        halves: connections that sent half a request.
        deaf: connections that sent a whole one and do not read.
    """

    def __init__(self, url: str, count: int, cases: list[Case]) -> None:
        self.address = urllib.parse.urlsplit(url)
        self.halves, self.deaf = count // 2, count - count // 2
        self.cases = cases
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        """Connects all of them."""
        for number in range(self.halves + self.deaf):
            body = self.cases[number % len(self.cases)].body(long=True) | {"max_tokens": LONG_ANSWER}
            data = json.dumps(body).encode()
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.address.netloc}\r\n"
                f"X-Session-ID: hanger-{number}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            ).encode()
            # The smallest buffer that asyncio takes: what is not read soon stops the sender.
            _, writer = await asyncio.open_connection(self.address.hostname, self.address.port, limit=1)
            writer.write(head + (data[: len(data) // 2] if number < self.halves else data))
            await writer.drain()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            self._writers.append(writer)

    async def stop(self) -> None:
        """Drops all connections without a goodbye."""
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(1)
