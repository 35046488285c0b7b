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
  "usage": {"input_tokens": 131, "output_tokens": 24}, "settings": "a3f9a1c2"}

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
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from pydantic_core import from_json
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

# USD per million (input, output) tokens of MODEL, for the cost shown and --max-cost:
# change both together. None where it costs nothing: https://openai.com/api/pricing
PRICES: tuple[float, float] | None = (0.40, 1.60)

CONCURRENCY = 100  # most requests in flight; the pace below that is found, not set
TIMEOUT = 30.0  # seconds for one attempt; more for a slow local model
MAX_ATTEMPTS = 5  # tries for one message; waiting for a rate limit is not a try

# --- 2. One message, one call ---------------------------------------------------------
Row = dict[str, Any]  # a message: line and text_message; with its answer a row
TOKENS = ("input_tokens", "output_tokens")
TROUBLE = ("timeout", "connection", "server_error", "bad_response")  # is it down?
RETRIED = (*TROUBLE, "rate_limit", "invalid_answer")  # the same may succeed later


class StopRun(Exception):
    """The run cannot go on: a line that says why and what to do."""

    rows: Iterable[Row] = ()  # what `answer_all` had by then


@dataclass
class Reply:
    """What came of one call: a response, or the type and message of an error."""

    error: str = ""
    message: str = ""
    status: int = 0  # of an HTTP error
    headers: Any = None
    wait: float = 0.0  # seconds that the server asks for
    doubtful: bool = False  # rejected, perhaps for the settings and not the message
    model: str | None = None
    usage: dict[str, int] | None = None  # by the names in TOKENS
    response: Row | None = None


def to_line(value: Any) -> bytes:
    """A line of strict JSON in UTF-8; ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def new_client(args: argparse.Namespace) -> openai.AsyncOpenAI:
    """A client for the key and endpoint of the environment, or for the stand-in."""
    import openai

    url = start_offline_server(0.4, Counter()) if args.offline else ""
    url = url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    key = "offline" if args.offline else os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]+", key):
        raise StopRun("OPENAI_API_KEY holds no key: set it, or try it by --offline")
    if not re.fullmatch(r"(?i)https?://([\w.-]+|\[[\da-f:]+\])(:\d{1,5})?(/\S*)?", url):
        raise StopRun(f"OPENAI_BASE_URL is {url!r}, but has to be like http://host/v1")
    if sys.platform != "win32":  # a connection is an open file; offline it is two
        import resource

        files = args.concurrency * (2 if args.offline else 1) + 50
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files > hard != resource.RLIM_INFINITY:
            raise StopRun(f"--concurrency: needs {files} files, ulimit -Hn is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
    # aiohttp takes 40 % less CPU than the default transport. The SDK's own timeout is
    # off: it starts anew at every read, and an answer that trickles in never meets it.
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=args.concurrency)
    http = openai.DefaultAioHttpClient(limits=limits, trust_env=not args.offline)
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


async def call(api: openai.AsyncOpenAI, args: argparse.Namespace, text: str) -> Reply:
    """One attempt. Raises StopRun where no message can succeed."""
    import aiohttp
    import openai

    # extra_body goes out as it is: to walk over typed parameters would cost the SDK
    # 0.5 ms a row, and to parse the reply into its own Response another 0.6.
    body = args.request | {"input": PROMPT.replace("{text_message}", text)}
    try:
        sending = api.responses.with_raw_response.parse(extra_body=body)
        raw = await asyncio.wait_for(sending, args.timeout)
        reply = read_body(raw.content)
        reply.headers = raw.headers
    except TimeoutError:
        reply = Reply("timeout", f"no answer within {args.timeout:g} s")
    except openai.APIStatusError as error:
        reply = read_error(error, args.model)
        asked = api._parse_retry_after_header(reply.headers) or 0.0
        reply.wait = max(0.0, min(asked, 1e6))  # neither nan nor inf
    except (openai.APIConnectionError, aiohttp.ClientError) as error:
        cause = error.__cause__ or error
        reply = Reply("connection", str(cause.__cause__ or cause))
    # A server may quote the key that it was sent: no row and no line may show it. (A
    # short one, as local servers take, is no secret, and part of other words.)
    said = reply.message.replace(api.api_key if len(api.api_key) > 7 else "\0", "[key]")
    said = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", said)  # nor control a terminal
    reply.message = said.strip()[:300].encode(errors="replace").decode()
    if reply.error == "stop":
        raise StopRun(reply.message)
    return reply


def read_body(content: bytes) -> Reply:
    """The reply in the body of a 200; other servers leave out much of what OpenAI has:
    https://platform.openai.com/docs/api-reference/responses/object"""
    try:
        body = from_json(content, allow_inf_nan=False)
        items = [i for i in body["output"] or () if i.get("phase") != "commentary"]
        parts = [part for item in items for part in item.get("content") or ()]
        text = "".join(part["text"] for part in parts if part["type"] == "output_text")
        refusal = [part["refusal"] for part in parts if part["type"] == "refusal"]
        why = (body.get("incomplete_details") or {}).get("reason") or body.get("error")
        used: Row = {name: (body.get("usage") or {}).get(name) for name in TOKENS}
    except (ValueError, LookupError, TypeError, AttributeError):
        start = content[:4000].decode(errors="replace")
        return Reply("bad_response", f"not from the Responses API: {start!r}")
    model, status = body.get("model"), str(body.get("status"))
    reply = Reply(model=model if isinstance(model, str) else None)
    if all(isinstance(n, int) and 0 <= n < 1e9 for n in used.values()):
        reply.usage = used
    cut = "content_filter" if why == "content_filter" else "incomplete"
    kinds = {"failed": "server_error", "cancelled": "server_error", "incomplete": cut}
    reply.error = kinds.get(status, "refusal" if refusal else "")
    reply.message = " ".join(map(str, refusal)) or f"{status}: {why}"
    if not reply.error:
        try:
            answer = SCHEMA.model_validate_json(text).model_dump(mode="json")
            to_line(answer)  # raises ValueError for NaN
            reply.response = answer
        except ValueError as error:
            reply.error = "invalid_answer"
            reply.message, _, _ = str(error).partition("For further information")
    return reply


