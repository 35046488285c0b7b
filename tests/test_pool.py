"""Many at a time: the limit, waits that hold no slot, the timeout's clock, bugs."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from itertools import groupby, pairwise
from statistics import mean
from typing import Any

import pytest
from conftest import Run
from pydantic import BaseModel, field_validator
from server import Server

import async_template

Runner = Callable[..., Run]
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


def test_back_off_grows_and_has_jitter(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waits before a retry double on average; each is anything from 0 on."""
    monkeypatch.setattr(async_template, "BACKOFF", 0.1)
    assert run([f"{n} [bounds,bounds,bounds,ok]" for n in range(40)]).code == 0
    tries = sorted((request.text, request.at) for request in server.requests)
    times = [[at for _, at in some] for _, some in groupby(tries, lambda one: one[0])]
    waits = [[after - before for before, after in pairwise(ats)] for ats in times]
    first, _, third = zip(*waits)
    assert len(waits) == 40
    assert mean(third) > 1.5 * mean(first)  # four times, but for what a request takes
    assert max(third) - min(third) > 0.4  # of 0.8


def test_back_off_holds_no_slot(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a single slot others get through while a message waits for its next try."""
    monkeypatch.setattr(async_template, "BACKOFF", 0.2)
    result = run(["Late. [500,ok]", *good(10)], "--concurrency", "1")
    late = ["Late." in request.text for request in server.requests]
    assert result.code == 0 and texts(result)[0] == "Late. [500,ok]"
    assert late[0] and not late[1] and sum(late) == 2


def test_refused_message_is_asked_again(server: Server, run: Runner) -> None:
    """With a single slot a refused message comes back, and the others as well."""
    messages = ["Late. [429:retry-after-ms=20,ok]", *good(10)]
    result = run(messages, "--concurrency", "1")
    assert result.code == 0 and texts(result) == messages
    assert server.total == 12 and server.peak == 1


def test_queueing_is_no_timeout(server: Server, run: Runner) -> None:
    """Waiting for a slot or for a rate limit does not count, only the request does."""
    server.latency = 0.05
    messages = [*good(10), "Late. [429:retry-after-ms=500,ok]"]
    result = run(messages, "--concurrency", "1", "--timeout", "0.4")
    assert result.code == 0 and server.total == 12


def test_trickling_reply_is_a_timeout(server: Server, run: Runner) -> None:
    """The clock covers the whole reply and doesn't start anew with each part of it."""
    result = run(["Slow. [trickle]"], "--max-attempts", "1", "--timeout", "0.5")
    assert result.rows[0]["error"]["type"] == "timeout"


# --- All of it together


@pytest.mark.parametrize("seed", range(2))
def test_rows_equal_the_input(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, seed: int
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


def test_rows_that_come_while_the_disk_is_slow(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at OUTPUT that takes a while is no reason to think that it was cut."""
    for name in "fstat", "stat", "fsync":
        monkeypatch.setattr(os, name, slowly(getattr(os, name)))
    server.latency = 0.05
    assert run(good(150), "--concurrency", "5").code == 0


def slowly(look: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, but 20 ms slower in all threads but the main one."""

    def slow(*args: Any, **options: Any) -> Any:
        found = look(*args, **options)
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.02)
        return found

    return slow


@pytest.mark.timeout(15)
@pytest.mark.parametrize("after", [0, 20])
@pytest.mark.parametrize("bug", [ZeroDivisionError, KeyError])
def test_bug_surfaces(
    server: Server,
    run: Runner,
    monkeypatch: pytest.MonkeyPatch,
    bug: type[Exception],
    after: int,
) -> None:
    """A bug, here one in the user's own class, ends the run soon and becomes no row."""
    checked = list[Any]()

    class Buggy(BaseModel):
        score: float
        explanation: str

        @field_validator("score")
        @classmethod
        def check(cls, value: float) -> float:
            checked.append(value)
            if len(checked) > after:
                raise bug("here")
            return value

    example = Buggy.model_construct(score=0.5, explanation="")
    monkeypatch.setattr(async_template, "EXAMPLE", example)
    with pytest.raises((bug, BaseExceptionGroup)) as caught:
        run(good(200), "--concurrency", "10")
    assert bug.__name__ in repr(caught.value)
    assert server.total < 60
