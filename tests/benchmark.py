"""Measures what the template promises in figures: run by hand, never by CI.

  python tests/benchmark.py                    everything: about 45 minutes
  python tests/benchmark.py --quick            everything, several times smaller
  python tests/benchmark.py limits kill        some sections only
  python tests/benchmark.py memory --million   a million messages at a server, too
  python tests/benchmark.py limits --first first/async_template.py     two in turn

Each program is a process on one core, the server (tests/server.py) another on another.
A Markdown table on standard output; exit 1 if a bound was missed. The bounds
are for the full size: with --quick, start and end weigh more. Not for Windows, which
does not tell how much memory a process took at most.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import itertools
import json
import math
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

Json = dict[str, Any]

HERE = Path(__file__).resolve()
TEMPLATE = HERE.parents[1] / "async_template.py"
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
RPS = 50  # 3,000 requests a minute
MOST_MB = 300  # for a million messages


class Row(NamedTuple):
    """A line of the table; ok is None where there is no bound."""

    name: str
    measured: str
    bound: str = ""
    ok: bool | None = None


class BenchmarkError(Exception):
    """A program did not do what it is measured at."""


# --- Processes ------------------------------------------------------------------------
note = partial(print, file=sys.stderr)  # tells how far it is


def pin(process: subprocess.Popen[Any], core: int) -> None:
    """Keeps a process that has just begun, and its threads to come, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {core})


@contextlib.contextmanager
def serve(flags: str = "") -> Iterator[str]:
    """The url of the test server, which has the last core."""
    command = [sys.executable, str(HERE.with_name("server.py")), *flags.split()]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        pin(process, CORES[-1])
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def get_stats(url: str) -> Json:
    """What the server has counted up to now."""
    with urlopen(url.replace("/v1", "/stats"), timeout=60) as reply:
        stats: Json = json.load(reply)
    return stats


class Program:
    """A Python program in a process of its own, on the first core."""

    def __init__(self, url: str, log: Path, *arguments: object) -> None:
        self.log = log
        self.started = time.monotonic()
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.peak_mb = 0.0
        command = [sys.executable, *map(str, arguments)]
        env = {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "benchmark-key"}
        env["TMPDIR"] = str(log.parent)  # what is killed leaves its folders there
        with log.open("w") as err:
            out = subprocess.DEVNULL
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=err)
        pin(self.process, CORES[0])

    def kill(self) -> None:
        """Kills it, as a crash would."""
        os.kill(self.process.pid, signal.SIGKILL)

    def wait(self, patience: float = 600.0) -> str:
        """What is wrong with how it ended; if that takes too long it is killed."""
        timer = threading.Timer(patience, self.kill)
        timer.daemon = True
        timer.start()
        _, status, usage = os.wait4(self.process.pid, 0)
        timer.cancel()
        self.seconds = time.monotonic() - self.started
        self.cpu_seconds = usage.ru_utime + usage.ru_stime
        self.peak_mb = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        code = os.waitstatus_to_exitcode(status)
        self.process.returncode = code
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"exit status {code}: {' '.join(last)}" if code else ""


# --- Messages and runs ----------------------------------------------------------------
def sentence(number: int) -> str:
    """A message of ordinary size."""
    return f"message {number}: the service here is very good, but the soup was cold"


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a file line by line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def output_of(source: Path) -> Path:
    """The OUTPUT of an INPUT."""
    return source.with_suffix(".jsonl")


def count_answers(source: Path) -> int:
    """How many rows with an answer stand where INPUT has their message."""
    right = 0
    with source.open(encoding="utf-8") as texts, output_of(source).open("rb") as lines:
        for text, line in itertools.zip_longest(texts, lines):
            row = json.loads(line or b'{"text_message": null}')
            same = text is not None and row["text_message"] == text.rstrip("\n")
            right += same and row["response"] is not None
    return right


def start(url: str, source: Path, *arguments: object) -> Program:
    """Starts the template, whose path the arguments begin with, on an INPUT."""
    path, *options = arguments
    log = source.with_suffix(".log")
    return Program(url, log, path, source, output_of(source), *options)


