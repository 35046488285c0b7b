"""A real HTTP server on 127.0.0.1 that speaks OpenAI's Responses API for tests.

What it does with a request is chosen by a directive in square brackets anywhere in
the input, such as ``[ok]``, ``[500,500,ok]`` or ``[429:retry-after-ms=50,ok]``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import math
import random
import re
import signal
import socket
import ssl
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from types import TracebackType
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, cast
from urllib.parse import urlsplit

Json = dict[str, Any]
Latency = float | Callable[[random.Random], float]
RetryAfter = Literal["ms", "seconds", "date"] | None
Plan = Sequence[tuple[float, float, float]]
T = TypeVar("T")

OUTPUT_TOKENS = 24
_LONGEST_WAIT = 3600.0
_TRICKLE_CHUNKS = 100
_TRICKLE_PAUSE = 0.05
_EXPLANATION = "Deterministic answer of the test server."


# --------------------------------------------------------------------- records


@dataclass(slots=True)
class Request:
    """A request to /v1/responses; status stays 0 if it is never fully answered."""

    text: str
    body: Json
    headers: dict[str, str]
    at: float
    status: int = 0


@dataclass(slots=True)
class Reply:
    """What is sent back for a request."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a directive: a name or status number with its options."""

    name: str
    options: Mapping[str, str]


def input_tokens(text: str) -> int:
    """Return the input tokens that the server reports for an input."""
    return len(text) // 4 + 20


def score_of(text: str) -> float:
    """Return the score in [-1, 1] that the server gives to an input."""
    return (zlib.crc32(text.encode("utf-8", "surrogatepass")) % 2001 - 1000) / 1000


def format_duration(seconds: float) -> str:
    """Format a time as OpenAI's headers do: 120ms, 1.2s, 6m0s, 1h0m0s."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def error_reply(status: int, options: Mapping[str, str]) -> Reply:
    """Build an OpenAI error; options that are no field of it become headers."""
    kind, code = _usual_error(status, options.get("code"))
    error = {
        "message": options.get("message", f"Test server says {status}."),
        "type": options.get("type", kind),
        "param": options.get("param"),
        "code": code,
    }
    headers = {key: value for key, value in options.items() if key not in error}
    body = b"" if status in (204, 304) else _dump({"error": error})
    return Reply(status, body, headers=headers)


def _usual_error(status: int, code: str | None) -> tuple[str, str | None]:
    """Return the type and code OpenAI gives to a status."""
    if code == "insufficient_quota":
        return "insufficient_quota", code
    if status == 429:
        return "requests", code or "rate_limit_exceeded"
    if status == 401:
        return "invalid_request_error", code or "invalid_api_key"
    return ("server_error" if status >= 500 else "invalid_request_error"), code


def _dump(value: object) -> bytes:
    """Encode a value as JSON bytes."""
    return json.dumps(value).encode()


# -------------------------------------------------------------------- policies


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a policy knows of a request when it arrives."""

    at: float
    tokens: int
    in_flight: int


class Policy(Protocol):
    """Decides at arrival whether a request is served."""

    def check(self, arrival: Arrival) -> Reply | None:
        """Return the refusal, or None to let the request through."""

    def take(self, arrival: Arrival) -> None:
        """Deduct a request that every policy has let through."""

    def headers(self, arrival: Arrival) -> dict[str, str]:
        """Return the headers to put on the reply, measured at arrival."""

    def stats(self) -> Json:
        """Return the counts of this policy."""


