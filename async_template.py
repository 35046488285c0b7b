#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["openai[aiohttp]>=3.0,<4", "pydantic>=2.8,<3", "tqdm>=4.66,<5"]
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
command retries just those; 2 not started or stopped, a line says why; 130 interrupted.
OPENAI_API_KEY holds the key, OPENAI_BASE_URL the address of another server (vLLM ...).
To ask your own question, copy this file and edit part 1. MIT licence. The idea and the
example are from Kai-Cheng Yang's tutorial, https://github.com/yang3kc/llm_for_css
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import filecmp
import gc
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from tqdm.auto import tqdm

if TYPE_CHECKING:  # imported where used: it takes 0.6 s, and --help needs none of it
    import openai

# --- 1. Edit this ---------------------------------------------------------------------
MODEL = "gpt-4.1-mini"  # any that the endpoint serves; --model overrides it for a run
TEMPERATURE: float | None = 0.0  # 0 repeats best; None for models that reason
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
Row = dict[str, Any]  # a message {"line", "text_message"}; with its answer, of OUTPUT
Ask = Callable[[str], Awaitable["Reply"]]  # from a message to what came of asking it
TOKENS = ("input_tokens", "output_tokens")


class StopRun(Exception):
    """The run cannot go on: a line that says why and what to do."""


@dataclass
class Reply:
    """What one call brought: a response, or the type and message of an error row."""

    error: str = ""
    message: str = ""
    retry: bool = False  # may the same request succeed later?
    status: int = 200  # of HTTP; 0 where no reply came, -1 where no connection was made
    headers: Any = field(default_factory=dict)
    response: Row | None = None
    model: str | None = None
    usage: dict[str, int] | None = None  # by the names in TOKENS
    wait: float = 0.0  # seconds that the server asks for
    doubtful: bool = False  # a rejection that may be due to the settings
    excused: bool = False  # does not count as a try


def to_json(value: Any) -> bytes:
    """Strict JSON in UTF-8; ValueError for NaN, infinity and halves of characters."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def find_key() -> str:
    """The key in the environment. Raises StopRun where there is none to use."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]+", key):
        raise StopRun("no key: set OPENAI_API_KEY, or try without one by --offline")
    return key


def new_client(concurrency: int, offline_url: str | None = None) -> openai.AsyncOpenAI:
    """A client for the key and endpoint of the environment, or for the stand-in."""
    import openai

    key = "offline" if offline_url else find_key()
    url = (
        offline_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    )
    if not re.fullmatch(r"https?://(\[[0-9a-f:]+\]|[\w.-]+)(:\d{1,5})?(/\S*)?", url):
        raise StopRun(f"OPENAI_BASE_URL is {url!r}, but has to be like http://host/v1")
    # aiohttp takes 40 % less CPU than the default transport. The SDK's own timeout is
    # off: it is for each read, so that a body that trickles in never meets it.
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=concurrency)
    http = openai.DefaultAioHttpClient(limits=limits, trust_env=not offline_url)
    rest: dict[str, Any] = {"max_retries": 0, "timeout": None, "http_client": http}
    return openai.AsyncOpenAI(api_key=key, base_url=url, **rest)


def build_request(model: str) -> Row:
    """The body of every call but for its input; the schema is built only once."""
    import openai

    schema = openai.pydantic_function_tool(SCHEMA)["function"]["parameters"]
    form = {"type": "json_schema", "name": SCHEMA.__name__, "schema": schema}
    request = {"model": model, "instructions": INSTRUCTIONS, "temperature": TEMPERATURE}
    request |= {"text": {"format": form | {"strict": True}}} | EXTRA
    return {name: value for name, value in request.items() if value is not None}


async def call(api: openai.AsyncOpenAI, request: Row, limit: float, text: str) -> Reply:
    """One attempt, of `limit` seconds. Raises StopRun where no message can succeed."""
    import aiohttp
    import openai

    try:
        # extra_body goes out as it is: to walk over typed parameters would cost the SDK
        # 0.5 ms a row, and to parse the reply into its own Response another 0.6.
        body = request | {"input": PROMPT.replace("{text_message}", text)}
        sending = api.responses.with_raw_response.parse(extra_body=body)
        raw = await asyncio.wait_for(sending, limit)
        reply = read_body(raw.content)
        reply.headers = raw.headers
    except TimeoutError:
        reply = Reply("timeout", f"no answer within {limit:g} s", True, 0)
    except openai.APIStatusError as error:
        reply = read_error(error, request["model"])
        wait = api._parse_retry_after_header(reply.headers) or 0.0
        reply.wait = max(0.0, min(wait, 1e6))  # neither nan nor inf
    except (openai.APIConnectionError, aiohttp.ClientError) as error:
        cause = error.__cause__ or error
        never = isinstance(cause.__cause__, aiohttp.ClientConnectorError)
        reply = Reply("connection", f"{cause.__cause__ or cause}", True, -never)
    # A server may quote the key that it was sent: no row and no line may show it.
    secret = api.api_key if len(api.api_key) > 7 else "\0"
    said = " ".join(reply.message.replace(secret, "[key]").split())[:300]
    reply.message = said.encode(errors="replace").decode()  # no halves of characters
    reply.model = reply.model and reply.model.encode(errors="replace").decode()
    if reply.error == "stop":
        raise StopRun(reply.message)
    return reply


