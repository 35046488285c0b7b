#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["openai[aiohttp]>=3.0,<4", "pydantic>=2.10,<3", "tqdm>=4.66,<5"]
# ///
"""Ask an LLM one structured question about every message of a file, many at once.

  python async_template.py messages.txt try.jsonl --offline   try it: no key, no cost
  python async_template.py messages.txt out.jsonl --limit 20  a pilot, with an estimate
  python async_template.py messages.txt out.jsonl             all; run again to resume

Each answer is a line of OUTPUT, on disk at once. Exit status: 0 every message has an
answer; 1 some have an error, the same command asks them again; 2 not started or
stopped, a line says why; 130 interrupted. OPENAI_API_KEY holds the key,
OPENAI_BASE_URL another server. For your own question copy this file and edit part 1.
MIT; from Kai-Cheng Yang's tutorial https://github.com/yang3kc/llm_for_css
"""

import argparse
import asyncio
import contextlib
import csv
import fileinput
import gc
import hashlib
import json
import os
import random
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal  # noqa: F401  Literal is for your schema

import aiohttp  # comes with openai[aiohttp]
import openai
from pydantic import BaseModel, Field
from tqdm.auto import tqdm

assert sys.version_info >= (3, 11), "async_template.py needs Python 3.11 or newer"

# --- 1. Edit this ---------------------------------------------------------------------
MODEL = "gpt-6-luna"  # any model of the endpoint; --model overrides it for a run
TEMPERATURE: float | None = 0.0  # 0: most repeatable; None: the model takes none

# Further settings of the API. The default model takes a temperature only without
# reasoning. Without "store": False the provider keeps every message for 30 days.
EXTRA: dict[str, Any] = {"reasoning": {"effort": "none"}, "store": False}

INSTRUCTIONS = "You are an expert on sentiment analysis of short text messages."

# {text_message} is the message: a line of a .txt, or a column of a table, by default
# `text` (--field names another). Other columns go by their names, such as {title}. If
# there is no {text_message} here, the first column that is named is the message.
PROMPT = """\
Evaluate the sentiment of the text message below: give a score from -1 (negative) to 1
(positive), and explain in one sentence why.

Text message: {text_message}"""


class Sentiment(BaseModel):
    """The sentiment of a text message."""  # the model reads this and what follows

    score: float = Field(ge=-1, le=1, description="-1 negative, 0 neutral, 1 positive")
    explanation: str = Field(description="one sentence that says why")
    # A codebook: topic: Literal["economy", "health", "other"]


# An answer that you might get. Its class is the schema of all answers, and --offline
# gives it to every message.
EXAMPLE: BaseModel = Sentiment(score=0.9, explanation="An example: no model was asked.")

# USD per million tokens of input, cached input and output, for the cost shown and for
# --max-cost: https://openai.com/api/pricing
PRICES = {"gpt-6-luna": (0.10, 0.01, 0.50)}

CONCURRENCY = 100  # most requests in flight; the pace is found, you need not set it
TIMEOUT = 30.0  # seconds for one attempt; more for a slow local model, 900 for flex
MAX_ATTEMPTS = 5  # tries for one message; waiting for a rate limit is not a try

# --- 2. One message, one call ---------------------------------------------------------
Row = dict[str, Any]  # a JSON object; mostly a message, later with its answer
Options = argparse.Namespace  # the flags, and the settings of part 1
Client = openai.AsyncOpenAI
TOKENS = ("input_tokens", "output_tokens")
COLUMN = r"""\{([^{}"':,\n]+)\}"""  # in PROMPT; other braces stay, as in {"score": 1}
# What a body or a row of the wrong shape may raise.
ODD = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError)
# Settings that do not shape an answer may change between two runs into one OUTPUT.
NEUTRAL = "service_tier|store|metadata|user|max_output_tokens|prompt_cache_.*|safety_.*"

# What went wrong, and what follows. From top to bottom, the first pattern decides that
# matches all of the status, an error code or the server's words:
# https://platform.openai.com/docs/guides/error-codes
#   stop     the run ends: nothing can get past this
#   wait     all wait, then it is sent again; after 100 refusals it is a row
#   later    the same, but only this message waits
#   trouble  it is tried again; five in a row, and the server seems down: all wait
#   retry    it is tried again
#   row      the message is at fault: its row says so
#   reject   the same; but 25 without an answer between them end the run
FAILURES = (
    ("content_filter", "row", "content_filter|content_policy.*|Responsible.*"),
    ("bad_request", "row", "413|invalid_prompt|(context_length|string_above).*"),
    ("bad_request", "row", ".*Request too large.*"),  # larger than a minute's limit
    ("invalid_answer", "retry", "json_validate_failed"),  # it does not fit the schema
    ("rate_limit", "later", "resource_unavailable"),  # flex has no room for this one
    ("rate_limit", "wait", "Allocated quota.*"),  # Alibaba calls it insufficient_quota
    ("bad_request", "stop", "401|402|insufficient_quota|billing_.*"),
    ("bad_request", "stop", "budget_exceeded|(Key limit|Your team .*spending limit).*"),
    ("rate_limit", "wait", "429|503|529|rate_limit_exceeded"),
    ("server_error", "trouble", "408|409|424|425|498|499|5.."),
    ("bad_request", "reject", ".*"),  # such as 400, 403 and 404
)


class StopRun(Exception):
    """The run cannot go on. The text says why and what to do."""


def clean(words: str) -> str:
    """The words on one line, without the key and control characters."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if len(key) >= 16:  # a shorter one is any word, for a local server
        words = words.replace(key, "[key]")
    return " ".join("".join(c if c.isprintable() else " " for c in words).split())


def say(line: str) -> None:
    """Prints to standard error, above the bar."""
    with contextlib.suppress(OSError):  # nobody reads it: no reason to stop
        tqdm.write(clean(line)[:999], file=sys.stderr)


def to_line(row: Row) -> bytes:
    """A line of strict JSON, ? for an unpaired surrogate. Raises ValueError for NaN."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return line.encode(errors="replace") + b"\n"


