"""Measures what the template promises in figures: run by hand, never by CI.

  python tests/benchmark.py                    everything: about an hour
  python tests/benchmark.py --quick            everything, several times smaller
  python tests/benchmark.py limits race        some sections only
  python tests/benchmark.py --template PATH    another version as well, in turn

Each figure stands beside something that was measured in the same run: what the server
allowed, another client, or the ideal. Each program is a process on one core, the server
(tests/server.py) another on another. A Markdown table on standard output; exit 1 if a
bound was missed. The bounds are for the full size: with --quick, start and end weigh
more. Not for Windows, which does not tell how much memory a process took at most.
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

Json = dict[str, Any]
Args = argparse.Namespace  # the flags, and the script to measure

HERE = Path(__file__).resolve()
TEMPLATE = HERE.parents[1] / "async_template.py"
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
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


class Program:
    """A Python program in a process of its own, on the first core."""

    def __init__(self, url: str, log: Path, *arguments: object) -> None:
        self.log = log
        self.started = time.monotonic()
        self.seconds = 0.0
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

    def wait(self, patience: float = 1500.0) -> str:
        """What is wrong with how it ended; if that takes too long it is killed."""
        timer = threading.Timer(patience, self.kill)
        timer.daemon = True
        timer.start()
        _, status, usage = os.wait4(self.process.pid, 0)
        timer.cancel()
        self.seconds = time.monotonic() - self.started
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


def count_answers(source: Path) -> int:
    """How many rows with an answer stand where INPUT has their message."""
    right = 0
    output = source.with_suffix(".jsonl")
    with source.open(encoding="utf-8") as texts, output.open("rb") as lines:
        for text, line in itertools.zip_longest(texts, lines):
            row = json.loads(line or b'{"text_message": null}')
            same = text is not None and row["text_message"] == text.rstrip("\n")
            right += same and row["response"] is not None
    return right


def smaller_share(sources: Sequence[Path]) -> float:
    """The share of the slower of some runs until the first of them has ended."""
    ends = []
    for source in sources:
        lines = source.with_suffix(".jsonl").read_bytes().splitlines()
        ends.append([json.loads(line)["answered_at"] for line in lines])
    first_end = min(map(max, ends))
    counts = [sum(at <= first_end for at in times) for times in ends]
    share: float = min(counts) / sum(counts)
    return share


class Outcome(NamedTuple):
    """What came of one or more programs at a server."""

    rows: int
    answered: int
    program: Program  # the last one
    trouble: str
    stats: Json
    share: float = 1.0  # of the slower one, while all of them ran

    @property
    def span(self) -> float:
        """Seconds from the first request to the last reply."""
        return float(self.stats["last_reply_at"] - self.stats["first_request_at"])

    def __str__(self) -> str:
        """How many rows have answers."""
        trouble = f" ({self.trouble})" if self.trouble else ""
        return f"{self.answered:,} of {self.rows:,} rows{trouble}"


def run(
    script: Path | None,
    flags: str,
    rows: int,
    *options: object,
    make: Callable[[int], str] = sentence,
    runs: int = 1,
) -> Outcome:
    """Lets a script, or else a plain pool, ask a server that has these flags."""
    with tempfile.TemporaryDirectory() as folder, serve(flags) as url:
        sources = [Path(folder, f"in{n}.txt") for n in range(runs)]
        programs = []
        for source in sources:
            write_lines(source, map(make, range(rows // runs)))
            words: tuple[object, ...] = (HERE, "--client", url, rows)
            if script:
                words = (script, source, source.with_suffix(".jsonl"))
            log = source.with_suffix(".log")
            programs.append(Program(url, log, *words, *options))
        trouble = "; ".join(filter(None, [program.wait() for program in programs]))
        with urlopen(url.replace("/v1", "/stats"), timeout=60) as reply:
            stats = json.load(reply)
        if not stats["last_reply_at"]:
            raise BenchmarkError(trouble)
        if not script:
            return Outcome(rows, stats["answered_200"], programs[-1], trouble, stats)
        answered = sum(map(count_answers, sources))
        share = smaller_share(sources)
        return Outcome(rows, answered, programs[-1], trouble, stats, share)


def compare(
    what: str,
    kinds: tuple[str, ...],
    take: Callable[[str], tuple[float, str]],
    args: Args,
    most: float = math.inf,
) -> Iterator[Row]:
    """Takes a figure of two kinds in turn; their ratio may have a bound."""
    figures: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _, kind in itertools.product(range(1 if args.quick else 5), kinds):
        figure, unit = take(kind)
        figures[kind].append(figure)
    for kind in kinds:
        yield Row(f"{what}, {kind}", f"{spread(figures[kind])} {unit}")
    ratios = [ours / its for ours, its in zip(*figures.values())]
    row = Row(f"{what}, {' / '.join(kinds)}", spread(ratios))
    if most < math.inf:
        good = statistics.median(ratios) <= most
        row = row._replace(bound=f"at most {most:g}", ok=good)
    yield row


def spread(values: Sequence[float]) -> str:
    """The median with the lowest and the highest."""
    middle = statistics.median(values)
    return f"{middle:,.2f} ({min(values):,.2f} to {max(values):,.2f})"


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
    in_flight: int = 100


MEAN_TOKENS = statistics.fmean(len(sized_sentence(n)) / 4 + 80 for n in range(2000))
RPM = f"--latency 0.2 --rps {RPS}"
TPM = f"--latency 0.2 --tpm-per-second {RPS * MEAN_TOKENS:.0f} --headers"
SLOW = "--latency 2 --sigma 0.5 --rps 25"
FAST = "--latency 1 --rps 500 --headers"  # the highest tier of OpenAI
LIMITS = (
    Limit("3,000 a minute, headers", f"{RPM} --headers", 2000, 0.97, 0.01),
    Limit("3,000 a minute, bare 429", RPM, 2000, 0.95, 0.05),
    Limit("token limit, headers", TPM, 2000, 0.95, 0.01, make=sized_sentence),
    Limit("20 in flight at most, 503", "--latency 0.2 --capacity 20", 2000, 0.8),
    Limit("60 a minute, bare 429", "--latency 0.2 --rps 1", 400, 0.8, 0.15),
    Limit("25 a second, 2 s jittered, bare 429", SLOW, 2000, 0.8),
    Limit("two runs, headers", f"{RPM} --headers", 2000, 0.95, 0.05, runs=2),
    Limit("two runs, bare 429", RPM, 2000, 0.95, 0.05, runs=2),
    Limit("500 a second, headers", FAST, 10_000, 0.9, in_flight=1000),
)


def use_of(got: Outcome) -> float:
    """The share that was let through of what the server allows."""
    policies = {policy["policy"]: policy for policy in got.stats["policies"]}
    if "Capacity" in policies:
        return got.rows * 0.2 / 20 / got.span
    bucket = policies.get("RateLimit") or policies["TokenLimit"]
    allowed = bucket["allowed_at_last_request"] + bucket["burst"]
    return float(bucket["taken"] / allowed)


def measure_limits(args: Args) -> Iterator[Row]:
    """How much of what a server allows is used, and how often it refuses."""
    for limit in LIMITS:
        yield measure_limit(limit, args)
    yield measure_outage(args)
    rows = 500 if args.quick else 2000
    got = run(args.script, "--latency 0.5", rows)
    times = got.span / (rows * 0.5 / 100)
    good = got.answered == got.rows and times <= 1.15
    measured = f"{got}, {times:.2f} of the ideal"
    yield Row("no limit, 0.5 s answers", measured, "all rows, 1.15 of the ideal", good)


def measure_limit(limit: Limit, args: Args) -> Row:
    """Holds the use of a limit, and the share of the slower run, against the bounds."""
    rows = limit.rows // 4 if args.quick else limit.rows
    ask = partial(run, args.script, limit.flags, rows, make=limit.make, runs=limit.runs)
    got = ask("--concurrency", limit.in_flight)
    use = use_of(got)
    refusals = got.stats["refused_429"] + got.stats["refused_503"]
    refused = refusals / got.stats["requests"]
    good = use >= limit.use and refused <= limit.refused and got.answered == got.rows
    measured = f"{got}, use {use:.3f}, refused {refused:.1%}"
    bound = f"all rows, use {limit.use}, refused {limit.refused:.0%}"
    if limit.runs > 1:
        good = good and got.share >= 0.3
        measured += f", the slower one has {got.share:.2f}"
        bound += ", the slower one has 0.3"
    return Row(limit.name, measured, bound, good)


def measure_outage(args: Args) -> Row:
    """A server that hangs up on everything for some seconds in mid-run."""
    begin, seconds = (5, 10) if args.quick else (10, 30)
    rows = 2 * begin * RPS
    got = run(args.script, f"{RPM} --outage {begin}:{seconds}", rows)
    after = got.span - begin - seconds
    ideal = begin - 2  # the server lets through a full second at once, twice
    measured = f"{got}, done {after:.1f} s after it, the ideal is {ideal} s"
    good = got.answered == rows and after <= 30
    return Row(f"{seconds} s outage in mid-run", measured, "all rows, 30 s", good)


# --- A plain pool ---------------------------------------------------------------------
QUESTION: Json = {
    "model": "gpt-6-luna",
    "instructions": "You are an expert on sentiment analysis of short text messages.",
    "temperature": 0.0,
    "reasoning": {"effort": "none"},
    "store": False,
}
PROMPT = "Give the sentiment of this text message, from -1 to 1, and say why: "


async def ask_plainly(url: str, rows: int, workers: int, retries: int) -> None:
    """Asks with what the SDK offers by itself; a row that fails is lost."""
    import openai
    from pydantic import BaseModel, Field

    class Sentiment(BaseModel):
        score: float = Field(ge=-1, le=1, description="-1 negative, 1 positive")
        explanation: str = Field(description="one sentence that says why")

    async def work() -> None:
        for number in numbers:
            text = PROMPT + sentence(number)
            asking = parse(input=text, text_format=Sentiment, **QUESTION)
            with contextlib.suppress(openai.APIError):
                await asking

    numbers = iter(range(rows))
    async with openai.AsyncOpenAI(base_url=url, max_retries=retries) as client:
        parse = client.responses.parse
        await asyncio.gather(*(work() for _ in range(workers)))


# --- Speed ----------------------------------------------------------------------------
def measure_race(args: Args) -> Iterator[Row]:
    """The template and plain pools at a limit, with an error now and then."""
    rows = 250 if args.quick else 1000
    flags = f"--latency 0.5 --rps {RPS} --headers --retry-after ms --errors 0.01"
    ideal = (rows - RPS) / RPS + 0.5
    for name, script, *options in (
        ("template", args.script),
        ("plain pool, 2 retries", None, "--retries", 2),
        ("plain pool, 10 retries", None, "--retries", 10),
    ):
        got = run(script, flags, rows, *options)
        lost = rows - got.answered
        took = f"{got.span:.1f} s, {got.span / ideal:.2f} of the ideal"
        row = Row(name, f"{lost:,} lost, {took}, {got.stats['requests']:,} requests")
        yield row._replace(bound="0 lost", ok=not lost) if script else row


def measure_loop(args: Args) -> Iterator[Row]:
    """100 messages of a second each, beside a loop."""
    few = 3 if args.quick else 10
    loop = run(None, "--latency 1", few, "--concurrency", 1)
    got = run(args.script, "--latency 1", 100)
    times = loop.span / few * 100 / got.span
    good = got.answered == 100 and times >= 40
    measured = f"{got}, {got.span:.2f} s, {times:.1f} times a loop"
    yield Row("100 messages, 1 s answers", measured, "all rows, 40 times a loop", good)


def measure_throughput(args: Args) -> Iterator[Row]:
    """Rows a second beside a plain pool, where the processor is the limit."""
    rows = 1500 if args.quick else 5000
    for in_flight in (100, 1000):

        def take(kind: str, in_flight: int = in_flight) -> tuple[float, str]:
            script = args.script if kind == "template" else None
            got = run(script, "--latency 0.05", rows, "--concurrency", in_flight)
            if got.answered != rows:
                raise BenchmarkError(f"{kind}: {got}")
            return rows / got.span, "rows/s"

        kinds = ("template", "plain pool")
        yield from compare(f"{in_flight:,} in flight", kinds, take, args)


def measure_startup(args: Args) -> Iterator[Row]:
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

    yield from compare("start", (*commands,), take, args, most=1.5)


# --- Memory ---------------------------------------------------------------------------
def measure_memory(args: Args) -> Iterator[Row]:
    """Peak memory for few and for many messages, and what each one adds to it."""
    few, many = (2_000, 20_000) if args.quick else (10_000, 100_000)
    peaks = []
    for rows in (few, many):
        got = run(args.script, "", rows)
        peaks.append(got.program.peak_mb)
        measured = f"{got}, {got.program.peak_mb:.0f} MB"
        yield Row(f"{rows:,} messages", measured, "all rows", got.answered == rows)
    each = (peaks[1] - peaks[0]) * 1e6 / (many - few) - len(sentence(many))
    name = "each, besides its text"
    yield Row(name, f"{each:.0f} bytes", "at most 900 bytes", each <= 900)


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
            files = (script, folder / "in.txt", folder / "in.jsonl")
            words = ("-c", IMPATIENT, *files, *options.split())
            program = Program(server.url, folder / "log", *words)
            if kills_left:
                time.sleep(random.uniform(0.4, 1.2) * seconds)
                program.kill()
            problem = program.wait(60)
            tally["kills"] += bool(kills_left and problem)
            folder = folder.rename(Path(base, f"{kills_left} left"))
        tally["wrong rows"] = KILL_ROWS - count_answers(folder / "in.txt")
    if problem:
        tally["stops"] = 1
        print(problem, file=sys.stderr)
    texts = server.batched.keys() | {request.text for request in server.requests}
    tally["repeated"] = server.total + server.batched.total() - len(texts)
    tally["paid twice"] = server.batched.total() - len(server.batched)
    return tally, program.seconds


def measure_kills(
    options: str, most: int, troubles: Sequence[Json], aim: int, args: Args
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
            print(options, trouble, dict(tally), file=sys.stderr)
        if total["kills"] >= aim:
            break
    counted = ("rounds", "kills", "failures", "repeated", "paid twice")
    measured = ", ".join(f"{total[name]} {name}" for name in counted)
    good = total["kills"] >= aim and not total["failures"]
    bound = f"no failure, at most {most} repeated a kill"
    yield Row(f"kill -9, {KILL_ROWS} messages, {options}", measured, bound, good)


# --- Command line ---------------------------------------------------------------------
SECTIONS: dict[str, Callable[[Args], Iterator[Row]]] = {
    "limits": measure_limits,
    "race": measure_race,
    "loop": measure_loop,
    "throughput": measure_throughput,
    "startup": measure_startup,
    "memory": measure_memory,
    "kill": partial(measure_kills, "--concurrency 20", 20, [{}], 200),
    "batch_kills": partial(measure_kills, "--batch", 1, TROUBLES, 30),
}


def rows_of(section: str, args: Args, script: Path) -> Iterator[Row]:
    """The rows of a section as they come; a program that fails is one, too."""
    try:
        yield from SECTIONS[section](Args(**vars(args), script=script))
    except BenchmarkError as error:
        yield Row("stopped", str(error), ok=False)


def print_head(scripts: Sequence[Path]) -> None:
    """Prints what is measured, when, and with what, and the head of the table."""
    command = " ".join(["python", "tests/benchmark.py", *sys.argv[1:]])
    versions = f"Python {platform.python_version()}, openai {version('openai')}"
    machine = f"{platform.machine()}, {len(CORES)} cores, load {os.getloadavg()[1]:.1f}"
    print(f"`{command}`\n{time.strftime('%F')}, {versions}, {machine}\n")
    measured = ("measured", "the other version")[: len(scripts)]
    print_line("section", "what", *measured, "bound", "ok")
    print_line(*["---"] * (4 + len(scripts)))


def print_line(*cells: str) -> None:
    """Prints a line of the Markdown table."""
    print(f"| {' | '.join(cell.strip() for cell in cells)} |", flush=True)


def main() -> int:
    """Measures the sections that were asked for."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("sections", nargs="*", help=", ".join(SECTIONS))
    add("--quick", action="store_true", help="several times smaller")
    add("--template", type=Path, metavar="PATH", help="another version of the script")
    add("--client", nargs=2, metavar=("URL", "ROWS"), help="be a plain pool")
    add("--concurrency", type=int, default=100, help="of the plain pool")
    add("--retries", type=int, default=0, help="of the plain pool")
    args = parser.parse_args()
    if args.client:
        url, rows = args.client
        asyncio.run(ask_plainly(url, int(rows), args.concurrency, args.retries))
        return 0
    for name in set(args.sections) - set(SECTIONS):
        parser.error(f"no section {name}: choose from {', '.join(SECTIONS)}")
    os.environ["NO_PROXY"] = "127.0.0.1"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # of open files
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    scripts = [TEMPLATE, *([args.template.resolve()] if args.template else [])]
    print_head(scripts)
    failures = 0
    for section in args.sections or SECTIONS:
        sides = (rows_of(section, args, script) for script in scripts)
        for rows in itertools.zip_longest(*sides, fillvalue=Row("", "")):
            name, _, bound, ok = rows[0]
            verdict = {None: "", True: "yes", False: "**no**"}[ok]
            measured = [row.measured for row in rows]
            print_line(section, name, *measured, bound, verdict)
            failures += ok is False
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