class _Bucket:
    """A token bucket whose rate and size can change in mid-run."""

    unit: ClassVar[str]
    short: ClassVar[str]

    def __init__(
        self,
        per_second: float,
        burst: float,
        *,
        headers: bool = False,
        retry_after: RetryAfter = None,
        limit_header: int | None = None,
        plan: Plan = (),
    ) -> None:
        self.burst = burst
        self.retry_after = retry_after
        self.limit_header = limit_header
        self.taken = 0.0
        self.refused = 0
        self.allowed_at_last_request = 0.0
        self._show = headers
        self._rate = per_second
        self._plan = sorted(plan)
        self._lock = threading.RLock()
        self._start: float | None = None
        self._settled = 0.0
        self._level = burst
        self._allowed = 0.0

    @property
    def per_second(self) -> float:
        """The rate in force now."""
        self._settle(time.monotonic())
        return self._rate

    @per_second.setter
    def per_second(self, value: float) -> None:
        with self._lock:
            self._settle(time.monotonic())
            self._rate = value

    @property
    def allowed(self) -> float:
        """The rate integrated from the first request to now, without the burst."""
        self._settle(time.monotonic())
        return self._allowed

    def cost(self, arrival: Arrival) -> float:
        """Return what a request takes out of the bucket."""
        raise NotImplementedError

    def check(self, arrival: Arrival) -> Reply | None:
        """Refuse with 429 when the bucket holds less than the request costs."""
        with self._lock:
            self._begin(arrival.at)
            self.allowed_at_last_request = self._allowed
            missing = self.cost(arrival) - self._level
            if missing <= 1e-9:
                return None
            self.refused += 1
            return self._refusal(self._time_for(missing))

    def take(self, arrival: Arrival) -> None:
        """Deduct a request."""
        with self._lock:
            cost = self.cost(arrival)
            self._level -= cost
            self.taken += cost

    def headers(self, arrival: Arrival) -> dict[str, str]:
        """Return the x-ratelimit headers, if this limit shows them."""
        if not self._show:
            return {}
        with self._lock:
            self._begin(arrival.at)
            reset = format_duration(self._time_for(self.burst - self._level))
            return {
                f"x-ratelimit-limit-{self.unit}": str(self._per_minute()),
                f"x-ratelimit-remaining-{self.unit}": str(max(0, int(self._level))),
                f"x-ratelimit-reset-{self.unit}": reset,
            }

    def stats(self) -> Json:
        """Return the counts of this limit."""
        return {
            "policy": type(self).__name__,
            "taken": self.taken,
            "refused": self.refused,
            "allowed": self.allowed,
            "allowed_at_last_request": self.allowed_at_last_request,
        }

    def _begin(self, now: float) -> None:
        """Start the plan at the first request; settle up to now."""
        first = self._start is None
        if first:
            self._start = self._settled = now
        self._settle(now)
        if first:
            self._level = self.burst

    def _settle(self, now: float) -> None:
        """Refill up to now, applying what the plan has changed meanwhile."""
        with self._lock:
            if self._start is None:
                return
            while self._plan and self._start + self._plan[0][0] <= now:
                offset, rate, burst = self._plan.pop(0)
                self._refill(self._start + offset)
                self._rate, self.burst = rate, burst
            self._refill(now)

    def _refill(self, now: float) -> None:
        """Add what one rate has allowed since the last time."""
        gain = max(0.0, now - self._settled) * self._rate
        self._settled = max(now, self._settled)
        self._allowed += gain
        self._level = min(self.burst, self._level + gain)

    def _time_for(self, amount: float) -> float:
        """Return the seconds in which an amount is refilled."""
        wait = amount / self._rate if self._rate > 0 else _LONGEST_WAIT
        return min(max(0.0, wait), _LONGEST_WAIT)

    def _per_minute(self) -> int:
        """Return the limit that the header shows."""
        if self.limit_header is not None:
            return self.limit_header
        return round(self._rate * 60)

    def _refusal(self, wait: float) -> Reply:
        """Build the 429 of this limit."""
        options = {
            "message": f"Rate limit reached on {self.unit} per min ({self.short}): "
            f"Limit {self._per_minute()}. Try again in {format_duration(wait)}.",
            "type": self.unit,
            "code": "rate_limit_exceeded",
        }
        return error_reply(429, options | self._retry_header(wait))

    def _retry_header(self, wait: float) -> dict[str, str]:
        """Return the header that tells when to come back."""
        if self.retry_after == "ms":
            return {"retry-after-ms": str(math.ceil(wait * 1000))}
        if self.retry_after == "seconds":
            return {"retry-after": str(math.ceil(wait))}
        if self.retry_after == "date":
            when = math.ceil(time.time() + wait)
            return {"retry-after": formatdate(when, usegmt=True)}
        return {}


class RateLimit(_Bucket):
    """A limit of requests per second."""

    unit = "requests"
    short = "RPM"

    def cost(self, arrival: Arrival) -> float:
        """Return what a request takes: one."""
        return 1.0


class TokenLimit(_Bucket):
    """A limit of tokens per second."""

    unit = "tokens"
    short = "TPM"

    def cost(self, arrival: Arrival) -> float:
        """Return what a request takes: the tokens its answer will report."""
        return float(arrival.tokens)


