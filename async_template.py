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
import subprocess
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
# Change it together with MODEL; None costs nothing. https://openai.com/api/pricing
PRICES: tuple[float, float] | None = (0.10, 0.50)

CONCURRENCY = 100  # most requests in flight; the pace is found, you need not set it
TIMEOUT = 30.0  # seconds for one attempt; more for a slow local model, 900 for flex
MAX_ATTEMPTS = 5  # tries for one message; waiting for a rate limit is not a try

# --- 2. One message, one call ---------------------------------------------------------
Row = dict[str, Any]  # a message (line, text_message, fields), later with its answer
Reader = Callable[[], Iterator[Row]]  # gives messages of INPUT, each time anew
Request = Callable[[Row], Awaitable["Reply"]]  # asks about a message, once
Keep = Callable[[Row, "Reply"], None]  # takes a message and its final reply
Options = argparse.Namespace  # the flags
Client = openai.AsyncOpenAI
Keys = Sequence[int]  # of texts, see `Question.key`
TOKENS = ("input_tokens", "output_tokens")
DATE = "%Y-%m-%dT%H:%M:%SZ"  # as pandas reads it, in UTC
MOST_BYTES = 10_000_000  # of a reply; no answer is as long
HOST = r"([\w.-]+|\[[\da-f:]+\])(:\d{1,5})?"  # of an address, with its port

