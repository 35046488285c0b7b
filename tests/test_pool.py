"""Many at a time: the bound, slots that waiting rows leave free, bugs, mixed runs."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Run
from server import Server

import async_template

Runner = Callable[..., Run]

KINDS = [
    *("ok", "reasoning", "commentary", "nousage", "nomodel"),
    *("400", "422:param=input", "500", "503", "529", "408", "failed", "drop", "half"),
    *("garbage", "empty", "html", "sse", "prose", "bounds", "nan", "refusal"),
    *("filter", "incomplete", "500,ok", "503,drop,ok", "empty,bounds,ok", "hang"),
    *("429:retry-after-ms=5,ok", "429,429,500,ok", "429:retry-after-ms=5,refusal"),
]


def good(count: int) -> list[str]:
    """So many messages that will be answered."""
    return [f"number {number} [ok]" for number in range(count)]


def texts(result: Run) -> list[str]:
    """The messages of the rows."""
    return [row["text_message"] for row in result.rows]


@pytest.mark.parametrize("limit", [1, 2, 5, 8])
def test_peak_is_the_limit(server: Server, run: Runner, limit: int) -> None:
    """The server waits until the limit is in flight, and never sees more."""
    server.hold = limit
    result = run(good(30), "--concurrency", str(limit))
    assert result.code == 0 and texts(result) == good(30)
    assert server.peak == limit


@pytest.mark.parametrize("count", [1, 4])
def test_limit_above_the_messages(server: Server, run: Runner, count: int) -> None:
    """With more slots than messages all are in flight at once."""
    server.hold = count
    assert run(good(count), "--concurrency", "50").code == 0
    assert server.peak == server.total == count


def test_never_above_a_larger_limit(server: Server, run: Runner) -> None:
    """In flight grows up to the limit and not past it."""
    server.latency = 0.05
    assert run(good(150), "--concurrency", "12").code == 0
    assert server.peak == 12


def test_limit_holds_in_trouble(server: Server, run: Runner) -> None:
    """Retries, timeouts and dropped connections do not breach the bound."""
    server.hold = 3
    kinds = ["ok", "500,ok", "drop,ok", "hang,ok", "empty,ok"]
    messages = good(8) + [f"{n} [{kinds[n % 5]}]" for n in range(30)]
    result = run(messages, "--concurrency", "3", "--timeout", "0.2")
    assert result.code == 0 and texts(result) == messages
    assert server.peak == 3


def test_back_off_holds_no_slot(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a single slot the others get through while a row waits for its next try."""
    monkeypatch.setattr(async_template, "BACKOFF", 0.25)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    result = run(["Late. [500,ok]", *good(10)], "--concurrency", "1")
    late = ["Late." in request.text for request in server.requests]
    assert result.code == 0 and texts(result)[0] == "Late. [500,ok]"
    assert late == [True] + [False] * 10 + [True]


def test_refused_row_is_asked_again(server: Server, run: Runner) -> None:
    """With a single slot a refused row comes back, and the others as well."""
    messages = ["Late. [429:retry-after-ms=20,ok]", *good(10)]
    result = run(messages, "--concurrency", "1")
    assert result.code == 0 and texts(result) == messages
    assert server.total == 12 and server.peak == 1


@pytest.mark.parametrize("after", [0, 20])
def test_bug_surfaces(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """A bug ends the run with its traceback, soon; it becomes no row."""
    read_body, calls = async_template.read_body, list[bytes]()

    def buggy(content: bytes) -> Any:
        calls.append(content)
        if len(calls) > after:
            raise KeyError("bug")
        return read_body(content)

    monkeypatch.setattr(async_template, "read_body", buggy)
    with pytest.raises((KeyError, BaseExceptionGroup)) as caught:
        run(good(200))
    assert "KeyError" in repr(caught.value)
    assert server.total < 200


@pytest.mark.parametrize("seed", range(3))
def test_rows_equal_the_input(server: Server, run: Runner, seed: int) -> None:
    """Whatever happens: a row for each message, in order, of the right kind."""
    mixed = [f"Mixed. [{kind}]" for kind in KINDS] + good(12)
    random.Random(seed).shuffle(mixed)
    messages = good(10) + mixed
    result = run(messages, "--max-attempts", "3", "--timeout", "0.3")
    assert result.code == 1 and texts(result) == messages
    assert [row["line"] for row in result.rows] == list(range(1, len(messages) + 1))
    for row in result.rows:
        assert (row["error"] is None) == (row["response"] is not None)
        assert row["response"] or not row["text_message"].endswith("ok]")


def test_same_message_many_times(server: Server, run: Runner) -> None:
    """Each occurrence of a message is asked and has its row."""
    result = run(["Same. [ok]"] * 30)
    assert result.code == 0 and len(result.rows) == server.total == 30
    assert [row["line"] for row in result.rows] == list(range(1, 31))


def test_notebook(server: Server, run: Runner) -> None:
    """`answer_all` gives the rows that the file would hold, twice in a process."""
    messages = [*good(12), "Bad. [400]"]
    in_file = run(messages).rows
    assert asyncio.run(async_template.answer_all(messages)) == in_file
    assert asyncio.run(async_template.answer_all(messages)) == in_file


def test_notebook_twice_in_one_loop(server: Server) -> None:
    """In a notebook the loop runs already, and two cells may run at once."""

    async def cells() -> list[list[dict[str, Any]]]:
        both = (async_template.answer_all(good(12)) for _ in range(2))
        return await asyncio.gather(*both)

    one, other = asyncio.run(cells())
    assert one == other and len(one) == 12


def test_notebook_takes_any_iterable(server: Server) -> None:
    """A generator will do; nothing at all gives no rows."""
    rows = asyncio.run(async_template.answer_all(text for text in good(12)))
    assert [row["text_message"] for row in rows] == good(12)
    assert asyncio.run(async_template.answer_all([])) == []


def test_notebook_options(server: Server) -> None:
    """Options are those of the command line, by their names."""
    options: dict[str, Any] = {"model": "other", "concurrency": 3, "timeout": 1}
    answers = async_template.answer_all([*good(12), "x [500]"], **options)
    rows = asyncio.run(answers)
    assert rows[0]["model"] == "other-2025-04-14"
    assert rows[-1]["error"]["attempts"] == async_template.MAX_ATTEMPTS
    assert server.peak <= 3


def test_notebook_offline() -> None:
    """Offline needs no key and says so in the rows."""
    rows = asyncio.run(async_template.answer_all(good(3), offline=True))
    assert [row["model"] for row in rows] == ["offline"] * 3
    assert all("laceholder" in row["response"]["explanation"] for row in rows)


def test_notebook_stops_without_key() -> None:
    """A hopeless run is an exception that says what to do, not an exit."""
    with pytest.raises(Exception, match="OPENAI_API_KEY"):
        asyncio.run(async_template.answer_all(good(3)))


def test_notebook_in_a_thread(server: Server) -> None:
    """Away from the main thread it works too: no signal handler is set."""
    found = list[dict[str, Any]]()

    def cell() -> None:
        found.extend(asyncio.run(async_template.answer_all(good(3))))

    thread = threading.Thread(target=cell)
    thread.start()
    thread.join()
    assert len(found) == 3
