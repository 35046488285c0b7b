#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["openai[aiohttp]>=3.54,<4", "pydantic>=2.8,<3", "tqdm>=4.66,<5"]
# ///
"""Ask an LLM one structured question about every message of a file, many at once.

  python async_template.py messages.txt out.jsonl --offline   try it: no key, no cost
  python async_template.py messages.txt out.jsonl --limit 20  a pilot, with an estimate
  python async_template.py messages.txt out.jsonl             all; run again to resume

Each message becomes one line of OUTPUT, on disk as soon as it is answered:

  {"line": 1, "text_message": "The service here is very good!", "response": {"score":
  0.9, "explanation": "..."}, "error": null, "model": "gpt-4.1-mini-2025-04-14",
  "usage": {"input_tokens": 131, "output_tokens": 24}, "settings": "3f9a1c2b"}

Exit status: 0 every message has an answer; 1 some have an error row, and the same
command retries just those; 2 not started or stopped, one line says why; 130 interrupted.
OPENAI_API_KEY holds the key, OPENAI_BASE_URL another server's address (vLLM, Ollama ...).

To ask your own question, copy this file and edit part 1. MIT licence. The idea and the
example are from Kai-Cheng Yang's tutorial, https://github.com/yang3kc/llm_for_css
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from tqdm.auto import tqdm

if TYPE_CHECKING:  # imported where it is used: that takes 0.6 s, and --help needs none
    import openai

# --- 1. Edit this ---------------------------------------------------------------------
MODEL = "gpt-4.1-mini"  # any model the endpoint serves; --model overrides it for one run
TEMPERATURE: float | None = 0.0  # 0 repeats best; None for reasoning models: they refuse it
EXTRA: dict[str, Any] = {}  # more for the API, say {"reasoning": {"effort": "low"}}

INSTRUCTIONS = "You are an expert on sentiment analysis of short text messages."

# {text_message} is where the message goes; other braces stay as they are.
PROMPT = """\
Evaluate the sentiment of the text message below: give a score from -1 (negative) to 1
(positive), and explain in one sentence why.