# Settings that do not shape an answer may change between two runs into one OUTPUT.
NEUTRAL = {"service_tier", "store", "metadata", "max_output_tokens", "user"}
NEUTRAL |= {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
NEUTRAL |= {"safety_identifier"}

# The types of errors, each with the HTTP statuses and the codes in a body that mean it.
# The first that fits counts: https://platform.openai.com/docs/guides/error-codes
ERRORS = {
    "timeout": "",  # no answer in time
    "connection": "",  # the server could not be reached, or hung up
    "bad_response": "",  # a reply that is not from the Responses API
    "incomplete": "",  # an answer that was cut off, say by max_output_tokens
    "refusal": "",  # the model declined
    "content_filter": "content_filter content_policy_violation ContentFiltered"
    " ResponsibleAIPolicyViolation",
    "bad_request": "invalid_prompt context_length_exceeded string_above_max_length",
    "invalid_answer": "json_validate_failed",  # it does not fit the schema
    "no_room": "resource_unavailable",  # flex has no capacity for this one request
    "account": "401 402 407 insufficient_quota billing_hard_limit_reached",
    "rate_limit": "429 503 529",  # the server wants fewer requests
    "server_error": "408 409 425 498 499",  # and all others from 500 on
    "unclear": "400 413 422",  # rejected, and the server does not say why
    "settings": "",  # all other 4xx, such as 403 and 404, or a setting is rejected
}
RETRIED = {"timeout", "connection", "server_error", "bad_response", "invalid_answer"}
TROUBLE = {"timeout", "connection", "server_error", "bad_response", "rate_limit"}
# What a row calls those that matter to this file alone.
SHOWN_AS = {"settings": "bad_request", "unclear": "bad_request"}
SHOWN_AS |= {"account": "bad_request", "no_room": "rate_limit"}
ADVICE = {
    401: "the key is not accepted, check OPENAI_API_KEY",
    402: "no credit is left, check plan and billing",
    403: "this is forbidden, check --model and your account",
    404: "there is no such model or address, check --model and OPENAI_BASE_URL",
    407: "the proxy wants a password, check HTTPS_PROXY",
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

    answer: Row | None = None
    error: str | None = None  # one of ERRORS
    message: str = ""  # of the error
    retry_after: float = 0.0  # seconds that the server asks us to wait
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    usage: dict[str, int] | None = None  # by the names in TOKENS
    usd: float = 0.0
    text: str = ""  # of the answer, as the model gave it
    attempts: int = 1
    answered_at: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.message = clean(self.message)


@dataclass
class Question:
    """What is asked: makes a message into a request, and reads the reply."""

    model: str
    instructions: str
    prompt: str
    example: BaseModel
    temperature: float | None
    extra: dict[str, Any]
    prices: tuple[float, float] | None  # USD per million tokens, in and out
    field: str = "text"  # the name of the column that is the message
    offline: bool = False  # every answer is the example

    def __post_init__(self) -> None:
        """Builds what all requests share, and a hash of all that shapes an answer."""
        if not re.search(r"\{[^\W\d]\w*\}", self.prompt):
            raise StopRun("PROMPT has no {text_message}, nor a {column}")
        self.schema = type(self.example)
        tool = openai.pydantic_function_tool(self.schema)
        form: Row = {"type": "json_schema", "name": self.schema.__name__}
        form |= {"schema": tool["function"]["parameters"], "strict": True}
        self.shared: Row = {"model": self.model, "instructions": self.instructions}
        if self.temperature is not None:
            self.shared["temperature"] = self.temperature
        self.shared |= self.extra
        self.shared["text"] = self.extra.get("text", {}) | {"format": form}
        shaping = {k: v for k, v in self.shared.items() if k not in NEUTRAL}
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

    def read(self, body: Any, half_price: bool = False) -> Reply:
        """The reply in the body of a 200. Other servers leave out much of what is in
        https://platform.openai.com/docs/api-reference/responses/object"""
        reply = Reply(None, "bad_response", f"not from the Responses API: {body}")
        try:
            with contextlib.suppress(LookupError, TypeError, AttributeError):
                reply = self.unpack(body)
            if body.get("model"):
                reply.model = clean(str(body["model"]))
            used = body.get("usage") or {}
            if all(isinstance(used.get(name), int) for name in TOKENS):
                reply.usage = {name: used[name] for name in TOKENS}
                prices = zip(TOKENS, self.prices or (0.0, 0.0))
                reply.usd = sum(used[name] * price for name, price in prices) / 1e6
            if half_price or body.get("service_tier") == "flex":
                reply.usd /= 2
            created_at = body.get("created_at")
            if isinstance(created_at, int) and 1e9 < created_at < 1e10:
                reply.answered_at = created_at
        except (ValueError, LookupError, TypeError, AttributeError):
            return Reply(None, "bad_response", f"not from the Responses API: {body}")
        if not reply.error:
            self.check(reply)
        return reply

    def unpack(self, body: Row) -> Reply:
        """The text or the error in the body of a 200."""
        if body.get("error"):
            code = body["error"].get("code")
            status = code if isinstance(code, int) and code >= 400 else 500
            return read_failure(status, body, {})
        if body.get("status") == "incomplete":
            reason = (body.get("incomplete_details") or {}).get("reason")
            error = reason if reason == "content_filter" else "incomplete"
            return Reply(None, error, f"the answer was cut off: {reason}")
        # The last message alone: some servers send it twice, some comment first.
        last = [item for item in body["output"] if item.get("type") == "message"][-1]
        parts = last["content"]
        refusal = [part["refusal"] for part in parts if part["type"] == "refusal"]
        if refusal:
            return Reply(None, "refusal", "".join(refusal))
        texts = [part["text"] for part in parts if part["type"] == "output_text"]
        return Reply(text="".join(texts))

    def check(self, reply: Reply) -> None:
        """Makes the text of a reply into its answer, or says what is wrong with it."""
        text = reply.text
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            # Some servers put it between ``` fences, or behind <think>...</think>.
            text = text[text.find("{") : text.rfind("}") + 1] or text
        try:
            parsed = self.schema.model_validate_json(text, strict=True)
            answer = parsed.model_dump(mode="json")
            to_line(answer)  # raises ValueError for NaN
            reply.answer = answer
        except ValueError as error:  # pydantic's ValidationError is one
            reply.error = "invalid_answer"
            reply.message = clean(str(error).partition("For further information")[0])

    def most_usd(self) -> float:
        """What the longest answer would cost, if max_output_tokens is set; else 0."""
        longest = self.extra.get("max_output_tokens", 0)
        return float(longest * (self.prices or (0.0, 0.0))[1] / 1e6)

    def row(self, message: Row, reply: Reply) -> Row:
        """The row of OUTPUT for a message and its final reply."""
        error: Row | None = None
        if reply.error:
            kind = SHOWN_AS.get(reply.error, reply.error)
            error = {"type": kind, "message": reply.message, "attempts": reply.attempts}
        when = time.gmtime(reply.answered_at)
        return message | {
            "response": reply.answer,
            "error": error,
            "model": reply.model,
            "answered_at": time.strftime(DATE, when),
            "usage": reply.usage,
            "settings": self.settings,
        }


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


def read_failure(status: int, body: Any, headers: Mapping[str, str]) -> Reply:
    """The reply for an error, with the server's reason and what to do about it."""
    error = "server_error" if status >= 500 else "settings"
    codes = [code for code in find("code|type", body) if not code.isdecimal()]
    seen = {str(status), *codes}
    for kind, names in ERRORS.items():
        if seen.intersection(names.split()):
            error = kind
            break
    setting = "".join(find("param", body)[:1])
    if setting and error == "unclear":
        about_message = setting.startswith(("input", "messages", "prompt"))
        error = "bad_request" if about_message else "settings"
    # Gateways have their own shapes, and wrap the words of the server behind them.
    words = find("raw", body) or find("message|msg", body) or find("detail|error", body)
    message = f"status {status}: {(words or [str(body)[:200]])[0]}"
    advice = {"settings": ADVICE[404], "account": ADVICE[402]}
    if setting:
        advice["settings"] = f"the setting {setting!r} is not accepted"
    if error in advice:
        message = f"{ADVICE.get(status, advice[error])}; {message}"
    return Reply(None, error, message, seconds_asked(headers), headers)


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


def read_error(error: BaseException, client: Client) -> Reply:
    """The reply for an error of the client, with what to do about it."""
    if not isinstance(error, openai.APIStatusError):
        advice = ""
        while error.__cause__:
            error = error.__cause__
            if isinstance(error, aiohttp.ClientConnectorCertificateError):
                advice = "; set SSL_CERT_FILE to the certificates of your network"
        return Reply(None, "connection", f"{client.base_url}: {error}{advice}")
    headers = error.response.headers
    if error.status_code < 400:
        there = str(error.request.url.join(headers.get("location", "")))
        words = "the server has moved, set OPENAI_BASE_URL to "
        return Reply(None, "account", words + there.removesuffix("/responses"))
    body = decode(error.response.content, client.api_key)
    return read_failure(error.status_code, body, headers)


def connect(offline: bool, concurrency: int) -> Client:
    """A client for the key and the address of the environment. Raises StopRun."""
    url = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    proxies = urllib.request.getproxies()
    if offline:
        url, key, proxies = "http://offline", "offline", {}
    if not key:
        raise StopRun("OPENAI_API_KEY holds no key: set it, or try --offline")
    address = url.partition("?")[0]
    parts = re.fullmatch(f"(?i)(https?)://{HOST}(/\\S*)?", address)
    if not parts:
        raise StopRun(f"OPENAI_BASE_URL is {url!r}: it has to be like http://host/v1")
    proxy = proxies.get(parts[1].lower()) or proxies.get("all") or ""
    used = proxy and not urllib.request.proxy_bypass(parts[2])
    if used and not re.fullmatch(f"(?i)(https?://)?(\\S+@)?{HOST}/?", proxy):
        name = f"{parts[1].upper()}_PROXY"
        raise StopRun(f"only HTTP proxies work, no SOCKS: see {name} and ALL_PROXY")
    allow_open_files(concurrency + 50)
    try:
        http = openai.DefaultAioHttpClient(  # takes 40 % less CPU than the default
            limits=type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=concurrency),
            follow_redirects=False,  # they would carry the messages to another host
            event_hooks={"response": [bound_body]},
            trust_env=not offline,
        )
    except OSError as error:
        raise StopRun(f"SSL_CERT_FILE has no certificates: {error}") from None
    query = dict(http.build_request("GET", url).url.params)  # Azure's ?api-version=...
    client = Client(
        api_key=key,
        base_url=address,
        default_query=query,
        http_client=http,
        max_retries=0,  # `ask` does that
        timeout=None,  # it would start anew at every read; `call` has its own
    )
    names = ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")
    for name, value in zip(names, (key, client.organization, client.project)):
        if not re.fullmatch("[!-~]*", value or ""):
            raise StopRun(f"{name} holds a line break, a blank or an accent")
    return client


def allow_open_files(count: int) -> None:
    """Raises the limit of open files, as each connection is one. Raises StopRun."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise StopRun(f"--concurrency needs {count} open files, ulimit -n is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


async def bound_body(reply: Any) -> None:
    """Reads a reply's body, but not more than MOST_BYTES. A hook of the HTTP client."""
    if not reply.request.url.path.endswith("/responses"):
        return  # the results of a batch may be large
    length = reply.headers.get("content-length", "")
    if length.isdecimal() and int(length) <= MOST_BYTES:
        return
    body = bytearray()
    async for chunk in reply.aiter_raw():
        body += chunk
        if len(body) > MOST_BYTES:
            raise OverflowError(f"the reply has more than {MOST_BYTES:,} bytes")
    # The client reads it once more, from memory now.
    reply.stream = type(reply)(200, content=bytes(body)).stream
    reply.is_closed = reply.is_stream_consumed = False


async def call(
    client: Client, question: Question, seconds: float, message: Row
) -> Reply:
    """Asks about one message, once. What goes wrong on the way is in the reply."""
    if question.offline:
        await asyncio.sleep(random.lognormvariate(-1, 0.3))  # some 0.4 s
        answer = question.example.model_dump(mode="json")
        return Reply(answer, model="offline", usage=dict.fromkeys(TOKENS, 0))
    # The body goes out as it is: EXTRA may hold what this SDK does not know, and the
    # SDK does not have to walk over the schema again for every row.
    parse = client.responses.with_raw_response.parse
    sending = parse(extra_body=question.request(message))
    try:
        raw = await asyncio.wait_for(sending, seconds)
        if len(raw.content) > MOST_BYTES:  # it was compressed
            raise OverflowError(f"the reply has more than {MOST_BYTES:,} bytes")
        reply = question.read(decode(raw.content, client.api_key))
        reply.headers = raw.headers
        return reply
    except TimeoutError:
        return Reply(None, "timeout", f"no answer within {seconds:g} s, see --timeout")
    except OverflowError as error:
        return Reply(None, "bad_response", str(error))
    except (openai.APIError, aiohttp.ClientError) as error:
        return read_error(error, client)


# --- 3. Many at a time ----------------------------------------------------------------
# A request may start when these three agree:
# 1. A slot is free. A semaphore gives out `--concurrency` slots. Only 8 are used before
#    the first answer, so that a wrong key costs little, and 1 while the server seems
#    down, that is after five failures or refusals in a row.
# 2. No pause is on. After a refusal, or five failures in a row, all pause: for as long
#    as the server asks, or for a moment that grows with its silence.
# 3. Three token buckets have room. `requests` and `tokens` are copies of the server's
#    own limits, kept as its headers tell. `pace` is for a server that tells nothing. It
#    is unlimited until the first refusal. That one sets it to half of what was sent a
#    second, each answer adds 0.2, and each further refusal takes off 5 to 20 %.
# Example: a server takes 50 requests a second and tells nothing. 60 a second were sent
# until the first refusal, so the pace is 30. 110 answers later it is 52, the server
# refuses again, and the pace falls to 42 or a bit more.
# With --max-cost the money left has to cover all in flight, too, and one goes first.
START = 8  # requests in flight before the first answer
DOWN = 5  # failures in a row after which the server seems down
BACKOFF = 0.5  # seconds; the n-th retry waits a random part of BACKOFF * 2**n
PATIENCE = 600.0  # seconds without any answer that end the run
OUTAGE = 30.0  # seconds; while the server seems down, only one try in these counts
SPARE = 4  # requests to leave room for, since other runs may share the account


@dataclass
class TokenBucket:
    """Lets through `rate` a second, and `size` at once. Fills up as time goes by."""

    rate: float = math.inf
    size: float = math.inf
    left: float = math.inf  # at the time `at`
    at: float = field(default_factory=time.monotonic)
    taken: float = 0.0  # since the time `since`
    since: float = field(default_factory=time.monotonic)

    def take(self, amount: float) -> None:
        """Takes so much, even if less is left: then the next one waits for longer."""
        self.left -= amount
        self.taken += amount

    def seconds_until(self, amount: float) -> float:
        """Seconds until so much is left."""
        now = time.monotonic()
        if now > self.at:
            self.left = min(self.size, self.left + self.rate * (now - self.at))
            self.at = now
        missing = min(amount, self.size) - self.left
        if missing <= 0:
            return 0.0
        return missing / self.rate


class Throttle:
    """Says when the next request may start, and learns from every reply."""

    def __init__(self, options: Options, question: Question, proven: bool) -> None:
        self.options = options
        self.proven = proven  # whether there is an answer with these settings
        self.slots = asyncio.Semaphore(options.concurrency)
        self.queue = asyncio.Lock()  # who has a slot waits here for its turn
        self.landed = asyncio.Event()  # set whenever a request ends
        self.stopping = asyncio.Event()  # set when nothing more may start
        self.reason: StopRun | OSError = StopRun("")  # why
        self.requests = TokenBucket()
        self.tokens = TokenBucket()
        self.pace = TokenBucket()
        self.usd_left = options.max_cost or math.inf
        self.tokens_per_character = 0.3  # a moving average
        self.usd_least = question.most_usd()  # to set aside for a request
        self.usd_per_character = 0.0  # of the dearest request
        self.in_flight = 0
        self.answers = 0
        self.rejected = 0  # messages in a row
        self.failures = Counter[str]()  # since the last answer, by type of error
        self.last_heard = time.monotonic()  # when it answered or rejected a request
        self.paused_until = 0.0
        self.headers_from = 0.0  # when the request was sent whose headers are in use

    def stop(self, reason: StopRun | OSError) -> None:
        """Lets nothing more start. What is in flight may land."""
        if not self.stopping.is_set():
            self.reason = reason
        self.stopping.set()
        self.landed.set()

    @property
    def is_down(self) -> bool:
        """Whether the server seems down."""
        return self.failures.total() >= DOWN

    def seconds_to_wait(self, tokens: float, usd: float) -> float:
        """Seconds until the next request may start; infinity: not before one lands."""
        # Before the first answer nobody knows what one costs.
        one_by_one = self.is_down or (not self.answers and self.usd_left < math.inf)
        if one_by_one and self.in_flight:
            return math.inf
        if not self.answers and self.in_flight >= START:
            return math.inf
        if usd > self.usd_left:
            return math.inf
        # Room for this request, and some for other runs that share the account.
        return max(
            self.paused_until - time.monotonic(),
            self.pace.seconds_until(1),
            self.requests.seconds_until(1 + min(SPARE, self.requests.rate)),
            self.tokens.seconds_until(tokens + min(SPARE * tokens, self.tokens.rate)),
        )

    async def wait_for_turn(self, tokens: float, usd: float) -> None:
        """Returns when the next request may start. Raises StopRun if none may."""
        while True:
            if self.stopping.is_set():
                raise self.reason
            seconds = self.seconds_to_wait(tokens, usd)
            if seconds <= 0:
                return
            if seconds == math.inf and not self.in_flight:
                raise StopRun(f"--max-cost: the next one may cost {usd:.2g} USD")
            self.landed.clear()
            await pause(min(seconds, 1.0), self.landed)

    async def send(self, request: Request, message: Row) -> Reply:
        """The reply to one request, which starts as soon as it may. Raises StopRun."""
        size = size_of(message)
        async with self.slots:
            async with self.queue:
                tokens = size * self.tokens_per_character
                # Half as much again: texts differ in their tokens a character.
                usd = max(self.usd_least, 1.5 * size * self.usd_per_character)
                await self.wait_for_turn(tokens, usd)
                sent_at = time.monotonic()
                if not self.requests.taken:
                    self.pace.since = sent_at  # the first request: measure from here
                self.in_flight += 1
                self.pace.take(1)
                self.requests.take(1)
                self.tokens.take(tokens)
                self.usd_left -= usd
                taken = (self.requests.taken, self.tokens.taken)
            try:
                reply = await request(message)
            finally:
                self.in_flight -= 1
                self.usd_left += usd
                self.landed.set()
        self.pay(reply, size)
        if sent_at >= self.headers_from:
            self.headers_from = sent_at
            self.read_limits(reply.headers, taken)
        if reply.error in TROUBLE:
            self.slow_down(reply, sent_at)
        elif reply.error != "no_room":
            self.speed_up(reply)
        self.judge(reply, sent_at)
        return reply

    def pay(self, reply: Reply, size: int) -> None:
        """Books what a request has cost, in tokens and in USD."""
        if reply.usage:
            used = sum(reply.usage.values()) / size
            self.tokens_per_character += 0.1 * (used - self.tokens_per_character)
        elif not reply.error and self.usd_left < math.inf:
            self.stop(StopRun("--max-cost: this server does not tell what it used"))
        self.usd_left -= reply.usd
        self.usd_per_character = max(self.usd_per_character, reply.usd / size)

    def read_limits(
        self, headers: Mapping[str, str], taken: tuple[float, float]
    ) -> None:
        """Takes over what a reply says is left of the limits, which are per minute:
        https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers"""
        for name, bucket, taken_then in (
            ("requests", self.requests, taken[0]),
            ("tokens", self.tokens, taken[1]),
        ):
            limit = headers.get(f"x-ratelimit-limit-{name}", "")
            if not limit:
                continue
            left = headers.get(f"x-ratelimit-remaining-{name}", "")
            if re.fullmatch("[1-9][0-9]{0,15},[0-9]{1,15}", f"{limit},{left}"):
                bucket.rate = int(limit) / 60
                bucket.size = int(limit)
                # The headers describe the moment of sending.
                bucket.left = int(left) - (bucket.taken - taken_then)
                bucket.at = self.headers_from

    def speed_up(self, reply: Reply) -> None:
        """The server has dealt with a request: the pace may grow."""
        self.failures.clear()
        self.last_heard = time.monotonic()
        self.answers += not reply.error
        self.pace.rate += 0.2
        self.pace.size = max(1.0, self.pace.rate / 20)

    def slow_down(self, reply: Reply, sent_at: float) -> None:
        """The server has refused a request, or failed. One failure among answers does
        nothing. After a refusal, or five failures in a row, all pause."""
        self.failures[str(reply.error)] += 1
        refused = reply.error == "rate_limit"
        if not refused and not self.is_down:
            return
        now = time.monotonic()
        seconds = reply.retry_after
        # `since` is the end of the last pause, and may still be to come. What was sent
        # before it met the same jam, for which the pace has been cut.
        if sent_at >= self.pace.since:
            seconds = max(seconds, 0.05 + min(10.0, (now - self.last_heard) / 5))
            self.restart_pace(now + seconds, refused or reply.error == "timeout")
        # Other runs may be waiting, too: not all should go on at the same moment.
        seconds *= random.uniform(1.0, 1.2)
        self.paused_until = max(self.paused_until, now + seconds)

    def restart_pace(self, at: float, jammed: bool) -> None:
        """Begins to measure anew what is let through, from the end of a pause on. After
        a jam the pace is what was let through since the last pause, or a bit less."""
        seconds = max(0.001, time.monotonic() - self.pace.since)
        let_through = self.pace.taken - 1  # all but the one refused
        rate = self.pace.rate
        # A server that refuses everything is not slow, but down.
        if jammed and let_through > 0:
            found = let_through / seconds
            if rate == math.inf:
                rate = found / 2  # the server's own bucket was full at the start
            else:
                rate = max(0.8 * rate, min(0.95 * rate, 0.92 * found))
        self.pace = TokenBucket(rate, max(1.0, rate / 20), left=0.0, at=at, since=at)

    def judge(self, reply: Reply, sent_at: float) -> None:
        """Raises StopRun if there is no point in going on."""
        if not reply.error:
            self.proven = True
            self.rejected = 0
        if reply.error in ("settings", "unclear"):
            self.rejected += 1
        hopeless = reply.error == "settings" and not self.proven
        if hopeless or reply.error == "account":
            raise StopRun(reply.message)
        if self.rejected >= (50 if self.proven else 24):
            raise StopRun(f"{self.rejected} messages were rejected; {reply.message}")
        if reply.retry_after > PATIENCE:
            then = time.ctime(time.time() + min(reply.retry_after, 1e9))
            raise StopRun(f"the limit is used up until {then}; {reply.message}")
        silence = sent_at - self.last_heard  # without the time that this one took
        patience = PATIENCE
        advice = ""
        if not self.answers and set(self.failures) == {"connection"}:
            patience = 10.0
        if not self.answers and set(self.failures) == {"timeout"}:
            patience = 2 * self.options.timeout
            advice = ", try a larger --timeout"
        if silence > patience:
            raise StopRun(f"no answer for {silence:.0f} s; {reply.message}{advice}")


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


async def ask(throttle: Throttle, request: Request, message: Row) -> Reply:
    """The final reply about a message: an answer, or the error of the last try. It has
    the usage and the cost of all tries. Raises StopRun."""
    usage = Counter[str]()
    usd = 0.0
    tries = 0
    refusals = 0
    last_try = time.monotonic()
    while True:
        reply = await throttle.send(request, message)
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


# How a run ends. All is done: the workers return. Or something calls `stop`: a worker
# that met a StopRun or a full disk, or Ctrl-C. Each worker finishes its request then,
# and meets the reason in `wait_for_turn`. Or a second Ctrl-C cancels all of them.
async def answer_each(
    messages: Iterator[Row],
    request: Request,
    keep: Keep,
    throttle: Throttle,
) -> None:
    """Asks about all messages and hands each final reply to `keep`. Raises StopRun, or
    what `keep` raised."""

    throttle.last_heard = time.monotonic()  # silence counts from here

    # Workers share one iterator. A task for each message, as `gather` makes, would take
    # 171 MiB for 100,000 messages; with 50 workers it was 22. Sharing is safe, because
    # another worker can take over only at an await.
    async def work() -> None:
        try:
            for message in messages:
                keep(message, await ask(throttle, request, message))
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
    """The messages of INPUT but blank ones; `name` is the field of .csv and .jsonl that
    holds them. Raises StopRun at the first record that is no message."""
    kind = path.suffix.lower()
    read = 0

    def read_lines() -> Iterator[str]:
        nonlocal read
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for read, text in enumerate(file, 1):  # noqa: B007
                yield text

    line = 1  # where the record begins
    try:
        lines = read_lines()
        records: Iterable[Any] = read_table(lines) if kind == ".csv" else lines
        line += read  # the header of a CSV
        for record in records:
            if kind == ".jsonl" and not BLANK.fullmatch(record):
                record = json.loads(record.lstrip("\ufeff"))
            message = to_message(line, record, name)
            if not BLANK.fullmatch(message["text_message"]):
                yield message
            line = read + 1
    except UnicodeError:
        raise StopRun(f"{path}, line {line}: not UTF-8, or half a character") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise StopRun(f"{path}, line {line}: {error}") from None


def read_table(lines: Iterator[str]) -> Iterator[Row | str]:
    """The records of a CSV file, "" for a blank line. The header is read at once; the
    delimiter is the one that makes the most columns of it."""
    csv.field_size_limit(2**31 - 1)
    first = next(lines, "")
    while re.search(r'(^|[,;\t|])"', first) and first.count('"') % 2:
        # A line break in the name of a column.
        first += next(lines, '"')
    widths = {mark: len(next(csv.reader([first], delimiter=mark))) for mark in ",;\t|"}
    mark = max(widths, key=widths.__getitem__)
    table = csv.reader(itertools.chain([first], lines), delimiter=mark, strict=True)
    header = next(table)
    names = [name or f"unnamed {number}" for number, name in enumerate(header, 1)]
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have the same name: {', '.join(names)}")

    def to_record(cells: list[str]) -> Row | str:
        if not cells:
            return ""
        if len(cells) != len(names):
            raise ValueError(f"{len(cells)} cells, but {len(names)} columns")
        # Spreadsheets add empty columns without a name.
        columns = zip(header, names, cells)
        return {name: cell for title, name, cell in columns if title or cell}

    return map(to_record, table)


def to_message(line: int, record: Any, name: str) -> Row:
    """The message in a record of INPUT. Raises ValueError if there is none."""
    message = {"line": line, "text_message": record}
    if isinstance(record, dict):
        if name not in record:
            names = ", ".join(record)
            raise ValueError(f"no field {name!r}, but {names}: choose one by --field")
        message = {"line": line, "text_message": record.pop(name), "fields": record}
    text = message["text_message"]
    if not isinstance(text, str):
        raise ValueError(f"the message is no text, but {json.dumps(text)[:50]}")
    message["text_message"] = text.lstrip("\ufeff").removesuffix("\n")
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
    """OUTPUT: rows are appended as they come, and put into INPUT's order at the end. A
    message is known by the text that is asked; until the end each text has one row."""

    def __init__(self, path: Path, question: Question, restart: bool) -> None:
        self.path = path.resolve()
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        self.question = question
        # A text (see `Question.key`) has no row yet, was handed out by `missing` (-1),
        # has an answer, or an error. Numbers are the byte where its row starts.
        self.starts: dict[int, int] = {}
        self.failed: set[int] = set()  # those of `starts` whose row is an error
        self.old_errors: dict[int, int] = {}  # of earlier runs: they are asked again
        self.end = 0  # the size of the file
        self.file = self.open(restart)

    def open(self, restart: bool) -> IO[bytes]:
        """The file, locked. Raises StopRun if another run writes it."""
        file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
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
        number = 0
        line = b"\n"
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):  # noqa: B007
                    self.load_row(line)
                    self.end += len(line)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            where = f"{self.path}, line {number}"
            torn = isinstance(error, ValueError) and not line.endswith(b"\n")
            start = line.strip(b"\0")[:9]  # a power failure can leave zeros
            if not torn or not b'{"line": '.startswith(start):
                raise StopRun(f"{where} is no row of results") from None
            say(f"{where} was cut off by a crash: its message is asked again")
            self.file.truncate(self.end)
            line = b"\n"
        if not line.endswith(b"\n"):
            self.end += self.file.write(b"\n")

    def load_row(self, line: bytes) -> None:
        """Notes a row of an earlier run. With other settings an error is dropped, and
        an answer raises StopRun."""
        if not line.strip():
            return
        row = json.loads(line.decode("utf-8-sig"))
        answered = row["response"] is not None
        if row["settings"] == self.question.settings:
            key = self.question.key(row)
            if answered:
                self.starts.setdefault(key, self.end)
                self.old_errors.pop(key, None)
            elif key not in self.starts:
                self.old_errors.setdefault(key, self.end)
        elif answered:
            raise StopRun(
                f"{self.path} has answers of {row.get('model')} with another prompt or "
                "setting: choose another OUTPUT, or --restart"
            )

    def has_answer(self, key: int) -> bool:
        """Whether there is an answer to a text."""
        return self.starts.get(key, -1) >= 0 and key not in self.failed

    def error_at(self, key: int) -> str:
        """When the error of an earlier run was met, or "" if there is none."""
        if key not in self.old_errors:
            return ""
        with open(self.path, "rb") as file:
            file.seek(self.old_errors[key])
            return str(json.loads(file.readline())["answered_at"])

    def missing(self, messages: Iterable[Row]) -> Iterator[Row]:
        """The messages to ask about: each text once, if it has no answer."""
        # What an earlier pass has asked in vain is missing again.
        for key in [key for key, start in self.starts.items() if start < 0]:
            del self.starts[key]
        for message in messages:
            key = self.question.key(message)
            if key not in self.starts:
                self.starts[key] = -1
                yield message

    def add(self, row: Row) -> None:
        """Appends a row in one write. A kill costs no row, only what was in flight.
        Raises OSError if the disk is full; no part of the row is left then."""
        line = to_line(row)
        start = self.file.seek(0, os.SEEK_END)
        if start < self.end:
            self.sync()  # somebody cut the file: this says so
        if self.file.write(line) < len(line):
            self.file.truncate(start)
            raise OSError(28, "No space left on device", str(self.path))
        self.end = start + len(line)
        key = self.question.key(row)
        self.starts[key] = start
        self.old_errors.pop(key, None)
        self.failed.discard(key)
        if row["error"]:
            self.failed.add(key)

    def sync(self) -> None:
        """Makes the rows survive a power failure. Raises StopRun if they are gone."""
        end = self.end  # rows may be added meanwhile
        os.fsync(self.file.fileno())
        mine = os.fstat(self.file.fileno())
        if not self.path.exists() or not os.path.samestat(mine, self.path.stat()):
            raise StopRun(f"{self.path} was moved or deleted during the run")
        if mine.st_size < end:
            raise StopRun(f"{self.path} was emptied or cut during the run")

    def in_order(self, messages: Iterable[Row]) -> Iterator[bytes]:
        """The rows in INPUT's order, then those whose text has left INPUT."""
        others = self.starts | self.old_errors
        with open(self.path, "rb") as file:
            for message in messages:
                key = self.question.key(message)
                start = self.starts.get(key, -1)
                if start < 0:
                    start = self.old_errors.get(key, -1)
                if start < 0:
                    continue  # not asked yet
                file.seek(start)
                row = json.loads(file.readline())
                for name in ("line", "text_message", "fields"):
                    row.pop(name, None)
                if others.pop(key, None) is None:  # not the first row with this text
                    row["usage"] = None
                yield to_line(message | row)
            for start in others.values():
                if start >= 0:
                    file.seek(start)
                    yield file.readline()

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
            self.file.close()