@dataclass
class Reply:
    """What came of one request: an answer, or an error and what follows from it."""

    error: str = ""  # its type; empty: an answer
    action: str = ""  # one of those above FAILURES
    message: str = ""  # of the error
    answer: Row | None = None
    model: str | None = None
    usage: dict[str, int] | None = None  # by the names in TOKENS
    usd: float = 0.0
    attempts: int = 1
    answered_at: time.struct_time = field(default_factory=time.gmtime)
    headers: Mapping[str, str] = field(default_factory=dict)
    sent_at: float = 0.0  # on the monotonic clock

    def seconds_asked(self) -> float:
        """How long the server asks us to wait, in seconds; 0 if it does not say."""
        for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
            with contextlib.suppress(KeyError, ValueError):
                return max(0.0, float(self.headers[name]) / unit)
        return 0.0


def read_failure(status: int, body: str) -> Reply:
    """The reply for an error. Its body may be wrapped in a gateway's, as deep as
    {"error": {"detail": {"code": "rate_limit_exceeded", "message": "Slow down"}}}."""
    text = re.sub(r'":\s*"', '": "', body[:5000])
    codes = re.findall(r'"(?:code|type)": "([a-zA-Z][^"]*)"', text)
    words = re.findall(r'"(?:message|msg|detail|error|raw)": "((?:[^"\\]|\\.)+)', text)
    reason = f"status {status}: {'; '.join(dict.fromkeys(words)) or text}"
    for error, action, pattern in FAILURES:
        if any(re.fullmatch(pattern, word) for word in [str(status), *codes, *words]):
            return Reply(error, action, reason)
    raise AssertionError("FAILURES has to end with .*")


def read_error(error: Exception, client: Client) -> Reply:
    """The reply for an exception of the client."""
    if isinstance(error, openai.APIStatusError):
        reply = read_failure(error.status_code, error.response.text)
        return replace(reply, headers=error.response.headers)
    words = f"{client.base_url.netloc.decode()}: {error.__cause__ or error}"
    return Reply("connection", "trouble", words)


class Question:
    """What is asked: makes a message into a request, and reads the reply."""

    def __init__(self, options: Options) -> None:
        """Builds what all requests share. Raises StopRun at a mistake in part 1."""
        self.options = options
        names = re.findall(COLUMN, options.prompt)
        if not names:
            raise StopRun("PROMPT has no {text_message}, nor a {column}")
        default = "text" if "text_message" in names else names[0]
        self.field = options.field or default  # the column that is the message
        self.prices = (options.prices or {}).get(options.model, ())
        self.schema = type(options.example)
        try:
            tool = openai.pydantic_function_tool(self.schema)["function"]
        except (TypeError, RuntimeError) as error:
            raise StopRun(f"EXAMPLE has to be like Mood(score=1): {error}") from None
        form: Row = {"type": "json_schema", "strict": True, "name": tool["name"]}
        form["schema"] = tool["parameters"]
        self.shared: Row = {"model": options.model}
        self.shared["instructions"] = options.instructions
        if options.temperature is not None:
            self.shared["temperature"] = options.temperature
        self.shared |= options.extra
        self.shared["text"] = options.extra.get("text", {}) | {"format": form}
        shaping = {k: v for k, v in self.shared.items() if not re.fullmatch(NEUTRAL, k)}
        shape = json.dumps([shaping, options.prompt, options.offline])
        # Pydantic writes a bound as 1 or as 1.0.
        same = json.dumps(json.loads(shape, parse_int=float), sort_keys=True)
        # The letter keeps pandas from reading a hash of digits as a number.
        self.settings = "a" + hashlib.sha256(same.encode()).hexdigest()[:7]

    def text(self, message: Row) -> str:
        """PROMPT filled in (once: a message may hold braces). Raises StopRun."""
        text = message["text_message"]
        columns = message.get("fields", {}) | {"text_message": text, self.field: text}

        def fill(match: re.Match[str]) -> str:
            if match[1] not in columns:
                only = f"line {message['line']} has only: {', '.join(columns)}"
                raise StopRun(f"PROMPT has {match[0]}, but {only}")
            value = columns[match[1]]
            return "" if value is None else str(value)

        return re.sub(COLUMN, fill, self.options.prompt)

    def key(self, message: Row) -> int:
        """A hash of the text that is asked: a message is known by it."""
        digest = hashlib.blake2b(self.text(message).encode(), digest_size=8).digest()
        return int.from_bytes(digest)

    def read(self, content: bytes) -> Reply:
        """The reply in the body of a 200."""
        bill: Row = {}
        try:
            body = json.loads(content)
            bill = self.bill(body)
            found = self.find_answer(body)
        except ODD:
            words = f"not from the Responses API: {content[:2000]!r}"
            action = "retry" if bill.get("usage") else "trouble"  # billed: no outage
            found = Reply("bad_response", action, words)
        reply = self.check(found) if isinstance(found, str) else found
        return replace(reply, **bill)

    def bill(self, body: Row) -> Row:
        """The model, the usage and the cost in USD of a reply: fields of Reply."""
        used = body.get("usage")
        if not used:
            return {"model": body.get("model")}
        usage = {name: int(used.get(name) or 0) for name in TOKENS}
        cached = (used.get("input_tokens_details") or {}).get("cached_tokens") or 0
        amounts = (usage["input_tokens"] - cached, cached, usage["output_tokens"])
        usd = sum(amount * price for amount, price in zip(amounts, self.prices)) / 1e6
        if body.get("service_tier") == "flex":
            usd /= 2
        return {"model": body.get("model"), "usage": usage, "usd": usd}

    def find_answer(self, body: Row) -> Reply | str:
        """The text of the answer in the body of a 200, or the error."""
        if body.get("error"):
            code = body["error"].get("code")
            status = code if code in range(400, 600) else 500
            return read_failure(status, json.dumps(body, ensure_ascii=False))
        if body.get("status") == "incomplete":
            reason = (body.get("incomplete_details") or {}).get("reason")
            error = "content_filter" if reason == "content_filter" else "incomplete"
            return Reply(error, "row", f"the answer was cut off: {reason}")
        # The last message alone: some models comment first, some servers send it twice.
        messages = [item for item in body["output"] if item["type"] == "message"]
        parts = messages[-1]["content"]
        refusal = "".join(part.get("refusal") or "" for part in parts)
        if refusal:
            return Reply("refusal", "row", refusal)
        return "".join(part.get("text") or "" for part in parts)

    def check(self, text: str) -> Reply:
        """The answer in a text, or what is wrong."""
        # Some servers put it behind <think>...</think>, between ``` fences, or twice.
        if not text.startswith("{"):
            text = text.rpartition("</think>")[2]
        try:
            found, _ = json.JSONDecoder().raw_decode(text, max(0, text.find("{")))
            parsed = self.schema.model_validate_json(json.dumps(found), strict=True)
            answer = parsed.model_dump(mode="json", by_alias=True)
            return Reply(answer=json.loads(to_line(answer)))
        except (ValueError, RecursionError) as error:
            return Reply("invalid_answer", "retry", str(error))

    async def call(self, client: Client, message: Row) -> Reply:
        """Asks about one message, once. The reply says what failed."""
        options = self.options
        if options.offline:
            await asyncio.sleep(random.lognormvariate(-1, 0.3))  # some 0.4 s
            answer = options.example.model_dump(mode="json", by_alias=True)
            return Reply(answer=answer, model="offline", usage=dict.fromkeys(TOKENS, 0))
        # As `extra_body` a request goes out as it is, with all that EXTRA holds.
        body = self.shared | {"input": self.text(message)}
        sending = client.responses.with_raw_response.parse(extra_body=body)
        try:
            raw = await asyncio.wait_for(sending, options.timeout)
        except TimeoutError:
            return Reply("timeout", "trouble", f"--timeout {options.timeout:g} is over")
        except (openai.APIError, aiohttp.ClientError, ValueError) as error:
            return read_error(error, client)
        return replace(self.read(raw.content), headers=raw.headers)


