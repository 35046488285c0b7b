"""Measures what the template promises in figures: run by hand, never by CI.

  python tests/benchmark.py                    everything: about 40 minutes
  python tests/benchmark.py --quick            everything, several times smaller
  python tests/benchmark.py limits kill        some sections only
  python tests/benchmark.py memory --million   a million messages at a server, too

Each program is a process on one core, the server (tests/server.py) another on another.
At the end a Markdown table on standard output; exit 1 if a bound was missed. Not for
Windows, which does not tell how much memory a process took at most.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

Json = dict[str, Any]

HERE = Path(__file__).resolve()
TEMPLATE = HERE.parents[1] / "async_template.py"
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
MOST_MB = 300  # for a million messages
RPS = 50  # 3,000 requests a minute


class Row(NamedTuple):
    """A line of the table; ok is None where there is no bound."""

    name: str
    measured: str
    bound: str = ""
    ok: bool | None = None


class BenchmarkError(Exception):
    """A program did not do what it is measured at."""


# --- Processes ------------------------------------------------------------------------
def note(text: str) -> None:
    """Tells on standard error how far it is."""
    print(text, file=sys.stderr, flush=True)


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
        self.log, self.started = log, time.monotonic()
        self.seconds, self.peak_mb, self.patience = 0.0, 0.0, 600.0
        command = [sys.executable, *map(str, arguments)]
        env = {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "benchmark-key"}
        with log.open("w") as err:
            out = subprocess.DEVNULL
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=err)
        pin(self.process, CORES[0])

    def wait(self) -> int:
        """The exit status, once it has ended; if that takes too long it is killed."""
        timer = threading.Timer(
            self.patience, os.kill, (self.process.pid, signal.SIGKILL)
        )
        timer.daemon = True
        timer.start()
        _, status, usage = os.wait4(self.process.pid, 0)
        timer.cancel()
        self.seconds = time.monotonic() - self.started
        self.peak_mb = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode

    def trouble(self) -> str:
        """What is wrong with how it ended."""
        if (status := self.process.returncode) == -signal.SIGKILL:
            return f"given up after {self.seconds:.0f} s"
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"exit status {status}: {' '.join(last)}" if status else ""

    def finish(self, *statuses: int) -> None:
        """Waits; BenchmarkError if the exit status is none of these, or 0."""
        if self.wait() not in (0, *statuses):
            raise BenchmarkError(self.trouble())


# --- Messages and runs ----------------------------------------------------------------
def sentence(number: int) -> str:
    """A message of ordinary size."""
    return f"message {number}: the service here is very good, but the soup was cold"


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a file line by line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def count_answers(source: Path) -> int:
    """How many rows with an answer stand where INPUT has their message."""
    right = 0
    with source.open(encoding="utf-8") as texts, output_of(source).open("rb") as lines:
        for text, line in itertools.zip_longest(texts, lines):
            row = json.loads(line or b'{"text_message": null}')
            same = text is not None and row["text_message"] == text.rstrip("\n")
            right += same and row["response"] is not None
    return right


def output_of(source: Path) -> Path:
    """The OUTPUT of an INPUT."""
    return source.with_suffix(".jsonl")


def start(url: str, source: Path, options: str = "--concurrency 100") -> Program:
    """Starts the template on an INPUT."""
    out, log = output_of(source), source.with_suffix(".log")
    return Program(url, log, TEMPLATE, source, out, *options.split())


class Outcome(NamedTuple):
    """What came of one or more runs of the template at a server."""

    rows: int
    answered: int
    seconds: float  # of the slowest run, start-up included
    peak_mb: float
    trouble: str
    stats: Json

    @property
    def refused(self) -> float:
        """The share of all requests that were refused."""
        refusals = self.stats["refused_429"] + self.stats["refused_503"]
        return float(refusals / self.stats["requests"])

    def __str__(self) -> str:
        """How many rows have answers."""
        trouble = f" ({self.trouble})" if self.trouble else ""
        return f"{self.answered:,} of {self.rows:,} rows{trouble}"


def span(stats: Json) -> float:
    """Seconds from the first request to the last reply."""
    return float(stats["last_reply_at"] - stats["first_request_at"])


def run(
    flags: str,
    rows: int,
    options: str = "--concurrency 100",
    make: Callable[[int], str] = sentence,
    runs: int = 1,
) -> Outcome:
    """Lets one or more runs at once ask a server that has these flags."""
    with tempfile.TemporaryDirectory() as folder, serve(flags) as url:
        sources = [Path(folder, f"in{n}.txt") for n in range(runs)]
        for source in sources:
            write_lines(source, map(make, range(rows // runs)))
        programs = [start(url, source, options) for source in sources]
        for program in programs:
            program.patience = 120 + rows / 20
            program.wait()
        seconds = max(program.seconds for program in programs)
        peak_mb = max(program.peak_mb for program in programs)
        trouble = "; ".join(filter(None, (program.trouble() for program in programs)))
        if not (stats := get_stats(url))["last_reply_at"]:
            raise BenchmarkError(trouble)
        answered = sum(map(count_answers, sources))
        return Outcome(rows, answered, seconds, peak_mb, trouble, stats)


# --- Limits ---------------------------------------------------------------------------
def sized_sentence(number: int) -> str:
    """A message of 70 to 8,000 characters, always the same for a number."""
    words = random.Random(number).lognormvariate(4.0, 1.0)
    return sentence(number) + " and so on" * min(800, int(words))


def measure_limits(args: argparse.Namespace) -> Iterator[Row]:
    """How much of what a server allows is used, and how often it refuses."""
    size = 500 if args.quick else 2000
    rps = f"--latency 0.2 --rps {RPS}"
    mean = statistics.fmean(len(sized_sentence(n)) / 4 + 80 for n in range(size))
    tpm = f"--latency 0.2 --tpm-per-second {RPS * mean} --headers"
    headers, bare = run(f"{rps} --headers", size), run(rps, size)
    yield judge("3,000 RPM, headers", headers, bucket_use(headers), (0.97, 0.01))
    yield judge("3,000 RPM, bare 429", bare, bucket_use(bare), (0.95, 0.05))
    tokens = run(tpm, size, make=sized_sentence)
    yield judge("token limit", tokens, bucket_use(tokens, RPS * mean), (0.95, 0.01))
    full = run("--latency 0.2 --capacity 20", size)
    yield judge("20 in flight", full, size * 0.2 / 20 / span(full.stats), (0.9, 0.05))
    for name, flag in (("headers", "--headers"), ("bare 429", "")):
        yield from measure_change(name, flag, 10 if args.quick else 20)
    for name, flag in (("headers", "--headers"), ("bare 429", "")):
        two = run(f"{rps} {flag}", size, runs=2)
        yield judge(f"two runs, {name}", two, bucket_use(two), (0.95, 0.05))
    free = run("--latency 0.5", rows := 2000)
    ratio = free.seconds / (rows * 0.5 / 100)
    good = free.answered == rows and ratio <= 1.35 and not free.refused
    measured = f"{free}, {ratio:.2f} of the ideal time, refused {free.refused:.1%}"
    yield Row("no limit, 0.5 s answers", measured, "all rows, 1.35, 0%", good)


def bucket_use(got: Outcome, burst: float = RPS) -> float:
    """The share of the allowance, first burst included, that was let through."""
    bucket = got.stats["policies"][0]
    return float(bucket["taken"] / (bucket["allowed_at_last_request"] + burst))


def judge(name: str, got: Outcome, use: float, bounds: tuple[float, float]) -> Row:
    """Holds the use and the refusals against the least and the most."""
    least, most = bounds
    good = got.answered == got.rows and use >= least and got.refused <= most
    measured = f"{got}, use {use:.3f}, refused {got.refused:.1%}"
    return Row(name, measured, f"all rows, use {least}, refused {most:.0%}", good)


def measure_change(name: str, flag: str, period: int) -> Iterator[Row]:
    """A limit that halves in mid-run and doubles again, each for `period` seconds."""
    plan = f"0:{RPS},{period}:{RPS // 2},{2 * period}:{RPS}"
    got = run(f"--latency 0.2 --plan {plan} {flag}", RPS * (period * 5 // 2 + 1))
    answered = got.stats["answered_200_by_second"]
    note(f"answers in each second of {plan}, {name}: {answered}")
    measured = f"{got}, use {bucket_use(got):.3f}, refused {got.refused:.1%}"
    good = got.answered == got.rows
    yield Row(f"limit changes, {name}", measured, "all rows", good)
    most = 5 if flag else 10
    for word, at, rate in (("halves", period, RPS / 2), ("doubles", 2 * period, RPS)):
        seconds = settled_after(answered[at : at + period], rate)
        line = Row(f"limit {word}, {name}", f"within 10% after {seconds:g} s")
        yield line._replace(bound=f"{most} s", ok=seconds <= most)


def settled_after(counts: Sequence[int], rate: float) -> float:
    """Seconds after which the next three average within 10 % of the rate."""
    means = [statistics.fmean(counts[n : n + 3]) for n in range(len(counts) - 2)]
    good = (n for n, mean in enumerate(means) if abs(mean / rate - 1) <= 0.1)
    return next(good, math.inf)


# --- Throughput -----------------------------------------------------------------------
QUESTION: Json = {
    "model": "gpt-4.1-mini",
    "instructions": "You are an expert on sentiment analysis of short text messages.",
    "temperature": 0.0,
}
PROMPT = (
    "Evaluate the sentiment of the text message below: give a score from -1 (negative) "
    "to 1\n(positive), and explain in one sentence why.\n\nText message: "
)


async def ask_plainly(url: str, rows: int, workers: int) -> None:
    """Asks with what the SDK offers by itself."""
    import openai
    from pydantic import BaseModel, Field

    class Sentiment(BaseModel):
        score: float = Field(ge=-1, le=1, description="-1 negative, 1 positive")
        explanation: str = Field(description="one sentence that says why")

    client = openai.AsyncOpenAI(base_url=url, max_retries=0)
    numbers = iter(range(rows))

    async def work() -> None:
        for number in numbers:
            text = PROMPT + sentence(number)
            response = await client.responses.parse(
                input=text, text_format=Sentiment, **QUESTION
            )
            assert response.output_parsed is not None

    await asyncio.gather(*(work() for _ in range(workers)))


async def ask_barely(url: str, rows: int, workers: int) -> None:
    """Asks without the SDK: aiohttp and json, no more."""
    import aiohttp

    fields = {"score": {"type": "number"}, "explanation": {"type": "string"}}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    form = {"type": "json_schema", "name": "Sentiment", "schema": schema}
    question, numbers = QUESTION | {"text": {"format": form}}, iter(range(rows))

    async def work(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            body = question | {"input": PROMPT + sentence(number)}
            async with session.post(f"{url}/responses", json=body) as response:
                reply = await response.json()
            assert "score" in json.loads(reply["output"][0]["content"][0]["text"])

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(work(session) for _ in range(workers)))


CLIENTS = {"plain": ask_plainly, "bare": ask_barely}


def time_client(kind: str, rows: int, in_flight: int) -> tuple[float, float]:
    """Rows a second from the first request to the last reply, and start-up included."""
    if kind == "template":
        got = run("--latency 0.05", rows, f"--concurrency {in_flight}")
        seconds, answered, stats = got.seconds, got.answered, got.stats
    else:
        with tempfile.TemporaryDirectory() as folder, serve("--latency 0.05") as url:
            client = (HERE, "--client", kind, url, rows, in_flight)
            program = Program(url, Path(folder, "log"), *client)
            program.finish()
            stats = get_stats(url)
        seconds, answered = program.seconds, stats["answered_200"]
    if answered != rows:
        raise BenchmarkError(f"{kind}: {answered} of {rows} rows")
    return rows / span(stats), rows / seconds


def spread(values: Sequence[float], digits: int) -> str:
    """The median with the lowest and the highest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def measure_throughput(args: argparse.Namespace) -> Iterator[Row]:
    """Rows a second beside a plain pool and a bare client, three rounds in turn."""
    for in_flight in (100, 1000):
        kinds, rows = ("template", *CLIENTS), 1500 if args.quick else 5000
        served: dict[str, list[float]] = {kind: [] for kind in kinds}
        whole: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _, kind in itertools.product(range(3), kinds):
            pair = time_client(kind, rows, in_flight)
            served[kind].append(pair[0])
            whole[kind].append(pair[1])
        where = f"{in_flight:,} in flight"
        for kind in kinds:
            total = f"with start-up {statistics.median(whole[kind]):,.0f}"
            yield Row(f"{where}, {kind}", f"{spread(served[kind], 0)} rows/s, {total}")
        for kind in CLIENTS:
            pairs = zip(served["template"], served[kind])
            ratios = [ours / theirs for ours, theirs in pairs]
            line = Row(f"{where}, template / {kind}", spread(ratios, 2))
            good = statistics.median(ratios) >= 3
            yield line._replace(bound="3", ok=good) if kind == "plain" else line


