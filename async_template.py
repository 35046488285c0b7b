#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["openai[aiohttp]>=3.0,<4", "pydantic>=2.8,<3", "tqdm>=4.66,<5"]
# ///
"""Ask an LLM one structured question about every message of a file, many at once.

  python async_template.py messages.txt try.jsonl --offline   try it: no key, no cost
  python async_template.py messages.txt out.jsonl --limit 20  a pilot, with an estimate
  python async_template.py messages.txt out.jsonl             all; run again to resume

Each message becomes a line of OUTPUT, on disk as soon as it is answered:
  {"line": 1, "text_message": "Very good!", "response": {"score": 0.9, "explanation":
  "..."}, "error": null, "model": "gpt-6-luna", "answered_at": "2026-11-25T22:10:04Z",
  "usage": {"input_tokens": 131, "output_tokens": 24}, "settings": "a3f9a1c2"}

Exit status: 0 every message has an answer; 1 some have an error, the same command asks
them again; 2 not started or stopped, a line says why; 130 interrupted. OPENAI_API_KEY
holds the key, OPENAI_BASE_URL another server. For your own question copy this file and
edit part 1. MIT; from Kai-Cheng Yang's tutorial https://github.com/yang3kc/llm_for_css
"""

import argparse
import asyncio
import contextlib
import csv
import email.utils
import fileinput
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import time
import urllib.request
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal  # noqa: F401  Literal is for your schema

if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write("async_template.py needs Python 3.11 or newer\n")
    raise SystemExit(2)

import aiohttp  # comes with openai[aiohttp]
import openai
from pydantic import BaseModel, Field
from tqdm.auto import tqdm

# --- 1. Edit this ---------------------------------------------------------------------
MODEL = "gpt-6-luna"  # any model of the endpoint; --model overrides it for a run
TEMPERATURE: float | None = 0.0  # 0 repeats best; None if the model takes none

# Further settings of the API. The default model takes a temperature only without
# reasoning. Without "store": False the provider keeps every message for 30 days.
EXTRA: dict[str, Any] = {"reasoning": {"effort": "none"}, "store": False}

INSTRUCTIONS = "You are an expert on sentiment analysis of short text messages."

# {text_message} is the message, that is the line or the column named by --field; {name}
# is any column of a .csv or .jsonl.
PROMPT = """\
Evaluate the sentiment of the text message below: give a score from -1 (negative) to 1
(positive), and explain in one sentence why.

Text message: {text_message}"""


class Sentiment(BaseModel):
    """What to answer. The model reads the names and the descriptions, too."""

    score: float = Field(ge=-1, le=1, description="-1 negative, 0 neutral, 1 positive")
    explanation: str = Field(description="one sentence that says why")
    # A codebook: topic: Literal["economy", "health", "other"]


# An answer that you might get. Its class is the schema of all answers, and --offline
# gives it to every message.
EXAMPLE: BaseModel = Sentiment(score=0.9, explanation="An example: no model was asked.")

# USD per million (input, output) tokens of MODEL, for the cost shown and --max-cost.
# Change them together with MODEL; None if it is free. https://openai.com/api/pricing
PRICES: tuple[float, float] | None = (0.10, 0.50)

CONCURRENCY = 100  # most requests in flight; the pace is found, you need not set it
TIMEOUT = 30.0  # seconds for one attempt; more for a slow local model, 900 for flex
MAX_ATTEMPTS = 5  # tries for one message; waiting for a rate limit is not a try

# --- 2. One message, one call ---------------------------------------------------------
# The way of a message: `run` opens the files and `fill` starts `answer_each`. A worker
# there uses `ask`, which tries until a `call` brings the final reply; `throttle.send`
# holds each call back for as long as it must. `keep` writes the row and moves the bar.
Row = dict[str, Any]  # a message (line, text_message, fields), later with its answer
Reader = Callable[[], Iterator[Row]]  # gives the messages of INPUT, each time anew
Request = Callable[[Row], Awaitable["Reply"]]  # asks about a message, once
Keep = Callable[[Row, "Reply"], None]  # takes a message and its final reply
Keys = Sequence[int]  # of texts, see `Question.key`
Options = argparse.Namespace  # the flags
Client = openai.AsyncOpenAI
DATE = "%Y-%m-%dT%H:%M:%SZ"  # as pandas reads it, in UTC
TOKENS = ("input_tokens", "output_tokens")
MOST_BYTES = 10_000_000  # of a reply; no answer is as long
# Settings that do not shape an answer may change between two runs into one OUTPUT.
NEUTRAL = "service_tier|store|metadata|user|max_output_tokens|prompt_cache_.*|safety_.*"

# The types of errors, by the status and the codes in a body. The first that fits is it:
# https://platform.openai.com/docs/guides/error-codes
ERRORS = {
    "content_filter": "content_filter|content_policy.*|ContentFiltered|Responsible.*",
    "bad_request": "invalid_prompt|context_length_exceeded|string_above_max_length",
    "invalid_answer": "json_validate_failed",  # it does not fit the schema
    "no_room": "resource_unavailable",  # flex has no capacity for this one request
    "fatal": "401|402|407|insufficient_quota|billing_hard_limit_reached",
    "rate_limit": "429|503|529",  # the server wants fewer requests
    "server_error": "408|409|425|498|499|5..",
    "unclear": "400|413|422",  # rejected, and the server does not say why
    "settings": ".*",  # such as 403 and 404; this may be about all messages or one
}
RETRIED = {"timeout", "connection", "server_error", "bad_response", "invalid_answer"}
TROUBLE = {"timeout", "connection", "server_error", "bad_response", "rate_limit"}
# Types that we tell apart, but a row does not.
SHOWN_AS = {"settings": "bad_request", "unclear": "bad_request"}
SHOWN_AS |= {"fatal": "bad_request", "no_room": "rate_limit"}
# What to check, by the status or else by the type.
ADVICE: dict[int | str, str] = {
    401: "the key is not accepted, check OPENAI_API_KEY",
    407: "the proxy wants a password, check HTTPS_PROXY",
    "fatal": "no credit is left, check plan and billing",
    "settings": "unknown or forbidden, check --model and OPENAI_BASE_URL",
}