def read_body(content: bytes) -> Reply:
    """The reply in the body of a 200; other servers leave out much of what OpenAI has.

    https://platform.openai.com/docs/api-reference/responses/object
    """
    try:
        body = json.loads(content)
        items = [i for i in body["output"] or () if i.get("phase") != "commentary"]
        parts = [part for item in items for part in item.get("content") or ()]
        text = "".join(part["text"] for part in parts if part["type"] == "output_text")
        refusal = [part["refusal"] for part in parts if part["type"] == "refusal"]
        used, status = body.get("usage") or {}, body.get("status")
        told = all(isinstance(used.get(name), int) for name in TOKENS)
        usage = {name: max(0, used[name]) for name in TOKENS} if told else None
        why = (body.get("incomplete_details") or {}).get("reason") or body.get("error")
        model = body.get("model")
        reply = Reply(model=model if isinstance(model, str) else None, usage=usage)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        start = content[:4000].decode(errors="replace")
        return Reply("bad_response", f"not from the Responses API: {start!r}", True)
    if status == "incomplete":
        reply.error = "content_filter" if why == "content_filter" else "incomplete"
        reply.message = f"the answer was cut short: {why}"
    elif status in ("failed", "cancelled"):
        reply.error, reply.message = "server_error", f"{status}: {why}"
        reply.retry = True
    elif refusal:
        reply.error, reply.message = "refusal", " ".join(map(str, refusal))
    else:
        try:
            reply.response = SCHEMA.model_validate_json(text).model_dump(mode="json")
            to_json(reply.response)
        except ValueError as error:
            problem, _, _ = str(error).partition("For further information")
            reply.error, reply.message, reply.retry = "invalid_answer", problem, True
            reply.response = None
    return reply


def read_error(error: openai.APIStatusError, model: str) -> Reply:
    """The reply for an HTTP error, of type "stop" where no other call can do better.

    https://platform.openai.com/docs/guides/error-codes
    """
    status, names = error.status_code, {error.code, error.type}
    where = error.request.url
    param = error.param if isinstance(error.param, str) else ""
    setting = re.split(r"[.\[]", param)[0]
    advice = {
        401: "the key is not accepted: check OPENAI_API_KEY",
        402: "no credit left: add some",
        403: f"the key may not use {model!r} at {where}",
        404: f"no {model!r} at {where}: check --model and OPENAI_BASE_URL",
    }.get(status, "")
    if names & {"insufficient_quota", "billing_hard_limit_reached"}:
        advice = "no credit left: check plan and billing"
    about_input = setting.startswith(("input", "messages", "prompt"))
    if status in (400, 422) and setting and not about_input:
        hint = ", say to None" if setting == "temperature" else ""
        advice = f"the setting {setting!r} is not accepted: change it in part 1{hint}"
    retry = status in (408, 409, 429) or status >= 500
    kind = "rate_limit" if status == 429 else "server_error" if retry else "bad_request"
    kind = "content_filter" if "content_filter" in names else "stop" if advice else kind
    said = error.body.get("message") if isinstance(error.body, dict) else None
    message = f"{advice}{advice and ': '}status {status}, {said or error.message}"
    reply = Reply(kind, message, retry, status, error.response.headers)
    reply.doubtful = kind == "bad_request" and not about_input
    return reply


# --- 3. Many at a time ----------------------------------------------------------------
START = 8  # requests in flight at first: the most that a wrong key can cost
BACKOFF = 0.5  # seconds: a message's n-th retry waits a random part of BACKOFF * 2**n
PATIENCE = 600.0  # seconds of nothing but refusals, or of an outage, that end the run
TROUBLE = ("timeout", "connection", "server_error", "bad_response")  # is it down?