# --- Overhead, start-up, memory -------------------------------------------------------
def tail_sentence(number: int) -> str:
    """A message; the first request for one in a hundred is never answered."""
    return sentence(number) + (" [hang,ok]" if number % 100 == 50 else "")


def measure_overhead(args: argparse.Namespace) -> Iterator[Row]:
    """The whole program against what the server alone would take."""
    rows = 2000  # with fewer, start-up would weigh more than the bound has in mind
    got = run("--latency 1", rows)
    ratio = got.seconds / (rows / 100)
    good = got.answered == rows and ratio <= 1.25
    measured = f"{got}, {got.seconds:.1f} s, {ratio:.2f} of the ideal"
    yield Row("1 s answers", measured, "all rows, 1.25", good)
    tail = "--concurrency 100 --timeout 5"
    got = run("--latency 0.5 --sigma 0.5", rows, tail, tail_sentence)
    ideal = (rows * 0.5 * math.exp(0.5**2 / 2) + rows / 100 * 5) / 100
    most = 1.25 * ideal + 5 + 2  # a timeout at the very end, its backoff and its retry
    good = got.answered == rows and got.seconds <= most
    measured = f"{got}, {got.seconds:.1f} s, {got.seconds / ideal:.2f} of the ideal"
    yield Row("slow tail, 1% hung", measured, f"all rows, {most:.1f} s", good)