class StopRun(Exception):
    """The run cannot go on. The text says why and what to do."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status  # the exit status
        self.rows: list[Row] = []  # what `answer_all` had by then


@dataclass
class Reply:
    """What came of one request: an answer, or the type and message of an error."""

    error: str | None = None
    message: str = ""  # of the error
    answer: Row | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    retry_after: float = 0.0  # seconds that the server asks us to wait
    model: str | None = None
    usage: dict[str, int] | None = None  # by the names in TOKENS
    usd: float = 0.0
    attempts: int = 1
    answered_at: float = field(default_factory=time.time)
    sent_at: float = 0.0  # on the monotonic clock

    def __post_init__(self) -> None:
        self.message = clean(self.message)


@dataclass
class Question:
    """What is asked: makes a message into a request, and reads the reply."""

    # Part 1 is read when a question is made: a notebook may have changed MODEL.
    model: str = field(default_factory=lambda: MODEL)
    instructions: str = field(default_factory=lambda: INSTRUCTIONS)
    prompt: str = field(default_factory=lambda: PROMPT)
    example: BaseModel = field(default_factory=lambda: EXAMPLE)
    temperature: float | None = field(default_factory=lambda: TEMPERATURE)
    extra: dict[str, Any] = field(default_factory=lambda: EXTRA)
    prices: tuple[float, float] | None = field(default_factory=lambda: PRICES)
    field: str = "text"  # the name of the column that is the message
    offline: bool = False  # every answer is the example

    def __post_init__(self) -> None:
        """Builds what all requests share, and a hash of all that shapes an answer."""
        if not re.search(r"\{[^\W\d]\w*\}", self.prompt):
            raise StopRun("PROMPT has no {text_message}, nor a {column}")
        if self.model != MODEL and self.prices is PRICES:
            self.prices = None  # those are of MODEL
        self.schema = type(self.example)
        tool = openai.pydantic_function_tool(self.schema)["function"]
        form: Row = {"type": "json_schema", "strict": True, "name": tool["name"]}
        form["schema"] = tool["parameters"]
        self.shared: Row = {"model": self.model, "instructions": self.instructions}
        if self.temperature is not None:
            self.shared["temperature"] = self.temperature
        self.shared |= self.extra
        self.shared["text"] = self.extra.get("text", {}) | {"format": form}
        shaping = {k: v for k, v in self.shared.items() if not re.fullmatch(NEUTRAL, k)}
        shape = json.dumps([shaping, self.prompt, self.offline], sort_keys=True)
        # The letter keeps pandas from reading a hash of digits as a number.
        self.settings = "a" + hashlib.sha256(shape.encode()).hexdigest()[:7]

    def text(self, message: Row) -> str:
        """PROMPT with the message filled in. Raises StopRun at an unknown {name}."""
        text = message["text_message"]  # it has two names: also that of its column
        columns = message.get("fields", {}) | {"text_message": text, self.field: text}

        def fill(match: re.Match[str]) -> str:
            name = match[1]
            if name not in columns and name.isidentifier():
                line = f"line {message['line']} has only: {', '.join(columns)}"
                raise StopRun(f"PROMPT names {match[0]}, but {line}")
            value = columns.get(name, match[0])  # braces of another kind stay
            if isinstance(value, str):
                return value
            return json.dumps(value, ensure_ascii=False)

        return re.sub(r"\{([^{}]+)\}", fill, self.prompt)

    def key(self, message: Row) -> int:
        """A hash of the text that is asked: a message is known by it."""
        digest = hashlib.blake2b(self.text(message).encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 4  # 60 bits take a third less memory

    def request(self, message: Row) -> Row:
        """The body of a request."""
        return self.shared | {"input": self.text(message)}

    def read(self, body: Any, in_batch: bool = False) -> Reply:
        """The reply in the body of a 200."""
        found: Reply | str
        try:
            found = unpack(body)
        except (LookupError, TypeError, AttributeError):
            found = Reply("bad_response", f"not from the Responses API: {body}")
        reply = self.check(found) if isinstance(found, str) else found
        if not isinstance(body, dict):
            return reply
        if body.get("model"):
            reply.model = clean(str(body["model"]))
        used = body.get("usage")
        if isinstance(used, dict) and all(is_count(used.get(name)) for name in TOKENS):
            reply.usage = {name: used[name] for name in TOKENS}
            prices = zip(TOKENS, self.prices or (0.0, 0.0))
            reply.usd = sum(used[name] * price for name, price in prices) / 1e6
        if in_batch or body.get("service_tier") == "flex":
            reply.usd /= 2
        if in_batch and is_count(body.get("created_at")):
            reply.answered_at = body["created_at"]
        return reply

    def most_usd(self) -> float:
        """The price of the longest answer if max_output_tokens bounds it, else 0."""
        longest = self.extra.get("max_output_tokens") or 0
        return float(longest * (self.prices or (0.0, 0.0))[1] / 1e6)

    def check(self, text: str) -> Reply:
        """The answer in a text, or what is wrong with it."""
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            # Some servers put it behind <think>...</think>, or between ``` fences.
            text = text.rpartition("</think>")[2]
            text = text[text.find("{") : text.rfind("}") + 1] or text
        try:
            parsed = self.schema.model_validate_json(text, strict=True)
            answer = parsed.model_dump(mode="json")
            to_line(answer)  # raises ValueError for NaN
        except ValueError as error:  # pydantic's ValidationError is one
            return Reply("invalid_answer", str(error))
        return Reply(answer=answer)

    def row(self, message: Row, reply: Reply) -> Row:
        """The row of OUTPUT for a message and its final reply."""
        error: Row | None = None
        if reply.error:
            kind = SHOWN_AS.get(reply.error, reply.error)
            error = {"type": kind, "message": reply.message, "attempts": reply.attempts}
        return message | {
            "response": reply.answer,
            "error": error,
            "model": reply.model,
            "answered_at": time.strftime(DATE, time.gmtime(reply.answered_at)),
            "usage": reply.usage,
            "settings": self.settings,
        }


def unpack(body: Row) -> Reply | str:
    """The error or the text of the answer in the body of a 200. Other servers leave out
    much: https://platform.openai.com/docs/api-reference/responses/object"""
    if body.get("error"):
        code = body["error"].get("code")
        if code == "rate_limit_exceeded":
            code = 429
        return read_failure(code if code in range(400, 600) else 500, body)
    if body.get("status") == "incomplete":
        reason = (body.get("incomplete_details") or {}).get("reason")
        error = reason if reason == "content_filter" else "incomplete"
        return Reply(error, f"the answer was cut off: {reason}")
    outputs = [item for item in body["output"] if item.get("type") == "message"]
    if not outputs:
        return Reply("bad_response", f"no message in the reply: {body}")
    # The last message alone: some servers send it twice, some comment first.
    parts = outputs[-1]["content"]
    refusal = [part["refusal"] for part in parts if part["type"] == "refusal"]
    if refusal:
        return Reply("refusal", "".join(refusal))
    return "".join(part["text"] for part in parts if part["type"] == "output_text")


def is_count(value: Any) -> bool:
    """Whether a server's number can be one of tokens, or of seconds since 1970."""
    return isinstance(value, int) and 0 <= value < 1e11


def to_line(row: Row) -> bytes:
    """A line of strict JSON in UTF-8. Raises ValueError for what cannot be one: NaN."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def clean(message: str) -> str:
    """A server's words on one line, without control characters."""
    message = "".join(char if char.isprintable() else " " for char in message[:5000])
    return " ".join(message.split())[:300]


def decode(content: bytes, key: str) -> Any:
    """The JSON value in the body of a reply, or its text. A key in it is replaced."""
    if len(key) >= 16:  # a shorter one is any word, for a local server
        content = content.replace(key.encode(), b"[key]")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content.decode(errors="replace")


def find(names: str, body: Any) -> list[str]:
    """The texts under these names in a body, however deep a gateway wraps them."""
    found = re.findall(rf'"(?:{names})": ("(?:[^"\\]|\\.)*")', json.dumps(body))
    return [json.loads(text) for text in found]


def read_failure(status: int, body: Any) -> Reply:
    """The reply for an error, with the server's reason and what to do about it."""
    words = find("code|type", body)
    words = [word for word in words if not word.isdecimal()]  # they are no statuses
    words.append(str(status))
    for error, pattern in ERRORS.items():  # noqa: B007
        if any(re.fullmatch(pattern, word) for word in words):
            break
    # Gateways have their own shapes, and wrap the words of the server behind them.
    reasons = find("raw", body) + find("message|msg", body) + find("detail|error", body)
    reasons.append(str(body)[:200])
    message = f"status {status}: {reasons[0]}"
    if error in ADVICE:
        message = f"{ADVICE.get(status, ADVICE[error])}; {message}"
    setting = "".join(find("param", body)[:1])
    if setting and error == "unclear":
        about_message = re.match(r"(input|messages|prompt)\b|input_tokens", setting)
        error = "bad_request" if about_message else "settings"
    if setting and error == "settings":
        message = f"the setting {setting!r} is not accepted; {message}"
    return Reply(error, message)


def read_error(error: BaseException, client: Client) -> Reply:
    """The reply for an error of the client, with what to do about it."""
    if not isinstance(error, openai.APIStatusError):
        advice = ""
        while error.__cause__:
            error = error.__cause__
            if isinstance(error, aiohttp.ClientConnectorCertificateError):
                advice = "; set SSL_CERT_FILE to the certificates of your network"
        return Reply("connection", f"{client.base_url}: {error}{advice}")
    headers = error.response.headers
    if error.status_code < 400:
        url = str(error.request.url.join(headers.get("location", "")))
        words = "the server has moved, set OPENAI_BASE_URL to "
        return Reply("fatal", words + url.removesuffix("/responses"))
    body = decode(error.response.content, client.api_key)
    reply = read_failure(error.status_code, body)
    reply.headers = headers
    reply.retry_after = seconds_asked(headers)
    return reply


