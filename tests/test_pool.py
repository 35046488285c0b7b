"""Many at a time: the limit, waits that hold no slot, the timeout's clock, bugs."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from conftest import Run
from pydantic import BaseModel, field_validator
from server import Server

import async_template

Runner = Callable[..., Run]
Patch = pytest.MonkeyPatch
FIRST = 8  # in flight before the first answer

KINDS = [
    *("ok", "reasoning", "commentary", "twice", "fenced", "nousage", "nomodel"),
    *("400", "422:param=input", "500", "408", "failed", "drop", "half", "garbage"),
    *("empty", "html", "sse", "prose", "bounds", "nan", "refusal", "filter", "hang"),
    *("incomplete", "500,ok", "503,drop,ok", "empty,bounds,ok", "529,ok"),
    *("429:retry-after-ms=5,ok", "429,429,500,ok", "429:retry-after-ms=5,refusal"),
]


def good(count: int) -> list[str]:
    """So many messages that will be answered."""
    return [f"number {number} [ok]" for number in range(count)]


def texts(result: Run) -> list[str]:
    """The messages of the rows."""
    return [row["text_message"] for row in result.rows]


def hold_twice(server: Server, then: int) -> None:
    """The first replies wait until 8 are in flight, the next ones until `then` are."""
    server.hold = FIRST

    def latency(dice: random.Random) -> float:
        if server.total == FIRST:
            server.hold = then
        return 0.1 if server.total <= FIRST else 0.0

    server.latency = latency


# --- How many are in flight


@pytest.mark.parametrize("limit", [1, 2, 5, 8])
def test_peak_is_the_limit(server: Server, run: Runner, limit: int) -> None:
    """The server waits until the limit is in flight, and never sees more."""
    server.hold = limit
    result = run(good(30), "--concurrency", str(limit))
    assert result.code == 0 and texts(result) == good(30)
    assert server.peak == limit


@pytest.mark.parametrize("limit", [12, 50])
def test_first_answer_opens_all_slots(server: Server, run: Runner, limit: int) -> None:
    """Eight before the first answer; then at once as many as the limit, and no more."""
    hold_twice(server, then=limit)
    assert run(good(100), "--concurrency", str(limit)).code == 0
    assert server.requests[8].at >= server.requests[7].at + 0.1
    assert server.peak == limit


@pytest.mark.parametrize("count", [1, 5])
def test_limit_above_the_messages(server: Server, run: Runner, count: int) -> None:
    """With more slots than messages all are in flight at once."""
    server.hold = count
    assert run(good(count), "--concurrency", "50").code == 0
    assert server.peak == server.total == count


def test_limit_holds_in_trouble(server: Server, run: Runner) -> None:
    """Retries, timeouts and dropped connections don't breach it."""
    server.hold = 3
    kinds = ["ok", "500,ok", "drop,ok", "hang,ok", "empty,ok", "429,ok"]
    messages = good(8) + [f"{n} [{kinds[n % 6]}]" for n in range(30)]
    result = run(messages, "--concurrency", "3", "--timeout", "0.3")
    assert result.code == 0 and texts(result) == messages
    assert server.peak == 3


# --- What is tried again, and when


@pytest.mark.parametrize("trouble", ["500", "408", "409", "drop", "empty"])
def test_nobody_else_retries(server: Server, run: Runner, trouble: str) -> None:
    """The SDK's own retries are off, even where the server asks for them."""
    server.headers = {"x-should-retry": "true"}
    result = run([f"Bad. [{trouble}]"], "--max-attempts", "1")
    assert (result.code, server.total) == (1, 1)
    assert result.rows[0]["error"]["attempts"] == 1