def connect(options: Options) -> Client:
    """A client for the key and the address of the environment. Raises StopRun."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not options.offline and not re.fullmatch("[!-~]+", key):
        raise StopRun("OPENAI_API_KEY holds no key: set it, or try --offline")
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=options.concurrency)
    return Client(
        api_key=key or "offline",
        http_client=openai.DefaultAioHttpClient(limits=limits),  # takes 40 % less CPU
        max_retries=0,  # `ask` does that
        timeout=None,  # it would start anew at every read; `call` has its own
    )


# --- 3. Many at a time ----------------------------------------------------------------
# A request starts as soon as it has three things:
# 1. A slot. There are `--concurrency` of them. Only 8 may send before the first answer,
#    so that a wrong key costs little, and 1 while the server seems down.
# 2. No pause. After a refusal (429), or five failures in a row, all wait for as long as
#    the server asks, or for a moment that grows with its silence.
# 3. Room in three token buckets: `requests` and `tokens`, as the server's headers tell
#    them, and `pace`, for a server that tells nothing. It is unlimited until the first
#    jam, that is a refusal or five timeouts in a row, and then half of what was sent a
#    second. Each reply adds 0.2 a second, each later jam leaves 0.85 of it.
START = 8  # most in flight before the first answer
DOWN = 5  # failures or refusals in a row after which the server seems down
GROWTH = 0.2  # requests a second that each reply adds to the pace, but at most 2 %
CUT = 0.85  # what is left of the pace after a jam
SPARE = 0.3  # seconds' worth of the server's limits, left to other runs
BACKOFF = 0.5  # seconds; the n-th retry waits a random part of BACKOFF * 2**n
OUTAGE = 30.0  # seconds; while the server seems down, a message loses one try in these
PATIENCE = 600.0  # seconds of silence end the run
UNLIMITED = 1e9  # requests or tokens a second, or USD: so much is no limit


@dataclass
class TokenBucket:
    """Fills up by `rate` a second, and holds what flows in within `seconds`."""

    seconds: float
    rate: float = UNLIMITED
    left: float = UNLIMITED  # at the time `at`; below 0 the next one waits for longer
    at: float = field(default_factory=time.monotonic)
    taken: float = 0.0  # in all

    def level(self) -> float:
        """How much is in it now."""
        size = max(1.0, self.rate * self.seconds)
        return min(size, self.left + self.rate * (time.monotonic() - self.at))

    def seconds_until(self, amount: float) -> float:
        """Seconds until so much is in it; 0 or less if it is there."""
        return (amount - self.level()) / self.rate

    def take(self, amount: float) -> None:
        self.left = self.level() - amount
        self.at = time.monotonic()
        self.taken += amount


class Throttle:
    """Says when the next request may start, and learns from every reply."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.slots = asyncio.Semaphore(options.concurrency)
        self.queue = asyncio.Lock()  # who has a slot waits here for its turn
        # The server's limits are per minute, and a minute's worth may go at once.
        self.limits = {"requests": TokenBucket(60), "tokens": TokenBucket(60)}
        self.pace = TokenBucket(0.05)  # a new one after each cut
        self.cut_ends = time.monotonic()  # when the pause after the last cut is over
        self.paused_until = 0.0
        self.tokens_per_character = 0.3  # on average
        self.in_flight = 0
        self.answers = 0
        self.last_heard = time.monotonic()  # when the server last dealt with a request
        self.failures = 0  # in a row, with refusals

    def tokens(self, size: int) -> float:
        """What the server may count for a request of so many characters."""
        longest_answer = self.options.extra.get("max_output_tokens") or 0
        tokens = size * self.tokens_per_character + float(longest_answer)
        return min(tokens, 60 * self.limits["tokens"].rate)  # more is never left

    def waits(self, size: int) -> dict[str, float]:
        """What a request has to wait for, with the seconds; empty if it may start."""
        most = self.options.concurrency if self.answers else START
        if self.failures >= DOWN:
            most = 1
        waits = {
            "a reply": float(self.in_flight >= most),  # nobody knows for how long
            "a pause": self.paused_until - time.monotonic(),
            "the pace": self.pace.seconds_until(1),
            "the request limit": self.limits["requests"].seconds_until(1),
            "the token limit": self.limits["tokens"].seconds_until(self.tokens(size)),
        }
        return {name: seconds for name, seconds in waits.items() if seconds > 0}

    def start(self, size: int) -> dict[str, float]:
        """Counts a request that starts now. Returns what is taken of the limits."""
        self.in_flight += 1
        self.pace.take(1)
        self.limits["requests"].take(1)
        self.limits["tokens"].take(self.tokens(size))
        return {name: bucket.taken for name, bucket in self.limits.items()}

    def learn(self, size: int, taken: dict[str, float], reply: Reply) -> None:
        """Learns from the reply to a request. Raises StopRun if that is the end."""
        if reply.usage:
            used = sum(reply.usage.values()) / size
            self.tokens_per_character += 0.1 * (used - self.tokens_per_character)
        # The headers tell what was left when this request was sent. If it was 70, and
        # 20 more have been sent since, it is 50 now:
        # https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers
        for name, bucket in self.limits.items():
            limit = reply.headers.get(f"x-ratelimit-limit-{name}", "")
            left = reply.headers.get(f"x-ratelimit-remaining-{name}", "")
            if re.fullmatch("[1-9][0-9]{0,15},[0-9]{1,15}", f"{limit},{left}"):
                bucket.rate = int(limit) / 60
                since = bucket.taken - taken[name]
                bucket.left = int(left) - since - SPARE * bucket.rate
                bucket.at = reply.sent_at
        if reply.action in ("wait", "trouble"):
            self.failures += 1
            if reply.action == "wait" or self.failures >= DOWN:
                self.slow_down(reply)
                self.check_patience(reply)
        elif reply.action != "later":  # the server has dealt with the request
            self.failures = 0
            self.last_heard = time.monotonic()
            self.pace.rate += min(GROWTH, 0.02 * self.pace.rate)
            if not reply.error:
                self.answers += 1

    def slow_down(self, reply: Reply) -> None:
        """Makes all pause after a refusal, or after five failures in a row."""
        now = time.monotonic()
        seconds = reply.seconds_asked()
        # What was sent before the last cut met the same jam. It may make the pause
        # longer, but does not cut the pace again:
        #   0.0 s  A and B are sent     0.5 s  A is refused: cut, pause until 1.5 s
        #   0.6 s  B is refused, too: no cut     1.5 s  C is sent, at the new pace
        if reply.sent_at >= self.cut_ends:
            seconds = max(seconds, 0.05 + min(5.0, (now - self.last_heard) / 5))
            rate = self.slower_pace(reply)
            self.cut_ends = now + seconds
            # The new bucket is empty, and fills up from the end of the pause on.
            self.pace = TokenBucket(0.05, rate, 0.0, self.cut_ends)
        if self.failures == DOWN or (self.failures == 1 and seconds > 5):
            say(f"all wait: {reply.message}")
        # Other runs may be waiting, too: not all should go on at the same moment.
        seconds *= random.uniform(1.0, 1.2)
        self.paused_until = max(self.paused_until, now + seconds)

    def slower_pace(self, reply: Reply) -> float:
        """The pace after a jam, in requests a second."""
        sent = self.pace.taken - 1  # since the last cut, and not refused
        is_outage = reply.action == "trouble" and reply.error != "timeout"
        if is_outage or sent < 1:  # it tells nothing about the right pace
            return self.pace.rate
        found = sent / max(0.001, time.monotonic() - self.cut_ends)
        if self.pace.rate >= UNLIMITED:
            return max(GROWTH, found / 2)  # the server may have let a burst through
        return max(GROWTH, min(found, CUT * self.pace.rate))

    def check_patience(self, reply: Reply) -> None:
        """Raises StopRun if the server is silent for too long, or wants to be."""
        patience = PATIENCE
        if not self.answers:
            shorter = {"connection": 10.0, "bad_response": 10.0}
            shorter["timeout"] = 2 * self.options.timeout
            patience = shorter.get(reply.error, PATIENCE)
        silence = max(reply.sent_at - self.last_heard, reply.seconds_asked())
        if silence > patience:
            raise StopRun(clean(f"silence for {silence:.0f} s; {reply.message}"))