def seconds_asked(headers: Mapping[str, str]) -> float:
    """How long the server asks us to wait, in seconds; 0 if it does not say."""
    asked = headers.get("retry-after", "")
    seconds = 0.0
    with contextlib.suppress(ValueError, OverflowError):
        seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
    with contextlib.suppress(ValueError):
        seconds = float(asked)
    with contextlib.suppress(ValueError):
        seconds = float(headers.get("retry-after-ms", "")) / 1000
    return seconds if 0 < seconds < math.inf else 0.0


# Of a server or a proxy: https, host, port, path.
ADDRESS = r"(?i)(?:(https?)://)?(?:\S+@)?([\w.-]+|\[[\da-f:]+\])(:\d{1,5})?([/?]\S*)?"


def connect(offline: bool, concurrency: int) -> Client:
    """A client for the key and the address of the environment. Raises StopRun."""
    if offline:
        http = openai.DefaultAioHttpClient(trust_env=False)
        return Client(api_key="offline", base_url="http://offline", http_client=http)
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise StopRun("OPENAI_API_KEY holds no key: set it, or try --offline")
    url = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    parts = re.fullmatch(ADDRESS, url)
    if not parts or not parts[1] or "@" in url:
        raise StopRun(f"OPENAI_BASE_URL is {url!r}: it has to be like http://host/v1")
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts[1].lower()) or proxies.get("all", url)
    if not re.fullmatch(ADDRESS, proxy) and not urllib.request.proxy_bypass(parts[2]):
        raise StopRun("HTTP(S)_PROXY or ALL_PROXY: SOCKS and the like do not work")
    allow_open_files(concurrency + 50)
    try:
        http = openai.DefaultAioHttpClient(  # takes 40 % less CPU than the default
            limits=type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=concurrency),
            follow_redirects=False,  # they would carry the messages to another host
            event_hooks={"response": [bound_body]},
        )
    except OSError as error:
        raise StopRun(f"SSL_CERT_FILE has no certificates: {error}") from None
    client = Client(
        api_key=key,
        base_url=url.partition("?")[0],
        default_query=dict(http.build_request("GET", url).url.params),  # of Azure
        http_client=http,
        max_retries=0,  # `ask` does that
        timeout=None,  # it would start anew at every read; `call` has its own
    )
    if not re.fullmatch("[!-~]*", f"{key}{client.organization}{client.project}"):
        names = "OPENAI_API_KEY, OPENAI_ORG_ID or OPENAI_PROJECT_ID"
        raise StopRun(f"{names} holds a line break, a blank or an accent")
    return client


def allow_open_files(count: int) -> None:
    """Raises the limit of open files, as each connection is one. Raises StopRun."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 < hard < count:
        raise StopRun(f"--concurrency needs {count} open files, ulimit -n is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


async def bound_body(reply: Any) -> None:
    """Reads a reply's body, but no more than MOST_BYTES. A hook of the HTTP client."""
    if not reply.request.url.path.endswith("/responses"):
        return  # the results of a batch may be large
    body = bytearray()
    async for chunk in reply.aiter_bytes():
        body += chunk
        if len(body) > MOST_BYTES:
            body = bytearray(b"it is too large")
            await reply.aclose()
            break
    reply._content = bytes(body)  # where a reply keeps its body once it is read


async def call(client: Client, question: Question, most: float, message: Row) -> Reply:
    """Asks about one message, once, for `most` seconds. The reply says what failed."""
    if question.offline:
        await asyncio.sleep(random.lognormvariate(-1, 0.3))  # some 0.4 s
        answer = question.example.model_dump(mode="json")
        usage = dict.fromkeys(TOKENS, 0)
        return Reply(answer=answer, model="offline", usage=usage)
    # As `extra_body` a request goes out as it is, with all that EXTRA holds.
    parse = client.responses.with_raw_response.parse
    sending = parse(extra_body=question.request(message))
    try:
        raw = await asyncio.wait_for(sending, most)
    except TimeoutError:
        return Reply("timeout", f"no answer within {most:g} s, see --timeout")
    except (openai.APIError, aiohttp.ClientError) as error:
        return read_error(error, client)
    reply = question.read(decode(raw.content, client.api_key))
    reply.headers = raw.headers
    return reply


# --- 3. Many at a time ----------------------------------------------------------------
# The server may refuse a request for now (429), or reject it for good (400). A request
# starts as soon as it has three things:
# 1. A slot. There are `--concurrency` of them. Only 8 are used before the first answer,
#    so that a wrong key costs little, and 1 while the server seems down.
# 2. No pause. After a refusal, or five failures in a row, all requests wait for as long
#    as the server asks, or for a moment that grows with its silence.
# 3. Room in three token buckets. `requests` and `tokens` copy the server's own limits,
#    as its headers tell them. `pace` is for a server that tells nothing: unlimited at
#    first, slower after each jam, and a little faster with each reply. It grows by a
#    constant, so that two runs on one account come to share it fairly.
# Example: a server takes 50 requests a second, and does not say so. At first we send 60
# a second. When it refuses one, the pace becomes half of that, 30. Each reply adds 0.2.
# After 110 replies it is 52, the server refuses again, and the pace falls to 42.
START = 8  # requests in flight before the first answer
DOWN = 5  # failures or refusals in a row after which the server seems down
GROWTH = 0.2  # requests a second that each reply adds to the pace
SPARE = 0.3  # seconds' worth of the server's limits, left to other runs
BACKOFF = 0.5  # seconds; the n-th retry waits a random part of BACKOFF * 2**n
OUTAGE = 30.0  # seconds; while the server seems down, one failed try in these counts
PATIENCE = 600.0  # seconds without any answer that end the run


@dataclass
class TokenBucket:
    """Fills up by `rate` a second, and holds what flows in within `seconds`."""

    seconds: float
    rate: float = math.inf
    left: float = math.inf  # at the time `at`
    at: float = field(default_factory=time.monotonic)
    taken: float = 0.0  # in all
    first_taken: float = math.inf  # when the first was taken; for the pace

    def take(self, amount: float) -> None:
        """Takes so much, even if less is left: then the next one waits for longer."""
        self.first_taken = min(self.first_taken, time.monotonic())
        self.taken += amount
        self.left -= amount

    def seconds_until(self, amount: float) -> float:
        """Seconds until so much is left."""
        size = max(1.0, self.rate * self.seconds)
        now = time.monotonic()
        if now > self.at:
            self.left = min(size, self.left + self.rate * (now - self.at))
            self.at = now
        return max(0.0, min(amount, size) - self.left) / self.rate