class Outcome(NamedTuple):
    """What came of one or more programs at a server."""

    rows: int
    answered: int
    program: Program  # the last one
    trouble: str
    stats: Json

    @property
    def span(self) -> float:
        """Seconds from the first request to the last reply."""
        return float(self.stats["last_reply_at"] - self.stats["first_request_at"])

    @property
    def refused(self) -> float:
        """The share of all requests that were refused."""
        refusals = self.stats["refused_429"] + self.stats["refused_503"]
        return float(refusals / self.stats["requests"])

    def __str__(self) -> str:
        """How many rows have answers."""
        trouble = f" ({self.trouble})" if self.trouble else ""
        return f"{self.answered:,} of {self.rows:,} rows{trouble}"


def run(
    who: Path | str,
    flags: str,
    rows: int,
    *options: object,
    make: Callable[[int], str] = sentence,
    runs: int = 1,
) -> Outcome:
    """Lets the template, or one of CLIENTS, ask a server that has these flags."""
    with tempfile.TemporaryDirectory() as folder, serve(flags) as url:
        sources = [Path(folder, f"in{n}.txt") for n in range(runs)]
        for source in sources:
            write_lines(source, map(make, range(rows // runs)))
        if isinstance(who, Path):
            programs = [start(url, source, who, *options) for source in sources]
        else:
            client = (HERE, "--client", who, url, rows, *options)
            programs = [Program(url, Path(folder, "log"), *client)]
        troubles = [program.wait(120 + rows / 20) for program in programs]
        stats = get_stats(url)
        if not stats["last_reply_at"]:
            raise BenchmarkError(*troubles)
        answered = stats["answered_200"]
        if isinstance(who, Path):
            answered = sum(map(count_answers, sources))
        trouble = "; ".join(filter(None, troubles))
        return Outcome(rows, answered, programs[-1], trouble, stats)


def in_time(name: str, got: Outcome, seconds: float, ideal: float, most: float) -> Row:
    """Holds the seconds that something took against the most that it may take."""
    measured = f"{got}, {seconds:.1f} s, {seconds / ideal:.2f} of the ideal"
    good = got.answered == got.rows and seconds <= most
    return Row(name, measured, f"all rows, {most:.1f} s", good)


def compare(
    what: str,
    kinds: Sequence[str],
    take: Callable[[str], tuple[float, str]],
    rounds: int,
    *,
    least: float = 0.0,
    most: float = math.inf,
) -> Iterator[Row]:
    """Takes a figure of each kind in turn, several rounds; the first kind's is divided
    by the others', and the ratio to the second kind's has a bound."""
    figures: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _, kind in itertools.product(range(rounds), kinds):
        figure, unit = take(kind)
        figures[kind].append(figure)
    for kind in kinds:
        yield Row(f"{what}, {kind}", f"{spread(figures[kind])} {unit}")
    ours, *others = kinds
    for kind in others:
        ratios = [ours / its for ours, its in zip(figures[ours], figures[kind])]
        row = Row(f"{what}, {ours} / {kind}", spread(ratios))
        if kind == others[0]:
            good = least <= statistics.median(ratios) <= most
            bound = f"at least {least:g}" if least else f"at most {most:g}"
            row = row._replace(bound=bound, ok=good)
        yield row


def spread(values: Sequence[float]) -> str:
    """The median with the lowest and the highest."""
    digits = 0 if min(values) > 100 else 2
    three = (statistics.median(values), min(values), max(values))
    return "{} ({} to {})".format(*(f"{value:,.{digits}f}" for value in three))


# --- Limits ---------------------------------------------------------------------------
def sized_sentence(number: int) -> str:
    """A message of 70 to 8,000 characters, always the same for a number."""
    words = random.Random(number).lognormvariate(4.0, 1.0)
    return sentence(number) + " and so on" * min(800, int(words))


class Limit(NamedTuple):
    """A server that refuses what is too much, and how well it has to be used."""

    name: str
    flags: str
    rows: int
    use: float  # at least this share of what the server allows
    refused: float = 1.0  # at most this share of the requests
    make: Callable[[int], str] = sentence
    runs: int = 1


MEAN_TOKENS = statistics.fmean(len(sized_sentence(n)) / 4 + 80 for n in range(2000))
RPM = f"--latency 0.2 --rps {RPS}"
TPM = f"--latency 0.2 --tpm-per-second {RPS * MEAN_TOKENS:.0f} --headers"
SLOW = "--latency 2 --sigma 0.5 --rps 25"
LIMITS = (
    Limit("3,000 RPM, headers", f"{RPM} --headers", 2000, 0.97, 0.01),
    Limit("3,000 RPM, bare 429", RPM, 2000, 0.95, 0.05),
    Limit("token limit, headers", TPM, 2000, 0.95, 0.01, make=sized_sentence),
    Limit("25 a second, 2 s jittered, bare 429", SLOW, 2000, 0.8),
    Limit("2 a second, bare 429", "--latency 0.2 --rps 2", 200, 0.95),
    Limit("two runs, headers", f"{RPM} --headers", 2000, 0.95, 0.05, runs=2),
    Limit("two runs, bare 429", RPM, 2000, 0.95, 0.05, runs=2),
    Limit("20 in flight, 503", "--latency 0.2 --capacity 20", 2000, 0.8),
)


def use_of(got: Outcome) -> float:
    """The share that was let through of what the server allows."""
    policies = {policy["policy"]: policy for policy in got.stats["policies"]}
    if "Capacity" in policies:
        return got.rows * 0.2 / 20 / got.span
    bucket = policies.get("RateLimit") or policies["TokenLimit"]
    allowed = bucket["allowed_at_last_request"] + bucket["burst"]
    return float(bucket["taken"] / allowed)


def measure_limits(args: argparse.Namespace) -> Iterator[Row]:
    """How much of what a server allows is used, and how often it refuses."""
    script, part = args.script, 4 if args.quick else 1
    for limit in LIMITS:
        rows = limit.rows // part
        got = run(script, limit.flags, rows, make=limit.make, runs=limit.runs)
        use = use_of(got)
        good = got.answered == got.rows
        good = good and use >= limit.use and got.refused <= limit.refused
        measured = f"{got}, use {use:.3f}, refused {got.refused:.1%}"
        bound = f"all rows, use {limit.use}"
        if limit.refused < 1:
            bound += f", refused {limit.refused:.0%}"
        yield Row(limit.name, measured, bound, good)
    yield measure_change(args, "headers", 5, f"{RPM} --headers")
    yield measure_change(args, "bare 429", 10, RPM)
    yield measure_outage(args)
    rows = 2000 // part
    ideal = rows * 0.5 / 100
    got = run(script, "--latency 0.5", rows)
    yield in_time("no limit, 0.5 s answers", got, got.span, ideal, 1.15 * ideal)
    got = run(script, "--latency 0.5 --no-room 0.1", rows)
    yield in_time("10% resource_unavailable", got, got.span, ideal, 2.5 * ideal)
    got = run(script, "--latency 1", 100)
    yield in_time("100 messages, 1 s answers", got, got.span, 1.0, 2.5)
    requests = run(script, "--default 401", 300).stats["requests"]
    yield Row("wrong key", f"{requests} requests", "at most 10", requests <= 10)


def measure_change(args: argparse.Namespace, name: str, most: float, flags: str) -> Row:
    """A limit that halves in mid-run and doubles again, each for some seconds."""
    period = 10 if args.quick else 20
    plan = f"{period}:{RPS // 2},{2 * period}:{RPS}"
    got = run(args.script, f"{flags} --plan {plan}", RPS * (period * 5 // 2 + 1))
    answered = got.stats["answered_200_by_second"]
    note(f"answers in each second of {plan}, {name}: {answered}")
    halved = settled_after(answered[period : 2 * period], RPS / 2)
    doubled = settled_after(answered[2 * period : 3 * period], RPS)
    measured = f"{got}, use {use_of(got):.3f}, refused {got.refused:.1%}, "
    measured += f"within 10% after {halved:g} s, {doubled:g} s"
    good = got.answered == got.rows and max(halved, doubled) <= most
    bound = f"all rows, {most} s, {most} s"
    return Row(f"limit halves and doubles, {name}", measured, bound, good)


def settled_after(counts: Sequence[int], rate: float) -> float:
    """Seconds after which the next three average within 10 % of the rate."""
    means = [statistics.fmean(counts[n : n + 3]) for n in range(len(counts) - 2)]
    good = (n for n, mean in enumerate(means) if abs(mean / rate - 1) <= 0.1)
    return next(good, math.inf)


def measure_outage(args: argparse.Namespace) -> Row:
    """A server that hangs up on everything for some seconds in mid-run."""
    begin, seconds = (5, 10) if args.quick else (10, 30)
    rows = 2 * begin * RPS
    got = run(args.script, f"{RPM} --outage {begin}:{seconds}", rows)
    after = got.span - begin - seconds
    ideal = begin - 2  # the server lets through a full second at once, twice
    measured = f"{got}, done {after:.1f} s after it, the ideal is {ideal} s"
    good = got.answered == rows and after <= 30
    return Row(f"{seconds} s outage in mid-run", measured, "all rows, 30 s", good)


# --- Other clients --------------------------------------------------------------------
FIELDS = {"score": {"type": "number"}, "explanation": {"type": "string"}}
SCHEMA = {"type": "object", "properties": FIELDS, "required": list(FIELDS)}
FORM = {"type": "json_schema", "name": "Sentiment", "schema": SCHEMA}
QUESTION: Json = {
    "model": "gpt-6-luna",
    "instructions": "You are an expert on sentiment analysis of short text messages.",
    "temperature": 0.0,
    "reasoning": {"effort": "none"},
    "store": False,
}
PROMPT = """\
Evaluate the sentiment of the text message below: give a score from -1 (negative) to 1
(positive), and explain in one sentence why.

Text message: """


def to_body(number: int) -> Json:
    """The body of a request, as the template makes it."""
    return {**QUESTION, "text": {"format": FORM}, "input": PROMPT + sentence(number)}


async def pool(ask: Callable[[int], Awaitable[None]], rows: int, workers: int) -> None:
    """Workers on one iterator."""
    numbers = iter(range(rows))

    async def work() -> None:
        for number in numbers:
            await ask(number)

    await asyncio.gather(*(work() for _ in range(workers)))


async def ask_plainly(url: str, rows: int, workers: int, retries: int) -> None:
    """Asks with what the SDK offers by itself; a row that fails is lost."""
    import openai
    from pydantic import BaseModel, Field

    class Sentiment(BaseModel):
        score: float = Field(ge=-1, le=1, description="-1 negative, 1 positive")
        explanation: str = Field(description="one sentence that says why")

    async def ask(number: int) -> None:
        text = PROMPT + sentence(number)
        with contextlib.suppress(openai.APIError):
            await client.responses.parse(input=text, text_format=Sentiment, **QUESTION)

    async with openai.AsyncOpenAI(base_url=url, max_retries=retries) as client:
        await pool(ask, rows, workers)


async def ask_by_post(url: str, rows: int, workers: int) -> None:
    """Asks with the SDK's own `post`, and does nothing with the replies."""
    import httpx2
    import openai

    async def ask(number: int) -> None:
        body = to_body(number)
        await client.post("/responses", body=body, cast_to=httpx2.Response)

    http = openai.DefaultAioHttpClient()
    sdk = openai.AsyncOpenAI(base_url=url, max_retries=0, http_client=http)
    async with sdk as client:
        await pool(ask, rows, workers)


async def ask_barely(url: str, rows: int, workers: int) -> None:
    """Asks without the SDK: aiohttp and json, no more."""
    import aiohttp

    async def ask(number: int) -> None:
        body = to_body(number)
        async with session.post(f"{url}/responses", json=body) as response:
            reply = await response.json()
        assert "score" in json.loads(reply["output"][0]["content"][0]["text"])

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await pool(ask, rows, workers)


Client = Callable[[str, int, int], Coroutine[Any, Any, None]]
CLIENTS: dict[str, Client] = {
    "plain pool": partial(ask_plainly, retries=0),
    "plain pool, 2 retries": partial(ask_plainly, retries=2),
    "plain pool, 10 retries": partial(ask_plainly, retries=10),
    "SDK's post": ask_by_post,
    "bare aiohttp": ask_barely,
}


def run_all(
    args: argparse.Namespace, kind: str, rows: int, *options: object
) -> Outcome:
    """Lets the template or a client have answers in 50 ms; raises BenchmarkError."""
    who = args.script if kind == "template" else kind
    got = run(who, "--latency 0.05", rows, *options)
    if got.answered != rows:
        raise BenchmarkError(f"{kind}: {got}")
    return got


# --- Speed ----------------------------------------------------------------------------
def measure_race(args: argparse.Namespace) -> Iterator[Row]:
    """The template and plain pools at a limit, with an error now and then."""
    rows = 250 if args.quick else 1000
    flags = f"--latency 0.5 --rps {RPS} --headers --retry-after ms --errors 0.01"
    ideal = (rows - RPS) / RPS + 0.5
    yield Row("the ideal", f"0 lost, {ideal:.1f} s, {rows:,} requests")
    for kind in ("template", "plain pool, 2 retries", "plain pool, 10 retries"):
        got = run(args.script if kind == "template" else kind, flags, rows)
        lost = rows - got.answered
        requests = got.stats["requests"]
        measured = f"{lost:,} lost, {got.span:.1f} s, {requests:,} requests"
        row = Row(kind, measured)
        yield row._replace(bound="0 lost", ok=not lost) if kind == "template" else row


def measure_throughput(args: argparse.Namespace) -> Iterator[Row]:
    """Rows a second beside a plain pool and a bare client."""
    rows = 1500 if args.quick else 5000
    for in_flight in (100, 1000):

        def take(kind: str, in_flight: int = in_flight) -> tuple[float, str]:
            got = run_all(args, kind, rows, "--concurrency", in_flight)
            return rows / got.span, "rows/s"

        kinds = ("template", "plain pool", "bare aiohttp")
        rounds = 1 if args.quick else 3
        yield from compare(f"{in_flight:,} in flight", kinds, take, rounds, least=3)


def tail_sentence(number: int) -> str:
    """A message; the first request for one in a hundred is never answered."""
    return sentence(number) + (" [hang,ok]" if number % 100 == 50 else "")


def measure_overhead(args: argparse.Namespace) -> Iterator[Row]:
    """CPU beside the SDK's own `post`, and the whole program beside the server."""
    sizes = (500, 1500) if args.quick else (500, 4000)

    def take(kind: str) -> tuple[float, str]:
        few, many = (run_all(args, kind, rows) for rows in sizes)
        more = many.program.cpu_seconds - few.program.cpu_seconds  # start-up cancels
        return more / (many.rows - few.rows) * 1000, "ms"

    kinds = ("template", "SDK's post", "bare aiohttp")
    yield from compare("CPU a row", kinds, take, 3 if args.quick else 7, most=1.2)
    rows = 2000  # with fewer, start-up would weigh more than the bound has in mind
    ideal = rows / 100
    got = run(args.script, "--latency 1", rows)
    seconds = got.program.seconds
    yield in_time("1 s answers, start-up too", got, seconds, ideal, 1.25 * ideal)
    ideal = (rows * 0.5 * math.exp(0.5**2 / 2) + rows / 100 * 5) / 100
    most = 1.25 * ideal + 5 + 2  # a timeout at the very end, its backoff and its retry
    slow = "--latency 0.5 --sigma 0.5"
    got = run(args.script, slow, rows, "--timeout", 5, make=tail_sentence)
    yield in_time("slow tail, 1% hung", got, got.program.seconds, ideal, most)


def measure_startup(args: argparse.Namespace) -> Iterator[Row]:
    """How soon --help answers."""
    imports = ("-c", "import openai, pydantic, tqdm, aiohttp")
    commands = {"--help": (args.script, "--help"), "the imports": imports}

    def take(kind: str) -> tuple[float, str]:
        with tempfile.TemporaryDirectory() as folder:
            program = Program("", Path(folder, "log"), *commands[kind])
            trouble = program.wait()
        if trouble:
            raise BenchmarkError(trouble)
        return program.seconds, "s"

    yield from compare("start", [*commands], take, 3 if args.quick else 10, most=1.5)


# --- Many messages --------------------------------------------------------------------
def measure_memory(args: argparse.Namespace) -> Iterator[Row]:
    """Peak memory for more and more messages."""
    sizes = [2_000, 20_000] if args.quick else [10_000, 100_000]
    peaks = []
    for rows in [*sizes, 1_000_000] if args.million else sizes:
        got = run(args.script, "", rows)
        peaks.append(got.program.peak_mb)
        good = got.answered == rows and got.program.peak_mb < MOST_MB
        measured = f"{got}, {got.program.peak_mb:.0f} MB, {got.program.seconds:.0f} s"
        yield Row(f"{rows:,} messages", measured, f"all rows, {MOST_MB} MB", good)
    each = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])  # MB
    guess = peaks[1] + each * (1_000_000 - sizes[1])
    measured = f"{each * 1e6:.0f} bytes, {guess:.0f} MB for a million by that"
    yield Row("each further message", measured, "at most 200 bytes", each * 1e6 <= 200)


def measure_million(args: argparse.Namespace) -> Iterator[Row]:
    """Resumes a run that lacks a thousandth of its rows, the rest in disorder."""
    rows = 100_000 if args.quick else 1_000_000
    left = rows // 1000
    numbers = array("l", range(rows))
    random.Random(0).shuffle(numbers)
    with tempfile.TemporaryDirectory() as folder, serve() as url:
        source, sample = Path(folder, "in.txt"), Path(folder, "one.txt")
        write_lines(source, map(sentence, range(rows)))
        write_lines(sample, map(sentence, range(1)))
        start(url, sample, args.script).wait()
        row = json.loads(output_of(sample).read_bytes().splitlines()[0])
        texts = ({"line": n + 1, "text_message": sentence(n)} for n in numbers[left:])
        write_lines(output_of(source), (json.dumps(row | text) for text in texts))
        for name in (f"{left:,} left", "nothing left"):
            program = start(url, source, args.script)
            trouble = program.wait()
            right, requests = count_answers(source), get_stats(url)["requests"]
            good = right == rows and requests == left + 1 and not trouble
            good = good and program.seconds <= 60 and program.peak_mb < MOST_MB
            measured = f"{right:,} rows, {requests:,} requests, "
            measured += f"{program.seconds:.1f} s, {program.peak_mb:.0f} MB"
            bound = f"{rows:,} rows, {left + 1:,} requests, 60 s, {MOST_MB} MB"
            yield Row(f"{rows:,} rows, {name}", f"{measured} {trouble}", bound, good)


# --- Kill -----------------------------------------------------------------------------
KILL_ROWS = 200
# The template, which looks at its batches often, and needs four of them.
IMPATIENT = """
import importlib, pathlib, sys
path = pathlib.Path(sys.argv.pop(1))
sys.path.insert(0, str(path.parent))
template = importlib.import_module(path.stem)
template.POLL = 0.2
template.MOST_LINES = 50
raise SystemExit(template.main())
"""
TROUBLES: tuple[Json, ...] = (  # what the provider of batches does: BatchControls
    {},
    {"enqueued_limit": 60},
    {"expire_after": 0.3},
    {"cancel_next": True},
    {"zero_share": 0.2, "zero_once": True},
    {"lose": {"create"}, "page": 1},
    {"lose": {"upload", "list", "content", "delete"}},
)


def snowy_sentence(number: int) -> str:
    """A message with letters of several bytes; every tenth comes twice."""
    return f"☃ Schnür {number - (number % 10 == 9)} 😀"


def kill_round(
    script: Path, options: str, trouble: Json, seconds: float, kills: int
) -> tuple[Counter[str], float]:
    """Kills a run that would take so many seconds, lets it finish, and counts; returns
    the seconds of the last run, too. After each kill the files move to another folder,
    as if to another machine."""
    from batches import BatchControls
    from server import Server  # here, since the clients above have no need of it

    controls = BatchControls(seconds=0.5, **copy.deepcopy(trouble))
    server = Server(latency=0.02, batch=controls)
    tally = Counter(rounds=1)
    with tempfile.TemporaryDirectory() as base, server:
        folder = Path(base, "start")
        folder.mkdir()
        write_lines(folder / "in.txt", map(snowy_sentence, range(KILL_ROWS)))
        for kills_left in range(kills, -1, -1):
            if not kills_left:
                controls.expire_after = None  # else a last message expires for ever
            source = folder / "in.txt"
            words = ("-c", IMPATIENT, script, source, output_of(source))
            program = Program(server.url, folder / "log", *words, *options.split())
            if kills_left:
                time.sleep(random.uniform(0.4, 1.2) * seconds)
                program.kill()
            problem = program.wait(60)
            tally["kills"] += bool(kills_left and problem)
            folder = folder.rename(Path(base, f"{kills_left} left"))
        tally["wrong rows"] = KILL_ROWS - count_answers(folder / "in.txt")
    if problem:
        tally["stops"] = 1
        note(problem)
    texts = server.batched.keys() | {request.text for request in server.requests}
    tally["repeated"] = server.total + server.batched.total() - len(texts)
    tally["paid twice"] = server.batched.total() - len(server.batched)
    return tally, program.seconds


def measure_kills(
    args: argparse.Namespace,
    options: str,
    most: int,
    troubles: Sequence[Json],
    aim: int,
) -> Iterator[Row]:
    """Kills runs at random moments; counts what was asked again, and paid for twice."""
    aim = aim // 6 if args.quick else aim
    total = Counter[str]()
    _, calm = kill_round(args.script, options, {}, 0.0, 0)
    for trouble in itertools.islice(itertools.cycle(troubles), 3 * aim):
        kills = random.choice((1, 1, 2))
        tally, _ = kill_round(args.script, options, trouble, calm, kills)
        total.update(tally)
        failed = tally["wrong rows"] + tally["stops"] + tally["paid twice"]
        if failed or tally["repeated"] > most * tally["kills"]:
            total["failures"] += 1
            note(options, trouble, dict(tally))
        if total["kills"] >= aim:
            break
    counted = ("rounds", "kills", "failures", "repeated", "paid twice")
    measured = ", ".join(f"{total[name]} {name}" for name in counted)
    good = total["kills"] >= aim and not total["failures"]
    bound = f"no failure, {most} repeated a kill"
    yield Row(f"kill -9, {KILL_ROWS} messages, {options}", measured, bound, good)


# --- Command line ---------------------------------------------------------------------
SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "limits": measure_limits,
    "race": measure_race,
    "throughput": measure_throughput,
    "overhead": measure_overhead,
    "startup": measure_startup,
    "memory": measure_memory,
    "million": measure_million,
    "kill": partial(
        measure_kills, options="--concurrency 20", most=20, troubles=[{}], aim=200
    ),
    "batch_kills": partial(
        measure_kills, options="--batch", most=1, troubles=TROUBLES, aim=30
    ),
}


def measure(section: str, args: argparse.Namespace, script: Path) -> Iterator[Row]:
    """The rows of a section as they come; a program that fails is one, too."""
    try:
        yield from SECTIONS[section](argparse.Namespace(**vars(args), script=script))
    except BenchmarkError as error:
        yield Row("stopped", str(error), ok=False)


def print_head(scripts: Sequence[Path]) -> None:
    """Prints what is measured, when, and with what, and the head of the table."""
    names = ("openai", "aiohttp", "pydantic")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    machine = f"{platform.system()} {platform.machine()}, {len(CORES)} cores"
    command = " ".join(["python", "tests/benchmark.py", *sys.argv[1:]])
    print(f"`{command}`, {time.strftime('%F')},")
    print(f"Python {platform.python_version()}, {packages},")
    print(f"{machine}, load {os.getloadavg()[1]:.1f}\n")
    measured = ("measured", "first edition")[: len(scripts)]
    print_line("section", "what", *measured, "bound", "ok")
    print_line(*["---"] * (4 + len(scripts)))


def print_line(*cells: str) -> None:
    """Prints a line of the Markdown table."""
    print(f"| {' | '.join(cell.strip() for cell in cells)} |", flush=True)


def main() -> int:
    """Measures the sections that were asked for; with --client, is a client."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("sections", nargs="*", help=", ".join(SECTIONS))
    add("--quick", action="store_true", help="several times smaller")
    add("--million", action="store_true", help="memory of a million")
    add("--first", type=Path, metavar="PATH", help="the first edition's script")
    add("--client", nargs=3, help=argparse.SUPPRESS)
    add("--concurrency", type=int, default=100, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        kind, url, rows = args.client
        asyncio.run(CLIENTS[kind](url, int(rows), args.concurrency))
        return 0
    for name in set(args.sections) - set(SECTIONS):
        parser.error(f"no section {name}: choose from {', '.join(SECTIONS)}")
    os.environ["NO_PROXY"] = "127.0.0.1"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # of open files
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    scripts = [TEMPLATE, args.first.resolve()] if args.first else [TEMPLATE]
    print_head(scripts)
    failures = 0
    for section in args.sections or SECTIONS:
        sides = (measure(section, args, script) for script in scripts)
        for rows in itertools.zip_longest(*sides, fillvalue=Row("", "")):
            name, _, bound, ok = rows[0]
            verdict = {None: "", True: "yes", False: "**no**"}[ok]
            measured = [row.measured for row in rows]
            print_line(section, name, *measured, bound, verdict)
            failures += ok is False
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
