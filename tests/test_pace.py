"""The pace: refusals, limits that a server tells or does not, outages, giving up."""

from __future__ import annotations

import math
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import KEY, ROOT, Run
from server import RateLimit, RetryAfter, Server, TokenLimit

import async_template

Runner = Callable[..., Run]
Done = subprocess.CompletedProcess[str]
SEVERAL = 20  # in flight at most, in most of these tests


def good(count: int, word: str = "number") -> list[str]:
    """So many messages that will be answered."""
    return [f"{word} {number} [ok]" for number in range(count)]


def usual(count: int) -> list[str]:
    """So many messages that get the server's default."""
    return [f"usual {number}" for number in range(count)]


def all_answered(result: Run, count: int) -> bool:
    """Whether there are so many rows, each with an answer."""
    answers = [row["response"] for row in result.rows]
    return result.code == 0 and len(answers) == count and all(answers)


def change(server: Server, plan: dict[int, str], latency: float = 0.005) -> None:
    """Lets the server's default change as soon as it has had so many requests."""

    def look(dice: random.Random) -> float:
        server.default = plan.get(server.total, server.default)
        return latency

    server.latency = look


def date_in(seconds: float) -> tuple[str, float]:
    """The time in so many seconds, rounded up: for HTTP, and of the monotonic clock."""
    when = math.ceil(time.time() + seconds)
    return formatdate(when, usegmt=True), when - time.time() + time.monotonic()


# --- Refusals


@pytest.mark.parametrize("status", [429, 503, 529])
def test_refusal_is_no_attempt(server: Server, run: Runner, status: int) -> None:
    """A message refused three times is answered at its one and only attempt."""
    late = f"Late. [{status},{status},{status},ok]"
    assert all_answered(run([*good(20), late], "--max-attempts", "1"), 21)
    assert server.total == 24


@pytest.mark.parametrize(
    "header", ["retry-after-ms=300", "retry-after=1", "retry-after={date}"]
)
def test_refusal_pauses_all(server: Server, run: Runner, header: str) -> None:
    """After one refusal nobody sends anything for as long as the server asks."""
    date, seconds = date_in(0.5)
    late = f"Late. [429:{header.format(date=date)},ok]"
    server.latency = 0.01
    result = run([*good(10), late, *good(30, "later")], "--concurrency", "4")
    times = [request.at for request in server.requests]
    gaps = [after - before for before, after in pairwise(times)]
    longest = gaps.index(max(gaps))
    assert all_answered(result, 41) and server.total == 42
    assert 5 <= longest <= 20  # soon after the refusal
    if "date" in header:
        assert times[longest + 1] >= seconds - 0.01
    else:
        assert gaps[longest] >= (1.0 if header == "retry-after=1" else 0.3)


@pytest.mark.parametrize(
    "header",
    [
        "retry-after=-5",
        "retry-after=nan",
        "retry-after=soon",
        "retry-after=",
        "retry-after-ms=1e999",
        "retry-after-ms=x:retry-after=0",
        "retry-after=Mon, 01 Jan 2001 00:00:00 GMT",
    ],
)
def test_odd_retry_after(server: Server, run: Runner, header: str) -> None:
    """A wait that makes no sense is the program's own short one."""
    assert all_answered(run([*good(10), f"Late. [429:{header},ok]"]), 11)


@pytest.mark.parametrize(
    "header", ["retry-after=660", "retry-after-ms=7200000", "retry-after={date}"]
)
def test_long_wait_stops(server: Server, run: Runner, header: str) -> None:
    """More than ten minutes: it stops, says until when and keeps what is done."""
    server.default = f"429:{header.format(date=date_in(7200)[0])}"
    result = run(good(20) + usual(100), "--concurrency", "5")
    stopped = result.err.splitlines()[-1]
    assert result.code == 2 and re.search(r"until .*\d\d:\d\d", stopped)
    assert 1 <= server.count("usual") <= 5
    assert len(result.rows) >= 15 and all(row["response"] for row in result.rows)


@pytest.mark.parametrize(
    ("answered", "refusal"), [(0, "429"), (20, "503"), (20, "429:retry-after-ms=50")]
)
def test_refusals_alone_stop(
    server: Server,
    run: Runner,
    monkeypatch: pytest.MonkeyPatch,
    answered: int,
    refusal: str,
) -> None:
    """Ten minutes of nothing but refusals end the run; a reason is given."""
    monkeypatch.setattr(async_template, "PATIENCE", 0.3)
    server.default = refusal
    result = run(good(answered) + usual(30), "--max-attempts", "2")
    refused = [request.at for request in server.requests if "usual" in request.text]
    assert result.code == 2 and len(result.rows) == answered
    assert refusal[:3] in result.err.splitlines()[-1]
    assert refused[-1] - refused[0] > 0.2