class Throttle:
    """Says when the next request may start, and learns from every reply."""

    def __init__(self, options: Options, request: Request, proven: bool) -> None:
        self.options = options
        self.request = request
        self.proven = proven  # whether there is an answer with these settings
        self.slots = asyncio.Semaphore(options.concurrency)
        self.queue = asyncio.Lock()  # who has a slot waits here for its turn
        self.stopping = asyncio.Event()  # set when nothing more may start
        self.reason: StopRun | OSError = StopRun("")  # why
        # The server's limits are per minute, and a minute's worth may go at once.
        self.limits = {"requests": TokenBucket(60), "tokens": TokenBucket(60)}
        self.headers_from = 0.0  # when the request was sent whose headers these are
        self.pace = TokenBucket(0.05)
        self.paused_until = 0.0
        self.tokens_per_character = 0.3  # a moving average
        self.usd_per_character = 0.0  # of the dearest request
        self.usd_least = 0.0  # to set aside for a request
        self.usd_left = options.max_cost or math.inf
        self.in_flight = 0
        self.answers = 0
        self.rejected = 0  # messages since the last answer
        # Failures and refusals since the server last dealt with a request, by type.
        self.failures = Counter[str]()
        self.last_heard = time.monotonic()  # when it did

    def stop(self, reason: StopRun | OSError) -> None:
        """Lets nothing more start. What is in flight may land."""
        if not self.stopping.is_set():
            self.reason = reason
        self.stopping.set()

    @property
    def is_down(self) -> bool:
        """Whether the server seems down."""
        return self.failures.total() >= DOWN

    def may_cost(self, size: int) -> float:
        """What a request may cost in USD: texts differ in their tokens a character."""
        return max(self.usd_least, 1.5 * size * self.usd_per_character)

    def seconds_to_wait(self, size: int) -> float:
        """Seconds until the next request may start; infinity: not before one lands."""
        most = self.options.concurrency if self.answers else START
        # Before the first answer nobody knows what one costs.
        if self.is_down or (self.options.max_cost and not self.answers):
            most = 1
        if self.in_flight >= most or self.may_cost(size) > self.usd_left:
            return math.inf
        return max(
            self.paused_until - time.monotonic(),
            self.pace.seconds_until(1),
            self.limits["requests"].seconds_until(1),
            self.limits["tokens"].seconds_until(size * self.tokens_per_character),
        )

    async def wait_for_turn(self, size: int) -> None:
        """Returns when the next request may start. Raises StopRun if none may."""
        while not self.stopping.is_set():
            seconds = self.seconds_to_wait(size)
            if seconds <= 0:
                return
            if seconds == math.inf and not self.in_flight:
                usd = self.may_cost(size)
                raise StopRun(f"--max-cost: the next one may cost {usd:.2g} USD")
            # Not for longer, since a reply may change it.
            await pause(min(seconds, 0.02), self.stopping)
        raise self.reason

    async def send(self, message: Row) -> Reply:
        """The reply to one request, which starts as soon as it may. Raises StopRun."""
        size = size_of(message)
        async with self.slots:
            async with self.queue:
                await self.wait_for_turn(size)
                usd = self.may_cost(size)
                self.usd_left -= usd
                self.pace.take(1)
                self.limits["requests"].take(1)
                self.limits["tokens"].take(size * self.tokens_per_character)
                self.in_flight += 1
            taken = {name: bucket.taken for name, bucket in self.limits.items()}
            sent_at = time.monotonic()
            try:
                reply = await self.request(message)
            finally:
                self.in_flight -= 1
        reply.sent_at = sent_at
        self.usd_left += usd - reply.usd
        self.learn_cost(reply, size)
        self.read_limits(reply, taken)
        if reply.error in TROUBLE:
            self.slow_down(reply)
        elif reply.error != "no_room":
            self.speed_up(reply)
        self.judge(reply)
        return reply

    def learn_cost(self, reply: Reply, size: int) -> None:
        """Learns what a request takes, in tokens and in USD."""
        if reply.usage:
            used = sum(reply.usage.values()) / size
            self.tokens_per_character += 0.1 * (used - self.tokens_per_character)
        elif not reply.error and self.options.max_cost:
            self.stop(StopRun("--max-cost: this server does not tell what it used"))
        self.usd_per_character = max(self.usd_per_character, reply.usd / size)

    def read_limits(self, reply: Reply, taken: dict[str, float]) -> None:
        """Takes over what was left of the server's limits when a request was sent:
        https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers"""
        if reply.sent_at < self.headers_from:
            return  # a request that was sent later knows better
        self.headers_from = reply.sent_at
        for name, bucket in self.limits.items():
            limit = reply.headers.get(f"x-ratelimit-limit-{name}", "")
            left = reply.headers.get(f"x-ratelimit-remaining-{name}", "")
            if re.fullmatch("[1-9][0-9]{0,15},[0-9]{1,15}", f"{limit},{left}"):
                bucket.rate = int(limit) / 60
                taken_since = bucket.taken - taken[name]
                bucket.left = int(left) - taken_since - SPARE * bucket.rate
                bucket.at = reply.sent_at

    def speed_up(self, reply: Reply) -> None:
        """The server has dealt with a request: the pace may grow."""
        self.failures.clear()
        self.last_heard = time.monotonic()
        self.pace.rate += GROWTH
        if not reply.error:
            self.answers += 1
            self.proven = True
            self.rejected = 0

    def slow_down(self, reply: Reply) -> None:
        """Makes all pause after a refusal, or after five failures in a row."""
        self.failures[str(reply.error)] += 1
        refused = reply.error == "rate_limit"
        if not refused and not self.is_down:
            return
        now = time.monotonic()
        seconds = reply.retry_after
        # The requests in time; a letter stands for a pace:
        #   A A A A (one is refused: pause, slower pace) B B B B (the same again) C C
        # If another A is refused later, it met the same jam as the first. It may make
        # the pause longer, but does not cut the pace again.
        sent_at_this_pace = reply.sent_at >= self.pace.first_taken
        if sent_at_this_pace:
            silence = now - self.last_heard
            seconds = max(seconds, 0.05 + min(10.0, silence / 5))
            rate = self.pace.rate
            if refused or reply.error == "timeout":  # an outage says nothing of it
                rate = self.slower_pace(now)
            # The new bucket is empty, and fills up from the end of the pause on.
            self.pace = TokenBucket(0.05, rate, left=0.0, at=now + seconds)
        # Other runs may be waiting, too: not all should go on at the same moment.
        seconds *= random.uniform(1.0, 1.2)
        self.paused_until = max(self.paused_until, now + seconds)

    def slower_pace(self, now: float) -> float:
        """The pace after a jam: about what was sent a second since the last pause."""
        rate = self.pace.rate
        sent = self.pace.taken - 1  # all but the one refused
        if sent <= 0:
            return rate  # a server that refuses everything is not slow, but down
        found = sent / max(0.001, now - self.pace.first_taken)
        if rate == math.inf:
            return found / 2  # the server let a burst through at the start
        return max(0.8 * rate, min(0.95 * rate, 0.85 * found))

    def judge(self, reply: Reply) -> None:
        """Raises StopRun if there is no point in going on."""
        if reply.error in ("settings", "unclear"):
            self.rejected += 1
        hopeless = reply.error == "settings" and not self.proven
        if hopeless or reply.error == "fatal":
            raise StopRun(reply.message)
        # With a setting that is wrong in the server's eyes, all would be rejected.
        if self.rejected >= (50 if self.proven else 24):
            raise StopRun(f"{self.rejected} messages were rejected; {reply.message}")
        if reply.retry_after > PATIENCE:
            then = time.ctime(time.time() + min(reply.retry_after, 1e9))
            raise StopRun(f"the limit is used up until {then}; {reply.message}")
        patience = PATIENCE
        # Nothing but the same failure since the start: it is no use to wait for long.
        if not self.answers and len(self.failures) == 1:
            shorter = {"connection": 10.0, "timeout": 2 * self.options.timeout}
            patience = shorter.get(str(reply.error), PATIENCE)
        silence = reply.sent_at - self.last_heard  # without the time that this one took
        if silence > patience:
            raise StopRun(f"no answer for {silence:.0f} s; {reply.message}")


def size_of(message: Row) -> int:
    """Characters of a message, and 500 for instructions, schema and answer."""
    return 500 + len(message["text_message"]) + len(str(message.get("fields", "")))