@dataclass
class Mirror:
    """What the server has left of a limit: `left` at the time `seen`, growing by `rate`
    a second up to `full`. No limit until one is known."""

    name: str  # "requests" or "tokens", as in the headers
    left: float = math.inf
    full: float = math.inf
    rate: float = 0.0
    seen: float = 0.0
    at: float = 0.0  # when the request was sent whose reply told the latest news
    spent: float = 0.0  # by this run
    limit: float = 0.0  # as the headers name it; 0 where there were none
    growth: float = 1.0  # of a guessed rate by each answer, to find out if it holds
    margin: float = 2.0  # how many requests to have room for before starting one

    def wait(self, cost: float) -> float:
        """Seconds until there is room for a request of that cost; 0 if there is now."""
        now = time.monotonic()
        if now > self.seen:
            self.left = min(self.full, self.left + self.rate * (now - self.seen))
            self.seen = now
        need = max(cost, min(self.margin * cost, self.full / 2))
        short = min(need, self.full) - self.left
        return max(0.0, short / self.rate) if self.rate else 0.1 * (short > 0)

    def spend(self, cost: float) -> float:
        """Books a request that starts now; returns all that was spent so far."""
        self.left, self.spent = self.left - cost, self.spent + cost
        return self.spent

    def read(self, headers: Any, at: float, spent: float, cost: float) -> None:
        """Takes what the reply to a request of that `cost`, sent `at`, says is left.

        https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers
        """
        units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        try:
            limit = float(headers[f"x-ratelimit-limit-{self.name}"])
            left = float(headers[f"x-ratelimit-remaining-{self.name}"])
            reset = headers[f"x-ratelimit-reset-{self.name}"]  # 6m0s, 1s, 120ms
            pairs = re.findall(r"([0-9.]+)(ms|[dhms])", reset)
            back = sum(float(number) * units[unit] for number, unit in pairs)
        except (KeyError, ValueError):
            return
        if at < self.at or not all(0 < x < math.inf for x in (limit, left + 1, back)):
            return
        # In `back` seconds all is there again. All is mostly `limit`, for a minute or a
        # day; where it is less, and back sooner, it is the most that was ever left.
        most = self.full if limit == self.limit else 0.0
        whole = back * limit / (limit - left) if left < limit else 0.0
        self.full = limit if whole >= 30 else max(most, left + cost)
        self.rate, self.limit, self.growth = (self.full - left) / back, limit, 1.0
        self.left, self.seen, self.at = left - (self.spent - spent), at, at
        self.margin = max(2.0, 0.998 * self.margin)

    def refused(self, rate: float, until: float) -> None:
        """Leaves more room, as somebody else spends, too; without headers keeps to that
        rate from then on."""
        if self.limit:
            self.margin = min(20.0, 1.5 * self.margin)
        elif rate:
            self.left, self.rate, self.full = 1.0, rate, max(2.0, rate)
            self.seen, self.margin, self.growth = until, 1.0, 1.005


def used_up(wait: float) -> StopRun:
    """The end of a run that would have to wait for so many seconds."""
    then = time.asctime(time.localtime(time.time() + wait))
    return StopRun(f"the limit is used up until {then}: run the same command then")


