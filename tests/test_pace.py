"""The pace: refusals, limits that a server tells or does not, outages, giving up."""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import KEY, ROOT, Run
from server import RateLimit, Reply, Request, RetryAfter, Server, TokenLimit

import async_template

Runner = Callable[..., Run]
Patch = pytest.MonkeyPatch
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


# --- Refusals


@pytest.mark.parametrize("status", [429, 503, 529])
def test_refusal_is_no_attempt(server: Server, run: Runner, status: int) -> None:
    """A message refused three times is answered at its one and only attempt."""
    late = f"Late. [{status},{status},{status},ok]"
    assert all_answered(run([*good(20), late], "--max-attempts", "1"), 21)
    assert server.total == 24


@pytest.mark.parametrize("refusal", ["429:retry-after-ms=300", "503:retry-after=1"])
def test_refusal_pauses_all(server: Server, run: Runner, refusal: str) -> None:
    """After one refusal nobody sends anything for as long as the server asks."""
    late = f"Late. [{refusal},ok]"
    server.latency = 0.01
    result = run([*good(10), late, *good(30, "later")], "--concurrency", "4")
    times = [request.at for request in server.requests]
    gaps = [after - before for before, after in pairwise(times)]
    assert all_answered(result, 41) and server.total == 42
    assert max(gaps) >= (1.0 if refusal.startswith("503") else 0.3)
    assert 5 <= gaps.index(max(gaps)) <= 20  # soon after the refusal


@pytest.mark.parametrize("failure", ["429:code=resource_unavailable", "500"])
def test_one_message_waits(server: Server, run: Runner, failure: str) -> None:
    """As long as the server asks; nobody else pauses or goes slower meanwhile."""
    count = 1 if failure == "500" else 20  # five failures would be an outage
    late = [f"Late {n}. [{failure}:retry-after-ms=700,ok]" for n in range(count)]
    assert all_answered(run([*good(10), *late, *good(60, "more")]), 70 + count)
    times = [request.at for request in server.requests if "Late" in request.text]
    assert times[count] >= times[0] + 0.7
    assert all("Late" in request.text for request in server.requests[-count:])


ODD_WAITS = ["=-5", "=nan", "=soon", "=", "-ms=x", "=Mon, 01 Jan 2001 00:00:00 GMT"]


@pytest.mark.parametrize("header", ODD_WAITS)
def test_odd_retry_after(server: Server, run: Runner, header: str) -> None:
    """A wait that makes no sense is the program's own short one."""
    assert all_answered(run([*good(10), f"Late. [429:retry-after{header},ok]"]), 11)


@pytest.mark.parametrize("header", ["retry-after=660", "retry-after-ms=1e999"])
def test_long_wait_stops(server: Server, run: Runner, header: str) -> None:
    """More than ten minutes: it stops, says why and keeps what is done."""
    server.default = f"429:message=Come back tomorrow.:{header}"
    result = run(good(20) + usual(100), "--concurrency", "5")
    assert result.code == 2 and "Come back tomorrow." in result.err.splitlines()[-1]
    assert 1 <= server.count("usual") <= 5
    assert len(result.rows) >= 15 and all(row["response"] for row in result.rows)


def test_hundred_refusals(server: Server, run: Runner, monkeypatch: Patch) -> None:
    """What is refused so often, while others are answered, seems to be too large."""
    monkeypatch.setattr(async_template, "BACKOFF", 0)
    result = run([*good(10), "Large. [429:code=resource_unavailable]"])
    assert result.code == 1 and result.rows[10]["error"]["type"] == "rate_limit"
    assert 100 <= server.count("Large") <= 101


@pytest.mark.parametrize("answered", [0, 20])
@pytest.mark.parametrize("trouble", ["429", "503:retry-after-ms=50", "500"])
def test_no_answer_for_long_stops(
    server: Server, run: Runner, monkeypatch: Patch, answered: int, trouble: str
) -> None:
    """Ten minutes without any answer end the run; a reason is given."""
    monkeypatch.setattr(async_template, "PATIENCE", 0.3)
    server.default = trouble
    result = run(good(answered) + usual(30), "--max-attempts", "2")
    asked = [request.at for request in server.requests if "usual" in request.text]
    assert result.code == 2 and len(result.rows) == answered
    assert trouble[:3] in result.err.splitlines()[-1]
    assert asked[-1] - asked[0] > 0.2


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


@dataclass
class SetsAside(TokenLimit):
    """Counts more tokens than a request will use, as OpenAI's API does."""

    aside: int = 0

    def check(self, request: Request, headers: dict[str, str]) -> Reply | None:
        """Refuses with 429 what is too much."""
        longer = replace(request, text=request.text + self.aside * "word")
        return super().check(longer, headers)


@pytest.mark.parametrize("aside", [0, 1000])
def test_tokens(server: Server, run: Runner, monkeypatch: Patch, aside: int) -> None:
    """Few are refused, long or short, also if `max_output_tokens` is set aside."""
    monkeypatch.setattr(async_template, "EXTRA", {"max_output_tokens": aside or None})
    limit = SetsAside(20_000, 4_000, headers=True, aside=aside)
    if aside:
        limit.per_second = limit.burst = 60_000
    server.policies = [limit]
    server.latency = 0.05
    messages = [f"{n} " + "word " * (n * 37 % 200) for n in range(120)]
    assert all_answered(run(messages), 120)
    assert limit.refused <= (2 if aside else 12)