Text message: {text_message}"""


class Sentiment(BaseModel):  # the model reads names and descriptions, too
    score: float = Field(ge=-1, le=1, description="-1 negative, 0 neutral, 1 positive")
    explanation: str = Field(description="one sentence that says why")


SCHEMA: type[BaseModel] = Sentiment  # the class above: change both when you rename it

# USD per million (input, output) tokens of MODEL, for the cost shown and --max-cost;
# None where it costs nothing, or you do not know: https://openai.com/api/pricing
PRICES: tuple[float, float] | None = (0.40, 1.60)

CONCURRENCY = 100  # most requests in flight; the pace below that is found, not set
TIMEOUT = 30.0  # seconds for one attempt; more for a slow local model
MAX_ATTEMPTS = 5  # tries for one message; waiting for a rate limit is not a try

# --- 2. One message, one call ---------------------------------------------------------
Row = dict[str, Any]  # {"line", "text_message"} to ask; with the answer, a line of OUTPUT
Usage = dict[str, int]  # {"input_tokens", "output_tokens"}


class StopRun(Exception):
    """Ends the run: a line that says why and what to do, and the exit status."""

    def __init__(self, line: str, exit_status: int = 2) -> None:
        super().__init__(line)
        self.exit_status = exit_status


@dataclass
class Reply:
    """What one call brought: a response, or the type and message of an error row."""

    error: str = ""
    message: str = ""
    retry: bool = False  # may the same request succeed later?
    status: int = 200  # of HTTP; 0 where no reply came, -1 where no connection was made
    response: dict[str, Any] | None = None
    model: str | None = None
    usage: Usage | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: float = 0.0  # seconds that the server asked for
    doubtful: bool = False  # a rejection that may be due to the settings
    excused: bool = False  # does not count as a try


def new_client(concurrency: int, offline_url: str = "") -> openai.AsyncOpenAI:
    """A client for the key and endpoint in the environment, or for the stand-in."""
    import openai

    key = "offline" if offline_url else os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]+", key):
        raise StopRun(
            "no usable key: set OPENAI_API_KEY (any word for a server of your own), "
            "or try it without one: --offline"
        )
    url = offline_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if not re.match("https?://[^/]", url):
        raise StopRun(f"OPENAI_BASE_URL is {url!r}, but must begin with http:// or https://")
    # aiohttp takes a third less CPU than the default transport. No timeout here, since
    # that is for each read: only wait_for, below, ends a body that trickles in.
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=concurrency)
    http = openai.DefaultAioHttpClient(
        timeout=None, limits=limits, trust_env=not offline_url
    )
    return openai.AsyncOpenAI(
        api_key=key, base_url=url, max_retries=0, timeout=None, http_client=http
    )


def build_request(model: str) -> dict[str, Any]:
    """The body of all calls, but for the input. The schema is built once, not per call."""
    import openai

    schema = openai.pydantic_function_tool(SCHEMA)["function"]["parameters"]
    form = {"type": "json_schema", "name": SCHEMA.__name__, "strict": True, "schema": schema}
    request = {"model": model, "instructions": INSTRUCTIONS, "text": {"format": form}}
    return request | ({} if TEMPERATURE is None else {"temperature": TEMPERATURE}) | EXTRA


def to_usd(usage: Mapping[str, float]) -> float:
    """What `usage` costs by PRICES; 0 without them."""
    cost = zip(PRICES or (0, 0), (usage["input_tokens"], usage["output_tokens"]))
    return sum(price * tokens for price, tokens in cost) / 1e6


async def call(
    client: openai.AsyncOpenAI, request: dict[str, Any], timeout: float, text: str
) -> Reply:
    """One attempt for one message. Raises StopRun where none can succeed."""
    import aiohttp
    import openai

    body = request | {"input": PROMPT.replace("{text_message}", text)}
    try:
        # In extra_body the SDK leaves it alone: walking over typed parameters would take
        # 0.5 ms a row, parsing into its own Response model another 0.6.
        sending = client.responses.with_raw_response.parse(extra_body=body)
        raw = await asyncio.wait_for(sending, timeout)
        reply = read_body(raw.content)
        reply.headers = raw.headers
    except TimeoutError:
        reply = Reply("timeout", f"no answer within {timeout:g} s", retry=True, status=0)
    except openai.APIStatusError as error:
        reply = read_error(error, request["model"])
        wait = client._parse_retry_after_header(error.response.headers) or 0.0
        reply.wait = wait if 0 < wait < math.inf else 0.0
    except (openai.APIConnectionError, aiohttp.ClientError) as error:
        cause = error.__cause__ or error
        never = isinstance(cause.__cause__, aiohttp.ClientConnectorError)
        reply = Reply("connection", f"{cause!r}", retry=True, status=-never)
    # A server may quote the key that it was sent: no row or line may show it.
    secret = client.api_key if len(client.api_key) > 7 else "no secret"
    reply.message = " ".join(reply.message.replace(secret, "[key]").split())[:300]
    if reply.error == "stop":
        raise StopRun(reply.message)
    return reply


def read_body(content: bytes) -> Reply:
    """The reply in the body of a 200; other servers leave out much of what OpenAI sends.

    https://platform.openai.com/docs/api-reference/responses/object
    """
    try:
        body = json.loads(content)
        items = [item for item in body["output"] or () if item.get("phase") != "commentary"]
        parts = [part for item in items for part in item.get("content") or ()]
        text = "".join(part["text"] for part in parts if part["type"] == "output_text")
        refusal = "".join(part["refusal"] for part in parts if part["type"] == "refusal")
        used = body.get("usage") or {}
        usage = {name: int(used[name]) for name in ("input_tokens", "output_tokens") if used}
        why = (body.get("incomplete_details") or {}).get("reason") or body.get("error")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        start = content[:80].decode(errors="replace")
        return Reply("bad_response", f"not from the Responses API: {start!r}", retry=True)
    reply = partial(Reply, model=body.get("model"), usage=usage or None)
    if body.get("status") == "incomplete":
        filtered = why == "content_filter"
        return reply("content_filter" if filtered else "incomplete", f"cut short: {why}")
    if body.get("status") in ("failed", "cancelled"):
        return reply("server_error", f"{body['status']}: {why}", retry=True)
    if refusal:
        return reply("refusal", refusal)
    try:
        answer = SCHEMA.model_validate_json(text).model_dump(mode="json")
        json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()  # is it JSON?
    except ValueError as error:
        problem = str(error).split("For further information")[0]
        return reply("invalid_answer", problem, retry=True)
    return reply(response=answer)


def read_error(error: openai.APIStatusError, model: str) -> Reply:
    """The reply for an HTTP error: of type "stop" where no other call can do better.

    https://platform.openai.com/docs/guides/error-codes
    """
    said = error.body.get("message") if isinstance(error.body, dict) else None
    status, names = error.status_code, {error.code, error.type}
    setting = re.split(r"[.\[]", error.param or "")[0]
    advice = {
        401: "the key is not accepted: check OPENAI_API_KEY",
        402: "no credit left: add some",
        403: f"the key may not use {model!r} at {error.request.url}",
        404: f"no {model!r} at {error.request.url}: check --model and OPENAI_BASE_URL",
    }.get(status)
    if names & {"insufficient_quota", "billing_hard_limit_reached"}:
        advice = "no credit left: check plan and billing"
    if status in (400, 422) and setting not in ("", "input", "messages", "prompt"):
        hint = ", say to None" if setting == "temperature" else ""
        advice = f"the setting {setting!r} is not accepted: change it in part 1{hint}"
    retry = status in (408, 409, 429) or status >= 500
    kind = "rate_limit" if status == 429 else "server_error" if retry else "bad_request"
    kind = "content_filter" if "content_filter" in names else "stop" if advice else kind
    message = f"{advice + ': ' if advice else ''}status {status}, {said or error.message}"
    reply = Reply(kind, message, retry, status, headers=error.response.headers)
    reply.doubtful = kind == "bad_request" and not setting
    return reply


# --- 3. Many at a time ----------------------------------------------------------------
START = 8  # requests in flight at first: the most that a wrong key can cost
BACKOFF = 0.5  # seconds: a message's n-th retry waits a random part of BACKOFF * 2**n
PATIENCE = 600.0  # seconds of nothing but refusals, or of an outage, that end the run
TROUBLE = ("timeout", "connection", "server_error", "bad_response")


@dataclass
class Mirror:
    """What the server has left of a limit: `left` at the time `at`, refilled by `rate` a
    second up to `full`, less what was `spent` since. No limit until something is known."""

    name: str  # "requests" or "tokens", as in the headers
    left: float = math.inf
    full: float = math.inf
    rate: float = 0.0
    at: float = 0.0
    spent: float = 0.0
    spent_then: float = 0.0  # of `spent`, up to the time `at`
    limit: float = 0.0  # as in the headers; 0 where there were none
    curiosity: float = 0.0  # how a guessed rate grows, to find out if it still holds

    def wait(self, need: float, now: float) -> float:
        """Seconds until there is room for `need`; 0 if there is now."""
        age = max(0.0, now - self.at)
        grown = self.left + self.rate * (age + self.curiosity * age**3)
        left = min(self.full, grown) - (self.spent - self.spent_then)
        short = min(need, self.full) - left
        return max(0.0, short / self.rate) if self.rate else 0.1 * (short > 0)

    def read(self, reply: Reply, at: float, spent: float, cost: float) -> None:
        """Takes over what the reply to a request of that cost, sent `at`, says is left.

        https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers
        """
        units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
        try:
            left = float(reply.headers[f"x-ratelimit-remaining-{self.name}"])
            limit = float(reply.headers[f"x-ratelimit-limit-{self.name}"])
            reset = reply.headers[f"x-ratelimit-reset-{self.name}"]  # 6m0s, 1s, 120ms
            parts = re.findall(r"([0-9.]+)(ms|[dhms])", reset)
            back = sum(float(number) * units[unit] for number, unit in parts)
        except (KeyError, ValueError):
            return
        good = 0 <= left < math.inf and 0 < limit < math.inf and 0 < back < math.inf
        if not good or at < self.at:
            return
        # After `back` seconds all is there again. All is `limit`, refilled in a minute or
        # a day; where that would take less than 30 s, it is the most that was ever left.
        known = self.full if limit == self.limit else 0.0
        whole = back * limit / (limit - left) if left < limit else 0.0
        self.full = limit if whole >= 30 else max(known, left + cost)
        self.left, self.at, self.spent_then, self.limit = left, at, spent, limit
        self.rate, self.curiosity = (self.full - left) / back, 0.0

    def guess(self, rate: float, at: float) -> None:
        """Sets a pace from the time `at`, for a server that refuses without headers."""
        self.left, self.full, self.rate = 0.0, max(1.0, rate), rate
        self.at, self.spent_then, self.curiosity = at, self.spent, 0.003


class Throttle:
    """Says when the next request may start, and learns from every reply.

    A request needs a slot, no brake on, and room in the mirrors of the server's limits.
    The window of slots grows while the server keeps up and is cut when not (AIMD).
    """

    def __init__(self, concurrency: int, budget: float = math.inf) -> None:
        self.started = now = time.monotonic()
        self.slots, self.most, self.in_flight = asyncio.Semaphore(concurrency), concurrency, 0
        self.window, self.fast, self.last_cut = float(min(START, concurrency)), True, now
        self.turnstile, self.landed = asyncio.Lock(), asyncio.Event()
        self.stopping = asyncio.Event()
        self.reason: StopRun | None = None
        self.brake_until, self.why, self.waited = now, "", 0.0
        self.requests, self.tokens = Mirror("requests"), Mirror("tokens")
        self.refusals, self.marked = 0, (now, 0.0)  # when, and how many got through then
        self.proven, self.alive_at, self.streak = False, now, 0
        self.failing = set[str]()  # messages that met trouble since the last answer
        self.canary, self.down = "", False  # a message that was answered before
        self.timeouts = self.rejected = 0
        self.budget, self.paid, self.reserved = budget, 0.0, 0.0  # USD
        self.density = self.densest = 0.3  # tokens a character: on average, at most
        self.dearest = to_usd({"input_tokens": 0.3, "output_tokens": 0.3})  # a character
        self.latencies = deque[float](maxlen=10_000)  # seconds

    async def send(self, call: Callable[[str], Awaitable[Reply]], text: str) -> Reply:
        """The reply to one request, sent when its turn has come."""
        size = len(text) + 1000  # characters: instructions, prompt and schema about 1000
        await self.turn(call, size)
        sent, reserve = time.monotonic(), size * self.dearest
        self.requests.spent += 1
        self.tokens.spent += size * self.density
        spent, spent_tokens = self.requests.spent, self.tokens.spent
        self.in_flight += 1
        self.reserved += reserve
        try:
            reply = await call(text)
        finally:
            self.in_flight -= 1
            self.reserved -= reserve
            self.slots.release()
            self.landed.set()
        if reply.usage:
            tokens, usd = sum(reply.usage.values()) / size, to_usd(reply.usage)
            self.density += 0.1 * (tokens - self.density)
            self.densest, self.paid = max(self.densest, tokens), self.paid + usd
            self.dearest = max(self.dearest, usd / size)
        self.requests.read(reply, sent, spent, 1.0)
        self.tokens.read(reply, sent, spent_tokens, size * self.density)
        self.learn(reply, sent, text)
        return reply

    async def probe(self, call: Callable[[str], Awaitable[Reply]]) -> None:
        """Is the server down, or are the messages to blame? Asks what it has answered."""
        sent = time.monotonic()
        reply = await call(self.canary)
        self.down = reply.error in TROUBLE
        self.failing.clear()
        if self.down:
            self.slow_down(sent, self.window, f"server down ({reply.error})", None)
        else:
            self.alive_at, self.streak = time.monotonic(), 0

    async def turn(self, call: Callable[[str], Awaitable[Reply]], size: int) -> None:
        """Returns with a slot taken, or raises StopRun when nothing more is to start."""
        async with self.turnstile:  # one at a time, first come first served
            while True:
                if self.paid + self.reserved + size * self.dearest > self.budget:
                    self.stop(StopRun(f"stopped by --max-cost at {self.paid:.4f} USD"))
                if self.reason:
                    raise self.reason
                await self.slots.acquire()
                wait = self.wait(size)
                if not wait and self.down:
                    await self.probe(call)
                elif not wait and not self.reason:
                    return
                self.slots.release()  # who waits holds no slot
                self.landed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.landed.wait(), wait)

    def wait(self, size: int) -> float:
        """Seconds until the next request may start; 0 if it may now."""
        now = time.monotonic()
        if self.in_flight >= int(self.window):
            return 60.0  # or until one lands
        tokens = self.tokens.wait(size * self.densest, now)
        return max(0.0, self.brake_until - now, self.requests.wait(2.0, now), tokens)

    async def back_off(self, tries: int) -> None:
        """Waits before the next try, without a slot; full jitter keeps retries apart.

        https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        """
        wait = random.uniform(0, min(60.0, BACKOFF * 2**tries))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), wait)
        if self.reason:
            raise self.reason

    def stop(self, reason: StopRun) -> None:
        """Lets nothing more start: what waits gives up, what is in flight may land."""
        self.reason = self.reason or reason
        self.stopping.set()
        self.landed.set()

    def learn(self, reply: Reply, sent: float, text: str) -> None:
        """Sets the pace by a reply. Raises StopRun where there is no point in going on."""
        if reply.status == 429:
            self.refused(reply, sent)
        elif reply.error in TROUBLE:
            self.troubled(reply, sent, text)
        elif reply.doubtful and not self.proven:
            self.rejected += 1
            if self.rejected >= 3:
                raise StopRun(f"the first requests were all rejected: {reply.message}")
        else:
            self.proven, self.alive_at, self.streak = True, time.monotonic(), 0
            self.latencies.append(self.alive_at - sent)
            self.timeouts, self.down, self.canary = 0, False, text
            self.failing.clear()
            if self.in_flight + 1 >= int(self.window):  # it was in use
                more = 1.0 if self.fast else 1 / self.window
                self.window = min(self.most, self.window + more)

    def refused(self, reply: Reply, sent: float) -> None:
        """A 429 is a wait, not a try, and what got through shows the pace to keep."""
        reply.excused = True
        self.refusals += 1
        now = time.monotonic()
        if reply.wait > PATIENCE:
            until = time.strftime("%H:%M on %d %B", time.localtime(time.time() + reply.wait))
            raise StopRun(f"the limit is used up until {until}: run the same command then")
        through = self.requests.spent - self.refusals
        if sent >= self.last_cut and through - self.marked[1] >= 5 and not self.requests.limit:
            # The bucket was empty at the mark and is now: what went through is its rate.
            rate = (through - self.marked[1]) / (now - self.marked[0])
            self.requests.guess(rate, now + reply.wait)
            self.marked = now, through
        in_use = self.requests.rate * statistics.fmean(self.latencies or [0.0])
        self.slow_down(sent, max(in_use, self.smaller()), "rate limited", reply.wait or None)

    def troubled(self, reply: Reply, sent: float, text: str) -> None:
        """A failure: of this message, of a server with too much to do, or of one down?"""
        self.failing.add(text)
        self.timeouts += reply.error == "timeout"
        self.down = self.proven and (len(self.failing) >= 5 or reply.status < 0)
        reply.excused = self.down
        if reply.status in (503, 529) or self.timeouts >= 3:
            self.slow_down(sent, self.smaller(), "server overloaded", reply.wait)

    def smaller(self) -> float:
        """The window to go on with: half in the fast growth at first, later a bit less."""
        return self.window * (0.5 if self.fast else 0.85)

    def slow_down(self, sent: float, window: float, why: str, wait: float | None) -> None:
        """Cuts the window and puts the brake on, once an episode: not for what was sent
        before the last cut. Raises StopRun when nothing was answered for too long."""
        now = time.monotonic()
        if sent >= self.last_cut:
            self.window, self.last_cut = max(1.0, window), now
            self.fast = False
            self.streak += 1
            quiet = now - self.alive_at
            if quiet > PATIENCE and self.streak > 2:
                raise StopRun(f"{why}, no answer for {quiet:.0f} s: try again later")
            if wait is None:
                wait = random.uniform(0.5, 1) * min(15.0, BACKOFF * 2 ** (self.streak - 1))
        until = now + (wait or 0.0) * random.uniform(1, 1.1)  # other runs wait as well
        self.waited += max(0.0, until - max(now, self.brake_until))
        self.brake_until, self.why = max(self.brake_until, until), why


async def ask(
    call: Callable[[str], Awaitable[Reply]],
    throttle: Throttle,
    tries: int,
    settings: str,
    message: Row,
) -> Row:
    """The row of one message: its answer, or the error of the last of so many tries."""
    attempts, usage = 0, Counter[str]()
    while True:
        reply = await throttle.send(call, message["text_message"])
        usage.update(reply.usage or {})
        attempts += not reply.excused
        if not reply.retry or attempts >= tries:
            break
        if not reply.excused:
            await throttle.back_off(attempts)
    error = {"type": reply.error, "message": reply.message, "attempts": attempts}
    row = message | {"response": reply.response, "error": error if reply.error else None}
    return row | {"model": reply.model, "usage": dict(usage) or None, "settings": settings}


async def answer_each(
    messages: Iterable[Row],
    ask: Callable[[Row], Awaitable[Row]],
    keep: Callable[[Row], None],
    throttle: Throttle,
) -> None:
    """Answers all messages; `keep` gets each row as it comes. Raises StopRun."""
    # Workers on one iterator, not a task for each message: 100,000 messages would be
    # 171 MiB of tasks. Sharing it is safe: a worker is interrupted only at an await.
    queue, held = iter(messages), list[Row]()

    async def work() -> None:
        try:
            for message in queue:
                held.append(await ask(message))
                while held and throttle.proven:  # else a setting may be to blame
                    keep(held.pop())
                if len(held) >= 5:
                    raise StopRun(f"nothing was answered yet: {held[-1]['error']['message']}")
        except StopRun as reason:
            throttle.stop(reason)

    async with asyncio.TaskGroup() as workers:
        for _ in range(throttle.most):
            workers.create_task(work())
    if throttle.reason:
        raise throttle.reason
    for row in held:
        keep(row)


# --- 4. Files -------------------------------------------------------------------------
def say(line: str) -> None:
    """Prints to standard error, above the bar."""
    tqdm.write(line, file=sys.stderr)


def read_messages(path: Path, name: str, shard: tuple[int, int]) -> Iterator[Row]:
    """The messages of INPUT one by one; for the shard (k, n) every n-th from the k-th.

    Blank ones are left out. Raises StopRun at the first record that is no message."""
    kind, line, count = path.suffix.lower(), 0, 0
    newline = "" if kind == ".csv" else "\n"
    try:
        # A wrong byte becomes a surrogate, which encode() reports with its line.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            for line, record in read_csv(file) if kind == ".csv" else enumerate(file, 1):
                if kind == ".jsonl" and record.strip():
                    record = json.loads(record)
                message = {"line": line} | to_message(record, name)
                json.dumps(message, ensure_ascii=False, allow_nan=False).encode()
                if message["text_message"].strip():
                    count += 1
                    if count % shard[1] == shard[0] % shard[1]:
                        yield message
    except OSError as error:
        raise StopRun(f"cannot read {path}: {error.strerror}") from None
    except UnicodeEncodeError:
        raise StopRun(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    except (ValueError, csv.Error) as error:
        raise StopRun(f"{path}, near line {line + 1}: {getattr(error, 'msg', error)}") from None


def read_csv(file: IO[str]) -> Iterator[tuple[int, Any]]:
    """The line where each record begins, and its fields by column."""
    csv.field_size_limit(2**31 - 1)
    table = csv.reader(file, strict=True)
    header, line = next(table, []), table.line_num + 1
    for record in table:
        if record and len(record) != len(header):
            raise ValueError(f"{len(record)} fields, but {len(header)} columns")
        if record:
            yield line, dict(zip(header, record))
        line = table.line_num + 1


def to_message(record: Any, name: str) -> Row:
    """{"text_message"} of a record, and "fields" if it had others."""
    if isinstance(record, dict) and name not in record:
        raise ValueError(f"no field {name!r} among {', '.join(record)}: choose with --field")
    text = record.pop(name) if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise ValueError(f"the message should be a text, but is {text!r:.50}")
    fields = {"fields": record} if isinstance(record, dict) else {}
    return {"text_message": text.rstrip("\r\n")} | fields


def lock(file: IO[bytes]) -> bool:
    """Locks `file` as long as this process lives; False if another one has."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(2**40)  # far behind the rows, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a network file system without locks
    return True