def measure_startup(args: argparse.Namespace) -> Iterator[Row]:
    """How soon --help and bad usage answer."""
    commands: dict[str, tuple[object, ...]] = {
        "import openai": ("-c", "import openai"),
        "--help": (TEMPLATE, "--help"),
        "bad usage": (TEMPLATE, "in.txt", "out.jsonl", "--concurrency", "0"),
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for _, name in itertools.product(range(3 if args.quick else 10), commands):
            program = Program("", Path(folder, "log"), *commands[name])
            program.finish(2)
            times[name].append(program.seconds)
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        share = middle / statistics.median(times["import openai"])
        line = Row(name, f"{spread(seconds, 2)} s, {share:.2f} of the import")
        bounded = line._replace(bound="0.5 s", ok=middle <= 0.5)
        yield line if name == "import openai" else bounded


def measure_memory(args: argparse.Namespace) -> Iterator[Row]:
    """Peak memory for more and more messages."""
    sizes, peaks = [2_000, 20_000] if args.quick else [10_000, 100_000], []
    for rows in [*sizes, 1_000_000] if args.million else sizes:
        got = run("", rows)
        peaks.append(got.peak_mb)
        good = got.answered == rows and got.peak_mb < MOST_MB
        measured = f"{got}, {got.peak_mb:.0f} MB, {got.seconds:.0f} s"
        yield Row(f"{rows:,} messages", measured, f"all rows, {MOST_MB} MB", good)
    slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    guess = peaks[1] + slope * (1_000_000 - sizes[1])
    line = Row("a million, by a straight line", f"{guess:.0f} MB", f"{MOST_MB} MB")
    yield line._replace(ok=guess < MOST_MB)


def rows_like(row: Json, numbers: Iterable[int]) -> Iterator[str]:
    """The rows of other messages."""
    for number in numbers:
        own = {"line": number + 1, "text_message": sentence(number)}
        yield json.dumps(row | own, ensure_ascii=False)


def measure_million(args: argparse.Namespace) -> Iterator[Row]:
    """Resumes a run that lacks a thousandth of its rows, the rest in disorder."""
    rows = 100_000 if args.quick else 1_000_000
    left, numbers = rows // 1000, array("l", range(rows))
    random.Random(0).shuffle(numbers)
    with tempfile.TemporaryDirectory() as folder, serve() as url:
        source, sample = Path(folder, "in.txt"), Path(folder, "sample.txt")
        write_lines(source, map(sentence, range(rows)))
        write_lines(sample, map(sentence, range(5)))
        with serve() as other_url:
            start(other_url, sample).finish()
        row = json.loads(output_of(sample).read_bytes().splitlines()[0])
        write_lines(output_of(source), rows_like(row, numbers[left:]))
        for name in (f"{left:,} left", "nothing left"):
            program = start(url, source)
            program.finish(1)
            right, stats = count_answers(source), get_stats(url)
            good = right == rows and stats["requests"] == left
            good = good and program.seconds <= 60 and program.peak_mb < MOST_MB
            asked_after = stats["first_request_at"] - program.started
            measured = f"{right:,} rows, {stats['requests']:,} requests in all, "
            measured += f"{program.seconds:.1f} s, {program.peak_mb:.0f} MB"
            if asked_after > 0:
                after = program.seconds - asked_after - span(stats)
                measured += f" ({asked_after:.1f} s to find them, {after:.1f} to order)"
            bound = f"{rows:,} rows, {left:,} requests, 60 s, {MOST_MB} MB"
            yield Row(f"{rows:,} rows, {name}", measured, bound, good)


# --- Kill -----------------------------------------------------------------------------
KILL_ROWS, KILL_AT_ONCE = 200, 20


def snowy_sentence(number: int) -> str:
    """A message with letters of several bytes; every tenth comes twice."""
    return f"☃ Schnür {number - (number % 10 == 9)} 😀"


def measure_kill(args: argparse.Namespace) -> Iterator[Row]:
    """Kills runs at random moments, and resumes them to the end."""
    rounds, kills, failures, extra, most = 5 if args.quick else 200, 0, 0, 0, 0
    with serve("--latency 0.02") as url:
        _, problem, calm = kill_and_resume(url, [])
        if problem:
            raise BenchmarkError(f"without any kill: {problem}")
        begin = get_stats(url)["first_request_at"] - calm.started
        for number in range(rounds):
            before = get_stats(url)["requests"]
            count, latest = random.choice((1, 1, 2)), 1.05 * calm.seconds
            delays = [random.uniform(0.8 * begin, latest) for _ in range(count)]
            killed, problem, _ = kill_and_resume(url, delays)
            more = get_stats(url)["requests"] - before - KILL_ROWS
            if more > killed * KILL_AT_ONCE:
                problem += f" {more} requests too many after {killed} kills"
            if problem:
                note(f"kill round {number}, {delays}: {problem}")
            kills, extra, most = kills + killed, extra + more, max(most, more)
            failures += bool(problem)
    measured = f"{rounds} rounds, {kills} kills, {failures} failures, "
    measured += f"{extra} requests repeated, at most {most} a round"
    bound = f"no failure, {KILL_AT_ONCE} repeated a kill"
    name = f"kill -9, {KILL_ROWS} messages, {KILL_AT_ONCE} in flight"
    yield Row(name, measured, bound, kills > 0 and not failures)


def kill_and_resume(url: str, delays: list[float]) -> tuple[int, str, Program]:
    """How many of the runs were killed, what is wrong with OUTPUT, and the last run."""
    with tempfile.TemporaryDirectory() as folder:
        source, kills = Path(folder, "in.txt"), 0
        write_lines(source, map(snowy_sentence, range(KILL_ROWS)))
        for delay in delays:
            program = start(url, source, f"--concurrency {KILL_AT_ONCE}")
            time.sleep(delay)
            os.kill(program.process.pid, signal.SIGKILL)
            kills += program.wait() != 0
        program = start(url, source, f"--concurrency {KILL_AT_ONCE}")
        try:
            program.finish()
        except BenchmarkError as error:
            return kills, str(error), program
        right = count_answers(source)
        return kills, "" if right == KILL_ROWS else f"{right} rows are right", program


# --- Command line ---------------------------------------------------------------------
SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "limits": measure_limits,
    "throughput": measure_throughput,
    "overhead": measure_overhead,
    "memory": measure_memory,
    "million": measure_million,
    "startup": measure_startup,
    "kill": measure_kill,
}