class Throttle:
    """Says when the next request may start, and learns from every reply.

    A request needs a slot, no brake on, and room in the mirrors of the server's limits.
    The window of slots grows while the server keeps up, and is cut when not (AIMD).
    """

    def __init__(self, args: argparse.Namespace) -> None:
        concurrency = args.concurrency
        self.started = now = time.monotonic()
        self.alive_at = self.last_cut = self.full_at = self.brake_until = now
        self.most, self.slots = concurrency, asyncio.Semaphore(concurrency)
        self.in_flight, self.window, self.fast = 0, float(min(START, concurrency)), True
        self.turnstile, self.landed = asyncio.Lock(), asyncio.Event()
        self.stopping, self.reason = asyncio.Event(), BaseException()
        self.requests, self.tokens = Mirror("requests"), Mirror("tokens")
        self.density = self.densest = 0.3  # tokens per character: on average, at most
        known = PRICES and args.model == MODEL and not args.offline
        self.prices = PRICES if known else None  # USD for a million tokens
        self.capped = bool(self.prices) and args.max_cost < sys.float_info.max
        self.budget, self.paid, self.dearest = args.max_cost, 0.0, 0.0  # USD; a request
        self.until, self.why, self.waited, self.refusals = now, "rate limited", 0.0, 0
        self.streak = 0  # of episodes of refusals or troubles without an answer
        self.marked, self.pace = (
            (now, 0.0),
            0.0,
        )  # last refusal, through by then; a second
        self.answered, self.down = "", False  # the last message that had a reply
        self.failing, self.timeouts, self.rejected = set[str](), 0, 0  # since then
        self.latencies = deque[float](maxlen=10_000)  # seconds

    async def send(self, call: Ask, text: str) -> Reply:
        """What came of one request, sent when its turn has come. May raise StopRun."""
        size = len(text) + 1000  # characters: 1000 for instructions, prompt and schema
        await self.turn(call, size)
        sent = time.monotonic()
        self.in_flight += 1
        spent = self.requests.spend(1.0), self.tokens.spend(size * self.density)
        try:
            reply = await call(text)
        finally:
            self.in_flight -= 1
            self.slots.release()
            self.landed.set()
        if self.capped and reply.response and not reply.usage:
            self.stop(StopRun("--max-cost: this server does not say what it used"))
        if reply.usage:
            dense = sum(reply.usage.values()) / size
            self.density += 0.1 * (dense - self.density)
            self.densest = max(self.densest, dense)
            prices = self.prices or (0, 0)
            usd = sum(map(operator.mul, prices, reply.usage.values())) / 1e6
            self.paid, self.dearest = self.paid + usd, max(self.dearest, usd)
        self.requests.read(reply.headers, sent, spent[0], 1.0)
        self.tokens.read(reply.headers, sent, spent[1], size * self.density)
        self.learn(reply, sent, text)
        return reply

    async def turn(self, call: Ask, size: int) -> None:
        """Returns with a slot taken, or raises StopRun if nothing more is to start."""
        async with self.turnstile:  # one at a time, first come first served
            while True:
                await self.slots.acquire()
                wait = self.wait(size)
                if not (wait or self.down or self.stopping.is_set()):
                    return
                self.slots.release()  # who waits holds no slot
                if self.stopping.is_set():
                    raise StopRun
                if not wait:  # Down, or are messages to blame? Ask one answered before.
                    sent = time.monotonic()
                    self.learn(await call(self.answered), sent, self.answered)
                self.landed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.landed.wait(), wait)

    def wait(self, size: int) -> float:
        """Seconds until the next request may start; 0 if it may now."""
        short = self.paid + (self.in_flight + 1) * self.dearest > self.budget
        if short and not self.in_flight:
            self.stop(StopRun(f"--max-cost reached, {self.paid:.4f} USD spent"))
        # Before the first answer nobody knows what one costs, or whether any will do.
        unsure = (self.capped and not self.dearest) or self.rejected >= 3
        if self.in_flight >= (1 if short or unsure else int(self.window)):
            self.full_at = time.monotonic()
            return 60.0  # or until one lands
        now, tokens = time.monotonic(), self.tokens.wait(size * self.densest)
        wait = max(0.0, self.brake_until - now, self.requests.wait(1.0), tokens)
        if wait > PATIENCE and not self.in_flight:
            self.stop(used_up(wait))
        self.until = now + wait
        return wait

    def stop(self, reason: BaseException) -> None:
        """Lets nothing more start: what waits gives up, what is in flight may land."""
        self.reason = self.reason if self.stopping.is_set() else reason
        self.stopping.set()
        self.landed.set()

    def learn(self, reply: Reply, sent: float, text: str) -> None:
        """Sets the pace by a reply. Raises StopRun if there is no point in going on."""
        if reply.status == 429:
            self.refused(reply, sent)
        elif reply.error in TROUBLE:
            self.failing.add(text)
            self.timeouts += reply.error == "timeout"
            if not self.answered and len(self.failing) >= 3 * START:
                raise StopRun(
                    f"nothing was answered yet: {reply.error}, {reply.message}"
                )
            lost = self.down or len(self.failing) >= 5 or reply.status < 0
            self.down = reply.excused = bool(self.answered) and lost
            if self.down:
                self.slow_down(sent, f"server down ({reply.error})", START)
            elif reply.status in (503, 529) or self.timeouts >= 3:
                self.slow_down(sent, "server overloaded", 0.0, reply.wait)
        elif reply.doubtful and not self.answered:
            self.rejected += 1
            if self.rejected >= 3 and not self.in_flight:
                raise StopRun(f"the first requests were all rejected: {reply.message}")
        else:
            self.alive_at, self.answered, self.down = time.monotonic(), text, False
            self.failing, self.timeouts, self.streak, self.rejected = set(), 0, 0, 0
            self.latencies.append(self.alive_at - sent)
            self.requests.rate *= self.requests.growth
            if sent <= self.full_at:  # all of it was in use
                more = 2.0 if self.fast else 1 / self.window
                self.window = min(self.most, self.window + more)

    def refused(self, reply: Reply, sent: float) -> None:
        """A 429 is a wait, no try; what went through since the last shows the pace."""
        reply.excused = True
        self.refusals += 1
        if reply.wait > PATIENCE:
            raise used_up(reply.wait)
        now, through = time.monotonic(), self.requests.spent - self.refusals
        if sent >= self.last_cut and through - self.marked[1] >= 5:
            # The bucket was empty then and is empty now: what went through is its rate.
            found = (through - self.marked[1]) / (now - self.marked[0])
            self.pace, self.marked = max(0.85 * self.pace, found), (now, through)
        in_use = self.pace * sum(self.latencies) / max(1, len(self.latencies))
        self.slow_down(sent, "rate limited", in_use, reply.wait or -1)
        self.requests.refused(self.pace, self.brake_until)
        self.tokens.refused(0.0, self.brake_until)

    def slow_down(self, sent: float, why: str, least: float, wait: float = -1) -> None:
        """Cuts the window, to `least` or more, and brakes all; once an episode: what
        was sent before the last cut is no news. May raise StopRun."""
        now = time.monotonic()
        if sent >= self.last_cut:
            cut = 0.0 if self.down else self.window * (0.5 if self.fast else 0.9)
            self.window, self.last_cut, self.fast = max(1.0, cut, least), now, self.down
            self.streak += 1
            if (quiet := now - self.alive_at) > PATIENCE and self.streak > 2:
                raise StopRun(f"{why}, no answer for {quiet:.0f} s: run it again later")
            if wait < 0:
                wait = random.uniform(0.1, 0.2) * min(
                    60.0, BACKOFF * 2 ** min(self.streak, 10)
                )
        until = now + max(0.0, wait) * random.uniform(1, 1.1)  # other runs wait as well
        self.waited += max(0.0, until - max(now, self.brake_until))
        self.brake_until, self.why = max(self.brake_until, until), why


