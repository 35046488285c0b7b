"""A real HTTP server on 127.0.0.1 that speaks OpenAI's Responses and Batch APIs.

What it answers is in replies.py; the files and batches are in batches.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Self

from aiohttp import web
from batches import BatchApi
from multidict import CIMultiDict
from replies import (
    BROKEN,
    DIRECTIVE,
    MANNERS,
    NAMES,
    NEXT_ITEM,
    NEXT_OPTION,
    OUTPUT_TOKENS,
    RAW,
    Capacity,
    Flaky,
    Json,
    Outage,
    Policy,
    RateLimit,
    Reply,
    Request,
    RetryAfter,
    TokenLimit,
    build_response,
    counts_of,
    error_reply,
    format_duration,
    input_tokens,
    message,
    sample_answer,
    score_of,
    text_of,
)

__all__ = [
    "OUTPUT_TOKENS",
    "Capacity",
    "Flaky",
    "Outage",
    "RateLimit",
    "Reply",
    "Request",
    "RetryAfter",
    "Server",
    "TokenLimit",
    "error_reply",
    "format_duration",
    "input_tokens",
    "message",
    "sample_answer",
    "score_of",
]

Latency = float | Callable[[random.Random], float]  # seconds
JSON_TYPE = {"content-type": "application/json"}


# --- The server -----------------------------------------------------------------------
@dataclass(kw_only=True, eq=False, repr=False)
class Server(BatchApi):
    """The server; it runs its own event loop in a thread."""

    latency: Latency = 0.0
    answer: Callable[[Json], Json] = sample_answer
    record: bool = True  # keeps the requests, and counts what is paid for
    default: str = "ok"  # the directive for inputs that have none
    policy: InitVar[Policy | Sequence[Policy] | None] = None
    hold: int = 0  # replies are held back until so many requests are in flight
    ssl_context: ssl.SSLContext | None = None
    headers: Mapping[str, str] | None = None  # of every live reply
    # Status, headers and body; with status 0 the body is all that is sent.
    canned: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    total: int = 0
    in_flight: int = 0
    peak: int = 0
    connections: int = 0
    port: int = 0
    paid: Counter[str] = field(default_factory=Counter)  # inputs answered with 200
    batched: Counter[str] = field(default_factory=Counter)  # those of them in batches

    def __post_init__(self, policy: Policy | Sequence[Policy] | None) -> None:
        given = policy or []
        self.policies = list(given) if isinstance(given, Sequence) else [given]
        self._dice = random.Random(0)
        self._go = asyncio.Event()
        self._seen: Counter[str] = Counter()  # inputs with a sequence of replies
        self._first_at: float | None = None
        self._last_reply_at: float | None = None
        self._answered_by_second: list[int] = []

    @property
    def url(self) -> str:
        """The base url to give to a client."""
        return f"{'https' if self.ssl_context else 'http'}://127.0.0.1:{self.port}/v1"

    def start(self) -> Self:
        """Starts the thread and listens on a free port."""
        self._loop = asyncio.SelectorEventLoop()
        options: Json = {"handler_cancellation": True, "access_log": None}
        self._web = web.Server(self._route, loop=self._loop, **options)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.resume_listening()
        return self

    def stop(self) -> None:
        """Closes everything and ends the thread."""
        self.pause_listening()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    __enter__ = start

    def __exit__(self, *error: object) -> None:
        self.stop()

    def resume_listening(self) -> None:
        """Listens again on the same port."""
        self._call(self._listen())

    def pause_listening(self) -> None:
        """Drops all connections and refuses new ones."""
        self._call(self._disconnect())

    def release(self) -> None:
        """Lets go the replies that are held back, and stops holding."""
        self._loop.call_soon_threadsafe(self._let_go)

    def count(self, substring: str) -> int:
        """How many recorded requests had this in their input."""
        return sum(substring in request.text for request in list(self.requests))

    def stats(self) -> Json:
        """The counts; all times are of the monotonic clock."""
        return {
            "requests": self.total,
            "answered_200": self.statuses[200],
            "refused_429": self.statuses[429],
            "refused_503": self.statuses[503],
            "statuses": dict(self.statuses),
            "in_flight": self.in_flight,
            "peak_in_flight": self.peak,
            "connections": self.connections,
            "first_request_at": self._first_at,
            "last_reply_at": self._last_reply_at,
            "answered_200_by_second": self._answered_by_second,
            "policies": [counts_of(policy) for policy in self.policies],
            "batched": self.batched.total(),
        }

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine in the server's thread and waits for it."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    # What follows runs in the server's thread.

    async def _listen(self) -> None:
        """Listens on the port, which is a free one the first time."""
        self._listener = await self._loop.create_server(
            self._connect, "127.0.0.1", self.port, ssl=self.ssl_context, backlog=4096
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    def _connect(self) -> asyncio.Protocol:
        """Counts a connection."""
        self.connections += 1
        return self._web()

    async def _disconnect(self) -> None:
        """Accepts no more, and drops all connections once they are made."""
        for socket in self._listener.sockets:
            self._loop.remove_reader(socket.fileno())
        await turn()
        self._listener.close()
        for handler in self._web.connections:
            if handler.transport:
                handler.transport.abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await turn()

    async def _route(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answers any request."""
        if http.path == "/v1/responses":
            return await self._respond(http)
        if http.path == "/stats":
            self.connections -= 1
            return whole(Reply(200, self.stats()))
        if self.batch.missing_status:
            return whole(error_reply(self.batch.missing_status))
        try:
            name, result = await self.call(http)
        except KeyError as error:
            return whole(error_reply(404, message=f"There is no {error}."))
        if name in self.batch.lose:
            self.batch.lose.discard(name)
            return hang_up(http, b"")
        return whole(Reply(200, result))

    async def _respond(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answers a request to /v1/responses."""
        body = json.loads(await http.content.read())
        await asyncio.sleep(0)  # a client that has just hung up is counted out first
        request = self._arrive(body, http.headers)
        headers = {"x-request-id": f"req_{self.total:08x}", **(self.headers or {})}
        refusal = None
        for policy in self.policies:
            refusal = refusal or policy.check(request, headers)
        try:
            reply = refusal or await self._serve(request)
            reply = reply._replace(headers={**headers, **reply.headers})
            return await self._send(http, request, reply)
        except ConnectionError:
            return web.Response()  # nobody gets it
        finally:
            self._leave(request, 0)

    def _arrive(self, body: Json, headers: Mapping[str, str]) -> Request:
        """Counts a request in."""
        now = time.monotonic()
        self._first_at = self._first_at or now
        self.total += 1
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        since = now - self._first_at
        request = Request(text_of(body), body, headers, now, since, self.in_flight)
        if self.record:
            self.requests.append(request)
        return request

    def _leave(self, request: Request, status: int) -> None:
        """Counts a request out, unless it is out already."""
        if not request.is_open:
            return
        request.is_open = False
        request.status = status
        self.in_flight -= 1
        self.statuses[status] += 1
        self._last_reply_at = time.monotonic()
        if status == 200:
            second = int(self._last_reply_at - request.at + request.since)
            missing = second + 1 - len(self._answered_by_second)
            self._answered_by_second.extend([0] * missing)
            self._answered_by_second[second] += 1
            if self.record:
                self.paid[request.text] += 1

    async def _serve(self, request: Request) -> Reply:
        """The reply to a request, once it is time for it."""
        name, options = self._next_item(request.text)
        if self.in_flight < self.hold:
            await self._go.wait()
        elif self.hold:
            self._let_go()
        delay = self.latency(self._dice) if callable(self.latency) else self.latency
        if "ms" in options:
            delay = int(options["ms"]) / 1000
        if delay > 0:
            await asyncio.sleep(delay)
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        return self._make_reply(name, options, request.body, key)

    def _let_go(self) -> None:
        """Lets go the replies that are held back, and stops holding."""
        self.hold = 0
        self._go.set()
        self._go = asyncio.Event()

    def _next_item(self, text: str) -> tuple[str, dict[str, str]]:
        """The name or the status, and the options, that are due for an input."""
        found = DIRECTIVE.search(text)
        items = NEXT_ITEM.split(found[1] if found else self.default)
        if len(items) > 1:
            self._seen[text] += 1
        due = min(self._seen[text], len(items)) - 1
        name, *options = NEXT_OPTION.split(items[due])
        return name, dict(option.split("=", 1) for option in options)

    def _make_reply(
        self, name: str, options: dict[str, str], body: Json, key: str
    ) -> Reply:
        """The reply of an item, live or in a batch."""
        if name.isdecimal():
            return error_reply(int(name), **options)
        if name.startswith("canned="):
            status, headers, content = self.canned[name.removeprefix("canned=")]
            return Reply(status, content, headers, "whole" if status else "raw")
        if name in RAW:
            return RAW[name]
        if name not in NAMES:
            raise ValueError(f"There is no directive {name!r}.")
        if name == "echo_key":
            return error_reply(400, message=f"Something is wrong with your key {key}.")
        response = build_response(name, body, json.dumps(self.answer(body)))
        if name == "sse":
            event = {"type": "response.completed", "response": response}
            stream = f"event: response.completed\ndata: {json.dumps(event)}\n\n"
            return Reply(200, stream.encode(), {"content-type": "text/event-stream"})
        return Reply(200, response, manner=name if name in MANNERS else "whole")

    def answer_line(self, body: Json) -> tuple[int, Any]:
        """The status and the body that come out for the body of a line."""
        text = text_of(body)
        reply = self._make_reply(*self._next_item(text), body, key="")
        if reply.status == 200:
            self.paid[text] += 1
            self.batched[text] += 1
        is_raw = isinstance(reply.body, bytes)
        return reply.status, reply.body.decode() if is_raw else reply.body

    async def _send(
        self, http: web.BaseRequest, request: Request, reply: Reply
    ) -> web.StreamResponse:
        """Sends a reply in its manner; the request is out of flight before its end."""
        if reply.manner == "hang":
            await asyncio.Event().wait()
        if reply.manner == "whole":
            self._leave(request, reply.status)
            return whole(reply)
        if reply.manner != "trickle":
            self._leave(request, 0)
            return hang_up(http, BROKEN.get(reply.manner, reply.content()))
        content = reply.content()
        pieces = [content[at : at + 8] for at in range(0, len(content), 8)]
        stream = web.StreamResponse(headers={**JSON_TYPE, **reply.headers})
        stream.content_length = len(content)
        await stream.prepare(http)
        for piece in pieces[:-1]:
            await stream.write(piece)
            await asyncio.sleep(0.05)
        self._leave(request, 200)
        await stream.write_eof(pieces[-1])
        return stream


async def turn() -> None:
    """Lets the event loop do what is due, and what becomes due by that."""
    for _ in range(5):
        await asyncio.sleep(0)


def whole(reply: Reply) -> web.Response:
    """A reply that is sent at once."""
    headers = CIMultiDict(JSON_TYPE)
    headers.update(reply.headers)
    return web.Response(status=reply.status, headers=headers, body=reply.content())


def hang_up(http: web.BaseRequest, last_words: bytes) -> web.Response:
    """Closes a connection after some last bytes."""
    if http.transport:
        http.transport.write(last_words)
        http.transport.close()
    return web.Response()  # nobody gets it


# --- Command line ---------------------------------------------------------------------
def read_flags() -> argparse.Namespace:
    """The flags; a time is in seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    for name in ("latency", "sigma", "capacity", "errors", "no-room", "batch-seconds"):
        add(f"--{name}", type=float, default=0.0)
    for name in ("rps", "burst", "tpm-per-second", "token-burst"):
        add(f"--{name}", type=float, default=0.0)
    add("--limit-header", type=int, help="requests per minute that headers tell")
    add("--plan", default="", help='changes of --rps: "20:25,40:50"')
    add("--token-plan", default="", help="changes of --tpm-per-second")
    add("--outage", help="START:SECONDS[:STATUS]; without STATUS connections drop")
    add("--headers", action="store_true", help="send x-ratelimit headers")
    add("--retry-after", choices=("ms", "seconds", "date"))
    add("--default", default="ok", help="directive for inputs without one")
    return parser.parse_args()


def build_policies(flags: argparse.Namespace) -> Iterator[Policy]:
    """The policies that the flags ask for."""
    if flags.outage:
        start, seconds, *status = flags.outage.split(":")
        yield Outage(float(start), float(seconds), *map(int, status))
    if flags.errors:
        yield Flaky(flags.errors)
    if flags.no_room:
        yield Flaky(flags.no_room, 429, "resource_unavailable")
    if flags.capacity:
        yield Capacity(int(flags.capacity))
    limits = (
        (RateLimit, flags.rps, flags.burst, flags.plan),
        (TokenLimit, flags.tpm_per_second, flags.token_burst, flags.token_plan),
    )
    for kind, rate, burst, plan in limits:
        text = f"0:{rate},{plan}" if rate else plan
        pairs = [map(float, step.split(":")) for step in text.split(",") if step]
        steps = [(at, rate, burst or max(1.0, rate)) for at, rate in pairs]
        told = flags.limit_header if kind is RateLimit else None
        if steps:
            yield kind(0.0, 0.0, flags.headers, flags.retry_after, told, steps)


def main() -> None:
    """Serves until standard input ends; the first line that it prints is the url."""
    flags = read_flags()

    def latency(dice: random.Random) -> float:
        return float(flags.latency * dice.lognormvariate(0.0, flags.sigma))

    server = Server(record=False, default=flags.default, latency=flags.latency)
    server.policies = [*build_policies(flags)]
    server.batch.seconds = flags.batch_seconds
    if flags.sigma:
        server.latency = latency
    with server:
        print(server.url, flush=True)
        sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