class Results:
    """OUTPUT: locked against other runs; rows are appended, and put in order at the end."""

    def __init__(self, path: Path, settings: str, restart: bool) -> None:
        self.path, self.settings, self.lost = path.resolve(), settings, 0
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        while True:
            try:
                self.file = open(self.path, "a+b", buffering=0)
            except OSError as error:
                raise StopRun(f"cannot write {path}: {error.strerror}") from None
            if not lock(self.file):
                raise StopRun(f"another run is writing {path}: let it finish, or stop it")
            if restart and self.file.seek(0, os.SEEK_END):
                self.file.close()
                backups = (f"{self.path}.bak{n or ''}" for n in itertools.count())
                os.rename(self.path, next(name for name in backups if not os.path.exists(name)))
            elif self.is_there():  # else another run has just replaced it
                return
            self.file.close()

    def is_there(self) -> bool:
        """Whether the open file is still the one at its path."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        return False

    def scan(self) -> Iterator[tuple[int, int, Row]]:
        """Offset, hash of the text, and row, of each line. A torn last one is cut off.

        Raises StopRun at a line that is no row, or one made with other settings."""
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path}, line {number}"
                if not line.endswith(b"\n"):
                    self.file.truncate(offset)
                    return say(f"{where}: torn by a crash; dropped, it is asked again")
                try:
                    row = json.loads(line)
                    key, settings, _ = hash(row["text_message"]), row["settings"], row["response"]
                except (ValueError, LookupError, TypeError):
                    raise StopRun(
                        f"{where}: not a row of results; mend it or choose another OUTPUT"
                    ) from None
                if settings != self.settings:
                    raise StopRun(
                        f"{where}: made with other settings (by {row.get('model')}): the model, "
                        "part 1 or --offline changed; choose another OUTPUT, or --restart"
                    )
                yield offset, key, row
                offset += len(line)

    def find_todo(self, keys: Iterable[int], limit: int | None) -> bytearray:
        """For each message, by the hash of its text: 1 if it has still to be asked."""
        answers, todo, shared = dict[int, int](), bytearray(), False
        for _, key, row in self.scan():
            answers[key] = answers.get(key, 0) + (row["response"] is not None)
        for key in keys:
            left = answers.get(key, -1)
            shared = shared or left >= 0
            answers.update({key: left - 1} if left > 0 else {})
            todo.append(left <= 0 and (limit is None or len(todo) < limit))
        if answers and not shared:
            raise StopRun(f"{self.path} holds answers to other messages: choose another OUTPUT")
        return todo

    def add(self, row: Row) -> None:
        """Appends one row in one write. If that fails, StopRun, and the file stays whole."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        end = self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(line) != len(line):
                raise OSError(0, "disk full")
        except OSError as error:
            self.file.truncate(end)
            self.lost += 1
            raise StopRun(f"cannot write {self.path}: {error.strerror}; make room") from None

    def sync(self) -> None:
        """Has the disk keep what was written. StopRun if it cannot, or OUTPUT is gone."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise StopRun(f"cannot write {self.path}: {error.strerror}") from None
        if not self.is_there():
            raise StopRun(f"{self.path} was moved or deleted during the run")

    def order(self, lines: array[int], keys: array[int]) -> int:
        """Puts OUTPUT in INPUT's order; returns how many rows have no message there."""
        errors, met, first = dict[int, int](), set[int](), dict[int, int]()
        answers, found = array("q"), array("q")  # hashes and offsets
        for offset, key, row in self.scan():
            if row["response"] is None:
                errors[key] = offset
            else:
                answers.append(key)
                found.append(offset)
        following = array("q", answers)  # the next row with the same text, or -1
        for i in reversed(range(len(answers))):
            following[i] = first.get(answers[i], -1)
            first[answers[i]] = i
        order = array("q")  # line and offset in turn
        for line, key in zip(lines, keys):
            i = first.get(key, -1)
            if i >= 0:
                first[key] = following[i]
                order.extend((line, found[i]))
                found[i] = -1
            elif key in errors:
                order.extend((line, errors[key]))
            if key in errors:
                met.add(key)
        gone = [offset for offset in found if offset >= 0]
        gone += [offset for key, offset in errors.items() if key not in met]
        for offset in gone:
            order.extend((0, offset))
        self.rewrite(order)
        return len(gone)

    def rewrite(self, order: array[int]) -> None:
        """Replaces OUTPUT at once by its rows in this order, if it is not in order."""

        def rows() -> Iterator[bytes]:
            with open(self.path, "rb") as file:
                for line, offset in zip(order[::2], order[1::2]):
                    file.seek(offset)
                    row, label = file.readline(), b'"line": %d' % line
                    yield re.sub(rb'"line": ?\d+', label, row, count=1) if line else row

        with open(self.path, "rb") as file:
            if all(old == new for old, new in itertools.zip_longest(file, rows())):
                return
        try:
            with open(self.temporary, "wb") as file:
                file.writelines(rows())
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(self.path, self.temporary)
            if sys.platform == "win32":
                self.file.close()  # Windows replaces no open file
            os.replace(self.temporary, self.path)
        except OSError as error:
            raise StopRun(f"{self.path} is whole, but not in order: {error.strerror}") from None
        finally:
            self.temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Windows opens no folders
            os.fsync(folder := os.open(self.path.parent, os.O_RDONLY))
            os.close(folder)