async def ask(call: Ask, throttle: Throttle, tries: int, tag: Row, row: Row) -> Row:
    """The row of a message: its answer, or the error of the last of so many tries."""
    attempts, usage = 0, Counter[str]()
    while True:
        reply = await throttle.send(call, row["text_message"])
        usage.update(reply.usage or {})
        attempts += not reply.excused
        if not reply.retry or attempts >= tries:
            break
        if not reply.excused:  # full jitter, without a slot, until the run stops:
            # https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
            wait = random.uniform(0, min(60.0, BACKOFF * 2 ** min(attempts, 10)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(throttle.stopping.wait(), wait)
    error = {"type": reply.error, "message": reply.message, "attempts": attempts}
    row |= {"response": reply.response, "error": error if reply.error else None}
    return row | {"model": reply.model, "usage": dict(usage) or None} | tag


async def answer_each(
    queue: Iterator[Row], ask: Any, keep: Any, throttle: Throttle
) -> None:
    """Answers all messages; `keep` gets each row. Raises what stopped it."""
    # Workers on one iterator, not a task for each message: 100,000 messages would be
    # 171 MiB of tasks. Sharing it is safe: a worker gives way only where it awaits.
    held: list[Row] = []

    async def work() -> None:
        try:
            for message in queue:
                held.append(await ask(message))
                while held and throttle.answered:  # else a setting may be to blame
                    keep(held.pop())
                if len(held) >= 5:
                    raise StopRun(f"no answer yet, but {held[-1]['error']['message']}")
        except (StopRun, OSError) as reason:  # OSError: of the file that `keep` writes
            throttle.stop(reason)

    async with asyncio.TaskGroup() as workers:
        for _ in range(throttle.most + 100):  # more than slots: some rows only wait
            workers.create_task(work())
    if throttle.stopping.is_set():
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
    count = 0
    for line, record in read_records(path):
        try:
            if isinstance(record, str) and path.suffix.lower() == ".jsonl":
                record = json.loads(record)
            fields = record if isinstance(record, dict) else {name: record}
            if name not in fields:
                raise ValueError(f"no {name!r} among {[*fields]}: see --field")
            if not isinstance(text := fields.pop(name), str):
                raise ValueError(f"the message is no text, but {text!r:.50}")
            message = {"line": line, "text_message": text.rstrip("\r\n")}
            message |= {"fields": fields} if fields is record else {}
            to_json(message)
        except UnicodeEncodeError:
            raise StopRun(f"{path}, line {line}: not UTF-8, save it as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise StopRun(f"{path}, line {line}: {error}") from None
        count += bool(text.strip())
        if text.strip() and count % shard[1] == shard[0] % shard[1]:
            yield message


def read_records(path: Path) -> Iterator[tuple[int, str | dict[str, str]]]:
    """The records of INPUT that are not blank, and the line where each begins."""
    table = path.suffix.lower() == ".csv"
    # A wrong byte becomes a surrogate: to_json then fails in the line it is in.
    wrong, end = "surrogateescape", "" if table else "\n"
    with open(path, encoding="utf-8-sig", errors=wrong, newline=end) as file:
        if not table:
            yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())
            return
        csv.field_size_limit(2**31 - 1)
        rows = csv.reader(file, strict=True)
        try:
            header, line = next(rows, []), rows.line_num + 1
            if len({*header}) < len(header):
                raise ValueError("two columns have the same name")
            for cells in rows:
                if cells:
                    yield line, dict(zip(header, cells, strict=True))
                line = rows.line_num + 1
        except (csv.Error, ValueError) as error:
            why = str(error).replace("zip() argument 2", "the record")
            raise StopRun(f"{path}, line {line}: {why}") from None


def lock(file: IO[bytes]) -> None:
    """Locks `file` while this process lives. Raises OSError if another one has."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(2**40)  # far behind the rows, which others may read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Results:
    """OUTPUT: locked against other runs; rows are appended, in the end put in order."""

    def __init__(self, path: Path, settings: str, restart: bool) -> None:
        self.path, self.settings, self.counts = path.resolve(), settings, Counter[str]()
        self.bar: Any = None
        while True:
            self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
            try:
                lock(self.file)
            except (BlockingIOError, PermissionError):
                self.file.close()
                raise StopRun(f"another run is writing {path}: let it finish") from None
            if restart and self.file.tell():
                self.file.close()
                names = (Path(f"{self.path}.bak{n or ''}") for n in itertools.count())
                self.path.rename(next(name for name in names if not name.exists()))
            elif self.is_there():  # else another run has just replaced it
                return
            self.file.close()

    def is_there(self) -> bool:
        """Whether the open file is still the one at its path."""
        mine = os.fstat(self.file.fileno())
        return self.path.exists() and os.path.samestat(mine, self.path.stat())

    def scan(self) -> Iterator[tuple[int, Row]]:
        """Offset and content of each row; a torn last one is cut off.

        Raises StopRun at a line that is no row, or was made with other settings."""
        offset, start = 0, b'{"line": '
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path}, line {number}"
                if not line.endswith(b"\n") and start.startswith(line[: len(start)]):
                    self.file.truncate(offset)
                    return say(f"{where}: torn by a crash; dropped, and asked again")
                try:
                    row = json.loads(line)
                    made, _ = (
                        row["settings"],
                        (hash(row["text_message"]), row["response"]),
                    )
                except (ValueError, LookupError, TypeError):
                    raise StopRun(f"{where}: no row; mend it first") from None
                if made != self.settings:
                    made = f"{where}: made by {row.get('model')} or another part 1"
                    raise StopRun(f"{made}; choose another OUTPUT, or --restart")
                yield offset, row
                offset += len(line)

    def match(self, keys: array[int]) -> tuple[array[int], dict[int, int], list[int]]:
        """Offsets of rows: of the answer to each message, known by the hash of its text
        (-1: none); of the last error of each text; of the rows of no message."""
        where, following = array("q", [-1]) * len(keys), array("q", keys)
        first, errors, gone = dict[int, int](), dict[int, int](), list[int]()
        for n in reversed(range(len(keys))):
            following[n] = first.get(keys[n], -1)  # the next message with the same text
            first[keys[n]] = n
        for offset, row in self.scan():
            n = first.get(key := hash(row["text_message"]), -1)
            if key in first and row["response"] is None:
                errors[key] = offset
            elif n >= 0:
                where[n], first[key] = offset, following[n]
            else:
                gone.append(offset)
        if gone and not errors and max(where) < 0:
            raise StopRun(f"{self.path} answers other messages: choose another OUTPUT")
        return where, errors, gone

    def add(self, row: Row) -> None:
        """Appends a row in one write, then counts it and moves the bar. Raises OSError,
        with the file still whole, if the disk is full."""
        line, end = to_json(row) + b"\n", self.file.seek(0, os.SEEK_END)
        self.counts["lost"] += 1
        if self.file.write(line) != len(line):
            self.file.truncate(end)
            raise OSError(28, "No space left on device")
        kind = row["error"]["type"] if row["error"] else "ok"
        self.counts.update({kind: 1, "rows": 1, "lost": -1}, **row["usage"] or {})
        if row["error"] and self.counts[kind] == 1:
            say(f"line {row['line']}: {kind}, {row['error']['message']}")
        self.bar.update()

    def order(self, messages: Iterable[Row], keys: array[int]) -> None:
        """Puts OUTPUT in INPUT's order, rows of no message last, in one atomic step."""
        where, errors, gone = self.match(keys)
        self.counts["gone"] = len(gone)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with open(self.path, "rb") as old, open(temporary, "wb") as new:
                end = itertools.repeat(
                    {"text_message": None}
                )  # INPUT may be shorter now
                now = itertools.chain(messages, end)
                for message, key, offset in zip(now, keys, where):
                    if hash(message["text_message"]) != key:
                        raise StopRun("INPUT was changed during the run: run it again")
                    if (place := errors.get(key, -1) if offset < 0 else offset) >= 0:
                        old.seek(place)
                        new.write(to_json(json.loads(old.readline()) | message) + b"\n")
                new.writelines(old.readline() for at in gone if old.seek(at) >= 0)
                new.flush()
                os.fsync(new.fileno())
            if not filecmp.cmp(self.path, temporary, shallow=False):
                shutil.copymode(self.path, temporary)
                if sys.platform == "win32":
                    self.file.close()  # Windows replaces no open file
                temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        if sys.platform != "win32":  # the new name, too, has to survive a power failure
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


# --- 5. No key yet? -------------------------------------------------------------------
def placeholder(schema: Any, dice: random.Random, root: Any, depth: int = 0) -> Any:
    """Something that fits the JSON schema; the same for the same dice."""
    if "$ref" in schema:
        schema = reduce(operator.getitem, schema["$ref"].split("/")[1:], root)
    if options := schema.get("anyOf"):  # what refers to itself has to end: null is last
        part = dice.choice(options) if depth < 5 else options[-1]
        return placeholder(part, dice, root, depth + 1)
    if "enum" in schema or "const" in schema:
        return dice.choice(schema.get("enum") or [schema["const"]])
    kind, step = schema["type"], 1 if schema["type"] == "integer" else 0.01
    if kind == "object":
        fields = schema.get("properties", {}).items()
        return {name: placeholder(part, dice, root, depth + 1) for name, part in fields}
    if kind == "array":
        least = schema.get("minItems", 0)
        most = min(schema.get("maxItems", 3), least + 3) if depth < 5 else least
        items = range(dice.randint(least, max(least, most)))
        return [placeholder(schema["items"], dice, root, depth + 1) for _ in items]
    low = schema.get("minimum", schema.get("exclusiveMinimum", -math.inf) + step)
    high = schema.get("maximum", schema.get("exclusiveMaximum", math.inf) - step)
    low = low if low > -math.inf else min(0, high - 100)
    number = dice.randint(0, int((min(high, low + 100) - low) / step)) * step + low
    number = round(number) if kind == "integer" else round(number, 2)
    text = "Placeholder made offline: no model was asked."[: schema.get("maxLength")]
    other = {"boolean": dice.random() < 0.5, "null": None, "string": text}
    return other.get(kind, number)


@contextlib.asynccontextmanager
async def offline_server(latency: float, load: Counter[str]) -> AsyncIterator[str]:
    """The address of a stand-in for the API on this machine: placeholders after about
    `latency` seconds. `load` tells how many are "in flight", and their "peak"."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(re.findall(rb"(?i)content-length: *(\d+)", head)[0])
                body = json.loads(await reader.readexactly(size))
                load["in flight"] += 1
                load["peak"] = max(load["peak"], load["in flight"])
                dice = random.Random(body["input"])  # same message, same answer
                schema = body["text"]["format"]["schema"]
                text = json.dumps(placeholder(schema, dice, schema))
                usage = dict(zip(TOKENS, (size // 4, len(text) // 4)))
                part = {"type": "output_text", "text": text}
                output = [{"type": "message", "content": [part]}]
                reply = {"model": "offline", "output": output, "usage": usage}
                await asyncio.sleep(latency * dice.lognormvariate(0, 0.3))
                load["in flight"] -= 1
                content = json.dumps(reply).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n" % len(content) + content)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1000)
    async with server:
        yield "http://{}:{}/v1".format(*server.sockets[0].getsockname())


# --- 6. Command line ------------------------------------------------------------------
def parse_args(argv: list[str] | None, **given: Any) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line where it is wrong."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s INPUT OUTPUT [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("input", metavar="INPUT", help=".txt: a message a line; .jsonl; .csv; -: stdin")
    add("output", metavar="OUTPUT", help="the results, JSON Lines")
    for name, metavar, default, text in (
        ("--field", "NAME", "text", "which field of .jsonl or .csv is the message"),
        ("--model", "NAME", MODEL, "the model to ask"),
        ("--concurrency", "N", CONCURRENCY, "most requests in flight"),
        ("--timeout", "S", TIMEOUT, "seconds for one attempt"),
        ("--max-attempts", "N", MAX_ATTEMPTS, "tries for one message"),
        ("--limit", "N", sys.maxsize, "only the first N: a pilot, with an estimate"),
        ("--max-cost", "USD", sys.float_info.max, "stop before this run costs more"),
        ("--shard", "K/N", "1/1", "only every N-th message, from the K-th"),
    ):
        add(name, metavar=metavar, type=type(default), default=default, help=text)
    add("--offline", action="store_true", help="placeholder answers: no key, no cost")
    add("--restart", action="store_true", help="begin again; keeps OUTPUT.bak")
    args = parser.parse_args(argv, argparse.Namespace(**given))
    for name in ("concurrency", "timeout", "max_attempts", "limit", "max_cost"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: has to be above 0")
    parts = re.fullmatch("([0-9]+)/([0-9]+)", args.shard)
    args.shard = tuple(map(int, parts.groups())) if parts else (0, 0)
    if not 1 <= args.shard[0] <= args.shard[1]:
        parser.error("argument --shard: has to be like 1/4, 2/4, 3/4 or 4/4")
    return args


def hash_settings(args: argparse.Namespace) -> str:
    """A short hash of all that shapes an answer."""
    parts = [build_request(args.model), PROMPT, args.offline]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    start = re.search("[a-d]", digest[:56])  # digits alone are a number to pandas
    return digest[start.start() if start else 0 :][:8]


def allow_files(count: int) -> None:
    """Raises the soft limit of open files to `count`; StopRun if that is too many."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if count > hard != resource.RLIM_INFINITY:
            raise StopRun(f"--concurrency: needs {count} files, ulimit -Hn is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


async def answer(
    queue: Iterator[Row], keep: Any, throttle: Throttle, args: Any, watch: Any
) -> None:
    """Answers all messages, by the API or by the stand-in, while the coroutine `watch`
    looks on. Raises what stopped it."""
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(asyncio.create_task(watch).cancel)
        allow_files(args.concurrency * (1 + args.offline) + 50)
        server = offline_server(0.4, Counter()) if args.offline else None
        url = await stack.enter_async_context(server) if server else None
        api = await stack.enter_async_context(new_client(args.concurrency, url))
        tag = {"settings": hash_settings(args)}
        once = partial(call, api, build_request(args.model), args.timeout)
        to_row = partial(ask, once, throttle, args.max_attempts, tag)
        await answer_each(queue, to_row, keep, throttle)


async def attend(bar: Any, throttle: Throttle, results: Results | None = None) -> None:
    """Twice a second: how it goes, to the bar, and what was written, to the disk."""
    for beat in itertools.count(1):
        await asyncio.sleep(0.5)
        status = f"{throttle.in_flight} in flight"
        status += f", ${throttle.paid:.2f}" if throttle.paid else ""
        if (wait := throttle.until - time.monotonic()) > 0.5:
            status += f", {throttle.why}, {wait:.0f} s"
        if not results:
            bar.set_postfix_str(status)
            continue
        status = f"{results.counts['rows'] - results.counts['ok']} errors, {status}"
        bar.set_postfix_str(status)
        if bar.disable and beat % 60 == 0:  # no terminal: a line now and then
            say(f"{results.counts['rows']:,} of {bar.total:,} rows, {status}")
        try:
            await asyncio.to_thread(os.fsync, results.file.fileno())
            if not results.is_there():
                raise StopRun(f"{results.path} was moved or deleted during the run")
        except (StopRun, OSError) as reason:
            throttle.stop(reason)


async def answer_all(
    messages: Iterable[str],
    *,
    model: str = MODEL,
    concurrency: int = CONCURRENCY,
    timeout: float = TIMEOUT,  # noqa: ASYNC109
    offline: bool = False,
) -> list[Row]:
    """The rows of all messages that are not blank, in order; in a notebook
    `await answer_all(texts)`. Raises StopRun."""
    given = {"model": model, "concurrency": concurrency, "timeout": timeout}
    args, rows = parse_args(["-", "-"], offline=offline, **given), list[Row]()
    throttle = Throttle(args)
    texts = ((n, t) for n, t in enumerate(messages, 1) if isinstance(t, str))
    numbered = ({"line": n, "text_message": t} for n, t in texts if t.strip())
    total = operator.length_hint(messages) or None  # None where it is not known
    with tqdm(total=total, unit="msg") as bar:

        def keep(row: Row) -> None:
            rows.append(row)
            bar.update()

        await answer(numbered, keep, throttle, args, attend(bar, throttle))
    return sorted(rows, key=operator.itemgetter("line"))


async def answer_file(
    queue: Any, results: Results, throttle: Throttle, args: Any
) -> None:
    """Answers all messages into OUTPUT. The first Ctrl-C lets those in flight land."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def interrupt() -> None:
        if isinstance(throttle.reason, KeyboardInterrupt) and task:
            task.cancel()
        throttle.stop(KeyboardInterrupt())
        throttle.reason = KeyboardInterrupt()
        say(f"waiting for {throttle.in_flight} in flight; Ctrl-C again to stop now")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(interrupt))
    try:
        watch = attend(results.bar, throttle, results)
        await answer(queue, results.add, throttle, args, watch)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)


def summarize(counts: Counter[str], throttle: Throttle, left: int) -> Iterator[str]:
    """The closing lines; for `left` messages, not asked yet, what they may take."""
    took, rows = time.monotonic() - throttle.started, max(1, counts["rows"])
    times = sorted(throttle.latencies) or [0.0]
    median, slow = times[len(times) // 2], times[-len(times) // 20]
    failed = counts["rows"] - counts["ok"]
    yield f"rows     {counts['ok']:,} answered, {failed:,} errors"
    yield f"tokens   {counts[TOKENS[0]]:,} in, {counts[TOKENS[1]]:,} out"
    if throttle.prices:
        yield f"cost     {throttle.paid:.4f} USD"
    yield f"time     {took:.1f} s, {counts['rows'] / took:.1f} rows/s"
    yield f"latency  median {median:.2f} s, 95 % within {slow:.2f} s"
    if throttle.waited:
        yield f"limits   refused {throttle.refusals:,}, waited {throttle.waited:.1f} s"
    if counts["lost"]:
        yield f"lost     {counts['lost']:,} answers that could not be written"
    if counts["gone"]:
        yield f"kept     {counts['gone']:,} rows whose message is no longer in INPUT"
    if left:
        more, off = left / rows, 2 / math.sqrt(rows)
        tokens, usd = sum(counts[name] for name in TOKENS), throttle.paid * more
        fast, slow = median * left / throttle.most, took * more  # seconds
        show = tqdm.format_interval
        yield f"to come  {left:,} rows, about {tokens * more:,.0f} tokens"
        if throttle.prices:
            yield f"         {usd * max(0, 1 - off):.2f} to {usd * (1 + off):.2f} USD"
        yield f"         {show(fast)} to {show(slow)} min"


def run(args: argparse.Namespace, source: Path, output: Path) -> int:
    """Answers INPUT into OUTPUT; returns the exit status. Raises what stopped it."""
    if source.suffix.lower() not in (".txt", ".jsonl", ".csv"):
        raise StopRun(f"{source}: INPUT has to be a .txt, .jsonl or .csv file")
    read = partial(read_messages, source, args.field, args.shard)
    keys = array("q", (hash(message["text_message"]) for message in read()))
    if not keys:
        raise StopRun(f"{source}: no message in it")
    if output.exists() and (not output.is_file() or output.samefile(source)):
        raise StopRun(f"{output}: no plain file, or INPUT itself; choose another")
    args.offline or find_key()
    throttle = Throttle(args)
    if args.max_cost < sys.float_info.max and not (throttle.prices or args.offline):
        raise StopRun("--max-cost needs the PRICES of that MODEL in part 1")
    results = Results(output, hash_settings(args), args.restart)
    with results.file:
        todo = bytearray(offset < 0 for offset in results.match(keys)[0])
        left = sum(todo[args.limit :])
        del todo[args.limit :]
        messages = itertools.compress(read(), todo)
        total, done = len(todo), len(todo) - sum(todo)
        results.bar = tqdm(total=total, initial=done, unit="msg", disable=None)
        gc.freeze()  # what is there by now will stay: no collection needs to look at it
        try:
            with results.bar:
                if any(todo):
                    asyncio.run(answer_file(messages, results, throttle, args))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            try:
                results.order(read(), keys)
            finally:
                say("\n".join(summarize(results.counts, throttle, left)))
    return 1 if results.counts["ok"] < results.counts["rows"] else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(args.input)
            if args.input == "-":
                source = Path(folder, "stdin.txt")
                with open(source, "wb") as file:
                    shutil.copyfileobj(sys.stdin.buffer, file)
            line, status = "", run(args, source, Path(args.output))
    except StopRun as stop:
        line, status = f"{stop}\n", 2
    except OSError as error:
        line, status = f"{error.filename or args.output}: {error.strerror}\n", 2
    except KeyboardInterrupt:
        line, status = "interrupted\n", 130
    if status:
        again = [word for word in argv or sys.argv[1:] if word != "--restart"]
        join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
        say(f"{line}to go on: {join(['python', sys.argv[0], *again])}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