# --- 5. Half the price ----------------------------------------------------------------
# The Batch API answers within a day: https://platform.openai.com/docs/guides/batch
# Nothing is remembered on this machine. A batch bears the settings and OUTPUT's name
# from the moment it exists, so the provider's list shows what was submitted. Who does
# not need batches may delete this part: then --batch is an error, and all else works.
POLL = 60.0  # seconds between two looks at the list
MOST_LINES = 50_000  # of a batch
MOST_FILE_BYTES = 190_000_000  # the API takes 200 MB
RUNNING = {"validating", "in_progress", "finalizing", "cancelling"}


class Batches:
    """The batches of one OUTPUT at the provider."""

    def __init__(
        self, client: openai.AsyncOpenAI, journal: Journal, read: Reader, keep: Keep
    ) -> None:
        # A call that creates a batch is never repeated: it might be paid for twice.
        self.create = client.with_options(timeout=600).batches.create
        self.client = client.with_options(timeout=600, max_retries=5)
        self.journal = journal
        self.read = read
        self.keep = keep
        self.label = {
            "settings": journal.question.settings,
            "output": journal.path.name,
        }
        self.created: set[str] = set()  # ids of batches of this run
        self.uploaded: list[str] = []  # ids of files of this run
        self.done: set[str] = set()  # ids of batches that need no further look
        self.most_lines = MOST_LINES
        self.state = "looking for batches"  # for the bar

    async def look(self) -> bool:
        """Collects the batches that have ended. Returns whether others still run."""
        running: list[str] = []
        async for batch in self.client.batches.list(limit=100):
            labelled = (batch.metadata or {}).items() >= self.label.items()
            if not labelled or batch.id in self.done:
                continue
            if batch.status in RUNNING:
                since = time.strftime("%a %H:%M", time.localtime(batch.created_at))
                running.append(f"{batch.status} since {since}")
                if batch.request_counts:
                    ready = batch.request_counts.completed
                    running[-1] += (
                        f", {ready:,} of {batch.request_counts.total:,} ready"
                    )
                continue
            if batch.status == "failed":
                self.learn_limit(batch)
            else:
                await self.collect(batch)
            self.done.add(batch.id)
        self.state = f"{len(running)} batches: {'; '.join(running)}"
        return bool(running)

    def learn_limit(self, batch: openai.types.Batch) -> None:
        """Makes batches smaller if this one was too large for the limit of the account.
        Raises StopRun if a batch of this run failed for another reason."""
        errors = (batch.errors and batch.errors.data) or []
        if any(error.code == "token_limit_exceeded" for error in errors):
            half = int((batch.metadata or {})["lines"]) // 2
            self.most_lines = max(1, min(self.most_lines, half))
        elif batch.id in self.created:
            reasons = "; ".join(str(error.message) for error in errors)
            raise StopRun(f"the provider rejects the batch: {clean(reasons)}")

    async def collect(self, batch: openai.types.Batch) -> None:
        """Writes the rows of a batch that has ended, then deletes its files."""
        results = [name for name in (batch.output_file_id, batch.error_file_id) if name]
        lines: dict[int, bytes] = {}  # by the text that was asked
        for file_id in results:
            with contextlib.suppress(openai.NotFoundError):  # deleted before
                file = await self.client.files.content(file_id)
                for line in filter(bytes.strip, file.content.split(b"\n")):
                    lines[int(json.loads(line)["custom_id"], 16)] = line
        if not lines:
            return
        journal = self.journal
        since = time.strftime(DATE, time.gmtime(batch.created_at))
        for message in self.read():
            key = journal.question.key(message)
            found = lines.pop(key, None)
            if found and not journal.has_answer(key):
                reply = self.read_line(decode(found, self.client.api_key))
                # An error that OUTPUT knows from an earlier look is to be asked again.
                known = batch.id not in self.created and journal.error_at(key) >= since
                if reply and not (reply.error and known):
                    self.keep(message, reply)
        journal.sync()
        # The lines left over may be those of another run, which still needs the files.
        if lines.keys() <= journal.starts.keys():
            await self.delete([batch.input_file_id, *results])

    async def delete(self, file_ids: list[str]) -> None:
        """Deletes files at the provider."""
        for file_id in file_ids:
            with contextlib.suppress(openai.NotFoundError):
                await self.client.files.delete(file_id)

    def read_line(self, line: Row) -> Reply | None:
        """The reply in a line of the results; None if its message has to go again."""
        response = line["response"]
        if not response or not response["status_code"]:
            return None  # it expired, was cancelled, or got lost
        if response["status_code"] == 200:
            reply = self.journal.question.read(response["body"], half_price=True)
        else:
            reply = read_failure(response["status_code"], response["body"], {})
        reply.message = clean(reply.message)
        again = reply.error in TROUBLE or reply.error == "no_room"
        return None if again else reply

    async def submit_all(
        self, messages: Iterator[Row], stopping: asyncio.Event
    ) -> None:
        """Submits batches about all these messages."""
        more = True
        while more and not stopping.is_set():
            more = await self.submit(messages)

    async def submit(self, messages: Iterator[Row]) -> bool:
        """Submits a batch about the first of these messages. Returns whether there were
        any."""
        question = self.journal.question
        count = 0
        with tempfile.TemporaryFile() as file:
            for message in itertools.islice(messages, self.most_lines):
                line: Row = {"custom_id": f"{question.key(message):015x}"}
                line |= {"method": "POST", "url": "/v1/responses"}
                file.write(to_line(line | {"body": question.request(message)}))
                count += 1
                if file.tell() > MOST_FILE_BYTES:
                    break
            if not count:
                return False
            file.seek(0)
            upload = ("messages.jsonl", file)
            uploaded = await self.client.files.create(file=upload, purpose="batch")
        self.uploaded.append(uploaded.id)
        batch = await self.create(
            input_file_id=uploaded.id,
            endpoint="/v1/responses",
            completion_window="24h",
            metadata=self.label | {"lines": str(count)},
        )
        self.created.add(batch.id)
        return True


