"""A broker's connections, in the hands of a test: cut, with answers swallowed, requests lost or requests delivered late.

It forwards Kafka's frames (a 4-byte length, then a request or an answer) and puts its own port into the answers where the broker tells its address,
so that clients stay behind it. Only for brokers without TLS that are reached by 127.0.0.1.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from enum import Enum

PRODUCE = 0
ADD_PARTITIONS_TO_TXN = 24
INIT_PRODUCER_ID = 22
END_TXN = 26


class Fault(Enum):
    """What happens to one request. In each case the client's connection is closed, so that it can't know."""

    LOSE_REQUEST = 1
    SWALLOW_ANSWER = 2
    HOLD_REQUEST = 3


Rewrite = Callable[[bytes], bytes]


class KafkaProxy:
    def __init__(self, broker_port: int) -> None:
        self.port = 0
        self.requests: Counter[int] = Counter()
        self._broker_port = broker_port
        self._faults: defaultdict[int, deque[Fault]] = defaultdict(deque)
        self._rewrites: defaultdict[int, deque[Rewrite]] = defaultdict(deque)
        self._held: list[tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._clients: set[asyncio.Task[None]] = set()
        self._is_cut = False

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def fault(self, api_key: int, fault: Fault, times: int = 1) -> None:
        """Do that to the next requests of this kind."""
        self._faults[api_key].extend([fault] * times)

    def rewrite(self, api_key: int, rewrite: Rewrite) -> None:
        """Change the next answer of this kind: the whole frame, which keeps its length."""
        self._rewrites[api_key].append(rewrite)

    def pending(self, api_key: int) -> int:
        """How many faults and rewrites of this kind have not happened yet."""
        return len(self._faults[api_key]) + len(self._rewrites[api_key])

    def cut(self) -> None:
        """Close all connections, and each new one at once."""
        self._is_cut = True
        for writer in list(self._writers):
            writer.close()

    def mend(self) -> None:
        self._is_cut = False

    async def release(self) -> None:
        """Deliver the requests that were held, and wait for the broker's answers to them."""
        for frame, reader, writer in self._held:
            writer.write(frame)
            await _frame(reader)
            writer.close()
        self._held.clear()

    async def end(self) -> None:
        self.cut()
        await asyncio.gather(*self._clients)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = asyncio.create_task(self._client(reader, writer))
        self._clients.add(client)
        client.add_done_callback(self._clients.discard)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.close()
            return
        to_broker = await asyncio.open_connection("127.0.0.1", self._broker_port)
        self._writers |= {writer, to_broker[1]}
        swallowed: set[bytes] = set()
        rewritten: dict[bytes, Rewrite] = {}
        answers = asyncio.create_task(self._answers(to_broker[0], writer, swallowed, rewritten))
        keep = False
        try:
            while True:
                frame = await _frame(reader)
                api_key, correlation = int.from_bytes(frame[4:6], "big"), frame[8:12]
                self.requests[api_key] += 1
                fault = self._faults[api_key].popleft() if self._faults[api_key] else None
                if fault is Fault.LOSE_REQUEST:
                    return
                if fault is Fault.HOLD_REQUEST:
                    keep = True
                    answers.cancel()
                    with suppress(asyncio.CancelledError):
                        await answers
                    self._held.append((frame, *to_broker))
                    return
                if fault is Fault.SWALLOW_ANSWER:
                    swallowed.add(correlation)
                if self._rewrites[api_key]:
                    rewritten[correlation] = self._rewrites[api_key].popleft()
                to_broker[1].write(frame)
                await to_broker[1].drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            if not keep:
                answers.cancel()
                to_broker[1].close()
            self._writers -= {writer, to_broker[1]}

    async def _answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, swallowed: set[bytes], rewritten: dict[bytes, Rewrite]
    ) -> None:
        told, ours = (b"127.0.0.1" + port.to_bytes(4, "big") for port in (self._broker_port, self.port))
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                frame = await _frame(reader)
                if frame[4:8] in swallowed:
                    break
                rewrite = rewritten.pop(frame[4:8], bytes)
                writer.write(rewrite(frame.replace(told, ours)))
                await writer.drain()
        writer.close()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    size = await reader.readexactly(4)
    return size + await reader.readexactly(int.from_bytes(size, "big"))


@asynccontextmanager
async def kafka_proxy(bootstrap_servers: str) -> AsyncIterator[KafkaProxy]:
    """A proxy before the (one) broker at that address."""
    proxy = KafkaProxy(int(bootstrap_servers.rpartition(":")[2]))
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.end()