class Capacity:
    """Refuses with 503 when more than n requests are in flight."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.refused = 0

    def check(self, arrival: Arrival) -> Reply | None:
        """Refuse a request that is one too many."""
        if arrival.in_flight <= self.n:
            return None
        self.refused += 1
        message = "The server is overloaded or not ready yet."
        return error_reply(503, {"message": message})

    def take(self, arrival: Arrival) -> None:
        """Deduct nothing: the server itself counts what is in flight."""

    def headers(self, arrival: Arrival) -> dict[str, str]:
        """Return no headers."""
        return {}

    def stats(self) -> Json:
        """Return the counts of this policy."""
        return {"policy": "Capacity", "refused": self.refused}


def _admit(
    policies: Iterable[Policy], arrival: Arrival
) -> tuple[Reply | None, dict[str, str]]:
    """Ask every policy; return the first refusal and the headers of all."""
    policies = list(policies)
    refusals = (policy.check(arrival) for policy in policies)
    refusal = next((reply for reply in refusals if reply is not None), None)
    if refusal is None:
        for policy in policies:
            policy.take(arrival)
    headers: dict[str, str] = {}
    for policy in policies:
        headers |= policy.headers(arrival)
    return refusal, headers


# --------------------------------------------------------------------- answers


def sample_answer(body: Json) -> Json:
    """Return a smallest answer that fits the schema of a request."""
    return cast(Json, _sample(_schema(body)))


def _schema(body: Json) -> Json:
    """Return the JSON schema a request asks for, or an empty one."""
    text = body.get("text") or {}
    return (text.get("format") or {}).get("schema") or {}


def _sample(schema: Json) -> object:
    """Return a value that fits a simple schema."""
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _sample(schema["anyOf"][0])
    kind = schema.get("type", "object")
    if kind == "object":
        properties = schema.get("properties", {})
        return {key: _sample(value) for key, value in properties.items()}
    if kind == "array":
        return [_sample(schema.get("items", {"type": "null"}))]
    simple = {"string": "text", "boolean": False, "null": None}
    return simple.get(kind, schema.get("minimum", 0))


def _wants_score(body: Json) -> bool:
    """Tell whether a request asks for a score and an explanation."""
    properties = _schema(body).get("properties")
    return properties is None or set(properties) == {"score", "explanation"}


def _text_part(text: str) -> Json:
    """Build the text part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(part: Json, **fields: str) -> Json:
    """Build an output message with one part."""
    message = {"id": "msg_test", "type": "message", "role": "assistant"}
    return {**message, "status": "completed", "content": [part], **fields}


def _usage(text: str) -> Json:
    """Build the usage of an answer."""
    tokens = input_tokens(text)
    return {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": OUTPUT_TOKENS,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens + OUTPUT_TOKENS,
    }


def _response(request: Request, number: int, answer: str) -> Json:
    """Build the response object of a good answer."""
    body = request.body
    return {
        "id": f"resp_{number:08x}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": f"{body.get('model')}-2025-04-14",
        "output": [_message(_text_part(answer))],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": True,
        "temperature": body.get("temperature"),
        "text": body.get("text"),
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": _usage(request.text),
        "user": None,
        "metadata": {},
    }


def _refusal(response: Json, answer: str) -> None:
    """Refuse to answer."""
    part = {"type": "refusal", "refusal": "I'm sorry, I can't help with that."}
    response["output"] = [_message(part)]


def _filter(response: Json, answer: str) -> None:
    """Let the content filter stop the answer."""
    response["status"] = "incomplete"
    response["incomplete_details"] = {"reason": "content_filter"}
    response["output"] = []