def read_error(error: openai.APIStatusError, model: str) -> Reply:
    """The reply for an HTTP error, of type "stop" where no other call can do better:
    https://platform.openai.com/docs/guides/error-codes"""
    status, names = error.status_code, {str(error.code), str(error.type)}
    param = error.param if isinstance(error.param, str) else ""
    setting = re.split(r"[.\[]", param)[0]
    about_input = setting.startswith(("input", "messages", "prompt"))
    where = f"{model!r} at {error.request.url}"
    advice = {
        401: "the key is not accepted: check OPENAI_API_KEY",
        402: "no credit left: add some",
        403: f"the key may not use {where}",
        404: f"no {where}: check --model and OPENAI_BASE_URL",
    }.get(status, "")
    if names & {"insufficient_quota", "billing_hard_limit_reached"}:
        advice = "no credit left: check plan and billing"
    elif status in (400, 422) and setting and not about_input:
        hint = ", say to None" if setting == "temperature" else ""
        advice = f"the setting {setting!r} is not accepted: change it in part 1{hint}"
    kind = "server_error" if status in (408, 409) or status >= 500 else "bad_request"
    kind = "stop" if advice else "rate_limit" if status == 429 else kind
    kind = "content_filter" if "content_filter" in names else kind
    said = error.body.get("message") if isinstance(error.body, dict) else None
    message = f"{advice}{advice and ': '}status {status}, {said or error.message}"
    doubtful = kind == "bad_request" and not about_input
    return Reply(kind, message, status, error.response.headers, doubtful=doubtful)


# --- 3. Many at a time ----------------------------------------------------------------
START = 8  # requests in flight at first: the most that a wrong key can cost
BACKOFF = 0.5  # seconds: a message's n-th retry waits a random part of BACKOFF * 2**n
PATIENCE = 600.0  # seconds of nothing but refusals, or of an outage, that end the run
OVERHEAD = 1000  # characters of instructions, prompt and schema, to guess tokens by
BEAT = 0.5  # seconds between two looks at how it goes, and between two fsyncs


@dataclass
class Mirror:
    """What the server has left of a limit: `left` at the time `seen`, and growing."""

    name: str  # "requests" or "tokens", as in the headers
    left: float = math.inf
    full: float = math.inf  # the most that can be left; inf: no limit is known
    rate: float = 0.0  # by which `left` grows, a second
    seen: float = 0.0
    at: float = 0.0  # when the request was sent whose reply is the latest news
    spent: float = 0.0  # by this run
    limit: float = 0.0  # as the headers name it; 0 where there were none
    margin: float = 1.0  # how many requests to leave room for: others may spend as well

    def wait(self, cost: float) -> float:
        """Seconds until there is room for a request of that cost; 0 if there is."""
        now = time.monotonic()
        if now > self.seen:
            self.left = min(self.full, self.left + self.rate * (now - self.seen))
            self.seen = now
        need = min(self.full, max(cost, min(self.margin * cost, self.full / 2)))
        short = need - self.left
        return max(0.0, short / self.rate) if self.rate else 0.1 * (short > 0)

    def spend(self, cost: float) -> float:
        """Books a request that starts now; returns all that was spent so far."""
        self.left, self.spent = self.left - cost, self.spent + cost
        return self.spent

    def read(self, reply: Reply, at: float, spent: float, cost: float) -> None:
        """Takes over what the reply to a request sent `at` that time says is left:
        https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers"""
        units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        try:
            limit = float(reply.headers[f"x-ratelimit-limit-{self.name}"])
            left = float(reply.headers[f"x-ratelimit-remaining-{self.name}"])
            reset = reply.headers[f"x-ratelimit-reset-{self.name}"]  # 6m0s, 1s, 120ms
            pairs = re.findall(r"([0-9.]+)(ms|[dhms])", reset)
            refill = sum(float(number) * units[unit] for number, unit in pairs)
        except (KeyError, ValueError, TypeError):
            return
        if at < self.at or not all(0 < x < math.inf for x in (limit, left + 1, refill)):
            return
        # In `refill` seconds it is full. Full is mostly `limit`, for a minute or a day;
        # where that takes under 30 s from empty, it is the most that was ever left.
        highest = self.full if limit == self.limit else 0.0
        from_empty = refill * limit / (limit - left) if left < limit else 0.0
        self.full = limit if from_empty >= 30 else max(highest, left + cost)
        self.rate, self.limit = (self.full - left) / refill, limit
        self.left, self.seen, self.at = left - (self.spent - spent), at, at
        self.margin *= 1.5 if reply.status == 429 else 0.998
        self.margin = min(20.0, max(2.0, self.margin))


