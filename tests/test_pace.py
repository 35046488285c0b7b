"""The pace: refusals, one brake for all, growth and cuts, outages, the mirror."""

from __future__ import annotations

import gc
import math
import random
import re
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from itertools import pairwise

import pytest
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from server import RateLimit, RetryAfter, Server, TokenLimit, format_duration

import async_template

Runner = Callable[..., Run]


def good(count: int, word: str = "number") -> list[str]:
    """So many messages that will be answered."""
    return [f"{word} {number} [ok]" for number in range(count)]


def plain(count: int) -> list[str]:
    """So many messages that get the server's default."""
    return [f"plain {number}" for number in range(count)]


def all_answered(result: Run) -> bool:
    """Whether every row has an answer, and none is missing."""
    return result.code == 0 and all(row["response"] for row in result.rows)


def spy(server: Server, latency: float, at: dict[int, str]) -> list[int]:
    """Lets the server's default change after so many requests; what was in flight."""
    seen = list[int]()

    def look(chance: random.Random) -> float:
        seen.append(server.in_flight)
        if directive := at.get(server.total):
            server.default = directive
        return latency

    server.latency = look
    return seen


# --- refusals


def test_refusal_is_no_attempt(server: Server, run: Runner) -> None:
    """A row refused three times is still answered at its one and only attempt."""
    refused = ",".join(["429:retry-after-ms=20"] * 3)
    result = run([*good(1), f"Late. [{refused},ok]"], "--max-attempts", "1")
    assert all_answered(result) and server.total == 5
    assert "refused 3" in result.err


@pytest.mark.parametrize(
    ("header", "least"),
    [("retry-after-ms=250", 0.25), ("retry-after=1", 1.0), ("retry-after={date}", 0.9)],
)
def test_one_brake_for_all(
    server: Server, run: Runner, header: str, least: float
) -> None:
    """After one refusal nobody sends anything for as long as the server asked."""
    date = formatdate(math.ceil(time.time()) + 1, usegmt=True)
    server.latency = 0.01
    run([f"Late. [429:{header.format(date=date)},ok]", *good(30)])
    times = [request.at for request in server.requests]
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps) >= least
    assert gaps.index(max(gaps)) < 25 and server.statuses[200] == 31


@pytest.mark.parametrize(
    "header",
    [
        "retry-after=-5",
        "retry-after=nan",
        "retry-after=soon",
        "retry-after-ms=",
        "retry-after-ms=x:retry-after=0",
        "retry-after=Mon, 01 Jan 2001 00:00:00 GMT",
    ],
)
def test_odd_retry_after(server: Server, run: Runner, header: str) -> None:
    """A wait that makes no sense is the program's own short one."""
    assert all_answered(run([*good(10), f"Late. [429:{header},ok]"]))


@pytest.mark.parametrize("header", ["retry-after=7200", "retry-after-ms=7200000"])
def test_long_wait_stops(server: Server, run: Runner, header: str) -> None:
    """A daily limit stops the run, says until when and keeps what is done."""
    server.default = f"429:{header}"
    result = run(good(20) + plain(100))
    (said,) = (line for line in result.err.splitlines() if "limit is used up" in line)
    assert result.code == 2 and re.search(r"\d\d:\d\d", said)
    assert server.count("plain") <= 60
    assert result.rows and all(row["response"] for row in result.rows)


@pytest.mark.timeout(8)
def test_stray_refusals_do_not_ruin_the_pace(server: Server, run: Runner) -> None:
    """Where one in 20 is refused for no reason the pace stays near what is served."""
    server.latency = 0.05
    messages = [f"{n} [{'ok' if n % 20 else '429,ok'}]" for n in range(1, 301)]
    assert all_answered(run(messages, "--concurrency", "20"))
    assert len(server.stats()["answered_200_by_second"]) <= 8


# --- growth and cuts


def test_starts_small(server: Server, run: Runner) -> None:
    """Before the first answer eight are in flight and no more."""
    server.hold, server.latency = 8, 0.1
    assert all_answered(run(good(60)))
    first = server.requests[0].at
    assert sum(request.at < first + 0.1 for request in server.requests) == 8


def test_grows_with_success(server: Server, run: Runner) -> None:
    """While answers come more and more are in flight."""
    server.latency = 0.1
    assert all_answered(run(good(150), "--concurrency", "30"))
    assert 20 <= server.peak <= 30