async def pause(seconds: float, until: asyncio.Event) -> None:
    """Sleeps, but not longer than until the event."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(until.wait(), seconds)


async def back_off(retry: int, until: asyncio.Event) -> None:
    """Sleeps before the n-th retry, exponentially longer each time, with full jitter:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/"""
    longest = min(60.0, BACKOFF * 2 ** min(retry, 10))
    await pause(random.uniform(0, longest), until)


async def ask(throttle: Throttle, message: Row) -> Reply:
    """The last reply about a message, with the usage and the cost of all tries."""
    usage = Counter[str]()
    usd = 0.0
    tries = 0
    refusals = 0
    last_try = time.monotonic()
    while True:
        reply = await throttle.send(message)
        usage.update(reply.usage or {})
        usd += reply.usd
        if reply.error in ("rate_limit", "no_room") and refusals < 100:
            refusals += 1  # a refusal is a wait, and no try
            if reply.error == "no_room":
                await back_off(refusals, throttle.stopping)
            continue
        since_try = time.monotonic() - last_try
        if reply.error in TROUBLE and throttle.is_down and since_try < OUTAGE:
            continue  # that was the server's fault, and no try
        last_try = time.monotonic()
        tries += 1
        if reply.error not in RETRIED or tries >= throttle.options.max_attempts:
            break
        await back_off(tries, throttle.stopping)
    reply.usage = dict(usage) or None
    reply.usd = usd
    reply.attempts = tries
    return reply


# A run ends when all is done, or when something calls `stop`: a worker that met a
# StopRun or a full disk, or Ctrl-C. Then each worker finishes its request, and meets
# the reason in `wait_for_turn`. A second Ctrl-C cancels all workers.
async def answer_each(messages: Iterator[Row], keep: Keep, throttle: Throttle) -> None:
    """Asks about all messages, and hands each last reply to `keep`. Raises StopRun."""
    throttle.last_heard = time.monotonic()  # silence counts from here

    # Workers share one iterator. A task for each message, as `gather` makes, would take
    # 171 MiB for 100,000 messages; with 50 workers it was 22. Sharing is safe, because
    # another worker can take over only at an await.
    async def work() -> None:
        try:
            for message in messages:
                keep(message, await ask(throttle, message))
        except (StopRun, OSError) as reason:
            throttle.stop(reason)

    async with asyncio.TaskGroup() as workers:
        count = 2 * throttle.options.concurrency  # some of them only wait for a retry
        tasks = [workers.create_task(work()) for _ in range(count)]
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            # First, since on 3.11 `wait_for` may drop the cancellation of a worker.
            throttle.stop(StopRun("interrupted", 130))
            raise
    if throttle.stopping.is_set():
        raise throttle.reason


# --- 4. Files -------------------------------------------------------------------------
BLANK = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")  # zero-width characters, too


def read_messages(path: Path, name: str) -> Iterator[Row]:
    """The messages of INPUT but blank ones. Raises StopRun at a record that is none."""
    kind = path.suffix.lower()
    lines = fileinput.FileInput(path, encoding="utf-8-sig", errors="surrogateescape")
    line = 1  # where the record begins
    try:
        records = read_table(lines) if kind == ".csv" else lines
        for record in records:
            if kind == ".jsonl" and not BLANK.fullmatch(record):
                record = json.loads(record.lstrip("\ufeff"))
            message = to_message(line, record, name)
            if not BLANK.fullmatch(message["text_message"]):
                yield message
            line = lines.lineno() + 1
    except UnicodeError:
        raise StopRun(f"{path}, line {line}: not UTF-8, or half a character") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise StopRun(f"{path}, line {line}: {error}") from None


def read_table(lines: Iterator[str]) -> Iterator[Any]:
    """The records of a CSV file; "" for the header and for a blank line."""
    csv.field_size_limit(2**31 - 1)
    first = next(lines, "")
    while re.search(r'(^|[,;\t|])"', first) and first.count('"') % 2:
        first += next(lines, '"')  # a line break in the name of a column
    unquoted = re.sub('"[^"]*"', "", first)
    mark = max(",;\t|", key=unquoted.count)  # what makes the most columns
    table = csv.reader(itertools.chain([first], lines), delimiter=mark, strict=True)
    header = next(table)
    names = [name or f"unnamed {number}" for number, name in enumerate(header, 1)]
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have the same name: {', '.join(names)}")
    yield ""
    for cells in table:
        if cells and len(cells) != len(names):
            raise ValueError(f"{len(cells)} cells, but {len(names)} columns")
        columns = zip(header, names, cells)
        # Spreadsheets add empty columns without a name.
        record = {name: cell for title, name, cell in columns if title or cell}
        yield record or ""


def to_message(line: int, record: Any, name: str) -> Row:
    """The message in a record of INPUT. Raises ValueError if there is none."""
    fields = record if isinstance(record, dict) else {name: record}
    if name not in fields:
        names = ", ".join(fields)
        raise ValueError(f"no field {name!r}, but {names}: choose one by --field")
    text = fields.pop(name)
    if not isinstance(text, str):
        raise ValueError(f"the message is no text, but {json.dumps(text)[:50]}")
    text = text.lstrip("\ufeff").removesuffix("\n")
    message = {"line": line, "text_message": text}
    if isinstance(record, dict):
        message["fields"] = fields
    to_line(message)  # raises ValueError for what JSON cannot hold
    return message


def lock(file: IO[bytes]) -> None:
    """Locks a file while this process lives. Raises OSError if another one has it."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(2**40)  # far behind the rows, which others may read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Journal:
    """OUTPUT: rows are appended as they come, and put into INPUT's order at the end."""

    def __init__(self, path: Path, question: Question, restart: bool) -> None:
        self.path = path.resolve()
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        self.question = question
        # A text, by its `Question.key`, is in one of these states:
        #                     in `starts`               in `failed`
        #   to be asked       no                        no
        #   being asked       None                      no
        #   answered          the byte of its row       no
        #   failed just now   the byte of its row       yes
        self.starts: dict[int, int | None] = {}
        self.failed: set[int] = set()
        self.old_errors: dict[int, int] = {}  # rows of earlier runs, to be asked again
        self.end = 0  # the size of the file
        self.file = self.open(restart)

    def open(self, restart: bool) -> IO[bytes]:
        """The file, locked. Raises StopRun if another run writes it."""
        file = open(self.path, "a+b", buffering=0)
        try:
            lock(file)
        except (BlockingIOError, PermissionError):
            file.close()
            raise StopRun(f"another run writes {self.path}: let it finish") from None
        if restart and file.seek(0, os.SEEK_END):
            file.close()
            names = (Path(f"{self.path}.bak{n or ''}") for n in itertools.count())
            self.path.rename(next(name for name in names if not name.exists()))
            return self.open(restart=False)
        self.temporary.touch()  # can the rows be put in order in the end?
        self.temporary.unlink()
        return file

    def load(self) -> None:
        """Finds the rows of earlier runs. Raises StopRun at a line that is no row."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    self.load_row(line)
                except (ValueError, LookupError, TypeError, RecursionError) as error:
                    torn = isinstance(error, ValueError) and not line.endswith(b"\n")
                    self.drop(line, f"{self.path}, line {number}", torn)
                    break
                self.end += len(line)
                if not line.endswith(b"\n"):
                    self.file.write(b"\n")  # it is read next, as a blank line

    def load_row(self, line: bytes) -> None:
        """Notes a row of an earlier run. Raises StopRun if other settings answered."""
        if not line.strip():
            return
        row = json.loads(line.decode("utf-8-sig"))
        ours = row["settings"] == self.question.settings
        answered = row["response"] is not None
        if answered and ours:
            self.starts.setdefault(self.question.key(row), self.end)
        elif ours:
            self.old_errors.setdefault(self.question.key(row), self.end)
        elif answered:
            there = f"{self.path} has answers of {row.get('model')} with another prompt"
            raise StopRun(f"{there} or setting: choose another OUTPUT, or --restart")

    def drop(self, line: bytes, where: str, torn: bool) -> None:
        """Drops a line that a crash has cut off. Raises StopRun at any other."""
        start = line.strip(b"\0")[:9]  # a power failure can leave zeros
        if not torn or not b'{"line": '.startswith(start):
            raise StopRun(f"{where} is no row of results")
        say(f"{where} was cut off by a crash: its message is asked again")
        self.file.truncate(self.end)

    def has_answer(self, key: int) -> bool:
        """Whether there is an answer to a text."""
        return self.starts.get(key) is not None and key not in self.failed

    def error_at(self, key: int) -> str:
        """When the error of an earlier run was met, or "" if there is none."""
        if key not in self.old_errors:
            return ""
        with open(self.path, "rb") as file:
            file.seek(self.old_errors[key])
            return str(json.loads(file.readline())["answered_at"])

    def missing(self, messages: Iterable[Row]) -> Iterator[Row]:
        """The messages to ask about: each text once, if it has no row."""
        # What an earlier pass has handed out in vain is missing again.
        for key in [key for key, start in self.starts.items() if start is None]:
            del self.starts[key]
        again = []  # errors of earlier runs go last, to hold up no other message
        for message in messages:
            key = self.question.key(message)
            if key in self.starts:
                continue
            self.starts[key] = None
            if key in self.old_errors:
                again.append(message)
            else:
                yield message
        yield from again

    def add(self, row: Row) -> None:
        """Appends a row in one write. A kill costs no row, only what was in flight.
        Raises OSError if the disk is full; no part of the row is left then."""
        line = to_line(row)
        self.end = max(self.end, self.file.seek(0, os.SEEK_END))
        if self.file.write(line) < len(line):
            self.file.truncate(self.end)
            raise OSError(28, "No space left on device", str(self.path))
        key = self.question.key(row)
        self.starts[key] = self.end
        self.end += len(line)
        if row["error"]:
            self.failed.add(key)

    def sync(self) -> None:
        """Makes the rows survive a power failure. Raises StopRun if they are gone."""
        end = self.end  # rows may be added meanwhile
        os.fsync(self.file.fileno())
        mine = os.fstat(self.file.fileno())
        there = self.path.exists() and os.path.samestat(mine, self.path.stat())
        if not there or mine.st_size < end:
            raise StopRun(f"{self.path} was moved, deleted or cut during the run")

    def in_order(self, messages: Iterable[Row]) -> Iterator[bytes]:
        """The rows in INPUT's order, then those whose text has left INPUT."""
        for key, old in self.old_errors.items():
            if self.starts.get(key) is None:  # it was not asked again
                self.starts[key] = old
                self.failed.add(key)
        with open(self.path, "rb") as file:
            for message in messages:
                key = self.question.key(message)
                start = self.starts.get(key)
                if start is None:
                    continue  # not asked yet
                # A number below 0 says that the row is written. A second dictionary
                # would take 50 bytes a message.
                written = start < 0
                if written:
                    start += self.end
                self.starts[key] = start - self.end
                file.seek(start)
                row = json.loads(file.readline())
                for name in ("line", "text_message", "fields"):
                    row.pop(name, None)
                if written:
                    row["usage"] = None  # it stands in the first row with this text
                yield to_line(message | row)
            for start in self.starts.values():
                if start is not None and start >= 0:
                    file.seek(start)
                    yield to_line(json.loads(file.readline()))

    def close(self, messages: Iterable[Row]) -> None:
        """Puts the rows in INPUT's order, by one atomic replace."""
        try:
            self.sync()  # no other file than ours is to be replaced
            with open(self.temporary, "wb") as ordered:
                ordered.writelines(self.in_order(messages))
                ordered.flush()
                os.fsync(ordered.fileno())
            self.temporary.chmod(self.path.stat().st_mode)
            if sys.platform == "win32":
                self.file.close()  # Windows replaces no open file
            self.temporary.replace(self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


# --- 5. Half the price ----------------------------------------------------------------
# The Batch API answers within a day: https://platform.openai.com/docs/guides/batch
# Nothing is remembered on this machine. A batch bears the settings and OUTPUT's name
# from the moment it exists, so the provider's list shows what was submitted. Who does
# not need batches may delete this part: then --batch is an error, and all else works.
POLL = 60.0  # seconds between two looks at the list
MOST_LINES = 50_000  # of a batch
MOST_FILE_BYTES = 190_000_000  # the API takes 200 MB
RUNNING = {"validating", "in_progress", "finalizing", "cancelling"}
UNDONE = {"no_room", *TROUBLE}  # errors that are not the message's: it goes again
Batch = openai.types.Batch


@dataclass
class Batches:
    """The batches of one OUTPUT at the provider."""

    client: Client
    journal: Journal
    missing: Reader  # gives the messages without a row
    keep: Keep
    throttle: Throttle
    state: str = "looking for batches"  # for the bar
    looks: int = 0  # at the list, since a run has submitted something

    def __post_init__(self) -> None:
        self.client = self.client.with_options(timeout=600, max_retries=5)
        self.question = self.journal.question
        name = self.journal.path.name
        self.label = {"settings": self.question.settings, "output": name}
        self.most_lines = MOST_LINES  # of the next batch
        self.rounds = Counter[tuple[int, int]]()  # see `submit`
        self.created: dict[str, int] = {}  # lines, by the id of a batch of this run
        self.uploaded: list[str] = []  # ids of the files of this run
        self.collected: set[str] = set()  # ids of batches

    async def run(self) -> None:
        """Collects and submits batches until nothing is missing. Raises StopRun."""
        if not self.throttle.proven:
            await self.ask_one()  # a wrong setting shows in seconds
            self.looks = 1  # there is no batch yet, so that one look is enough
        while not self.throttle.stopping.is_set():
            try:
                running = await self.look()
                if not any(self.missing()):
                    await self.delete(self.uploaded)  # some belong to no batch
                    return
                # A new batch may exist though its creation seemed to fail, and the list
                # may show it late. So look twice before another one is created.
                if not running and self.looks >= 2:
                    await self.submit()
            except (openai.APIError, aiohttp.ClientError) as error:
                reply = read_error(error, self.client)
                if reply.error not in TROUBLE:
                    raise StopRun(f"no batch: {reply.message}") from None
                say(reply.message)
            await pause(POLL, self.throttle.stopping)
        say("the batches go on; the same command collects them: keep --batch")
        raise self.throttle.reason

    async def ask_one(self) -> None:
        """Asks about one message at once, and not in a batch."""
        one = itertools.islice(self.missing(), 1)
        await answer_each(one, self.keep, self.throttle)

    async def look(self) -> bool:
        """Collects the batches that have ended. Returns whether others still run."""
        running: list[str] = []
        async for batch in self.client.batches.list(limit=100):
            ours = (batch.metadata or {}).items() >= self.label.items()
            if not ours or batch.id in self.collected:
                continue
            if batch.status not in RUNNING:
                await self.collect(batch)
                self.collected.add(batch.id)
                continue
            since = time.strftime("%a %H:%M", time.localtime(batch.created_at))
            counts = batch.request_counts
            running.append(f"{batch.status} since {since}")
            if counts:
                running[-1] += f", {counts.completed:,} of {counts.total:,} ready"
        self.looks += 1
        self.state = f"{len(running)} batches: {'; '.join(running)}"
        # The list may not show a new batch yet.
        return bool(running or self.created.keys() - self.collected)

    async def collect(self, batch: Batch) -> None:
        """Writes the rows of a batch that has ended, then deletes its files."""
        if batch.status == "failed" and batch.id in self.created:
            self.learn_limit(batch)
        results = [name for name in (batch.output_file_id, batch.error_file_id) if name]
        replies: dict[int, Reply] = {}  # by the text that was asked
        for file_id in results:
            with contextlib.suppress(openai.NotFoundError):  # it was deleted before
                file = await self.client.files.content(file_id)
                for content in filter(bytes.strip, file.content.splitlines()):
                    line = decode(content, self.client.api_key)
                    replies[int(line["custom_id"], 16)] = self.read_line(line)
        if not replies:
            return
        since = time.strftime(DATE, time.gmtime(batch.created_at))
        for message in self.missing():
            key = self.question.key(message)
            reply = replies.get(key)
            # An error that an earlier run has collected is to be asked again.
            known = batch.id not in self.created and self.journal.error_at(key) >= since
            if reply and not (reply.error in UNDONE or (reply.error and known)):
                self.throttle.usd_left -= reply.usd
                self.keep(message, reply)
        self.journal.sync()
        # Texts that are not ours may be another run's, which still needs the files.
        if replies.keys() <= self.journal.starts.keys():
            await self.delete([batch.input_file_id, *results])

    def learn_limit(self, batch: Batch) -> None:
        """Makes the next batches smaller if this one was above the account's limit.
        Raises StopRun if it failed for another reason."""
        body = batch.to_dict()
        if "token_limit_exceeded" not in find("code", body):
            reasons = clean("; ".join(find("message", body)))
            raise StopRun(f"the provider rejects the batch: {reasons}")
        self.most_lines = max(1, self.created[batch.id] // 2)

    def read_line(self, line: Row) -> Reply:
        """The reply in a line of the results."""
        response = line["response"] or {}
        status = response.get("status_code") or 503  # expired, cancelled or lost
        body = response.get("body")
        if status == 200:
            return self.question.read(body, in_batch=True)
        return read_failure(status, body)

    async def delete(self, file_ids: list[str]) -> None:
        """Deletes files at the provider."""
        for file_id in file_ids:
            with contextlib.suppress(openai.NotFoundError):
                await self.client.files.delete(file_id)

    async def check_cost(self) -> None:
        """Raises StopRun if the batches would cost too much."""
        throttle = self.throttle
        if not throttle.options.max_cost:
            return
        if not throttle.usd_per_character:
            await self.ask_one()
        if not throttle.usd_per_character:
            raise StopRun("--max-cost: the first message failed, so no cost is known")
        usd = sum(map(size_of, self.missing())) * throttle.usd_per_character / 2
        if usd > throttle.usd_left:
            raise StopRun(f"--max-cost: the other messages may take {usd:,.4f} USD")

    async def submit(self) -> None:
        """Submits batches about all that is missing. Raises StopRun if that is vain."""
        # A round that brings rows makes OUTPUT larger. One that meets the limit of the
        # account makes `most_lines` smaller. Two that do neither were in vain.
        begin = (self.journal.end, self.most_lines)
        if self.rounds[begin] == 2:
            raise StopRun("the batches bring no rows: see the provider's page")
        await self.check_cost()
        self.looks = 0
        messages = self.missing()
        for first in messages:
            if self.throttle.stopping.is_set():
                return
            rest = itertools.islice(messages, self.most_lines - 1)
            with tempfile.TemporaryFile() as lines:
                count = self.write(lines, itertools.chain([first], rest))
                upload = ("messages.jsonl", lines)
                file = await self.client.files.create(file=upload, purpose="batch")
            self.uploaded.append(file.id)
            # The client never repeats this call: the batch might be paid for twice.
            batch = await self.client.with_options(max_retries=0).batches.create(
                input_file_id=file.id,
                endpoint="/v1/responses",
                completion_window="24h",
                metadata=self.label,
            )
            self.created[batch.id] = count
        self.rounds[begin] += 1
        await self.look()  # for the bar

    def write(self, file: IO[bytes], messages: Iterator[Row]) -> int:
        """Writes a line for each message until the file is full. Returns how many."""
        count = 0
        for message in messages:
            line: Row = {"custom_id": f"{self.question.key(message):015x}"}
            line |= {"method": "POST", "url": "/v1/responses"}
            file.write(to_line(line | {"body": self.question.request(message)}))
            count += 1
            if file.tell() > MOST_FILE_BYTES:
                break
        file.seek(0)
        return count


# --- 6. Command line ------------------------------------------------------------------
LAYOUT = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}, {rate_fmt} {bar}"


def parse_args(argv: Sequence[str] | None) -> Options:
    """The command line. Exits with status 2 and a line about what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.usage = "%(prog)s INPUT OUTPUT [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("input", metavar="INPUT", help=".txt: a message a line; .jsonl; .csv; -: stdin")
    add("output", metavar="OUTPUT", help="the results, .jsonl")
    for name, metavar, kind, default, text in (
        ("--field", "NAME", str, None, "field of .csv or .jsonl to ask about (text)"),
        ("--model", "NAME", str, MODEL, "the model to ask (%(default)s)"),
        ("--concurrency", "N", int, CONCURRENCY, "most in flight (%(default)s)"),
        ("--timeout", "S", float, TIMEOUT, "seconds for one attempt (%(default)s)"),
        ("--max-attempts", "N", int, MAX_ATTEMPTS, "tries for a message (%(default)s)"),
        ("--limit", "N", int, None, "only the first N: a pilot, with an estimate"),
        ("--max-cost", "USD", float, None, "stop before this run costs more"),
        ("--shard", "K/N", str, "1/1", "only every N-th message, from the K-th"),
    ):
        add(name, metavar=metavar, type=kind, default=default, help=text)
    add("--batch", action="store_true", help="half the price, within a day: Batch API")
    add("--offline", action="store_true", help="answer with EXAMPLE: no key, no cost")
    add("--restart", action="store_true", help="begin again; OUTPUT is kept as .bak")
    # As for a notebook; `main` sets what a terminal needs.
    parser.set_defaults(command="", signals=[], no_bar=False)
    options = parser.parse_args(argv)
    try:
        check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def check(options: Options) -> None:
    """Raises ValueError at an option that makes no sense."""
    for name in ("concurrency", "timeout", "max_attempts", "limit", "max_cost"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} has to be above 0")
    shard = re.fullmatch("([0-9]+)/([0-9]+)", options.shard)
    if not shard or not 1 <= int(shard[1]) <= int(shard[2]):
        raise ValueError("--shard has to be like 1/4, 2/4, 3/4 or 4/4")
    if not str(options.output).endswith(".jsonl"):
        raise ValueError("OUTPUT has to end in .jsonl, for JSON Lines")


def open_input(options: Options, folder: Path) -> Reader:
    """What reads the messages of INPUT. Raises StopRun."""
    source = Path(options.input)
    output = Path(options.output)
    if options.input == "-":
        if sys.stdin is None:
            raise StopRun("-: standard input is closed")
        source = folder / ("stdin.jsonl" if options.field else "stdin.txt")
        with open(source, "wb") as copy:
            copy.writelines(sys.stdin.buffer)
    if source.suffix.lower() not in (".txt", ".jsonl", ".csv"):
        raise StopRun(f"{source} has to be .txt, .jsonl or .csv, or - for stdin")
    for path in (source, output):
        if path.exists() and not path.is_file():
            raise StopRun(f"{path} is a folder or a device, and has to be a file")
    if output.exists() and source.exists() and output.samefile(source):
        raise StopRun(f"{output} is INPUT: choose another OUTPUT")
    return lambda: read_messages(source, options.field or "text")


def say(line: str) -> None:
    """Prints to standard error, above the bar."""
    with contextlib.suppress(OSError):  # nobody reads it: no reason to stop
        tqdm.write(line, file=sys.stderr)


class Progress:
    """The bar, the counts, and the closing lines."""

    def __init__(self, journal: Journal, throttle: Throttle, keys: Keys) -> None:
        self.journal = journal
        self.throttle = throttle
        self.all_keys = keys  # of the texts of INPUT
        self.keys = keys[: throttle.options.limit]  # of those to be answered now
        self.before = self.answered()  # by earlier runs
        self.written = 0  # answers of this run
        self.errors = Counter[str]()  # of this run, by type
        self.usage = Counter[str]()
        self.usd = 0.0
        self.started = time.monotonic()
        self.printed = self.started
        texts = itertools.groupby(sorted(self.keys))  # a set would take more memory
        to_ask = sum(1 for key, _ in texts if not journal.has_answer(key))
        self.bar = tqdm(
            total=self.before + to_ask,
            initial=self.before,
            unit="msg",
            bar_format=LAYOUT,
            disable=throttle.options.no_bar,
        )

    def answered(self) -> int:
        """How many messages have an answer by now."""
        return sum(map(self.journal.has_answer, self.keys))

    def add(self, row: Row, usd: float) -> None:
        """Counts a row and moves the bar. Prints the first error of each type."""
        self.usage += Counter(row["usage"])  # without zeros
        self.usd += usd
        if row["error"]:
            kind = row["error"]["type"]
            self.errors[kind] += 1
            if self.errors[kind] == 1:
                say(f"line {row['line']}: {kind}, {row['error']['message']}")
        else:
            self.written += 1
        self.bar.update()

    def show(self, state: str) -> None:
        """Shows how it goes: behind the bar or, without a terminal, every 30 s."""
        state = f"{self.errors.total():,} errors, {state}"
        if self.usd:
            state += f", {self.usd:,.4f} USD"
        self.bar.set_postfix_str(state)
        if self.bar.disable and time.monotonic() > self.printed + 30:
            self.printed = time.monotonic()
            say(f"{self.answered():,} of {len(self.keys):,} answered, {state}")

    def closing_lines(self) -> Iterator[str]:
        """What the run has done and taken, and what the texts left may take."""
        now = self.answered()
        line = f"{now:,} of {len(self.keys):,} answered"
        if self.before:
            line += f" ({self.before:,} before, {now - self.before:,} now)"
        yield line
        kept = self.written if self.journal.path.exists() else 0
        if self.throttle.answers > kept:
            yield f"{self.throttle.answers - kept:,} answers could not be kept"
        errors = [f"{count:,} {kind}" for kind, count in self.errors.items()]
        if errors:
            yield f"errors: {', '.join(errors)}; the same command asks again"
        used = [f"{n:,} {name.replace('_', ' ')}" for name, n in self.usage.items()]
        if self.usd:
            used.append(f"{self.usd:,.4f} USD")
        if used:
            yield f"used: {', '.join(used)}"
        if self.journal.question.offline:
            yield "these answers are placeholders: --offline asks no model"
        yield f"results: {self.journal.path}"
        rows = self.written + self.errors.total()
        if rows:
            seconds = time.monotonic() - self.started
            yield f"time: {seconds:.1f} s, {rows / seconds:,.1f} rows a second"
            left = {k for k in self.all_keys if self.journal.starts.get(k) is None}
            more = f"{seconds / rows / 60 * len(left):,.1f} minutes"
            if self.usd:
                more = f"{self.usd / rows * len(left):,.4f} USD and {more}"
            if left:
                yield f"the other {len(left):,} may take {more}"
        if self.throttle.options.command and now < len(self.keys):
            yield f"to resume: {self.throttle.options.command}"


# What Ctrl-C does, and so do SIGTERM and SIGHUP. During `fill` the first one calls
# `throttle.stop`, as a full disk does: each worker ends after its request. The second
# one cancels `fill` and the workers. At other times it ends `main`.
@contextlib.contextmanager
def soft_interrupts(throttle: Throttle) -> Iterator[None]:
    """Meanwhile a first Ctrl-C lets nothing more start, and a second one cancels."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def interrupt() -> None:
        if throttle.stopping.is_set() and task:
            task.cancel()
        else:
            say(f"waiting for {throttle.in_flight} requests; Ctrl-C again: at once")
            throttle.stop(StopRun("interrupted", 130))

    for number in throttle.options.signals:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(interrupt))
    try:
        yield
    finally:
        for number in throttle.options.signals:
            signal.signal(number, interrupt_now)