# --- 4. Files -------------------------------------------------------------------------
def read_messages(path: Path, name: str) -> Iterator[Row]:
    """All messages that are not blank. Raises StopRun at a malformed record."""
    lines = fileinput.FileInput(path, encoding="utf-8-sig")
    records: Iterator[Any] = lines
    if path.suffix.lower() in (".csv", ".tsv"):
        records = read_table(lines)
    if path.suffix.lower() == ".jsonl":
        records = map(json.loads, filter(str.strip, lines))
    try:
        for record in records:
            message = to_message(lines.lineno(), record, name)
            if message["text_message"].strip():
                yield message
    except UnicodeDecodeError as error:
        line = lines.lineno() + 1 + error.object[: error.start].count(b"\n")
        raise StopRun(f"{path}, line {line}: save it as CSV UTF-8") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise StopRun(f"{path}, line {lines.lineno()}: {error}") from None


def read_table(lines: Iterator[str]) -> Iterator[Row]:
    """The records of a table. Raises ValueError and csv.Error at a malformed one."""
    csv.field_size_limit(2**31 - 1)
    header = next(lines, "")
    mark = max(",;\t|", key=re.sub('"[^"]*"', "", header).count)
    first, *_ = csv.reader([header], delimiter=mark)
    names = [name or f"column {n}" for n, name in enumerate(first, 1)]
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have the same name: {', '.join(names)}")
    for cells in filter(None, csv.reader(lines, delimiter=mark, strict=True)):
        if len(cells) != len(names):
            raise ValueError(f"{len(cells)} cells, but {len(names)} columns")
        if mark == "\t" and any(mark in cell and "\n" in cell for cell in cells):
            raise ValueError("a cell spans lines and columns: a quote has no partner")
        yield dict(zip(names, cells))


def to_message(line: int, record: Any, name: str) -> Row:
    """The message in a record. Raises ValueError if there is none."""
    fields = dict(record) if isinstance(record, dict) else {name: record}
    if name not in fields:
        raise ValueError(f"no column {name!r}, but {', '.join(fields)}: see --field")
    message: Row = {"line": line, "text_message": fields.pop(name)}
    if isinstance(record, dict):
        message["fields"] = fields
    # As strict JSON: a date is a text, NaN is null, an unpaired surrogate is a ?.
    strict = json.dumps(message, ensure_ascii=False, default=str)
    message = json.loads(strict.encode(errors="replace"), parse_constant=lambda _: None)
    text = message["text_message"] or ""
    if not isinstance(text, str):
        raise ValueError(f"the message is no text, but {text!r:.50}")
    return message | {"text_message": text.removesuffix("\n")}