# --- 5. No key yet? -------------------------------------------------------------------
def placeholder(schema: dict[str, Any], dice: random.Random, root: dict[str, Any]) -> Any:
    """Something that fits the JSON schema; the same for the same dice."""
    if path := schema.get("$ref"):
        schema = reduce(lambda node, name: node[name], path.split("/")[1:], root)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return placeholder(dice.choice(options), dice, root)
    if options := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
        return dice.choice(options)
    kind = schema.get("type")
    if kind == "object":
        fields = schema.get("properties", {})
        return {name: placeholder(part, dice, root) for name, part in fields.items()}
    if kind == "array":
        least = schema.get("minItems", 1)
        length = dice.randint(least, max(least, min(schema.get("maxItems", 3), least + 2)))
        return [placeholder(schema["items"], dice, root) for _ in range(length)]
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + 100))
    if kind == "integer":
        return dice.randint(math.ceil(low), math.floor(high))
    if kind == "number":
        return round(dice.uniform(low, high), 2)
    text = "Placeholder made offline: no model was asked."[: schema.get("maxLength")]
    return {"boolean": dice.random() < 0.5, "null": None}.get(kind, text)


@contextlib.asynccontextmanager
async def offline_server(
    latency: float = 0.4, load: Counter[str] | None = None
) -> AsyncIterator[str]:
    """The address of a server on this machine that answers with placeholders, after about
    `latency` seconds each; `load` is told how many are "in flight", and their "peak"."""
    load = Counter() if load is None else load

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                body = json.loads(await reader.readexactly(int(length[1]) if length else 0))
                dice = random.Random(body["input"])  # the same answer for the same message
                schema = body["text"]["format"]["schema"]
                text = json.dumps(placeholder(schema, dice, schema))
                part = {"type": "output_text", "text": text}
                usage = {"input_tokens": len(str(body)) // 4, "output_tokens": len(text) // 4}
                output = [{"type": "message", "content": [part]}]
                reply = {"model": "offline", "status": "completed", "output": output}
                content = json.dumps(reply | {"usage": usage}).encode()
                load["in flight"] += 1
                load["peak"] = max(load["peak"], load["in flight"])
                await asyncio.sleep(latency * dice.lognormvariate(0, 0.3))
                load["in flight"] -= 1
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
                writer.write(head + b"%d\r\n\r\n" % len(content) + content)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1000)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