def test_no_room_for_flex_holds_up_nobody_else(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else pauses or goes slower; most retries come when the others are done."""
    monkeypatch.setattr(async_template, "BACKOFF", 0.4)
    late = [f"Late {n}. [429:code=resource_unavailable,ok]" for n in range(20)]
    both = zip(late, zip(*[iter(usual(60))] * 3))
    messages = [text for one, three in both for text in (one, *three)]
    assert all_answered(run(messages, "--concurrency", "15"), 80)
    asked = ["Late" in request.text for request in server.requests]
    assert asked[::-1].index(False) >= 10


# --- The pace


@pytest.mark.parametrize(
    ("headers", "retry_after", "share"),
    [(True, "ms", 0.05), (False, "ms", 0.25), (False, None, 0.25)],
)
def test_rate_limit(
    server: Server, run: Runner, headers: bool, retry_after: RetryAfter, share: float
) -> None:
    """Within a limit of requests all are answered, and few are refused."""
    limit = RateLimit(100, 20, headers=headers, retry_after=retry_after)
    server.policies = [limit]
    server.latency = 0.05
    assert all_answered(run(usual(150)), 150)
    assert limit.refused <= share * server.total


def test_token_limit(server: Server, run: Runner) -> None:
    """Within a limit of tokens all are answered, long messages and short."""
    limit = TokenLimit(20_000, 4_000, headers=True)
    server.policies = [limit]
    server.latency = 0.05
    messages = [f"{n} " + "word " * (n * 37 % 200) for n in range(120)]
    assert all_answered(run(messages), 120)
    assert limit.refused <= 12


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "headers",
    [
        {"limit-requests": "0", "remaining-requests": "0", "reset-requests": "0s"},
        {"limit-requests": "x", "remaining-requests": "", "reset-requests": "soon"},
        {"limit-requests": "-6", "remaining-requests": "5", "reset-requests": "-5s"},
        {"limit-requests": "9" * 400, "remaining-requests": "1", "reset-requests": ""},
        {"limit-requests": "60", "remaining-requests": "٣", "reset-requests": "٣s"},
        {"remaining-requests": "0"},
        {"limit-tokens": "inf", "remaining-tokens": "nan", "reset-tokens": "1h"},
        {"limit-requests": "200", "remaining-requests": "150", "reset-requests": "6h"},
        {"limit-requests": "60000", "remaining-requests": "0", "reset-requests": "20h"},
    ],
)
def test_odd_limits(server: Server, run: Runner, headers: dict[str, str]) -> None:
    """Headers that make no sense, or of a day's limit, don't stop a run."""
    server.headers = {f"x-ratelimit-{key}": value for key, value in headers.items()}
    assert all_answered(run(good(30)), 30)


@pytest.mark.timeout(20)
def test_one_cut_for_what_is_refused_together(server: Server, run: Runner) -> None:
    """Twenty refused at once slow the run down once; it doesn't crawl afterwards."""
    change(server, {60: "503", 80: "ok"})
    assert all_answered(run(usual(240), "--concurrency", str(SEVERAL)), 240)


@pytest.mark.timeout(20)
def test_stray_refusals_do_not_ruin_the_pace(server: Server, run: Runner) -> None:
    """Where one in 20 is refused for no reason, the run still gets on."""
    server.latency = 0.02
    messages = [f"{n} [{'ok' if n % 20 else '429,ok'}]" for n in range(1, 101)]
    assert all_answered(run(messages, "--concurrency", str(SEVERAL)), 100)


# --- Outages


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_server_restarts(server: Server, run: Runner) -> None:
    """A server that is gone for a while costs no row, even with two attempts."""
    back = threading.Event()

    def resume() -> None:
        server.resume_listening()
        back.set()

    def restart() -> None:
        server.pause_listening()
        threading.Timer(0.3, resume).start()

    def look(dice: random.Random) -> float:
        if server.total == 60:
            threading.Thread(target=restart).start()
        return 0.02

    server.latency = look
    options = ("--max-attempts", "2", "--concurrency", str(SEVERAL))
    assert all_answered(run(good(150), *options), 150)
    assert back.is_set() and server.total <= 200


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("trouble", "concurrency", "count"),
    [("503", 2, 4), ("500", 2, 10), ("drop", 2, 10), ("empty", 2, 10), ("hang", 4, 8)],
)
def test_outage_costs_no_row(
    server: Server, run: Runner, trouble: str, concurrency: int, count: int
) -> None:
    """A server that fails everybody for a while is waited for; no row is lost."""
    change(server, {40: trouble, 40 + count: "ok"})
    flags = f"--max-attempts 2 --timeout 0.2 --concurrency {concurrency}"
    assert all_answered(run(usual(60), *flags.split()), 60)