@pytest.mark.parametrize(
    ("trouble", "cut"),
    [("503", True), ("500", False), ("drop", False)],
)
def test_cut(server: Server, run: Runner, trouble: str, cut: bool) -> None:
    """Overload cuts what is in flight; a row's own trouble does not."""
    in_flight = spy(server, 0.15, {})
    messages = [*good(60, "before"), f"Bad. [{trouble},ok]", *good(50, "after")]
    assert all_answered(run(messages, "--concurrency", "20"))
    assert max(in_flight[:61]) >= 15
    assert (max(in_flight[85:105]) < 15) == cut


def test_one_cut_an_episode(server: Server, run: Runner) -> None:
    """Many refused at once are one episode: the run does not crawl afterwards."""
    in_flight = spy(server, 0.15, {})
    bad = [f"Bad {n}. [503,ok]" for n in range(5)]
    messages = [*good(60, "before"), *bad, *good(50, "after")]
    assert all_answered(run(messages, "--concurrency", "20"))
    assert 7 <= max(in_flight[90:110]) < 15


# --- rate limits


@pytest.mark.parametrize(
    ("headers", "retry_after"), [(True, "ms"), (False, "ms"), (False, None)]
)
def test_rate_limit(
    server: Server,
    run: Runner,
    monkeypatch: pytest.MonkeyPatch,
    headers: bool,
    retry_after: RetryAfter,
) -> None:
    """Within a limit of requests all is answered, and little is refused."""
    monkeypatch.setattr(async_template, "BACKOFF", 0.1)
    limit = RateLimit(100, 20, headers=headers, retry_after=retry_after)
    server.policies = [limit]
    server.latency = 0.05
    assert all_answered(run(plain(150)))
    assert limit.refused <= (0.05 if headers else 0.25) * server.total


def test_larger_than_the_limit_is_a_row(server: Server, run: Runner) -> None:
    """What is refused for ever, while others are answered, does not hold up the end."""
    result = run(["Large. [429:retry-after-ms=1]", *plain(60)], "--max-attempts", "2")
    assert (result.code, len(result.rows)) == (1, 61)
    assert result.rows[0]["error"]["type"] == "rate_limit"
    assert server.count("Large.") > 30


def test_token_limit(server: Server, run: Runner) -> None:
    """Within a limit of tokens all is answered, long messages and short."""
    limit = TokenLimit(20_000, 4_000, headers=True)
    server.policies = [limit]
    server.latency = 0.05
    messages = [f"{n} " + "word " * (n * 37 % 200) for n in range(120)]
    assert all_answered(run(messages))
    assert limit.refused <= 12


@pytest.mark.parametrize(
    "headers",
    [
        {"limit-requests": "0", "remaining-requests": "0", "reset-requests": "0s"},
        {"limit-requests": "x", "remaining-requests": "", "reset-requests": "soon"},
        {"remaining-requests": "0"},
        {"limit-requests": "9", "remaining-requests": "-1", "reset-requests": "1s"},
        {"limit-tokens": "1", "remaining-tokens": "1", "reset-tokens": "1ms"},
        {"limit-tokens": "inf", "remaining-tokens": "nan", "reset-tokens": "1h"},
        {"limit-requests": "200", "remaining-requests": "150", "reset-requests": "6h"},
    ],
)
def test_odd_limits(server: Server, run: Runner, headers: dict[str, str]) -> None:
    """Headers that make no sense, or leave room for all, do not stop a run."""
    server.headers = {f"x-ratelimit-{key}": value for key, value in headers.items()}
    assert all_answered(run(good(30)))


@pytest.mark.timeout(5)
def test_daily_limit_used_up(server: Server, run: Runner) -> None:
    """A limit that is back tomorrow is no reason to stand still without a word."""
    limit = {"limit-requests": "200", "remaining-requests": "0"}
    limit["reset-requests"] = "20h0m0s"
    server.headers = {f"x-ratelimit-{key}": value for key, value in limit.items()}
    assert run(good(60)).code in (0, 2)