@pytest.mark.timeout(20)
def test_text_above_the_token_limit(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes out once the bucket is full, and the bar says what it waits for."""
    limits = {"limit-tokens": "60000", "remaining-tokens": "58000"}
    server.headers = {f"x-ratelimit-{name}": value for name, value in limits.items()}
    messages = [*good(3), "word " * 100_000, *good(3, "more")]
    answers = async_template.answer_all(messages, tmp_path / "o.jsonl", concurrency=1)
    assert all(row["response"] for row in asyncio.run(answers))
    assert re.search(r"[1-9] s for the \w*.*token", capsys.readouterr().err)


ODD_LIMITS = ["requests:0:0", "requests:x:", "requests:-6:5", "requests:60:٣"]
ODD_LIMITS += [f"requests:{'9' * 400}:1", "requests::0", "tokens:inf:nan"]
ODD_LIMITS += ["requests:200:150", "requests:60000:0"]  # of a day


@pytest.mark.timeout(20)
@pytest.mark.parametrize("headers", ODD_LIMITS)
def test_odd_limits(server: Server, run: Runner, headers: str) -> None:
    """Headers that make no sense, or of a day's limit, don't stop a run."""
    kind, limit, left = headers.split(":")
    values = {"limit": limit, "remaining": left, "reset": "6h"}
    server.headers = {f"x-ratelimit-{k}-{kind}": value for k, value in values.items()}
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
def test_one_in_flight_in_an_outage(server: Server, run: Runner, trouble: str) -> None:
    """Once it has failed five times in a row it is asked by one request at a time."""

    def look(dice: random.Random) -> float:
        server.default = trouble if 40 <= server.total < 52 else "ok"
        server.hold = 4 if server.total == 60 else server.hold
        return 0.005

    server.latency = look
    options = ("--max-attempts", "2", "--concurrency", "4")
    result = run(usual(80), *options)
    in_flight = [request.in_flight for request in server.requests]
    assert all_answered(result, 80) and max(in_flight[60:]) == 4
    assert in_flight[49:52] == [1, 1, 1]  # 40 well, 5 failures, 4 in flight by then
    assert result.err.count("all wait: ") == 1


@pytest.mark.parametrize("trouble", ["500", "drop"])
def test_poison(server: Server, run: Runner, monkeypatch: Patch, trouble: str) -> None:
    """Messages that only ever fail become error rows, though none other is left."""
    monkeypatch.setattr(async_template, "OUTAGE", 0.05)
    poison = [f"Poison {number}. [{trouble}]" for number in range(5)]
    result = run([*good(30), *poison], "--max-attempts", "2")
    assert result.code == 1
    assert [row["error"] is None for row in result.rows] == [True] * 30 + [False] * 5
    assert all(row["error"]["attempts"] == 2 for row in result.rows[30:])
    assert server.count("Poison") <= 60


@pytest.mark.parametrize("count", [3, 30])
def test_only_timeouts_name_the_flag(server: Server, run: Runner, count: int) -> None:
    """If nothing was ever answered in time it ends after some three rounds."""
    server.default = "hang"
    result = run(usual(count), "--timeout", "0.1")
    assert (result.code, result.rows) == (2, [])
    assert "--timeout" in result.err.splitlines()[-1]
    assert min(count, 8) < server.total <= 8 + 8 + 8


# --- What takes some seconds, beside the tests above

Done = subprocess.CompletedProcess[str]
Slow = dict[str, Future[Done]]
LIMIT = RateLimit(2, 2)  # of the run "small"


def run_script(folder: Path, url: str, messages: list[str]) -> Done:
    """Runs the real script with this base url; it may take 40 s."""
    (folder / "in.txt").write_text("\n".join(messages), encoding="utf-8")
    command = [sys.executable, str(ROOT / "async_template.py"), "in.txt", "out.jsonl"]
    command += ["--concurrency", "2"]
    env = {name: text for name, text in os.environ.items() if "proxy" not in name}
    env |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY}
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=40
    )


def seconds(done: Done) -> float:
    """How long a run has taken by its closing lines, without the start of Python."""
    return float(re.findall(r"(?m)^used: .*?([\d.]+) s\b", done.stderr)[0])


@pytest.fixture(scope="module", autouse=True)
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    """Runs of the real script, by their names; all start at once."""
    late = "Late. [429:message=Slow down.:retry-after=6,ok]"
    small = Server(policy=LIMIT)
    with Server() as server, small, ThreadPoolExecutor() as pool:
        cases = {
            "nobody": ("http://no-such-host.invalid/v1", usual(100)),
            "page": (server.url, [f"{number} [html]" for number in range(100)]),
            "late": (server.url, [*good(10), late]),
            "small": (small.url, usual(40)),
        }
        yield {
            name: pool.submit(run_script, tmp_path_factory.mktemp(name), url, messages)
            for name, (url, messages) in cases.items()
        }


@pytest.mark.parametrize(
    ("name", "reason"), [("nobody", "no-such-host.invalid"), ("page", "Bad gateway")]
)
def test_no_api_there(slow: Slow, name: str, reason: str) -> None:
    """Nobody, or a web page, since the start: it takes 15 s, and the reason is said."""
    done = slow[name].result()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert reason in done.stderr.splitlines()[-1] and seconds(done) <= 15


def test_long_wait_is_said(slow: Slow) -> None:
    """If all wait for more than five seconds a line says why, in the server's words."""
    done = slow["late"].result()
    assert done.returncode == 0 and done.stderr.count("Slow down.") == 1


def test_small_limit_without_headers(slow: Slow) -> None:
    """Its pace is found, too, since each reply adds 2 % at most."""
    done = slow["small"].result()
    assert done.returncode == 0
    assert seconds(done) <= 19 / 0.8  # a burst of two, then two a second
    assert LIMIT.refused <= 14  # if each reply added 0.2: 15 and more