def interrupt_now(*_: object) -> None:
    """Handles a signal at once, where asyncio would wait for the next `await`."""
    raise KeyboardInterrupt


async def run(read: Reader, question: Question, options: Options) -> int:
    """Answers all messages into OUTPUT; returns the exit status. Raises StopRun."""
    k, n = map(int, options.shard.split("/"))

    def read_shard() -> Iterator[Row]:
        return itertools.islice(read(), k - 1, None, n)

    keys = array("Q", map(question.key, read_shard()))
    if not keys:
        raise StopRun(f"{options.input}: there is no message in it")
    if options.max_cost and not question.prices and not question.offline:
        raise StopRun("--max-cost needs PRICES of this model, at the top of the file")
    async with connect(question.offline, options.concurrency) as client:
        journal = Journal(Path(options.output), question, options.restart)
        with journal.file:
            journal.load()
            if journal.starts and not any(key in journal.starts for key in keys):
                raise StopRun(f"{journal.path} is about other messages: choose another")
            return await fill(journal, client, read_shard, keys, options)


async def fill(
    journal: Journal, client: Client, read: Reader, keys: Keys, options: Options
) -> int:
    """Fills OUTPUT with what is missing; returns the exit status. Raises StopRun."""
    question = journal.question

    async def request(message: Row) -> Reply:
        return await call(client, question, options.timeout, message)

    throttle = Throttle(options, request, any(map(journal.has_answer, keys)))
    throttle.usd_least = question.most_usd()
    progress = Progress(journal, throttle, keys)

    def keep(message: Row, reply: Reply) -> None:
        row = question.row(message, reply)
        journal.add(row)
        progress.add(row, reply.usd)

    def missing() -> Iterator[Row]:
        return journal.missing(itertools.islice(read(), options.limit))

    batches = None
    if options.batch and not options.offline:
        batches = Batches(client, journal, missing, keep, throttle)
    watcher = asyncio.create_task(watch(progress, batches))
    try:
        with progress.bar, soft_interrupts(throttle):
            if batches:
                await batches.run()
            else:
                await answer_each(missing(), keep, throttle)
            progress.show("done")
    finally:
        watcher.cancel()
        try:
            journal.close(read())
        finally:
            for line in progress.closing_lines():
                say(line)
    return int(progress.answered() < len(progress.keys))