async def answer_in_batches(
    batches: Batches,
    missing: Reader,
    ask_live: Callable[[Iterator[Row]], Awaitable[None]],
    throttle: Throttle,
) -> None:
    """Collects and submits batches until nothing is missing. Raises StopRun."""
    # One message goes first and alone: it shows what is wrong.
    if not throttle.proven:
        await ask_live(itertools.islice(missing(), 1))
    doubts = 0  # looks to take before the next batch, since one may exist already
    states: list[tuple[int, int]] = []  # what there was when batches were submitted
    while not throttle.stopping.is_set():
        try:
            running = await batches.look()
            count = sum(1 for _ in missing())
            if not count and not running:
                await batches.delete(batches.uploaded)
            if not count:
                return
            state = (batches.journal.end, batches.most_lines)
            may_submit = not running and not doubts
            if may_submit and states[-2:] == [state, state]:
                raise StopRun("the batches bring no rows: see the provider's page")
            if may_submit:
                await check_cost(missing, ask_live, throttle)
                doubts = 2
                await batches.submit_all(missing(), throttle.stopping)
                doubts = 0
                states.append(state)
                await batches.look()
            doubts = max(0, doubts - 1)
        except openai.APIStatusError as error:
            body = decode(error.response.content, batches.client.api_key)
            reply = read_failure(error.status_code, body, {})
            if reply.error not in TROUBLE:
                raise StopRun(f"no batch: {clean(reply.message)}") from None
            say(clean(reply.message))
        except openai.APIConnectionError as error:
            say(f"the provider cannot be reached: {error.__cause__ or error}")
        await pause(POLL, throttle.stopping)
    raise throttle.reason