@pytest.mark.timeout(9)
def test_outage_is_no_reason_to_be_slow(server: Server, run: Runner) -> None:
    """What was slow at the start, and failed then, may be fast for all that is left."""

    def latency(dice: random.Random) -> float:
        server.default = "500" if 4 < server.total <= 12 else "ok"
        return 0.5 if server.total <= 4 else 0.0

    server.latency = latency
    assert all_answered(run(usual(300), "--concurrency", "4"), 300)  # 8 a second: 37 s


@pytest.mark.parametrize("trouble", ["500", "drop"])
def test_one_in_flight_while_the_server_is_down(
    server: Server, run: Runner, trouble: str
) -> None:
    """Once it has failed five times in a row it is asked by one request at a time."""
    change(server, {40: trouble, 52: "ok"})
    options = ("--max-attempts", "2", "--concurrency", "4")
    assert all_answered(run(usual(80), *options), 80)
    in_flight = [request.in_flight for request in server.requests]
    assert in_flight[49:52] == [1, 1, 1]  # 40 well, 5 failures, 4 in flight by then
    assert max(in_flight[52:]) == 4


@pytest.mark.parametrize("trouble", ["500", "drop"])
def test_poison_at_the_end(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """Messages that only ever fail become error rows, though none other is left."""
    monkeypatch.setattr(async_template, "OUTAGE", 0.05)
    poison = [f"Poison {number}. [{trouble}]" for number in range(5)]
    result = run([*good(30), *poison], "--max-attempts", "2")
    assert result.code == 1
    assert [row["error"] is None for row in result.rows] == [True] * 30 + [False] * 5
    assert all(row["error"]["attempts"] == 2 for row in result.rows[30:])
    assert server.count("Poison") <= 60


def test_no_answer_for_long_stops(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes without any answer end the run; what was answered is kept."""
    monkeypatch.setattr(async_template, "PATIENCE", 0.3)
    change(server, {20: "500"})
    result = run(usual(100), "--max-attempts", "2")
    assert result.code == 2 and "500" in result.err.splitlines()[-1]
    assert result.rows and all(row["response"] for row in result.rows)


@pytest.mark.parametrize("count", [3, 30])
def test_only_timeouts_name_the_flag(server: Server, run: Runner, count: int) -> None:
    """If nothing was ever answered in time it ends after some three rounds."""
    server.default = "hang"
    result = run(usual(count), "--timeout", "0.1")
    assert (result.code, result.rows) == (2, [])
    assert "--timeout" in result.err.splitlines()[-1]
    assert min(count, 8) < server.total <= 8 + 8 + 8


# --- What takes some seconds, beside the tests above

REFUSED, UNKNOWN, LARGE = "refused", "unknown", "large"


def run_script(folder: Path, url: str, messages: list[str]) -> Done:
    """Runs the real script with this base url; it may take 40 s."""
    (folder / "in.txt").write_text("\n".join(messages), encoding="utf-8")
    command = [sys.executable, str(ROOT / "async_template.py"), "in.txt", "out.jsonl"]
    env = {
        key: value for key, value in os.environ.items() if "proxy" not in key.lower()
    }
    env |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY}
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=40
    )


@pytest.fixture(scope="module", autouse=True)
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Done]]]:
    """Three runs of the real script, by their names; all start at once."""
    answers = [f"{n} [ok:ms={100 * n}]" for n in range(110)]  # ten a second
    with socket.socket() as closed, Server() as server, ThreadPoolExecutor() as pool:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        runs = {}
        for name, url, messages in (
            (REFUSED, nobody, usual(100)),
            (UNKNOWN, "http://no-such-host.invalid/v1", usual(100)),
            (LARGE, server.url, [*answers, "Large. [429:retry-after-ms=1]"]),
        ):
            folder = tmp_path_factory.mktemp(name)
            runs[name] = pool.submit(run_script, folder, url, messages)
        yield runs


@pytest.mark.parametrize(
    ("name", "host"), [(REFUSED, "127.0.0.1"), (UNKNOWN, "no-such-host.invalid")]
)
def test_nobody_there(slow: dict[str, Future[Done]], name: str, host: str) -> None:
    """An address that cannot be reached is soon said, and which one it is."""
    done = slow[name].result()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"http://{host}" in done.stderr.splitlines()[-1]


def test_larger_than_the_limit_is_a_row(slow: dict[str, Future[Done]]) -> None:
    """What is refused a hundred times, while others are answered, is a row."""
    done = slow[LARGE].result()
    assert done.returncode == 1 and "1 rate_limit" in done.stderr