def _incomplete(response: Json, answer: str) -> None:
    """Cut the answer short."""
    response["status"] = "incomplete"
    response["incomplete_details"] = {"reason": "max_output_tokens"}
    part = _text_part(answer[: len(answer) // 2])
    response["output"] = [_message(part, status="incomplete")]


def _failed(response: Json, answer: str) -> None:
    """Report a failed response."""
    response["status"] = "failed"
    message = "An error occurred while processing your request."
    response["error"] = {"code": "server_error", "message": message}
    response["output"] = []
    response["usage"] = None


def _reasoning(response: Json, answer: str) -> None:
    """Put reasoning before the message, and unknown fields everywhere."""
    unknown: Json = {"x_future_field": {"nested": [1, None, "text"]}}
    thought: Json = {"id": "rs_test", "type": "reasoning", "summary": []}
    message = _message(_text_part(answer) | unknown) | unknown
    response["output"] = [thought | unknown, message]
    response["usage"] |= unknown
    response |= unknown


def _commentary(response: Json, answer: str) -> None:
    """Put a commentary before the answer."""
    response["output"] = [
        _message(_text_part("Let me think about this."), phase="commentary"),
        _message(_text_part(answer), phase="final_answer"),
    ]


def _nulloutput(response: Json, answer: str) -> None:
    """Give no list of output."""
    response["output"] = None


def _nousage(response: Json, answer: str) -> None:
    """Leave out the usage."""
    response["usage"] = None


def _nomodel(response: Json, answer: str) -> None:
    """Leave out the model."""
    del response["model"]


def _texted(change: Callable[[str], str]) -> Callable[[Json, str], None]:
    """Make an item that answers with another text."""

    def apply(response: Json, answer: str) -> None:
        """Replace the text of the answer."""
        response["output"] = [_message(_text_part(change(answer)))]

    return apply


def _scored(score: float) -> Callable[[Json, str], None]:
    """Make an item that answers with a fixed score."""
    text = json.dumps({"score": score, "explanation": _EXPLANATION})
    return _texted(lambda answer: text)


_SHAPES: dict[str, Callable[[Json, str], None]] = {
    "ok": lambda response, answer: None,
    "refusal": _refusal,
    "filter": _filter,
    "incomplete": _incomplete,
    "prose": _texted(lambda answer: "The mood of this message is rather good."),
    "fenced": _texted(lambda answer: f"```json\n{answer}\n```"),
    "nan": _scored(math.nan),
    "bounds": _scored(7),
    "badjson": _texted(lambda answer: answer[: len(answer) * 2 // 3]),
    "failed": _failed,
    "nulloutput": _nulloutput,
    "reasoning": _reasoning,
    "nousage": _nousage,
    "nomodel": _nomodel,
    "commentary": _commentary,
}
_RAW = {
    "empty": ("application/json", b""),
    "html": ("text/html; charset=utf-8", b"<html><body>Bad gateway</body></html>"),
}
_WIRE = ("drop", "half", "garbage", "hang", "trickle")
_NAMED = frozenset([*_SHAPES, *_RAW, *_WIRE, "sse", "echo_key"])


def _sse_body(response: Json) -> bytes:
    """Encode a response as the two events of a stream."""
    events = ("response.created", "response.completed")
    return b"".join(
        f"event: {kind}\n".encode()
        + b"data: "
        + _dump({"type": kind, "sequence_number": number, "response": response})
        + b"\n\n"
        for number, kind in enumerate(events)
    )


# ------------------------------------------------------------------ directives

_BRACKETS = re.compile(r"\[([a-z2-5][^\[\]\r\n]*)\]")
_STATUS = re.compile(r"[2-5]\d\d")
_OPTION_START = re.compile(r":(?=[A-Za-z][\w-]*=)")
_ITEM_START = re.compile(
    rf",\s*(?=(?:{_STATUS.pattern}|{'|'.join(sorted(_NAMED))})(?:[:,]|$))"
)


def _parse_item(text: str) -> Item | None:
    """Parse one item, or return None if it is not a known one."""
    name, *rest = _OPTION_START.split(text)
    options = dict(option.split("=", 1) for option in rest)
    if _STATUS.fullmatch(name):
        return Item(name, options)
    delay = options.get("ms", "0")
    known = name in _NAMED and set(options) <= {"ms"}
    return Item(name, options) if known and delay.isdecimal() else None


@functools.lru_cache(maxsize=4096)
def parse_directive(text: str) -> tuple[Item, ...] | None:
    """Parse a sequence of items, or return None if any of them is unknown."""
    items = [_parse_item(part) for part in _ITEM_START.split(text)]
    known = tuple(item for item in items if item is not None)
    return known if len(known) == len(items) else None


def find_directive(text: str) -> tuple[Item, ...] | None:
    """Return the first directive in an input, if it has one."""
    for match in _BRACKETS.finditer(text):
        if items := parse_directive(match[1]):
            return items
    return None


# ------------------------------------------------------------------------ HTTP


class _BadRequestError(Exception):
    """The bytes received are not an HTTP request."""


@dataclass(slots=True)
class _Message:
    """A parsed HTTP request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    end: int
    keep_alive: bool


def _parse_head(head: str) -> tuple[str, str, str, dict[str, str]]:
    """Split a request's head into method, path, version and headers."""
    first, *lines = head.split("\r\n")
    try:
        method, target, version = first.split(" ")
        pairs = (line.split(":", 1) for line in lines)
        headers = {name.lower(): value.strip() for name, value in pairs}
    except ValueError:
        raise _BadRequestError(first) from None
    path = urlsplit(target).path  # a client of a proxy sends the whole address
    return method, path, version, headers


def _dechunk(data: bytearray, at: int) -> tuple[bytes, int] | None:
    """Decode a chunked body; return it and its end, or None if not all is there."""
    body = bytearray()
    while (line_end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line_end].split(b";")[0], 16)
        start = line_end + 2
        if len(data) < start + size + 2:
            return None
        body += data[start : start + size]
        at = start + size + 2
        if size == 0:
            return bytes(body), at
    return None


def _body_of(
    data: bytearray, at: int, headers: dict[str, str]
) -> tuple[bytes, int] | None:
    """Return a request's body and its end, or None if not all is there."""
    try:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return _dechunk(data, at)
        end = at + int(headers.get("content-length", "0"))
    except ValueError:
        raise _BadRequestError("bad length") from None
    return (bytes(data[at:end]), end) if len(data) >= end else None


def _head_bytes(reply: Reply) -> bytes:
    """Encode the head of a reply."""
    try:
        phrase = HTTPStatus(reply.status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = [
        f"HTTP/1.1 {reply.status} {phrase}",
        f"content-type: {reply.content_type}",
        f"content-length: {len(reply.body)}",
        *(f"{key}: {value}" for key, value in reply.headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


class _Connection(asyncio.Protocol):
    """One connection of a client; serves one request at a time."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._buffer = bytearray()
        self._request: Request | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._keep_alive = True
        self._continued = False
        self._used = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the connection, or drop it if the server is not listening."""
        self.transport = cast(asyncio.Transport, transport)
        if not self._server._add(self):
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection and what it had in flight."""
        if self._timer is not None:
            self._timer.cancel()
        if self._request is not None:
            self._finish(0)
        self._server._remove(self)

    def data_received(self, data: bytes) -> None:
        """Collect bytes; serve the requests that are complete."""
        self._buffer += data
        self._advance()

    def _advance(self) -> None:
        """Serve the next request if it is complete and none is in flight."""
        while self._request is None and not self.transport.is_closing():
            try:
                message = self._next_message()
            except _BadRequestError as error:
                self._keep_alive = False
                self._write(error_reply(400, {"message": str(error)}))
                return
            if message is None:
                return
            del self._buffer[: message.end]
            self._keep_alive = message.keep_alive
            self._continued = False
            self._route(message)
            self._used = True

    def _next_message(self) -> _Message | None:
        """Parse the next request, or return None if not all of it is there."""
        split = self._buffer.find(b"\r\n\r\n")
        if split < 0:
            return None
        head = self._buffer[:split].decode("latin-1")
        method, path, version, headers = _parse_head(head)
        found = _body_of(self._buffer, split + 4, headers)
        if found is None:
            self._continue(headers)
            return None
        keep_alive = version == "HTTP/1.1" and headers.get("connection") != "close"
        return _Message(method, path, headers, *found, keep_alive)

    def _continue(self, headers: dict[str, str]) -> None:
        """Ask once for the body of a client that waits to be asked."""
        if "expect" in headers and not self._continued:
            self._continued = True
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _route(self, message: _Message) -> None:
        """Send a request where its path leads."""
        where = (message.method, message.path)
        if where == ("POST", "/v1/responses"):
            self._receive(message)
        elif where == ("GET", "/stats"):
            if not self._used:
                self._server.connections -= 1
            self._write(Reply(body=_dump(self._server.stats())))
        else:
            what = f"Invalid URL ({message.method} {message.path})"
            self._write(error_reply(404, {"message": what}))

    def _receive(self, message: _Message) -> None:
        """Hand a request over to the server."""
        try:
            body = json.loads(message.body)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            what = "We could not parse the JSON body of your request."
            self._write(error_reply(400, {"message": what}))
            return
        given = body.get("input")
        text = given if isinstance(given, str) else json.dumps(given)
        self._request = Request(text, body, message.headers, time.monotonic())
        self._server._arrive(self, self._request)

    def later(self, delay: float, action: Callable[[], None]) -> None:
        """Do something after a delay unless the connection is lost before."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(delay, action)

    def send(self, reply: Reply, manner: str = "whole") -> None:
        """Send the reply of the request in flight in the given manner."""
        if self.transport.is_closing() or manner == "hang":
            return
        if manner == "trickle":
            self._trickle(reply)
        elif manner == "whole":
            self._finish(reply.status)
            self._write(reply)
            self._advance()
        else:
            self._finish(0)
            self._break(reply, manner)

    def _break(self, reply: Reply, manner: str) -> None:
        """Close the connection with a broken reply or none."""
        if manner == "half":
            half = reply.body[: len(reply.body) // 2]
            self.transport.write(_head_bytes(reply) + half)
        elif manner == "garbage":
            self.transport.write(b"%% this is no status line %%\r\n\r\n")
        self.transport.close()

    def _trickle(self, reply: Reply) -> None:
        """Send a reply whose body arrives in small pieces."""
        size = math.ceil(len(reply.body) / _TRICKLE_CHUNKS)
        starts = range(0, len(reply.body), size)
        pieces = [reply.body[start : start + size] for start in starts]
        self.transport.write(_head_bytes(reply))
        self._trickle_on(reply.status, pieces)

    def _trickle_on(self, status: int, pieces: list[bytes]) -> None:
        """Send one piece and plan the next."""
        piece, *rest = pieces
        if rest:
            self.transport.write(piece)
            action = functools.partial(self._trickle_on, status, rest)
            self.later(_TRICKLE_PAUSE, action)
            return
        self._finish(status)
        self.transport.write(piece)
        if not self._keep_alive:
            self.transport.close()
        self._advance()

    def _write(self, reply: Reply) -> None:
        """Write a whole reply."""
        self.transport.write(_head_bytes(reply) + reply.body)
        if not self._keep_alive or reply.headers.get("connection") == "close":
            self.transport.close()

    def _finish(self, status: int) -> None:
        """Take the request out of flight; done first, so that clients see it."""
        request, self._request = self._request, None
        if request is not None:
            self._server._finished(request, status)


# ---------------------------------------------------------------------- server


@dataclass(slots=True)
class _Exchange:
    """A request that was let through, with the headers measured at its arrival."""

    connection: _Connection
    request: Request
    item: Item
    headers: dict[str, str]


def _as_list(policy: Policy | Sequence[Policy] | None) -> list[Policy]:
    """Return the given policies as a list."""
    if policy is None:
        return []
    return list(policy) if isinstance(policy, Sequence) else [policy]


def _bump(counts: list[int], second: int) -> None:
    """Count one more in a second."""
    counts.extend([0] * (second + 1 - len(counts)))
    counts[second] += 1


class Server:
    """The server; runs its own event loop in a thread between start and stop."""

    def __init__(
        self,
        *,
        latency: Latency = 0.0,
        answer: Callable[[Json], Json] = sample_answer,
        record: bool = True,
        default: str = "ok",
        policy: Policy | Sequence[Policy] | None = None,
        hold: int = 0,
        ssl_context: ssl.SSLContext | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.latency = latency
        self.answer = answer
        self.record = record
        self.default = default
        self.policies = _as_list(policy)
        self.hold = hold
        self.headers = dict(headers or {})
        self.port = 0
        self._ssl = ssl_context
        self._random = random.Random(0)
        self._numbers = itertools.count(1)
        self._listener: asyncio.Server | None = None
        self._open: set[_Connection] = set()
        self._held: list[_Exchange] = []
        self._seen: Counter[str] = Counter()
        self._reset_counts()

    def _reset_counts(self) -> None:
        """Set all counts to nothing."""
        self.requests: list[Request] = []
        self.total = 0
        self.in_flight = 0
        self.peak = 0
        self.connections = 0
        self.statuses: Counter[int] = Counter()
        self._first_at: float | None = None
        self._last_at: float | None = None
        self._last_reply_at: float | None = None
        self._asked_by_second: list[int] = []
        self._answered_by_second: list[int] = []

    @property
    def url(self) -> str:
        """The base url to give to a client."""
        return f"{self._origin}/v1"

    @property
    def stats_url(self) -> str:
        """The url of the statistics."""
        return f"{self._origin}/stats"

    @property
    def _origin(self) -> str:
        """The url without a path."""
        return f"{'https' if self._ssl else 'http'}://127.0.0.1:{self.port}"

    @property
    def default(self) -> str:
        """The directive for inputs that have none; can be set in mid-run."""
        return self._default

    @default.setter
    def default(self, directive: str) -> None:
        items = parse_directive(directive)
        if items is None:
            raise ValueError(f"unknown directive: {directive}")
        self._default, self._default_items = directive, items

    def __enter__(self) -> Self:
        """Start the server."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the server."""
        self.stop()

    def start(self) -> None:
        """Start the thread and listen on a free port."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="test-server", daemon=True
        )
        self._thread.start()
        self._call(self._listen())

    def stop(self) -> None:
        """Close everything and end the thread."""
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def pause_listening(self) -> None:
        """Drop all connections and refuse new ones."""
        self._call(self._disconnect())

    def resume_listening(self) -> None:
        """Listen again on the same port."""
        self._call(self._listen())

    def release(self) -> None:
        """Let go all replies that are held back, and stop holding."""
        self._call(self._release_held())

    def count(self, substring: str) -> int:
        """Return how many recorded requests had this in their input."""
        return sum(substring in request.text for request in list(self.requests))

    def stats(self) -> Json:
        """Return the statistics; all times are of the monotonic clock."""
        return {
            "requests": self.total,
            "answered_200": self.statuses[200],
            "refused_429": self.statuses[429],
            "refused_503": self.statuses[503],
            "statuses": {str(key): n for key, n in sorted(self.statuses.items())},
            "in_flight": self.in_flight,
            "peak_in_flight": self.peak,
            "connections": self.connections,
            "first_request_at": self._first_at,
            "last_request_at": self._last_at,
            "last_reply_at": self._last_reply_at,
            "requests_by_second": list(self._asked_by_second),
            "answered_200_by_second": list(self._answered_by_second),
            "policies": [policy.stats() for policy in self.policies],
        }

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the server's thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _listen(self) -> None:
        """Listen on the port, which the first time is a free one."""
        if self._listener is not None:
            return
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self),
            "127.0.0.1",
            self.port,
            family=socket.AF_INET,
            backlog=4096,
            reuse_address=True,
            ssl=self._ssl,
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _disconnect(self) -> None:
        """Stop listening and drop all connections."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in list(self._open):
            connection.transport.abort()
        while self._open:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def _shut(self) -> None:
        """Disconnect, and end the handshakes that are under way."""
        await self._disconnect()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(3):
            await asyncio.sleep(0)

    def _add(self, connection: _Connection) -> bool:
        """Register a new connection unless the server has stopped listening."""
        if self._listener is None:
            return False
        self._open.add(connection)
        self.connections += 1
        return True

    def _remove(self, connection: _Connection) -> None:
        """Forget a lost connection and what is held back for it."""
        self._open.discard(connection)
        self._held = [one for one in self._held if one.connection is not connection]

    def _arrive(self, connection: _Connection, request: Request) -> None:
        """Refuse, hold back or serve a request."""
        self._count_arrival(request)
        tokens = input_tokens(request.text) + OUTPUT_TOKENS
        arrival = Arrival(request.at, tokens, self.in_flight)
        refusal, headers = _admit(self.policies, arrival)
        if refusal is not None:
            refusal.headers |= self._common_headers() | headers
            connection.send(refusal)
            return
        item = self._choose(request.text)
        self._held.append(_Exchange(connection, request, item, headers))
        if self.in_flight >= self.hold:
            self._let_go()

    def _count_arrival(self, request: Request) -> None:
        """Count a request that has just arrived."""
        if self.record:
            self.requests.append(request)
        if self._first_at is None:
            self._first_at = request.at
        self._last_at = request.at
        self.total += 1
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        _bump(self._asked_by_second, int(request.at - self._first_at))

    def _finished(self, request: Request, status: int) -> None:
        """Count a request that is no longer in flight."""
        request.status = status
        self.in_flight -= 1
        self.statuses[status] += 1
        self._last_reply_at = time.monotonic()
        if status == 200 and self._first_at is not None:
            second = int(self._last_reply_at - self._first_at)
            _bump(self._answered_by_second, second)

    def _choose(self, text: str) -> Item:
        """Return the item of the directive that is due for an input."""
        items = find_directive(text) or self._default_items
        if len(items) == 1:
            return items[0]
        self._seen[text] += 1
        return items[min(self._seen[text], len(items)) - 1]

    async def _release_held(self) -> None:
        """Let go in the server's thread."""
        self._let_go()

    def _let_go(self) -> None:
        """Serve all that is held back, and stop holding."""
        self.hold = 0
        held, self._held = self._held, []
        for exchange in held:
            self._serve(exchange)

    def _serve(self, exchange: _Exchange) -> None:
        """Send the reply, after the latency if there is one."""
        delay = self._delay(exchange.item)
        if delay > 0:
            action = functools.partial(self._send, exchange)
            exchange.connection.later(delay, action)
        else:
            self._send(exchange)

    def _delay(self, item: Item) -> float:
        """Return the seconds to wait before a reply."""
        if item.name in _NAMED and "ms" in item.options:
            return int(item.options["ms"]) / 1000
        if callable(self.latency):
            return self.latency(self._random)
        return self.latency

    def _send(self, exchange: _Exchange) -> None:
        """Build and send the reply of an item."""
        name = exchange.item.name
        reply = self._reply(exchange.request, exchange.item)
        reply.headers |= self._common_headers() | exchange.headers
        exchange.connection.send(reply, name if name in _WIRE else "whole")

    def _common_headers(self) -> dict[str, str]:
        """Return the headers of every reply."""
        return {"x-request-id": f"req_{next(self._numbers):08x}", **self.headers}

    def _reply(self, request: Request, item: Item) -> Reply:
        """Build the reply of an item."""
        if item.name not in _NAMED:
            return error_reply(int(item.name), item.options)
        if item.name in _RAW:
            content_type, body = _RAW[item.name]
            return Reply(body=body, content_type=content_type)
        if item.name == "echo_key":
            key = request.headers.get("authorization", "").removeprefix("Bearer ")
            message = f"Something is wrong with your key {key}."
            return error_reply(400, {"message": message})
        return self._response_reply(request, item.name)

    def _response_reply(self, request: Request, name: str) -> Reply:
        """Build a reply that carries a response object."""
        answer = self._answer_text(request)
        response = _response(request, self.total, answer)
        if name == "sse":
            return Reply(body=_sse_body(response), content_type="text/event-stream")
        if name in _SHAPES:
            _SHAPES[name](response, answer)
        return Reply(body=_dump(response))

    def _answer_text(self, request: Request) -> str:
        """Return the text of a good answer."""
        if not _wants_score(request.body):
            return json.dumps(self.answer(request.body))
        score = score_of(request.text)
        return json.dumps({"score": score, "explanation": _EXPLANATION})


# --------------------------------------------------------------------- process


def _parse_plan(text: str, burst: float | None) -> list[tuple[float, float, float]]:
    """Parse "0:50,20:25" into times, rates and bursts."""
    pairs = (part.split(":") for part in text.split(",") if part)
    plan = [(float(at), float(rate)) for at, rate in pairs]
    return [(at, rate, burst or max(1.0, rate)) for at, rate in plan]


def _parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--latency", type=float, default=0.0, help="seconds (the median)")
    add("--sigma", type=float, default=0.0, help="log-normal spread of the latency")
    add("--rps", type=float, help="requests per second")
    add("--burst", type=float, help="bucket of requests; else one second's")
    add("--plan", default="", help='changes of --rps: "0:50,20:25,40:50"')
    add("--tpm-per-second", type=float, help="tokens per second")
    add("--token-burst", type=float, help="bucket of tokens; else one second's")
    add("--token-plan", default="", help="changes of --tpm-per-second")
    add("--headers", action="store_true", help="send x-ratelimit headers")
    add("--retry-after", choices=("ms", "seconds", "date"))
    add("--limit-header", type=int, help="requests per minute that headers tell")
    add("--capacity", type=int, help="503 above this many in flight")
    add("--default", default="ok", help="directive for inputs without one")
    return parser.parse_args()


def _policies(options: argparse.Namespace) -> list[Policy]:
    """Build the policies that the command line asks for."""
    policies: list[Policy] = []
    show, retry = options.headers, options.retry_after
    if options.capacity is not None:
        policies.append(Capacity(options.capacity))
    if options.rps is not None or options.plan:
        plan = _parse_plan(options.plan, options.burst)
        rate = options.rps if options.rps is not None else plan[0][1]
        requests = RateLimit(
            rate,
            options.burst or max(1.0, rate),
            headers=show,
            retry_after=retry,
            limit_header=options.limit_header,
            plan=plan,
        )
        policies.append(requests)
    if options.tpm_per_second is not None or options.token_plan:
        plan = _parse_plan(options.token_plan, options.token_burst)
        rate = options.tpm_per_second or plan[0][1]
        burst = options.token_burst or rate
        tokens = TokenLimit(rate, burst, headers=show, retry_after=retry, plan=plan)
        policies.append(tokens)
    return policies


def _latency(options: argparse.Namespace) -> Latency:
    """Return the latency that the command line asks for."""
    median, sigma = float(options.latency), float(options.sigma)
    if sigma == 0:
        return median
    return lambda chance: median * chance.lognormvariate(0.0, sigma)


def main() -> None:
    """Serve until stdin ends or SIGTERM comes; then print the statistics."""
    options = _parse_arguments()
    server = Server(
        latency=_latency(options),
        record=False,
        default=options.default,
        policy=_policies(options),
    )
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
        server.start()
        print(server.url, flush=True)
        sys.stdin.buffer.read()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stats = server.stats()
    server.stop()
    print(json.dumps(stats), flush=True)


if __name__ == "__main__":
    main()