async def pause(until: asyncio.Event, seconds: float) -> None:
    """Waits for the event, but not for more than so many seconds."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(until.wait(), seconds)


class Throttle:
    """Says when the next request may start, and learns from every reply. A request
    needs a slot, no brake on, and room in the mirrors of the server's limits. The
    window of slots grows while the server keeps up, and is cut when not (AIMD)."""

    def __init__(self, args: argparse.Namespace, api: openai.AsyncOpenAI) -> None:
        self.args, self.api, self.slots = args, api, asyncio.Semaphore(args.concurrency)
        self.turnstile, self.landed = asyncio.Lock(), asyncio.Event()
        self.stopping, self.reason = asyncio.Event(), BaseException()
        self.started = self.alive_at = self.last_cut = now = time.monotonic()
        self.full_at = self.brake_until = self.until = now  # until: the next may start
        # Before the first answer nobody knows what one costs.
        self.window = 1.0 if args.capped else float(min(START, args.concurrency))
        longest = args.request.get("max_output_tokens", 0)  # else the dearest so far
        self.ceiling = longest * args.prices[1] / 1e6  # USD, of an answer
        self.in_flight, self.fast, self.why = 0, True, "rate limited"  # fast: doubling
        self.waited = 0.0  # seconds with a brake on
        self.mirrors = self.requests, self.tokens = Mirror("requests"), Mirror("tokens")
        self.density = 0.3  # tokens per character; soon up, slowly down
        self.paid = self.booked = self.dearest = 0.0  # USD: all, in flight, a character
        self.pace, self.marked = 0.0, (now, 0.0)  # let through a second; at last 429
        self.answered, self.failures, self.refusals = "", 0, 0  # text; in a row; in all
        self.held = list[Row]()  # not written yet
        self.outcomes, self.usage = Counter(answered=0), Counter[str]()  # of the rows
        self.latencies = deque[float](maxlen=10_000)

    @property
    def down(self) -> bool:
        """Whether the server has answered before, and now fails every request."""
        return bool(self.answered) and self.failures >= 5

    async def send(self, text: str) -> Reply:
        """What came of one request, sent when its turn has come. May raise StopRun."""
        async with self.turnstile:  # one at a time, first come first served
            while (wait := self.wait(text)) or self.down:
                if wait:
                    await pause(self.landed, wait)
                    self.landed.clear()
                else:  # or is it these messages? ask one that was answered before
                    await self.attempt(self.answered)
        return await self.attempt(text)

    def costs(self, text: str) -> tuple[float, float, float]:
        """What a request may take, by those so far: requests, tokens, USD."""
        size = len(text) + OVERHEAD
        return 1.0, size * self.density, size * self.dearest + self.ceiling

    def wait(self, text: str) -> float:
        """Seconds until the next request may start; 0 if it may now. Raises StopRun."""
        now, (requests, tokens, usd) = time.monotonic(), self.costs(text)
        over_budget = self.paid + self.booked + usd > self.args.max_cost
        if over_budget and not self.in_flight:
            raise StopRun(f"--max-cost reached, {self.paid:.4f} USD spent")
        waits = self.requests.wait(requests), self.tokens.wait(tokens)
        wait = max(0.0, self.brake_until - now, *waits)
        if wait > PATIENCE and not self.in_flight:
            then = time.ctime(time.time() + min(wait, 1e9))
            raise StopRun(f"the limit is used up until {then}: run it again then")
        if self.stopping.is_set():
            raise StopRun
        if over_budget or self.in_flight >= max(1, int(self.window) - len(self.held)):
            self.full_at = now
            return 60.0  # or rather until one lands
        self.until, self.why = now + wait, self.why if wait else "rate limited"
        return wait

    async def attempt(self, text: str) -> Reply:
        """Sends a request now, and learns from the reply. May raise StopRun."""
        sent, (*costs, usd) = time.monotonic(), self.costs(text)
        spent = [mirror.spend(cost) for mirror, cost in zip(self.mirrors, costs)]
        self.in_flight, self.booked = self.in_flight + 1, self.booked + usd
        try:
            async with self.slots:
                reply = await call(self.api, self.args, text)
        finally:
            self.in_flight, self.booked = self.in_flight - 1, self.booked - usd
            self.landed.set()
        if reply.usage:
            size = len(text) + OVERHEAD
            dense = sum(reply.usage.values()) / size
            self.density = max(dense, self.density + 0.1 * (dense - self.density))
            used = zip(self.args.prices, reply.usage.values())
            paid = sum(price * tokens for price, tokens in used) / 1e6
            self.paid, self.dearest = self.paid + paid, max(self.dearest, paid / size)
        elif self.args.capped and reply.response:
            self.stop(StopRun("--max-cost: this server does not say what it used"))
        for mirror, cost, by_then in zip(self.mirrors, costs, spent):
            mirror.read(reply, sent, by_then, cost)
        if reply.error in (*TROUBLE, "rate_limit"):
            self.slow_down(reply, sent)
        elif self.answered or not reply.doubtful:
            self.alive_at, self.answered, self.failures = time.monotonic(), text, 0
            self.latencies.append(self.alive_at - sent)
            if not self.requests.limit:  # a guessed rate: find out if there is more
                self.requests.rate *= 1.008
            if sent <= self.full_at:  # all of the window was in use since then
                more = 2.0 if self.fast else 1 / self.window
                self.window = min(self.args.concurrency, self.window + more)
        return reply

    def slow_down(self, reply: Reply, sent: float) -> None:
        """Brakes all and cuts the window, once for all that was sent before the cut."""
        now, news = time.monotonic(), sent >= self.last_cut
        quiet, refused = now - self.alive_at, reply.status == 429
        self.refusals += refused
        self.failures += not refused
        stuck = reply.error == "timeout" and self.failures >= 3
        rest, least = max(2 * BACKOFF, quiet), 0.0
        if refused:
            why, through = "rate limited", self.requests.spent - self.refusals
            if news and through - self.marked[1] >= 5:
                # Used up then and used up now: what went through since is the rate. The
                # first time it is too much: at the start the bucket was full.
                found = (through - self.marked[1]) / (now - self.marked[0])
                found *= 0.5 if self.fast else 1.0
                self.pace, self.marked = max(0.85 * self.pace, found), (now, through)
            least = self.pace * sum(self.latencies) / max(1, len(self.latencies))
        elif self.down:
            why, least = f"server down ({reply.error})", START
        elif reply.status in (503, 529) or stuck:
            why, rest = "server overloaded", quiet
        else:
            return
        if news:
            cut = self.window * (0.0 if self.down else 0.5 if self.fast else 0.9)
            self.window = min(self.args.concurrency, max(1.0, cut, least))
            self.last_cut, self.fast = now, self.down
            if quiet > PATIENCE + self.args.timeout:
                raise StopRun(f"{why}, no answer for {quiet:.0f} s: run it again later")
        wait = reply.wait or random.uniform(0.1, 0.2) * min(60.0, rest) * news
        until = now + wait * random.uniform(1, 1.1)  # other runs wait as well
        self.waited += max(0.0, until - max(now, self.brake_until))
        self.brake_until, self.why = max(self.brake_until, until), why
        if refused and self.pace and not self.requests.limit:
            self.requests.left, self.requests.full = 1.0, max(2.0, self.pace)
            self.requests.rate, self.requests.seen = self.pace, self.brake_until

    def check_start(self) -> None:
        """Raises StopRun if the first messages all failed: the others would, too."""
        if len(self.held) >= 5 and not (self.answered or self.in_flight):
            why = self.held[-1]["error"]["message"]
            raise StopRun(f"the first all failed, check part 1 and the server: {why}")

    def stop(self, reason: BaseException) -> None:
        """Lets nothing more start: what waits gives up, what is in flight may land."""
        self.reason = self.reason if self.stopping.is_set() else reason
        self.stopping.set()
        self.landed.set()


async def ask(throttle: Throttle, row: Row) -> Row:
    """The row of a message: its answer, or the error of its last try."""
    attempts, refusals, usage, began = 0, 0, Counter[str](), time.monotonic()
    while True:
        reply = await throttle.send(row["text_message"])
        usage.update(reply.usage or {})
        refusals += reply.status == 429
        # Refused again and again while others are answered: larger than the limit.
        refused = refusals > 30 and throttle.alive_at > began
        excused = throttle.down or (reply.error == "rate_limit" and not refused)
        attempts += not excused
        if reply.error not in RETRIED or attempts >= throttle.args.max_attempts:
            break
        if not excused:  # back off with full jitter; waiting holds no slot
            # https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
            longest = min(60.0, BACKOFF * 2 ** min(attempts, 10))
            await pause(throttle.stopping, random.uniform(0, longest))
    error = {"type": reply.error, "message": reply.message, "attempts": attempts}
    row |= {"response": reply.response, "error": error if reply.error else None}
    row |= {"model": reply.model, "usage": dict(usage) or None}
    return row | {"settings": throttle.args.settings}


def say(line: str) -> None:
    """Prints to standard error, above the bar."""
    with contextlib.suppress(OSError):  # nobody reads it: no reason to stop
        tqdm.write(line, file=sys.stderr)


def describe(throttle: Throttle) -> str:
    """How the run goes, for the bar."""
    errors = throttle.outcomes.total() - throttle.outcomes["answered"]
    wait, now = throttle.until - time.monotonic(), f"{throttle.in_flight} in flight"
    if wait > 0.5:
        now = f"{throttle.why}, {wait:.0f} s"
    spent = f", ${throttle.paid:.2f}" if throttle.paid else ""
    return f"{errors:,} errors, {now}{spent}"


async def attend(throttle: Throttle, bar: Any, sync: Any) -> None:
    """At every BEAT: how it goes, to the bar, and what was written, to the disk."""
    for beat in itertools.count(1):
        await asyncio.sleep(BEAT)
        bar.set_postfix_str(describe(throttle))
        if bar.disable and beat % 60 == 0:  # no terminal: a line now and then
            done, total = bar.n + throttle.outcomes.total(), bar.total
            share = f"{done:,} of {total:,}" if total else f"{done:,}"
            say(f"{share} rows, {describe(throttle)}")
        try:
            await asyncio.to_thread(sync or bool)  # bool: nothing to do
        except (StopRun, OSError) as reason:
            throttle.stop(reason)


def settle(throttle: Throttle, bar: Any, keep: Callable[[Row], object]) -> None:
    """Hands over the rows held, counts them and moves the bar: the one place for it."""
    while throttle.held:
        row = throttle.held[-1]
        keep(row)  # where that fails it stays among the held
        throttle.held.pop()
        kind = row["error"]["type"] if row["error"] else "answered"
        throttle.outcomes[kind] += 1
        throttle.usage.update(row["usage"] or {})
        if row["error"] and throttle.outcomes[kind] == 1:  # of each an example
            say(f"line {row['line']}: {kind}, {row['error']['message']}")
        bar.set_postfix_str(describe(throttle), refresh=False)
        bar.update()


async def answer_each(
    queue: Iterator[Row], throttle: Throttle, bar: Any, keep: Any, sync: Any = None
) -> None:
    """Answers all messages; `keep` gets each row, `sync` is called now and then. Raises
    what stopped it. The first Ctrl-C lets those in flight land."""

    # Workers on one iterator, not a task for each message: 100,000 messages would be
    # 171 MiB of tasks. Sharing is safe: only at an await can another worker take over.
    async def work() -> None:
        try:
            for message in queue:
                throttle.held.append(await ask(throttle, message))
                if throttle.answered:
                    settle(throttle, bar, keep)
                throttle.check_start()
        except (StopRun, OSError) as reason:  # OSError: of the file that `keep` writes
            throttle.stop(reason)

    me, loop = asyncio.current_task(), asyncio.get_running_loop()
    if sync and me:  # not asyncio's own handler: its second Ctrl-C breaks into any task
        signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(me.cancel))
    async with throttle.api, asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(attend(throttle, bar, sync))
        crew = range(throttle.args.concurrency + 100)  # more than slots: some only wait
        workers = [tasks.create_task(work()) for _ in crew]
        try:
            await asyncio.wait(workers)
        except asyncio.CancelledError:
            if sync:  # in a notebook nothing would keep what they bring
                throttle.stop(KeyboardInterrupt())
                say(f"waiting for {throttle.in_flight} in flight; Ctrl-C again to stop")
                await asyncio.wait(workers)
            raise
        watch.cancel()
    if throttle.stopping.is_set():
        raise throttle.reason
    settle(throttle, bar, keep)


# --- 4. Files -------------------------------------------------------------------------
def read_messages(path: Path, name: str, shard: tuple[int, int]) -> Iterator[Row]:
    """The messages of INPUT but blank ones; of shard (k, n) every n-th from the k-th.
    Raises StopRun at the first record that is no message."""
    kind, count, read, line = path.suffix.lower(), 0, 0, 1  # line: where one begins

    def read_lines() -> Iterator[str]:
        nonlocal read
        with open(path, "rb") as file:
            for read, text in enumerate(file, 1):
                yield text.decode("utf-8-sig" if read == 1 else "utf-8")

    try:
        for record in read_table(read_lines()) if kind == ".csv" else read_lines():
            if kind == ".jsonl" and record.strip():
                record = from_json(record, allow_inf_nan=False)
            fields = record if isinstance(record, dict) else {name: record}
            if name not in fields:
                raise ValueError(f"no {name!r} among {[*fields]}: see --field")
            if not isinstance(text := fields.pop(name), str):
                raise ValueError(f"the message is no text, but {text!r:.50}")
            message = {"line": line, "text_message": text.rstrip("\r\n")}
            message |= {"fields": fields} if fields is record else {}
            to_line(message)  # raises ValueError for what JSON does not have
            count += bool(text.strip())
            if text.strip() and count % shard[1] == shard[0] % shard[1]:
                yield message
            line = read + 1
    except UnicodeDecodeError:
        raise StopRun(f"{path}, line {line}: not UTF-8, save it as UTF-8") from None
    except (ValueError, csv.Error) as error:
        raise StopRun(f"{path}, line {line}: {error}") from None


def read_table(lines: Iterator[str]) -> Iterator[Any]:
    """The records of a CSV file; a blank text for its header and for blank lines."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(lines, strict=True)
    header = next(rows, [])
    if len({*header}) < len(header):
        raise ValueError("two columns have the same name")
    yield ""  # as the header counts as a line
    for cells in rows:
        if cells and len(cells) != len(header):
            raise ValueError(f"{len(cells)} cells in {len(header)} columns")
        yield dict(zip(header, cells)) if cells else ""


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
        self.path, self.settings, self.gone = path.resolve(), settings, list[int]()
        self.temporary, self.end = self.path.with_name(f".{self.path.name}.tmp"), 0
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
                self.temporary.touch()  # can it be put in order in the end?
                return self.temporary.unlink()
            self.file.close()

    def is_there(self) -> bool:
        """Whether the open file is still the one at its path."""
        mine = os.fstat(self.file.fileno())
        return self.path.exists() and os.path.samestat(mine, self.path.stat())

    def add(self, row: Row) -> None:
        """Appends a row in one write. OSError if the disk is full; no torn row then."""
        line, end = to_line(row), self.file.seek(0, os.SEEK_END)
        if end < self.end:
            raise StopRun(f"{self.path} was cut during the run")
        if self.file.write(line) != len(line):
            self.file.truncate(end)
            raise OSError(28, "No space left on device")
        self.end = end + len(line)

    def sync(self) -> None:
        """Makes the rows survive a power failure. Raises StopRun if OUTPUT is gone."""
        os.fsync(self.file.fileno())
        if not self.is_there():
            raise StopRun(f"{self.path} was moved or deleted during the run")

    def load(self) -> None:
        """Notes, by the hash of a text, where its answers and last error are. Drops a
        torn last line. StopRun at one that is no row, or made with other settings."""
        self.answers, self.errors = dict[int, int](), dict[int, int]()
        self.others = defaultdict[int, deque[int]](deque)  # of texts that come again
        offset, start = 0, b'{"line": '
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path}, line {number}"
                if not line.endswith(b"\n") and start.startswith(line[: len(start)]):
                    self.file.truncate(offset)
                    say(f"{where}: torn by a crash; dropped, and asked again")
                    break
                try:
                    row = from_json(line, allow_inf_nan=False)
                    made, key = row["settings"], hash(row["text_message"])
                    answered = row["response"] is not None
                except (ValueError, LookupError, TypeError):
                    raise StopRun(f"{where}: not a row; mend or delete it") from None
                if made != self.settings:
                    made = f"{where}: made by {row.get('model')} or another part 1"
                    raise StopRun(f"{made}; choose another OUTPUT, or --restart")
                if not answered:
                    self.errors[key] = offset
                elif self.answers.setdefault(key, offset) < offset:  # it has one
                    self.others[key].append(offset)
                offset += len(line)
        self.end = offset

    def take(self, key: int, otherwise: int = -1) -> int:
        """The offset of the next answer to that text; `otherwise` if none is left."""
        offset = self.answers.pop(key, otherwise)
        if self.others.get(key):
            self.answers[key] = self.others[key].popleft()
        return offset

    def missing(self, keys: array[int]) -> bytearray:
        """For each message, by the hash of its text, 1 if it has no answer, else 0."""
        self.load()
        known = (key in self.answers or key in self.errors for key in keys)
        if (self.answers or self.errors) and not any(known):
            raise StopRun(f"{self.path} answers other messages: choose another OUTPUT")
        return bytearray(self.take(key) < 0 for key in keys)

    def in_order(self, messages: Iterable[Row]) -> Iterator[bytes]:
        """The rows in INPUT's order, with its lines and fields; the others behind."""
        self.load()
        gone = dict(self.errors)  # in the end those whose message left INPUT
        with open(self.path, "rb") as file:
            for message in messages:
                key = hash(message["text_message"])
                gone.pop(key, None)
                offset = self.take(key, self.errors.get(key, -1))
                if offset >= 0:
                    file.seek(offset)
                    yield to_line(from_json(file.readline()) | message)
            answers = itertools.chain(self.answers.values(), *self.others.values())
            self.gone = sorted([*gone.values(), *answers])
            for offset in self.gone:
                file.seek(offset)
                yield file.readline()

    def order(self, messages: Iterable[Row]) -> None:
        """Puts OUTPUT in INPUT's order, in one atomic step."""
        try:
            self.sync()  # no other file than ours is to be replaced
            with open(self.temporary, "wb") as new:
                new.writelines(self.in_order(messages))
                new.flush()
                os.fsync(new.fileno())
            if not filecmp.cmp(self.path, self.temporary, shallow=False):
                shutil.copymode(self.path, self.temporary)
                if sys.platform == "win32":
                    self.file.close()  # Windows replaces no open file
                self.temporary.replace(self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


# --- 5. No key yet? -------------------------------------------------------------------
FORMATS = {"date": "2024-02-29", "time": "12:00:00Z", "uri": "https://example.org"}
FORMATS |= {"date-time": "2024-02-29T12:00:00Z", "uuid": str(uuid.UUID(int=0))}


def placeholder(schema: Any, dice: random.Random, root: Any, depth: int = 0) -> Any:
    """Something that fits the JSON schema; the same for the same dice."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if options := schema.get("anyOf") or schema.get("oneOf"):
        # What refers to itself has to end: null is last.
        part = dice.choice(options) if depth < 5 else options[-1]
        return placeholder(part, dice, root, depth + 1)
    if "enum" in schema or "const" in schema:
        return dice.choice(schema.get("enum") or [schema["const"]])
    kind, step = schema.get("type"), 1 if schema.get("type") == "integer" else 0.01
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
    number = round(dice.uniform(low, min(high, low + 100)), 2 if step < 1 else None)
    text = "Placeholder made offline: no model was asked."[: schema.get("maxLength")]
    text = text.ljust(schema.get("minLength", 0), ".")
    text = FORMATS.get(schema.get("format"), text)
    other = {"boolean": dice.random() < 0.5, "null": None, "string": text}
    return other.get(kind, number)


def start_offline_server(latency: float, load: Counter[str]) -> str:
    """The address of a stand-in for the API, in a thread of this process: placeholders
    after some `latency` seconds. `load` tells how many are "in flight", the "peak"."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(re.findall(rb"(?i)content-length: *(\d+)", head)[0])
                body = from_json(await reader.readexactly(size))
                load["in flight"] += 1
                load["peak"] = max(load["peak"], load["in flight"])
                dice = random.Random(body["input"])  # same message, same answer
                schema = body["text"]["format"]["schema"]
                text = json.dumps(placeholder(schema, dice, schema))
                part = {"type": "output_text", "text": text}
                reply: Row = {"output": [{"type": "message", "content": [part]}]}
                reply |= {"usage": dict(zip(TOKENS, (size // 4, len(text) // 4)))}
                content = to_line(reply | {"model": "offline"})
                await asyncio.sleep(latency * dice.lognormvariate(0, 0.3))
                load["in flight"] -= 1
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n" % len(content) + content)
        writer.close()

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    starting = asyncio.start_server(serve, "127.0.0.1", 0, backlog=1000)
    server = asyncio.run_coroutine_threadsafe(starting, loop).result()
    return "http://{}:{}/v1".format(*server.sockets[0].getsockname())


# --- 6. Command line ------------------------------------------------------------------
LAYOUT = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}, {rate_fmt} {bar}"
LOOK: dict[str, Any] = {"unit": "msg", "bar_format": LAYOUT}  # the bar fills the rest


def parse_args(argv: list[str] | None, **given: Any) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line where it is wrong."""
    parser = argparse.ArgumentParser(None, "%(prog)s INPUT OUTPUT [options]", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    add = parser.add_argument
    add("input", metavar="INPUT", help=".txt: a message a line; .jsonl; .csv; -: stdin")
    add("output", metavar="OUTPUT", help="the results, JSON Lines")
    for name, metavar, default, text in (
        ("--field", "NAME", "text", "field of .csv or .jsonl to ask about (text)"),
        ("--model", "NAME", MODEL, "the model to ask (%(default)s)"),
        ("--concurrency", "N", CONCURRENCY, "most requests in flight (%(default)s)"),
        ("--timeout", "S", TIMEOUT, "seconds for one attempt (%(default)s)"),
        ("--max-attempts", "N", MAX_ATTEMPTS, "tries for one message (%(default)s)"),
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
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: has to be above 0, and finite")
    parts = re.fullmatch("([0-9]+)/([0-9]+)", args.shard)
    args.shard = tuple(map(int, parts.groups())) if parts else (0, 0)
    if not 1 <= args.shard[0] <= args.shard[1]:
        parser.error("argument --shard: has to be like 1/4, 2/4, 3/4 or 4/4")
    known = PRICES if args.model == MODEL and not args.offline else None
    args.prices = known or (0.0, 0.0)  # USD per million tokens; 0 where none are known
    args.capped = args.max_cost < sys.float_info.max and not args.offline
    if args.capped and not known:
        parser.error("argument --max-cost: needs the PRICES of that MODEL in part 1")
    if "{text_message}" not in PROMPT:
        parser.error("PROMPT in part 1 has no {text_message}, the place of the message")
    args.request = build_request(args.model)
    shape = json.dumps([args.request, PROMPT, args.offline], sort_keys=True)
    # To pandas digits alone would be a number.
    args.settings = "a" + hashlib.sha256(shape.encode()).hexdigest()[:7]
    return args


async def answer_all(
    messages: Iterable[str],
    *,
    model: str = MODEL,
    concurrency: int = CONCURRENCY,
    timeout: float = TIMEOUT,  # noqa: ASYNC109
    offline: bool = False,
) -> list[Row]:
    """The rows of all messages that are not blank, in order; in a notebook
    `await answer_all(texts)`. Raises StopRun, whose `rows` are those made so far."""
    given = {"model": model, "concurrency": concurrency, "timeout": timeout}
    args, rows = parse_args(["-", "-"], offline=offline, **given), list[Row]()
    texts = ((n, t) for n, t in enumerate(messages, 1) if isinstance(t, str))
    # What is only half of a character could not be sent, nor written.
    whole = ((n, t.encode(errors="replace").decode()) for n, t in texts if t.strip())
    queue = ({"line": n, "text_message": t} for n, t in whole)
    throttle = Throttle(args, new_client(args))
    with tqdm(messages, **LOOK) as bar:  # it knows the length, if there is one
        try:
            await answer_each(queue, throttle, bar, rows.append)
        except StopRun as stop:
            stop.rows = rows
            raise
    return sorted(rows, key=lambda row: row["line"])


def summarize(throttle: Throttle, gone: int, left: int) -> str:
    """The closing lines; for `left` messages, not asked yet, what they may take."""
    outcomes, used = throttle.outcomes, [throttle.usage[name] for name in TOKENS]
    rows, priced = outcomes.total(), any(throttle.args.prices)
    times = sorted(throttle.latencies) or [0.0]
    median, late = times[len(times) // 2], times[-len(times) // 20]
    took = time.monotonic() - throttle.started
    lost = sum(bool(row["response"]) for row in throttle.held)
    # What is to come: `more` times what was seen, give or take the share `off`.
    more, off = (left / rows, 2 / math.sqrt(rows)) if rows else (0.0, 0.0)
    low, high = max(0, 1 - off) * more * throttle.paid, (1 + off) * more * throttle.paid
    fast, slow = median * left / throttle.args.concurrency, took * more  # seconds
    table = {
        "rows": ", ".join(f"{n:,} {kind}" for kind, n in outcomes.items()),
        "tokens": f"{used[0]:,} in, {used[1]:,} out",
        "cost": f"{throttle.paid:.4f} USD" if priced else "",
        "time": f"{took:.1f} s, {rows / took:.1f} rows/s",
        "latency": f"median {median:.2f} s, 95 % within {late:.2f} s",
        "limits": f"refused {throttle.refusals:,}, waited {throttle.waited:.1f} s",
        "lost": f"{lost:,} answers that could not be written" if lost else "",
        "kept": f"{gone:,} rows whose message is no longer in INPUT" if gone else "",
        "to come": f"{left:,} rows, {sum(used) * more:,.0f} tokens" if more else "",
        "for": f"{low:.2f} to {high:.2f} USD" if more and priced else "",
        "in": f"{fast / 60:.1f} to {slow / 60:.1f} min" if more else "",
        "by": "the same command without --limit" if left else "",
    }
    return "\n".join(f"{name:8} {text}" for name, text in table.items() if text)


def run(args: argparse.Namespace, folder: Path) -> int:
    """Answers INPUT into OUTPUT; returns the exit status. Raises what stopped it."""
    source, output = Path(args.input), Path(args.output)
    if args.input == "-":  # INPUT is read three times: a copy can be
        source = folder / "stdin.txt"
        with open(source, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    known = source.suffix.lower() in (".txt", ".jsonl", ".csv")
    if not known or (source.exists() and not source.is_file()):
        raise StopRun(f"{source}: has to be .txt, .jsonl or .csv, or - for a pipe")
    read = partial(read_messages, source, args.field, args.shard)
    keys = array("q", (hash(message["text_message"]) for message in read()))
    if not keys:
        raise StopRun(f"{source}: no message in it")
    if output.exists() and (not output.is_file() or output.samefile(source)):
        raise StopRun(f"{output}: not a plain file, or INPUT itself: choose another")
    api, results = new_client(args), Results(output, args.settings, args.restart)
    with results.file:
        missing = results.missing(keys)
        left = sum(missing[args.limit :])
        del missing[args.limit :]
        todo, done = itertools.compress(read(), missing), missing.count(0)
        throttle = Throttle(args, api)
        gc.freeze()  # what is there by now will stay: no collection needs to look at it
        try:
            with tqdm(total=len(missing), initial=done, disable=None, **LOOK) as bar:
                asyncio.run(answer_each(todo, throttle, bar, results.add, results.sync))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                results.order(read())
            finally:
                say(summarize(throttle, len(results.gone), left))
    return 1 if throttle.outcomes["answered"] < throttle.outcomes.total() else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        args = parse_args(argv)
        with tempfile.TemporaryDirectory() as folder:
            line, status = "", run(args, Path(folder))
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