async def check_cost(
    missing: Reader,
    ask_live: Callable[[Iterator[Row]], Awaitable[None]],
    throttle: Throttle,
) -> None:
    """Raises StopRun if the messages cost too much. Asks one, to know what it costs."""
    if throttle.usd_left == math.inf:
        return
    if not throttle.usd_per_character:
        await ask_live(itertools.islice(missing(), 1))
    if not throttle.usd_per_character:
        raise StopRun("--max-cost: the first message failed, so no cost is known")
    usd = sum(map(size_of, missing())) * throttle.usd_per_character / 2
    if usd > throttle.usd_left:
        raise StopRun(f"--max-cost: the other messages may take {usd:,.4f} USD")


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
    options = parser.parse_args(argv)
    try:
        check(options)
    except ValueError as error:
        parser.error(str(error))
    words = [word for word in argv or sys.argv[1:] if word != "--restart"]
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    options.command = join(["python", sys.argv[0], *words])
    options.no_bar = None  # that is, in a log
    options.signals = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        options.signals.append(signal.SIGHUP)  # the terminal closes, without nohup
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
    if options.batch and options.offline:
        raise ValueError("--batch asks a provider, and --offline none: leave one out")
    if not str(options.output).endswith(".jsonl"):
        raise ValueError("OUTPUT has to end in .jsonl, for JSON Lines")