def measure(section: str, args: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """The rows of a section as they come; a program that fails is one, too."""
    try:
        for row in SECTIONS[section](args):
            note(to_line(section, row))
            yield section, row
    except BenchmarkError as error:
        yield section, Row("stopped", str(error), ok=False)


def to_line(section: str, row: Row) -> str:
    """A line of the Markdown table."""
    verdict = {None: "", True: "yes", False: "**no**"}[row.ok]
    return f"| {' | '.join([section, *row[:3], verdict])} |"


def print_table(rows: Iterable[tuple[str, Row]]) -> None:
    """Prints what was measured, when, and with what."""
    names = ("openai", "aiohttp", "pydantic")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    machine = f"{platform.system()} {platform.machine()}, {len(CORES)} cores"
    print(
        f"`python tests/benchmark.py {' '.join(sys.argv[1:])}`, {time.strftime('%F')},"
    )
    print(f"Python {platform.python_version()}, {packages},")
    print(f"{machine}, load {os.getloadavg()[1]:.1f}\n")
    print("| section | what | measured | bound | ok |\n|---|---|---|---|---|")
    for section, row in rows:
        print(to_line(section, row))


def main() -> int:
    """Measures the sections that were asked for; with --client, is a client."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("sections", nargs="*", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="several times smaller")
    parser.add_argument("--million", action="store_true", help="memory of a million")
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        kind, url, count, workers = args.client
        asyncio.run(CLIENTS[kind](url, int(count), int(workers)))
        return 0
    for name in set(args.sections) - set(SECTIONS):
        parser.error(f"no section {name}: choose from {', '.join(SECTIONS)}")
    os.environ["NO_PROXY"] = "127.0.0.1"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # of open files
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    names = args.sections or SECTIONS
    rows = [row for name in names for row in measure(name, args)]
    print_table(rows)
    return int(any(row.ok is False for _, row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