# --- outages


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_server_restarts(server: Server, run: Runner) -> None:
    """A server that is gone for a while costs no row, even with two attempts."""
    back = threading.Event()

    def restart() -> None:
        server.pause_listening()
        threading.Timer(0.4, resume).start()

    def resume() -> None:
        server.resume_listening()
        back.set()

    def look(chance: random.Random) -> float:
        if server.total == 60:
            threading.Thread(target=restart).start()
        return 0.02

    server.latency = look
    result = run(good(150), "--max-attempts", "2", "--concurrency", "20")
    assert back.wait(10) and all_answered(result) and len(result.rows) == 150
    assert server.total <= 200
    gc.collect()  # the test server's sockets that were accepted just as it closed


@pytest.mark.parametrize("trouble", ["503", "500", "drop", "empty", "hang"])
def test_outage_costs_no_row(server: Server, run: Runner, trouble: str) -> None:
    """A server that fails everybody for a while is waited for; no row is lost."""
    spy(server, 0.01, {40: trouble, 50: "ok"})
    options = ("--max-attempts", "2", "--concurrency", "8", "--timeout", "0.2")
    result = run(plain(80), *options)
    assert all_answered(result) and len(result.rows) == 80


@pytest.mark.parametrize("trouble", ["500", "503", "empty", "drop"])
def test_poison_at_the_end(server: Server, run: Runner, trouble: str) -> None:
    """Messages that only ever fail become error rows: the server is well."""
    poison = [f"Poison {number}. [{trouble}]" for number in range(10)]
    result = run([*good(30), *poison], "--max-attempts", "2")
    assert result.code == 1
    assert [row["error"] is None for row in result.rows] == [True] * 30 + [False] * 10
    assert all(row["error"]["attempts"] == 2 for row in result.rows[30:])
    assert server.count("Poison") <= 60


# --- the mirror

ODD = [
    None,
    "",
    "0",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "5e-324",
    "1e-300",
    "9" * 400,
]
ODD += [
    "60",
    "0s",
    "1ms",
    "6m0s",
    "1.2.3s",
    "٣s",
    "99999999999d",
    "-5s",
    "1e9s",
    "\ud800",
]
NAMES = [f"x-ratelimit-{part}-requests" for part in ("limit", "remaining", "reset")]
VALUE = st.sampled_from(ODD) | st.text() | st.integers().map(str) | st.floats().map(str)
HEADERS = st.tuples(VALUE, VALUE, VALUE)


def fed(*headers: tuple[str | None, ...]) -> async_template.Mirror:
    """A mirror of the limit of requests that has read these headers."""
    mirror = async_template.Mirror("requests")
    for values in headers:
        known = {name: value for name, value in zip(NAMES, values) if value is not None}
        reply = async_template.Reply(headers=known)
        mirror.read(reply, time.monotonic(), mirror.spent, 1.0)
    return mirror


@settings(max_examples=60)
@given(st.lists(HEADERS, max_size=4), st.floats(0, 1e9))
def test_mirror_of_odd_headers(
    headers: list[tuple[str | None, ...]], need: float
) -> None:
    """No header raises, and there is always a finite wait."""
    mirror = fed(*headers)
    assert 0 <= mirror.wait(need) < math.inf
    mirror.spend(1.0)
    assert 0 <= mirror.wait(need) < math.inf


@given(st.integers(100, 1_000_000), st.floats(0.05, 0.6))
def test_mirror_of_a_limit_per_minute(limit: int, share: float) -> None:
    """From OpenAI's headers comes the rate at which there is room again."""
    left = int(limit * share)
    reset = format_duration((limit - left) / (limit / 60))
    mirror = fed((str(limit), str(left), reset))
    assert mirror.wait(1) == 0
    took = mirror.wait(0.9 * limit) - mirror.wait(0.7 * limit)
    assert 0.2 * limit / took == pytest.approx(limit / 60, 0.05)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120ms", 0.12),
        ("1s", 1),
        ("1.5s", 1.5),
        ("59.999s", 59.999),
        ("6m0s", 360),
        ("7m12s", 432),
        ("1h0m0s", 3600),
        ("1d2h", 93_600),
    ],
)
def test_mirror_of_durations(text: str, seconds: float) -> None:
    """All that a server had is there again after the time it names."""
    mirror = fed(("200", "0", text))
    assert mirror.wait(200) == pytest.approx(seconds, 0.01, 0.01)


def test_mirror_knows_nothing() -> None:
    """Without headers there is no limit."""
    assert async_template.Mirror("requests").wait(1e9) == fed((None,) * 3).wait(5) == 0