def new_question(**changes: Any) -> Question:
    """The question at the top of this file, with some of its parts changed."""
    parts: dict[str, Any] = {"model": MODEL, "instructions": INSTRUCTIONS}
    parts |= {"prompt": PROMPT, "example": EXAMPLE, "temperature": TEMPERATURE}
    parts |= {"extra": EXTRA, "prices": PRICES}
    if changes.get("model", MODEL) != MODEL:
        parts["prices"] = None  # those above are of MODEL
    return Question(**(parts | changes))


def open_input(options: Options, folder: Path) -> Reader:
    """What reads the messages of INPUT. Raises StopRun."""
    source, output = Path(options.input), Path(options.output)
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

    def __init__(
        self, keys: Keys, has_answer: Callable[[int], bool], no_bar: bool | None
    ) -> None:
        self.keys = keys  # of the messages that are to have an answer
        self.has_answer = has_answer
        self.before = self.answered()  # by earlier runs
        self.counts = Counter[str]()  # rows of this run, by type of error or "answered"
        self.usage = Counter[str]()
        self.usd = 0.0
        self.started = self.printed = time.monotonic()
        to_ask = {key for key in keys if not has_answer(key)}  # each text once
        look: dict[str, Any] = {"unit": "msg", "bar_format": LAYOUT}
        look |= {"initial": self.before, "disable": no_bar}
        self.bar = tqdm(total=self.before + len(to_ask), **look)

    def answered(self) -> int:
        """How many messages have an answer by now."""
        return sum(map(self.has_answer, self.keys))

    def add(self, row: Row, usd: float) -> None:
        """Counts a row and moves the bar. Prints the first error of each type."""
        error = row["error"] or {"type": "answered"}
        self.counts[error["type"]] += 1
        self.usage.update(row["usage"] or {})
        self.usd += usd
        if row["error"] and self.counts[error["type"]] == 1:
            say(f"line {row['line']}: {error['type']}, {error['message']}")
        self.bar.update()

    def show(self, state: str) -> None:
        """Shows how it goes: behind the bar or, without a terminal, every 30 s."""
        errors = self.counts.total() - self.counts["answered"]
        state = f"{errors:,} errors, {state}"
        if self.usd:
            state += f", {self.usd:,.4f} USD"
        self.bar.set_postfix_str(state)
        if self.bar.disable and time.monotonic() > self.printed + 30:
            self.printed = time.monotonic()
            say(f"{self.answered():,} of {len(self.keys):,} answered, {state}")