async def watch(progress: Progress, batches: Any) -> None:
    """Twice a second, shows how it goes and makes the rows survive a power failure."""
    throttle = progress.throttle
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.5)
        # A computer that was asleep, or stopped by Ctrl-Z, has heard nothing meanwhile.
        throttle.last_heard += max(0.0, time.monotonic() - before - 5)
        state = f"{throttle.in_flight} in flight"
        seconds = throttle.paused_until - time.monotonic()
        if seconds > 0.5:
            refused = "rate_limit" in throttle.failures or not throttle.is_down
            reason = "rate limited" if refused else "server down"
            state = f"{reason}, {seconds:.0f} s"
        progress.show(batches.state if batches else state)
        try:
            await asyncio.to_thread(progress.journal.sync)
        except (StopRun, OSError) as reason:
            throttle.stop(reason)


async def answer_all(
    messages: Iterable[str], output: str | Path | None = None, **changes: Any
) -> list[Row]:
    """The rows of all messages but blank ones, in their order. With `output` they are
    kept in that file, and resumed. Changes are the fields of Question and the flags:
    `await answer_all(texts, "rows.jsonl", prompt=..., example=..., concurrency=20)`.
    Raises TypeError, ValueError, OSError, and StopRun with the `rows` made so far."""
    if isinstance(messages, str):
        raise TypeError("messages has to be a list of strings, not one string")
    asked: list[Row] = []
    for line, text in enumerate(messages, 1):
        if not isinstance(text, str):
            raise TypeError(f"message {line} is no string, but {text!r:.50}")
        whole = text.encode(errors="replace").decode()  # without halves of characters
        if not BLANK.fullmatch(whole):
            asked.append({"line": line, "text_message": whole})
    if not asked:
        return []
    options = parse_args(["-", "rows.jsonl"])
    flags = vars(options).keys() - {"model", "field", "offline"}  # Question has these
    vars(options).update(changes)
    question = Question(**{k: v for k, v in changes.items() if k not in flags})
    if options.batch and output is None:
        raise ValueError("batch=True needs output: batches are found by its name")
    with tempfile.TemporaryDirectory() as folder:
        options.output = Path(output or Path(folder, "rows.jsonl"))
        check(options)
        try:
            await run(lambda: iter(asked), question, options)
        except StopRun as stop:
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                stop.rows = read_rows(options.output, question, asked)
            raise
        return read_rows(options.output, question, asked)


def read_rows(path: Path, question: Question, messages: list[Row]) -> list[Row]:
    """The rows of these messages in a file of results."""
    keys = set(map(question.key, messages))
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    ours = [row for row in rows if row["settings"] == question.settings]
    return [row for row in ours if question.key(row) in keys]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    options = parse_args(argv)
    words = [word for word in argv or sys.argv[1:] if word != "--restart"]
    options.command = shlex.join(["python", sys.argv[0], *words])
    options.no_bar = None  # tqdm shows it in a terminal only
    options.signals = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        options.signals.append(signal.SIGHUP)  # the terminal closes, without nohup
    for number in options.signals:
        signal.signal(number, interrupt_now)
    try:
        with tempfile.TemporaryDirectory() as folder:
            read = open_input(options, Path(folder))
            column = options.field or "text"
            question = Question(
                model=options.model, field=column, offline=options.offline
            )
            if PRICES and not (question.prices or options.offline or options.max_cost):
                say(f"the cost is not known: PRICES are those of {MODEL}")
            gc.freeze()  # what is there by now stays: no collection has to look at it
            return asyncio.run(run(read, question, options))
    except (StopRun, OSError) as error:
        say(str(error))
        return error.status if isinstance(error, StopRun) else 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("interrupted")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
