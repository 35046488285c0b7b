"""What the test server answers: responses of many shapes, errors, and refusals.

A directive in square brackets anywhere in the input chooses the reply: `[ok]`,
`[500,500,ok]`, `[429:retry-after-ms=50,ok]`, `[ok:ms=200]`, `[canned=NAME]`. The first
item is for the first request with that input, and so on; the last one is repeated.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Literal, NamedTuple

Json = dict[str, Any]
RetryAfter = Literal["ms", "seconds", "date"] | None
OUTPUT_TOKENS = 24  # of every answer


# --- Requests and replies -------------------------------------------------------------
@dataclass
class Request:
    """A request to /v1/responses; its status stays 0 if it is never fully answered."""

    text: str
    body: Json
    headers: Mapping[str, str]  # names in any case
    at: float  # of the monotonic clock
    since: float  # seconds since the first request
    in_flight: int  # when it arrived, itself included
    status: int = 0
    is_open: bool = True


class Reply(NamedTuple):
    """What is sent back, and how: "whole", "raw", or one of MANNERS."""

    status: int
    body: Any  # bytes, or what becomes JSON
    headers: Mapping[str, str] = {}
    manner: str = "whole"

    def content(self) -> bytes:
        """The body as it is sent."""
        is_raw = isinstance(self.body, bytes)
        return self.body if is_raw else json.dumps(self.body).encode()


def error_reply(status: int, **options: str) -> Reply:
    """An error as OpenAI sends it; options that are no field of it become headers."""
    code = {401: "invalid_api_key", 429: "rate_limit_exceeded"}.get(status)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {
        "message": options.pop("message", f"Test server says {status}."),
        "type": options.pop("type", kind),
        "param": options.pop("param", None),
        "code": options.pop("code", code),
    }
    return Reply(status, b"" if status in (204, 304) else {"error": error}, options)


def text_of(body: Json) -> str:
    """The input of a request as text."""
    given = body.get("input")
    return given if isinstance(given, str) else json.dumps(given)


# --- Answers --------------------------------------------------------------------------
def input_tokens(text: str) -> int:
    """How many input tokens the server reports for an input."""
    return len(text) // 4 + 20


def score_of(text: str) -> float:
    """The score from -1 to 1 that the server gives to an input."""
    return (zlib.crc32(text.encode("utf-8", "surrogatepass")) % 2001 - 1000) / 1000


def sample_answer(body: Json) -> Json:
    """The score of an input, or a small answer that fits another schema."""
    form = (body.get("text") or {}).get("format") or {}
    schema = form.get("schema") or {}
    answer = {"score": score_of(text_of(body)), "explanation": "By the test server."}
    if set(schema.get("properties", answer)) != set(answer):
        answer = sample(schema, schema.get("$defs", {}))
    return answer


def sample(schema: Json, definitions: Json) -> Any:
    """A value that fits a simple schema."""
    if "$ref" in schema:
        return sample(definitions[schema["$ref"].split("/")[-1]], definitions)
    if "anyOf" in schema:  # the last choice is null if there is one: recursion ends
        return sample(schema["anyOf"][-1], definitions)
    if "enum" in schema or "const" in schema:
        return schema.get("enum", [schema.get("const")])[0]
    kind = schema.get("type", "object")
    if kind == "object":
        fields = schema.get("properties", {})
        return {name: sample(fields[name], definitions) for name in fields}
    if kind == "array":
        return [sample(schema["items"], definitions)] * schema.get("minItems", 0)
    least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
    number = min(least, schema.get("maximum", least))
    return {"string": "text", "boolean": False, "null": None}.get(kind, number)


def message(text: str, **fields: Any) -> Json:
    """An output message."""
    content = [{"type": "output_text", "text": text, "annotations": []}]
    usual = {"id": "msg_test", "type": "message", "role": "assistant"}
    return {**usual, "status": "completed", "content": content, **fields}


def shapes(answer: str) -> dict[str, Json]:
    """The fields in which a response of each shape differs from a good one."""
    part = {"type": "refusal", "refusal": "I'm sorry, I can't help with that."}
    cut = {"status": "incomplete", "output": [message(answer[: len(answer) // 2])]}
    filtered = {"reason": "content_filter"}
    failed: Json = {"status": "failed", "output": [], "usage": None}
    fault = {"code": "server_error", "message": "An error occurred."}
    flagged = {"code": "invalid_prompt", "message": "The prompt was flagged."}
    unknown = {"x_future_field": {"nested": [1, None, "text"]}}
    thought = {"id": "rs_test", "type": "reasoning", "summary": [], **unknown}
    comment = message("Let me think about this.", phase="commentary")
    texts = {
        "ok": answer,
        "prose": "The mood of this message is rather good.",
        "fenced": f"```json\n{answer}\n```",
        "nan": '{"score": NaN, "explanation": "Not a number."}',
        "bounds": '{"score": 7, "explanation": "Out of bounds."}',
        "badjson": answer[: len(answer) * 2 // 3],
        "think": f"<think>Hm, rather good.</think>\n\n{answer}",
        "thinkbrace": f"<think>A set {{good, bad}}.</think>{answer}",
        "thinkfence": f"<think>Hm, rather good.</think>\n```json\n{answer}\n```",
    }
    return {name: {"output": [message(text)]} for name, text in texts.items()} | {
        "refusal": {"output": [message("", content=[part])]},
        "filter": cut | {"incomplete_details": filtered, "output": []},
        "incomplete": cut | {"incomplete_details": {"reason": "max_output_tokens"}},
        "failed": failed | {"error": fault},
        "failed_prompt": failed | {"error": flagged},
        "nulloutput": {"output": None},
        "nousage": {"usage": None},
        "flex": {"service_tier": "flex"},
        "reasoning": {"output": [thought, message(answer, **unknown)], **unknown},
        "commentary": {"output": [comment, message(answer, phase="final_answer")]},
        "twice": {"output": [message(answer), message(answer)]},
    }


def build_response(name: str, body: Json, answer: str) -> Json:
    """A response object of the shape that has this name."""
    tokens = input_tokens(text_of(body))
    usage = {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": OUTPUT_TOKENS,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens + OUTPUT_TOKENS,
    }
    tier = body.get("service_tier", "auto")
    response = {
        "id": f"resp_{random.getrandbits(64):016x}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": f"{body.get('model')}-2026-01-01",
        "output": [message(answer)],
        "service_tier": "default" if tier == "auto" else tier,
        "store": body.get("store", True),
        "usage": usage,
    }
    if name == "nomodel":
        del response["model"]
    return response | shapes(answer).get(name, {})


# --- Directives -----------------------------------------------------------------------
RAW = {
    "empty": Reply(200, b""),
    "html": Reply(200, b"<html>Bad gateway</html>", {"content-type": "text/html"}),
    "error200": Reply(200, {"error": {"code": 502, "message": "upstream"}}),
}
BROKEN = {
    "drop": b"",
    "garbage": b"%% this is no HTTP %%\r\n\r\n",
    "half": b'HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{"id": "resp_1", ',
}
MANNERS = {*BROKEN, "hang", "trickle"}
NAMES = {*shapes(""), *RAW, *MANNERS, "nomodel", "sse", "echo_key"}
ITEM = rf"(?:[2-5]\d\d|canned=\w+|{'|'.join(NAMES)})(?=[:,\]]|$)"
DIRECTIVE = re.compile(rf"\[({ITEM}[^\[\]\r\n]*)\]")
NEXT_ITEM = re.compile(rf",\s*(?={ITEM})")
NEXT_OPTION = re.compile(r":(?=[A-Za-z][\w-]*=)")


# --- Policies: they refuse requests, and may add headers to replies -------------------
@dataclass
class Refusal:
    """Refuses the requests of which a condition is true."""

    policy: str
    condition: Callable[[Request], bool]
    reply: Reply
    refused: int = 0

    def check(self, request: Request, headers: dict[str, str]) -> Reply | None:
        """The refusal, or None to let the request through."""
        if not self.condition(request):
            return None
        self.refused += 1
        return self.reply


def Capacity(n: int) -> Refusal:
    """Refuses with 503 what exceeds n requests in flight."""
    return Refusal("Capacity", lambda request: request.in_flight > n, error_reply(503))


def Flaky(
    share: float, status: int = 500, code: str | None = None, seed: int = 0
) -> Refusal:
    """Gives an error to that share of the requests, at random."""
    dice = random.Random(seed)
    reply = error_reply(status, **{"code": code} if code else {})
    return Refusal("Flaky", lambda request: dice.random() < share, reply)


def Outage(start: float, seconds: float, status: int = 0) -> Refusal:
    """Refuses all for some seconds; without a status the connections are dropped."""
    reply = error_reply(status) if status else Reply(0, b"", manner="drop")
    end = start + seconds
    return Refusal("Outage", lambda request: start <= request.since < end, reply)


@dataclass
class RateLimit:
    """A token bucket of requests, whose rate and size may change by a plan."""

    per_second: float
    burst: float
    headers: bool = False  # whether replies have x-ratelimit headers
    retry_after: RetryAfter = None
    limit_header: int | None = None  # the limit per minute that the headers tell
    plan: Sequence[tuple[float, float, float]] = ()  # from that second: rate, burst
    refused: int = 0
    taken: float = 0.0
    allowed_at_last_request: float = 0.0  # by the rate alone
    level: float = math.inf  # becomes the burst with the first request
    refilled: float = 0.0  # seconds since the first request
    policy: str = "RateLimit"
    unit: str = "requests"

    def check(self, request: Request, headers: dict[str, str]) -> Reply | None:
        """Refuses with 429 if the bucket holds less than the request costs."""
        self.refill(request.since)
        tokens = input_tokens(request.text) + OUTPUT_TOKENS
        cost = tokens if self.unit == "tokens" else 1
        missing = cost - self.level
        if missing <= 1e-9:
            self.level -= cost
            self.taken += cost
        if self.headers:
            limit = self.limit_header or round(self.per_second * 60)
            reset = format_duration(self.seconds_for(self.burst - self.level))
            headers[f"x-ratelimit-limit-{self.unit}"] = str(limit)
            headers[f"x-ratelimit-remaining-{self.unit}"] = str(max(0, int(self.level)))
            headers[f"x-ratelimit-reset-{self.unit}"] = reset
        return self.refuse(missing) if missing > 1e-9 else None

    def refuse(self, missing: float) -> Reply:
        """The refusal, which may tell when to come back."""
        self.refused += 1
        wait = self.seconds_for(missing)
        when = formatdate(math.ceil(time.time() + wait), usegmt=True)
        hints = {
            None: {},
            "ms": {"retry-after-ms": str(math.ceil(wait * 1000))},
            "seconds": {"retry-after": str(math.ceil(wait))},
            "date": {"retry-after": when},
        }
        text = f"Rate limit reached on {self.unit} per min. Try again in {wait:.3f}s."
        return error_reply(429, message=text, type=self.unit, **hints[self.retry_after])

    def refill(self, now: float) -> None:
        """Adds what the rates of the plan have allowed since the last time."""
        while self.plan and self.plan[0][0] <= now:
            (at, rate, burst), *self.plan = self.plan
            if at > 0:
                self.refill(at)
            self.per_second = rate
            self.burst = burst
        gain = max(0.0, now - self.refilled) * self.per_second
        self.refilled = max(now, self.refilled)
        self.level = min(self.burst, self.level + gain)
        self.allowed_at_last_request += gain

    def seconds_for(self, amount: float) -> float:
        """How long it takes until that much is refilled, at most an hour."""
        return min(amount / max(self.per_second, 1e-9), 3600.0)


@dataclass
class TokenLimit(RateLimit):
    """A token bucket of a model's tokens: a request costs what its answer reports."""

    policy: str = "TokenLimit"
    unit: str = "tokens"


Policy = Refusal | RateLimit


def counts_of(policy: Policy) -> Json:
    """The name, the counts and the measures of a policy."""
    plain = (str, int, float)
    return {key: one for key, one in vars(policy).items() if isinstance(one, plain)}


def format_duration(seconds: float) -> str:
    """A time as OpenAI's headers have it: 120ms, 1.2s, 6m0s, 1h0m0s."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{minutes // 60}h{minutes % 60}m{rest / 1000:g}s"
    return text.removeprefix("0h").removeprefix("0m")