@contextlib.contextmanager
def caught(signals: Iterable[int], throttle: Throttle) -> Iterator[None]:
    """Meanwhile a signal lets nothing more start, and a second one cancels the task."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def interrupt() -> None:
        if throttle.stopping.is_set() and task:
            task.cancel()
            return
        say(f"waiting for {throttle.in_flight} requests; Ctrl-C again: at once")
        reason = "interrupted"
        if throttle.options.batch:
            reason += ": the batches go on; the same command collects them (without"
            reason += " --batch they would be paid for twice)"
        throttle.stop(StopRun(reason, 130))

    before = {number: signal.getsignal(number) for number in signals}
    for number in before:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(interrupt))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def run(read: Reader, question: Question, options: Options) -> int:
    """Answers all messages into OUTPUT; returns the exit status. Raises StopRun."""
    k, n = map(int, options.shard.split("/"))

    def shard() -> Iterator[Row]:
        return itertools.islice(read(), k - 1, None, n)

    keys = array("Q", map(question.key, shard()))
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
            return await fill(journal, client, shard, keys, options)


async def fill(
    journal: Journal, client: Client, read: Reader, keys: Keys, options: Options
) -> int:
    """Fills OUTPUT with what is missing; returns the exit status. Raises StopRun."""
    question = journal.question
    throttle = Throttle(options, question, any(map(journal.has_answer, keys)))
    progress = Progress(keys[: options.limit], journal.has_answer, options.no_bar)

    def missing() -> Iterator[Row]:
        return journal.missing(itertools.islice(read(), options.limit))

    def keep(message: Row, reply: Reply) -> None:
        row = question.row(message, reply)
        journal.add(row)
        progress.add(row, reply.usd)

    async def request(message: Row) -> Reply:
        return await call(client, question, options.timeout, message)

    async def ask_live(messages: Iterator[Row]) -> None:
        await answer_each(messages, request, keep, throttle)

    batches = None
    if options.batch:
        batches = Batches(client, journal, read, keep)
    watcher = asyncio.create_task(watch(journal, throttle, progress, batches))
    try:
        with progress.bar, caught(options.signals, throttle):
            if batches:
                await answer_in_batches(batches, missing, ask_live, throttle)
            else:
                await ask_live(missing())
            progress.show("done")
    finally:
        watcher.cancel()
        try:
            journal.close(read())
        finally:
            for line in closing_lines(journal, throttle, progress, keys):
                say(line)
    return int(progress.answered() < len(progress.keys))


async def watch(
    journal: Journal, throttle: Throttle, progress: Progress, batches: Any
) -> None:
    """Twice a second, shows how it goes and makes the rows survive a power failure."""
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
            await asyncio.to_thread(journal.sync)
        except (StopRun, OSError) as reason:
            throttle.stop(reason)


def closing_lines(
    journal: Journal, throttle: Throttle, progress: Progress, keys: Keys
) -> Iterator[str]:
    """What the run has done and taken, and what the texts left may take."""
    now = progress.answered()
    before = progress.before
    counts = progress.counts
    earlier = f" ({before:,} before, {now - before:,} now)" if before else ""
    yield f"{now:,} of {len(progress.keys):,} answered{earlier}"
    written = counts["answered"] if journal.path.exists() else 0
    if throttle.answers > written:
        yield f"{throttle.answers - written:,} answers could not be kept"
    errors = [f"{n:,} {kind}" for kind, n in counts.items() if kind != "answered"]
    if errors:
        yield f"errors: {', '.join(errors)}; the same command asks again"
    usage = progress.usage.items()
    used = [f"{n:,} {name.replace('_', ' ')}" for name, n in usage if n]
    if progress.usd:
        used.append(f"{progress.usd:,.4f} USD")
    if used:
        yield f"used: {', '.join(used)}"
    if journal.question.offline:
        yield "these answers are placeholders: --offline asks no model"
    yield f"results: {journal.path}"
    rows = counts.total()
    if rows:
        seconds = time.monotonic() - progress.started
        yield f"time: {seconds:.1f} s, {rows / seconds:,.1f} rows a second"
        left = len({key for key in keys if journal.starts.get(key, -1) < 0})
        more = f"{seconds / rows / 60 * left:,.1f} minutes"
        if progress.usd:
            more = f"{progress.usd / rows * left:,.4f} USD and {more}"
        if left:
            yield f"the other {left:,} may take {more}"
    if throttle.options.command and now < len(progress.keys):
        yield f"to resume: {throttle.options.command}"


async def answer_all(
    messages: Iterable[str], output: str | Path | None = None, **changes: Any
) -> list[Row]:
    """The rows of all messages but blank ones, in their order. With `output` they are
    kept in that file, and resumed. Changes are the fields of Question and the flags:
    `await answer_all(texts, "rows.jsonl", prompt=..., example=..., concurrency=20)`.
    Raises TypeError, ValueError, and StopRun, whose `rows` are those made so far."""
    if isinstance(messages, str):
        raise TypeError("messages has to be a list of strings, not one string")
    asked: list[Row] = []
    for line, text in enumerate(messages, 1):
        if not isinstance(text, str):
            raise TypeError(f"message {line} is no string, but {text!r:.50}")
        whole = text.encode(errors="replace").decode()  # without halves of characters
        if not BLANK.fullmatch(whole):
            asked.append({"line": line, "text_message": whole})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(output or Path(folder, "rows.jsonl"))
        options = parse_args(["-", "rows.jsonl"])
        for name in vars(options).keys() & changes.keys():
            setattr(options, name, changes[name])
            if name not in ("model", "field", "offline"):  # Question has these, too
                del changes[name]
        if options.batch and output is None:
            raise ValueError("batch=True needs output: batches are found by its name")
        options.output = path
        options.command = ""
        options.signals = []
        options.no_bar = False
        check(options)
        question = new_question(**changes)
        try:
            if asked:
                await run(lambda: iter(asked), question, options)
        except StopRun as stop:
            with contextlib.suppress(ValueError, LookupError):  # it is no such file
                stop.rows = read_rows(path, question, asked)
            raise
        return read_rows(path, question, asked)


def read_rows(path: Path, question: Question, messages: list[Row]) -> list[Row]:
    """The rows of these messages in a file of results."""
    keys = set(map(question.key, messages))
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    ours = [row for row in rows if row["settings"] == question.settings]
    return [row for row in ours if question.key(row) in keys]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    options = parse_args(argv)
    for number in options.signals:
        signal.signal(number, interrupt)
    try:
        with tempfile.TemporaryDirectory() as folder:
            read = open_input(options, Path(folder))
            changes = {"model": options.model, "offline": options.offline}
            question = new_question(**changes, field=options.field or "text")
            unpriced = options.model != MODEL and PRICES and not options.offline
            if unpriced and not options.max_cost:
                say(f"the cost is not known: PRICES are those of {MODEL}")
            gc.freeze()  # what is there by now stays: no collection has to look at it
            return asyncio.run(run(read, question, options))
    except StopRun as stop:
        say(str(stop))
        return stop.status
    except OSError as error:
        say(f"{error.filename or options.output}: {error.strerror or error}")
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("interrupted")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