# --- 6. Command line ------------------------------------------------------------------
def number(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    """A type for argparse: a number from `least`."""

    def parse(text: str) -> float:
        if not least <= (value := kind(text)) < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"number, from {least} up,"
    return parse


def shard(text: str) -> tuple[int, int]:
    """K/N as (k, n)."""
    k, n = map(int, text.split("/"))
    if not 1 <= k <= n:
        raise ValueError
    return k, n


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s INPUT OUTPUT [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, count = parser.add_argument, number(int, 1)
    add("input", metavar="INPUT", type=Path, help=".txt, a message a line; .jsonl; .csv; -")
    add("output", metavar="OUTPUT", type=Path, help="the results, JSON Lines")
    add("--field", metavar="NAME", default="text", help="which field is the message")
    add("--model", metavar="NAME", default=MODEL, help="the model to ask")
    for name, kind, default, text in (
        ("--concurrency", count, CONCURRENCY, "most requests in flight"),
        ("--timeout", number(float, 0.001), TIMEOUT, "seconds for one attempt"),
        ("--max-attempts", count, MAX_ATTEMPTS, "tries for one message"),
        ("--limit", count, None, "only the first N messages: a pilot, with an estimate"),
        ("--max-cost", number(float, 0), math.inf, "stop before this run spends more USD"),
        ("--shard", shard, (1, 1), "K/N: every N-th message, from the K-th"),
    ):
        add(name, metavar="N", type=kind, default=default, help=text)
    add("--offline", action="store_true", help="placeholder answers: no key, no cost")
    add("--restart", action="store_true", help="begin again; OUTPUT is kept as OUTPUT.bak")
    return parser


def hash_settings(request: dict[str, Any], offline: bool) -> str:
    """A short hash of all that shapes an answer."""
    text = json.dumps([request, PROMPT, offline], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def allow_files(count: int) -> None:
    """Raises the soft limit of open files to `count`; StopRun where the system has less."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            if soft < count:
                resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
        except (ValueError, OSError):
            raise StopRun(
                f"--concurrency needs {count} open files, the system allows {hard}: "
                "take a smaller one, or raise `ulimit -Hn`"
            ) from None


async def answer(
    messages: Iterable[Row],
    keep: Callable[[Row], None],
    throttle: Throttle,
    args: argparse.Namespace,
) -> None:
    """Answers all messages by the API or the stand-in. Raises StopRun."""
    request = build_request(args.model)
    allow_files(args.concurrency * (2 if args.offline else 1) + 50)
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(offline_server()) if args.offline else ""
        client = await stack.enter_async_context(new_client(args.concurrency, url))
        once = partial(call, client, request, args.timeout)
        settings = hash_settings(request, args.offline)
        to_row = partial(ask, once, throttle, args.max_attempts, settings)
        await answer_each(messages, to_row, keep, throttle)


async def answer_all(messages: Iterable[str], **options: Any) -> list[Row]:
    """The rows of all messages, in order: `rows = await answer_all(texts)` in a notebook.

    Options as on the command line: model, concurrency, offline ... Raises StopRun."""
    args = build_parser().parse_args(["-", "-"], argparse.Namespace(**options))
    throttle, rows = Throttle(args.concurrency, args.max_cost), list[Row]()
    numbered = ({"line": n, "text_message": text} for n, text in enumerate(messages, 1))
    with tqdm(total=len(messages) if hasattr(messages, "__len__") else None) as bar:

        def keep(row: Row) -> None:
            rows.append(row)
            bar.update()

        await answer(numbered, keep, throttle, args)
    return sorted(rows, key=lambda row: row["line"])


def show(bar: tqdm[Any], throttle: Throttle, errors: int) -> None:
    """Says beside the bar how it goes, and why it waits."""
    parts = [f"{errors} errors" if errors != 1 else "1 error"]
    parts.append(f"{throttle.in_flight} in flight")
    if throttle.paid:
        parts.append(f"${throttle.paid:.2f}")
    if (wait := throttle.brake_until - time.monotonic()) > 0.5:
        parts.append(f"{throttle.why}, {wait:.0f} s")
    bar.set_postfix_str(", ".join(parts))


def summarize(counts: Counter[str], examples: dict[str, str], throttle: Throttle) -> str:
    """The closing lines: rows, errors with an example each, tokens, cost, time."""
    took = time.monotonic() - throttle.started
    rows = counts["ok"] + sum(counts[kind] for kind in examples)
    lines = [f"{counts['ok']:,} answered, {rows - counts['ok']:,} errors"]
    lines += [f"  {counts[kind]:,} {kind}, e.g. {text}" for kind, text in examples.items()]
    cost = f", {throttle.paid:.4f} USD" if throttle.paid else ""
    used = f"{counts['input_tokens']:,} in, {counts['output_tokens']:,} out"
    lines.append(f"tokens   {used}{cost}")
    lines.append(f"time     {took:.1f} s, {rows / took:.1f} rows/s")
    if len(throttle.latencies) > 1:
        cuts = statistics.quantiles(throttle.latencies, n=20)
        lines.append(f"latency  median {cuts[9]:.2f} s, 95 % within {cuts[18]:.2f} s")
    if throttle.refusals:
        lines.append(f"limits   refused {throttle.refusals}, waited {throttle.waited:.1f} s")
    return "\n".join(lines)


def run(args: argparse.Namespace, source: Path) -> int:
    """Answers the messages of `source` into OUTPUT; the exit status. Raises StopRun."""
    lines, keys = array("q"), array("q")
    read = partial(read_messages, source, args.field, args.shard)
    for message in read():
        lines.append(message["line"])
        keys.append(hash(message["text_message"]))
    if not lines:
        raise StopRun(f"no message in {args.input}")
    settings = hash_settings(build_request(args.model), args.offline)
    results = Results(args.output, settings, args.restart)
    todo = results.find_todo(keys, args.limit)
    throttle = Throttle(args.concurrency, args.max_cost)
    counts, examples = Counter[str](), dict[str, str]()
    total = min(len(lines), args.limit or len(lines))
    bar = tqdm(total=total, initial=total - sum(todo), unit="msg", disable=None)

    def keep(row: Row) -> None:
        results.add(row)
        error = row["error"] or {"type": "ok"}
        counts.update({error["type"]: 1}, **row["usage"] or {})
        if row["error"]:
            examples.setdefault(error["type"], f"line {row['line']}: {error['message']}")
        bar.update()

    async def tick() -> None:
        for beat in itertools.count():
            await asyncio.sleep(0.5)
            show(bar, throttle, sum(counts[kind] for kind in examples))
            if bar.disable and beat % 60 == 59:
                say(f"{counts['ok']} answered ...")
            try:
                await asyncio.to_thread(results.sync)
            except StopRun as reason:
                throttle.stop(reason)

    async def work() -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()

        def interrupt() -> None:
            if throttle.reason and task:
                task.cancel()
            throttle.stop(StopRun("interrupted", 130))
            say(f"stopping: {throttle.in_flight} in flight may land; Ctrl-C again: at once")

        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(interrupt))
        ticking = asyncio.create_task(tick())
        try:
            await answer(itertools.compress(read(), todo), keep, throttle, args)
        finally:
            ticking.cancel()
            for number in signal.SIGINT, signal.SIGTERM:
                signal.signal(number, signal.default_int_handler)

    gc.freeze()
    stop = None
    with bar:
        try:
            if any(todo):
                asyncio.run(work())
        except StopRun as reason:
            stop = reason
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    results.sync()
    gone = results.order(lines, keys)
    if gone: say(f"{gone} rows whose message is not in INPUT any more were kept")
    say(summarize(counts, examples, throttle))
    if stop:
        raise stop
    return 1 if examples else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv`; returns the exit status."""
    args = build_parser().parse_args(argv)
    again = [word for word in argv or sys.argv[1:] if word != "--restart"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = run(args, args.input)
    except StopRun as stop:
        say(f"{stop}")
        status = stop.exit_status
    except KeyboardInterrupt:
        say("interrupted")
        status = 130
    if status:
        say("to go on: " + shlex.join(["python", sys.argv[0], *again]))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