def test_back_off(server: Server, run: Runner, monkeypatch: Patch) -> None:
    """The waits before a retry double on average; each is anything from 0 on."""
    monkeypatch.setattr(async_template, "BACKOFF", 0.1)
    late = [f"Late {n}. [bounds,bounds,bounds,ok]" for n in range(40)]
    assert run([*good(10), *late]).code == 0
    requests = [request for request in server.requests if "Late" in request.text]
    tries = sorted((request.text, request.at) for request in requests)
    times = [[at for _, at in some] for _, some in groupby(tries, lambda one: one[0])]
    waits = [[after - before for before, after in pairwise(ats)] for ats in times]
    first, _, third = zip(*waits)
    assert len(waits) == 40
    assert mean(third) > 1.5 * mean(first)  # four times, but for what a request takes
    assert max(third) - min(third) > 0.4  # of 0.8


def test_back_off_holds_no_slot(
    server: Server, run: Runner, monkeypatch: Patch
) -> None:
    """With a single slot others get through while a message waits for its next try."""
    monkeypatch.setattr(async_template, "BACKOFF", 0.2)
    result = run(["Late. [500,ok]", *good(10)], "--concurrency", "1")
    late = ["Late." in request.text for request in server.requests]
    assert result.code == 0 and texts(result)[0] == "Late. [500,ok]"
    assert late[0] and not late[1] and sum(late) == 2


def test_queueing_is_no_timeout(server: Server, run: Runner) -> None:
    """Waiting for a slot or for a rate limit does not count, only the request does."""
    server.latency = 0.05
    messages = ["Late. [429:retry-after-ms=500,ok]", *good(10)]
    result = run(messages, "--concurrency", "1", "--timeout", "0.4")
    assert result.code == 0 and texts(result) == messages
    assert server.total == 12 and server.peak == 1


def test_trickling_reply_is_a_timeout(server: Server, run: Runner) -> None:
    """The clock covers the whole reply and doesn't start anew with each part of it."""
    result = run(["Slow. [trickle]"], "--max-attempts", "1", "--timeout", "0.5")
    assert result.rows[0]["error"]["type"] == "timeout"


# --- All of it together


@pytest.mark.parametrize("seed", range(2))
def test_rows_equal_the_input(
    server: Server, run: Runner, monkeypatch: Patch, seed: int
) -> None:
    """Whatever happens: a row for each message, in order, of the right kind."""
    monkeypatch.setattr(async_template, "OUTAGE", 0.05)
    mixed = [f"Mixed. [{kind}]" for kind in KINDS] + good(12)
    random.Random(seed).shuffle(mixed)
    messages = [f"first {n}" for n in range(10)] + mixed
    result = run(messages, "--max-attempts", "3", "--timeout", "0.3")
    assert result.code == 1 and texts(result) == messages
    assert [row["line"] for row in result.rows] == list(range(1, len(messages) + 1))
    for row in result.rows:
        assert (row["error"] is None) == (row["response"] is not None)
        assert row["response"] or not row["text_message"].endswith("ok]")


@pytest.mark.timeout(15)
@pytest.mark.parametrize("at", [1, 20])
@pytest.mark.parametrize("bug", [ZeroDivisionError, KeyError])
def test_bug_surfaces(
    server: Server, run: Runner, monkeypatch: Patch, tmp_path: Path, bug: Any, at: int
) -> None:
    """With its traceback; what is in flight lands. Here it is in the user's class."""
    checked = list[float]()

    class Buggy(BaseModel):
        score: float
        explanation: str

        @field_validator("score")
        @classmethod
        def my_check(cls, value: float) -> float:
            checked.append(value)
            if len(checked) == at:
                raise bug("here")
            return value

    example = Buggy.model_construct(score=0.5, explanation="")
    monkeypatch.setattr(async_template, "EXAMPLE", example)
    server.latency = 0.02
    with pytest.raises(bug, match="here") as caught:
        run(good(200), "--concurrency", "10")
    assert "my_check" in "".join(traceback.format_exception(caught.value))
    kept = (tmp_path / "out.jsonl").read_text("utf-8").count("\n")
    assert kept == server.statuses[200] - 1 and server.total < 60