class Journal:
    """OUTPUT: rows are appended as they come, and put into INPUT's order at the end."""

    def __init__(self, path: Path, question: Question) -> None:
        """Opens and locks the file. Raises StopRun if another run writes it."""
        self.path = path.resolve()
        self.question = question
        self.starts: dict[int, int] = {}  # where the row of a text begins, by its key
        self.failed: dict[int, int] = {}  # the same, of errors in earlier runs
        self.not_in_input = 0  # rows at the end of OUTPUT, once it is in order
        self.file = open(self.path, "a+b", buffering=0)
        try:  # to lock it while this process lives
            if sys.platform == "win32":
                import msvcrt

                self.file.seek(2**40)  # far behind the rows, which others may read
                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.close()
            raise StopRun(f"another run writes {self.path}: let it finish") from None
        except OSError as error:  # network drives
            say(f"{self.path} cannot be locked, so start no second run: {error}")

    # A line of OUTPUT is one of four: an answer, an error (its text is asked again, but
    # last), blank, or the last one and cut off. Any other is refused: it may be a row.
    def load(self) -> None:
        """Finds the rows of earlier runs. Raises StopRun at a line that is no row."""
        start = 0
        with open(self.path, "rb") as rows:
            for number, line in enumerate(rows, 1):
                where = f"{self.path}, line {number}"
                try:
                    self.load_line(line, start)
                except ODD as error:
                    begin = line.strip(b"\0")[:9]  # a power failure can leave zeros
                    is_half = b'{"line": '.startswith(begin) and line[-1:] != b"\n"
                    if not is_half or re.search(rb'"settings": ?"\w+"[,}]', line):
                        raise StopRun(f"{where} is no row of results") from error
                    say(f"{where} was cut off by a crash: its message is asked again")
                    self.file.truncate(start)
                    return
                start += len(line)
                if not line.endswith(b"\n"):
                    self.file.write(b"\n")  # it is read next, as a blank line

    def load_line(self, line: bytes, start: int) -> None:
        """Notes the row in a line. Raises StopRun if other settings have answered."""
        if not line.strip():
            return
        row = json.loads(line)
        if row["settings"] != self.question.settings:
            if row["response"] is None:
                return
            there = f"{self.path} has answers of {row['model']} with another prompt"
            raise StopRun(f"{there} or setting: choose another OUTPUT")
        key = self.question.key(row)
        if row["response"] is None:
            self.failed[key] = start
        elif key not in self.starts or row["usage"]:  # of equal texts the one billed
            self.starts[key] = start

    def add(self, row: Row) -> None:
        """Appends a row in one write. Raises OSError if there is no room for it."""
        line = to_line(row)
        start = self.file.seek(0, os.SEEK_END)
        if self.file.write(line) < len(line):
            self.file.truncate(start)
            raise OSError(28, "No space left on device", str(self.path))
        self.starts[self.question.key(row)] = start

    def in_order(self, messages: Iterable[Row]) -> Iterator[bytes]:
        """The rows in INPUT's order, then those whose text is no longer in INPUT."""
        written: set[int] = set()
        places = self.failed | self.starts  # errors that were not asked again stay
        # Not by its name: somebody may have moved or deleted it meanwhile.
        with open(os.dup(self.file.fileno()), "rb") as rows:
            for message in messages:
                key = self.question.key(message)
                if key not in places:
                    continue  # not asked yet
                rows.seek(places[key])
                row = json.loads(rows.readline())
                if self.question.key(row) != key:
                    raise ValueError("another program has changed it")
                row |= message
                if key in written:
                    row["usage"] = None  # it stands in the first row with this text
                written.add(key)
                yield to_line(row)
            for key, start in self.starts.items():
                if key not in written:
                    self.not_in_input += 1
                    rows.seek(start)
                    yield to_line(json.loads(rows.readline()))

    def close(self, messages: Iterable[Row]) -> None:
        """Puts the rows into INPUT's order, by one atomic replace. Raises StopRun."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with open(temporary, "wb") as ordered:
                ordered.writelines(self.in_order(messages))
                ordered.flush()
                os.fsync(ordered.fileno())
            with contextlib.suppress(OSError):  # some network drives know no modes
                temporary.chmod(self.path.stat().st_mode)
            if sys.platform == "win32":
                self.file.close()  # Windows replaces no open file
            for _ in range(20):  # nor one that a virus scanner reads at the moment
                with contextlib.suppress(PermissionError):
                    temporary.replace(self.path)
                    return
                time.sleep(0.1)
            temporary.replace(self.path)
        except (OSError, ValueError) as error:
            kept = f"{self.path} keeps the answers in the order in which they came"
            raise StopRun(f"{kept}, as it cannot be rewritten: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)


# --- 5. One run -----------------------------------------------------------------------
LIVE_BAR = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}, {rate_fmt} {bar}"
BATCH_BAR = "{n_fmt}/{total_fmt} [{elapsed}]{postfix} {bar}"
REJECTED = 25  # without an answer between them, they end the run
REFUSED = 100  # refusals of one message, after which it seems to be above the limit


class Run:
    """One run: workers take a message each, `ask` for a final reply, and `keep` it."""

    def __init__(self, messages: list[Row], client: Client, journal: Journal) -> None:
        self.question = journal.question
        self.options = self.question.options
        self.client = client
        self.journal = journal
        self.texts: dict[int, Row] = {}  # each is asked once, for its first message
        for message in messages[: self.options.limit]:
            self.texts.setdefault(self.question.key(message), message)
        others = {self.question.key(m) for m in messages[self.options.limit :]}
        self.others = len(others - self.texts.keys() - journal.starts.keys())
        self.before = len(self.texts) - len(self.missing())  # answered by earlier runs
        self.stopping = asyncio.Event()  # set when nothing more may start
        self.batches = 0  # that run at the provider
        self.rejected = 0  # since the last answer
        self.rows = 0  # of this run, as the next
        self.errors = Counter[str]()  # by type
        self.usage = Counter[str]()
        self.usd = 0.0
        self.request_seconds = 0.0
        self.throttle = Throttle(self.options)
        to_log = self.options.command and not sys.stderr.isatty()
        self.bar = tqdm(
            total=len(self.texts),
            initial=self.before,
            bar_format=BATCH_BAR if self.options.batch else LIVE_BAR,
            dynamic_ncols=True,
            mininterval=30 if to_log else 0.1,
            miniters=0,
        )

    def missing(self) -> list[Row]:
        """The messages without a row; last those that failed in an earlier run."""
        keys = [key for key in self.texts if key not in self.journal.starts]
        keys.sort(key=lambda key: key in self.journal.failed)
        return [self.texts[key] for key in keys]

    def answered(self) -> int:
        return self.before + self.rows - self.errors.total()

    async def send(self, message: Row) -> Reply:
        """The reply to one request, sent as soon as it may start. Raises StopRun."""
        throttle = self.throttle
        size = 500 + len(self.question.text(message))  # with instructions and schema
        async with throttle.slots:
            async with throttle.queue:
                while (waits := throttle.waits(size)) and not self.stopping.is_set():
                    self.show(waits)
                    await asyncio.sleep(min(0.02, *waits.values()))  # a reply may come
                if self.stopping.is_set():
                    raise asyncio.CancelledError  # a quiet end of this worker
                if self.usd >= self.options.max_cost:
                    raise StopRun(f"--max-cost: {self.usd:,.4f} USD are spent")
                taken = throttle.start(size)
                self.show({})
            sent_at = time.monotonic()
            try:
                reply = await self.question.call(self.client, message)
            finally:
                throttle.in_flight -= 1
        reply.sent_at = sent_at
        self.request_seconds += time.monotonic() - sent_at
        self.usage.update(reply.usage or {})
        self.usd += reply.usd
        throttle.learn(size, taken, reply)
        # Without any answer so far, each new error may be the fault of a setting.
        is_new = self.question.key(message) not in self.journal.failed
        is_odd = reply.action in ("retry", "row") and is_new and not throttle.answers
        if is_odd or reply.action == "reject":
            self.rejected += 1
        elif not reply.error:
            self.rejected = 0
        if reply.action == "stop" or self.rejected >= REJECTED:
            where = "OPENAI_API_KEY, plan, address, model, part 1 (TEMPERATURE = None?)"
            raise StopRun(clean(f"check {where}; {reply.message}"))
        return reply

    async def ask(self, message: Row) -> Reply:
        """The final reply about a message; what follows from others: see FAILURES."""
        usage = Counter[str]()
        tries = 0
        refusals = 0
        last_try = time.monotonic()
        while True:
            reply = await self.send(message)
            usage.update(reply.usage or {})
            if reply.action in ("wait", "later") and refusals < REFUSED:
                refusals += 1
                if reply.action == "later":
                    await self.back_off(refusals, reply)
                continue
            is_down = reply.action == "trouble" and self.throttle.failures >= DOWN
            if is_down and time.monotonic() < last_try + OUTAGE:
                continue
            last_try = time.monotonic()
            tries += 1
            again = reply.action in ("trouble", "retry")
            if not again or tries >= self.options.max_attempts:
                return replace(reply, usage=dict(usage) or None, attempts=tries)
            await self.back_off(tries, reply)

    async def back_off(self, retry: int, reply: Reply) -> None:
        """Sleeps before the n-th retry: exponential backoff with full jitter."""
        seconds = random.uniform(0, min(60.0, BACKOFF * 2**retry))
        with contextlib.suppress(TimeoutError):
            seconds = max(seconds, min(PATIENCE, reply.seconds_asked()))
            await asyncio.wait_for(self.stopping.wait(), seconds)

    def keep(self, message: Row, reply: Reply) -> None:
        """Writes, counts and shows a row. Raises StopRun if --max-cost cannot work."""
        error: Row = {"type": reply.error, "message": clean(reply.message)[:300]}
        error["attempts"] = reply.attempts
        row = message | {
            "response": reply.answer,
            "error": error if reply.error else None,
            "model": reply.model,
            "answered_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", reply.answered_at),
            "usage": reply.usage,
            "settings": self.question.settings,
        }
        self.journal.add(row)
        self.rows += 1
        self.bar.n += 1
        if reply.error:
            self.errors[reply.error] += 1
            if self.errors[reply.error] == 1:
                say(f"line {message['line']}: {reply.error}, {reply.message}")
        self.show({})
        if reply.answer and not reply.usage and self.options.max_cost < UNLIMITED:
            raise StopRun("--max-cost: this server does not tell what it used")

    def show(self, waits: dict[str, float]) -> None:
        """Shows the counts in the bar, and what the next request waits for."""
        state = f"errors: {self.errors.total():,}, in flight: {self.throttle.in_flight}"
        if self.usd:
            state += f", {self.usd:,.4f} USD"
        for name, seconds in waits.items():
            if seconds > 1:
                state += f", {seconds:,.0f} s for {name}"
        self.bar.set_postfix_str(state, refresh=False)
        with contextlib.suppress(OSError):  # nobody reads it, see `say`
            self.bar.update(0)

    # When all is done, at an exception, or at Ctrl-C, `stopping` lets nothing start.
    # What is in flight lands and is kept, or is cancelled by another Ctrl-C.
    async def answer_each(self, messages: list[Row]) -> None:
        """Asks about all messages, and keeps each final reply. Raises StopRun."""
        shared = iter(messages)

        # A task for each message, as `gather` makes, takes eight times the memory.
        async def work() -> None:
            for message in shared:
                self.keep(message, await self.ask(message))

        count = 2 * self.options.concurrency  # some of them only wait for a retry
        workers = [asyncio.create_task(work()) for _ in range(count)]
        try:
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            self.stopping.set()
            if self.throttle.in_flight:
                say(f"waiting for {self.throttle.in_flight} requests; again: at once")
            try:
                await asyncio.wait(workers)
            finally:
                for worker in workers:
                    worker.cancel()
                ends = await asyncio.gather(*workers, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    def closing_lines(self) -> None:
        """Says what the run has done and taken, and what others may take."""
        answered = f"{self.answered():,} of {len(self.texts):,} texts answered"
        say(f"{answered}, {self.before:,} of them before")
        errors = ", ".join(f"{count:,} {kind}" for kind, count in self.errors.items())
        say(f"errors: {errors or 'none'}")
        used = [f"{n:,} {name.replace('_', ' ')}" for name, n in self.usage.items()]
        used.append(f"{self.bar.format_dict['elapsed']:,.1f} s")
        if self.question.prices:
            used.append(f"{self.usd:,.4f} USD")
        say(f"used: {', '.join(used)}")
        if self.others and self.rows:
            factor = self.others / self.rows
            minutes = factor * self.request_seconds / self.options.concurrency / 60
            took = "a day" if self.options.batch else f"{minutes:,.1f} minutes"
            usd = f"{factor * self.usd:,.4f} USD" if self.question.prices else "? USD"
            say(f"others may take {usd} and {took}")
        if self.journal.not_in_input:
            say(f"{self.journal.not_in_input:,} rows at the end are no longer in INPUT")
        if self.batches:
            say("batches go on: keep --batch, or their texts are paid twice")
        say(f"results: {self.journal.path}")
        if self.options.command and self.answered() < len(self.texts):
            say(f"to resume: {self.options.command}")


async def fill_output(messages: list[Row], question: Question) -> Run:
    """Answers all into OUTPUT. Raises StopRun."""
    options = question.options
    for name in ("concurrency", "timeout", "max_attempts", "limit", "max_cost"):
        if not vars(options)[name] > 0:  # nor nan
            raise StopRun(f"{name} has to be above 0")
    part, _, parts = options.shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 0 < int(part) <= int(parts)):
        raise StopRun("--shard has to be like 1/4, 2/4, 3/4 or 4/4")
    messages = [m for m in messages if question.key(m) % int(parts) == int(part) - 1]
    if not messages:
        raise StopRun("there is no message in INPUT, or in this shard of it")
    if options.max_cost < UNLIMITED and (options.batch or not question.prices):
        raise StopRun(f"--max-cost stops no batch, and needs PRICES of {options.model}")
    if options.limit < len(messages):
        for line in ("The first prompt:", *question.text(messages[0]).splitlines()):
            say(line)
    async with connect(options) as client:
        journal = Journal(Path(options.output), question)
        with journal.file, contextlib.ExitStack() as at_the_end:
            journal.load()
            known = journal.starts.keys()
            if known and known.isdisjoint(map(question.key, messages)):
                raise StopRun(f"{journal.path} has answers about other messages only")
            run = Run(messages, client, journal)
            at_the_end.callback(run.closing_lines)  # the last callback is called first
            at_the_end.callback(journal.close, messages)
            with run.bar:
                if options.batch and not options.offline:
                    await Batches(run).finish()
                else:
                    await run.answer_each(run.missing())
    return run


# --- 6. Half the price ----------------------------------------------------------------
# The Batch API answers within a day: https://platform.openai.com/docs/guides/batch
# Nothing is remembered here: each batch is tagged with the settings and OUTPUT's name.
POLL = 60.0  # seconds between two looks at the list
MOST_LINES = 10_000  # of a batch; the API takes 50,000 lines and 200 MB
ENDED = {"completed", "failed", "expired", "cancelled"}  # in any other state it runs


class Batches:
    """The batches of one OUTPUT at the provider. All else works without this part."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.client = run.client.with_options(timeout=600, max_retries=5)
        self.tag = {"settings": run.question.settings, "output": run.journal.path.name}
        self.most_lines = MOST_LINES  # of the next one
        self.created: dict[str, int] = {}  # lines, by the id of a batch of this run
        self.collected: set[str] = set()  # ids
        self.looks = Counter[str]()  # at results with lines missing, by the batch's id
        self.rounds = Counter[tuple[int, int]]()  # of submitting in the same situation

    # The list may be late, so two looks have to find nothing before more is sent.
    async def finish(self) -> None:
        """Collects and submits batches until nothing is missing. Raises StopRun."""
        quiet = 0  # looks that found nothing
        while self.run.missing():
            try:
                await self.look()
                quiet = 0 if self.run.batches else quiet + 1
                if quiet == 2:
                    quiet = 0
                    await self.submit()
            except (openai.APIError, aiohttp.ClientError, *ODD) as error:
                reply = read_error(error, self.client)
                if reply.action in ("stop", "row", "reject"):
                    raise StopRun(clean(f"no batch (key?): {reply.message}")) from None
                say(f"no answer from the Batch API for now: {reply.message}")
            if quiet == 1 and not self.run.answered():
                await self.run.answer_each(self.run.missing()[:1])  # live, as a check
                if not self.run.answered():
                    raise StopRun("no batch is sent: the first message failed")
            elif self.run.missing():
                await asyncio.sleep(POLL)

    async def look(self) -> None:
        """Collects the batches that have ended, and counts those that still run."""
        found = {}
        async for batch in self.client.batches.list(limit=100):
            if (batch.metadata or {}).items() >= self.tag.items():
                found[batch.id] = batch
        for name in filter(None, self.created.keys() - found.keys()):  # it may be late
            found[name] = await self.client.batches.retrieve(name)
        running = Counter[str]()
        for name in found.keys() - self.collected:
            if found[name].status in ENDED and await self.collect(found[name]):
                self.collected.add(name)
            else:
                running[found[name].status] += 1
                self.created.setdefault(name, self.most_lines)
        self.run.bar.set_postfix_str(f"batches: {', '.join(running) or 'looking'}")
        self.run.batches = running.total()

    async def collect(self, batch: openai.types.Batch) -> bool:
        """Writes the rows of a batch that has ended. Returns whether it is done."""
        mine = batch.id in self.created
        if mine and batch.status == "failed":  # was it above the account's limit?
            if "token_limit_exceeded" not in str(batch.errors):
                raise StopRun(f"the provider rejects the batch: {batch.errors}")
            self.most_lines = max(1, self.created[batch.id] // 2)
        files = [name for name in (batch.output_file_id, batch.error_file_id) if name]
        lines: dict[int, Row] = {}
        for name in files:
            try:
                file = await self.client.files.content(name)
            except openai.NotFoundError:
                return not mine  # ours is late; an earlier run has collected theirs
            for line in map(json.loads, file.content.splitlines()):
                lines[int(line["custom_id"], 16)] = line
        self.looks[batch.id] += 1
        counts = batch.request_counts
        is_short = counts and len(lines) < counts.completed + counts.failed
        if is_short and self.looks[batch.id] < 5:
            return False
        texts, starts = self.run.texts, self.run.journal.starts
        for key in lines.keys() & texts.keys() - starts.keys():
            self.keep_line(batch, key, lines[key])
        os.fsync(self.run.journal.file.fileno())
        # Texts that are not ours may be another run's, which still needs the files.
        if lines.keys() <= texts.keys() | starts.keys():
            for name in [batch.input_file_id, *files]:
                with contextlib.suppress(openai.APIError):  # they expire in any case
                    await self.client.files.delete(name)
        return True

    def keep_line(self, batch: openai.types.Batch, key: int, line: Row) -> None:
        """Keeps the reply in a line of the results, unless its text is asked again."""
        response = line.get("response") or {}
        body = json.dumps(response.get("body"), ensure_ascii=False)
        if response.get("status_code") == 200:
            reply = self.run.question.read(body.encode(errors="replace"))
            reply.usd /= 2
        else:  # without a status it has expired, or was lost
            reply = read_failure(response.get("status_code") or 503, body)
        if reply.action in ("wait", "later", "trouble", "stop"):
            return
        reply.answered_at = time.gmtime(batch.completed_at or batch.created_at)
        self.run.usage.update(reply.usage or {})
        self.run.usd += reply.usd
        self.run.keep(self.run.texts[key], reply)

    async def submit(self) -> None:
        """Submits all that is missing. Raises StopRun if that was pointless before."""
        question = self.run.question
        situation = (self.run.rows, self.most_lines)
        if self.rounds[situation] == 2:
            raise StopRun("two rounds of batches have brought no row")
        missing = self.run.missing()
        for first in range(0, len(missing), self.most_lines):
            lines = []
            for message in missing[first : first + self.most_lines]:
                line: Row = {"custom_id": f"{question.key(message):016x}"}
                line |= {"method": "POST", "url": "/v1/responses"}
                line["body"] = question.shared | {"input": question.text(message)}
                lines.append(to_line(line))
            upload = ("lines.jsonl", b"".join(lines))
            file = await self.client.files.create(file=upload, purpose="batch")
            if file.status not in ("processed", "uploaded"):  # Azure takes a moment
                await self.client.files.wait_for_processing(file.id)
            if first == 0:
                self.rounds[situation] += 1
            # The client never repeats this call: the batch might be paid for twice.
            batch = await self.client.with_options(max_retries=0).batches.create(
                input_file_id=file.id,
                endpoint="/v1/responses",
                completion_window="24h",
                metadata=self.tag,
            )
            self.created[batch.id] = len(lines)
            self.run.batches += 1
            say(f"{batch.id} is on its way")
            if batch.metadata != self.tag:
                say(f"do not stop: {batch.id} has no tag and would be paid twice")


# --- 7. Command line ------------------------------------------------------------------
def parse_args(argv: Sequence[str] | None) -> Options:
    """The flags, and the settings of part 1. Exits with status 2 at a wrong flag."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.usage = "%(prog)s INPUT OUTPUT [options]; in a notebook: answer_all"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("input", metavar="INPUT", help=".txt with a message a line; .csv, .tsv, .jsonl")
    add("output", metavar="OUTPUT", help="the results, .jsonl")
    add("--field", metavar="NAME", help="column that is the message (text)")
    add("--model", metavar="NAME", default=MODEL, help=f"the model to ask ({MODEL})")
    add("--concurrency", type=int, default=CONCURRENCY, help="most requests in flight")
    add("--timeout", type=float, default=TIMEOUT, help="seconds for one attempt")
    add("--max-attempts", type=int, default=MAX_ATTEMPTS, help="tries for a message")
    add("--limit", type=int, default=sys.maxsize, help="only so many, with an estimate")
    add("--max-cost", type=float, default=UNLIMITED, help="USD that end this run")
    add("--shard", default="1/1", help="K/N: the K-th of N parts of INPUT, by text")
    add("--batch", action="store_true", help="half the price, within a day: Batch API")
    add("--offline", action="store_true", help="answer with EXAMPLE: no key, no cost")
    parser.set_defaults(instructions=INSTRUCTIONS, prompt=PROMPT, example=EXAMPLE)
    parser.set_defaults(temperature=TEMPERATURE, extra=EXTRA, prices=PRICES, command="")
    options = parser.parse_args(argv)
    source, output = Path(options.input), Path(options.output)
    if source.suffix.lower() not in (".txt", ".csv", ".tsv", ".jsonl"):
        parser.error("INPUT has to be .txt, .csv (as CSV UTF-8), .tsv or .jsonl")
    if output.suffix != ".jsonl" or output.resolve() == source.resolve():
        parser.error("OUTPUT has to be another file, and end in .jsonl")
    return options


async def until_signal(messages: list[Row], question: Question) -> Run:
    """`fill_output`, cancelled by Ctrl-C, by a cluster or by a terminal that closes."""
    loop = asyncio.get_running_loop()
    work = loop.create_task(fill_output(messages, question))
    # KeyboardInterrupt could strike in the middle of writing a row; this cannot.
    interrupt = lambda *_: loop.call_soon_threadsafe(work.cancel)  # noqa: E731
    before = {}
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
        number = getattr(signal, name)
        with contextlib.suppress(ValueError):  # only the main thread may set them
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, interrupt)
    try:
        return await work
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def answer_all(messages: Any, output: str | Path, **changes: Any) -> list[Row]:
    """The rows of all messages that are not blank, in their order: of strings, of
    dictionaries, or of a DataFrame. They are kept in the file `output`, and resumed.
    Changes are the flags and part 1's settings in small letters: `prompt=...`."""
    options = parse_args(["in.txt", "rows.jsonl"])
    unknown = changes.keys() - vars(options).keys()
    if unknown or isinstance(messages, str | Mapping):
        raise TypeError(f"not a list of messages, or unknown: {', '.join(unknown)}")
    vars(options).update(changes, output=output)
    question = Question(options)
    if hasattr(messages, "to_json"):  # a DataFrame or a column of one
        messages = json.loads(messages.to_json(orient="records", date_format="iso"))
    asked = [to_message(n, m, question.field) for n, m in enumerate(messages, 1)]
    asked = [message for message in asked if message["text_message"].strip()]
    run = await until_signal(asked, question)
    rows = run.journal.path.read_bytes().splitlines()
    return [json.loads(row) for row in rows[: len(rows) - run.journal.not_in_input]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse_args(argv)
    options.command = shlex.join(["python", sys.argv[0], *(argv or sys.argv[1:])])
    try:
        question = Question(options)
        messages = list(read_messages(Path(options.input), question.field))
        gc.freeze()  # no collection of garbage has to look at the messages again
        run = asyncio.run(until_signal(messages, question))
        return int(run.answered() < len(run.texts))
    except (StopRun, OSError) as error:
        say(str(error))
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("interrupted")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
