"""answer_all, in a script and in a real notebook: tables, changes, interrupts."""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import KEY, ROOT, Run
from pydantic import BaseModel
from server import Server

import async_template
from async_template import StopRun, answer_all

Runner = Callable[..., Run]
Rows = list[dict[str, Any]]
Ask = Callable[..., Rows]
Case = tuple[str, Any, Callable[[Server, Rows], bool]]  # name, value, check


class Mood(BaseModel):
    """Another question's answer."""

    mood: str


def good(count: int) -> list[str]:
    """So many messages that will be answered."""
    return [f"number {number} [ok]" for number in range(count)]


def texts(rows: Rows) -> list[str]:
    """The messages of the rows."""
    return [row["text_message"] for row in rows]


def body(server: Server) -> dict[str, Any]:
    """The first request."""
    return server.requests[0].body


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file for the rows; the one that `run` writes."""
    return tmp_path / "out.jsonl"


@pytest.fixture
def ask(path: Path) -> Ask:
    """Calls `answer_all` in a loop of its own."""

    def ask(messages: Any, **changes: Any) -> Rows:
        return asyncio.run(answer_all(messages, path, **changes))

    return ask


# --- Messages and rows


def test_same_file_as_the_command_line(server: Server, run: Runner, ask: Ask) -> None:
    """Kept and resumed by both in turn; each text is asked once."""
    assert texts(ask(good(10))) == good(10)
    result = run([*good(20), "Bad. [refusal,ok]", "number 3 [ok]"])
    assert (result.code, server.total) == (1, 21)
    rows = ask([*good(20), "Bad. [refusal,ok]", "number 3 [ok]"])
    assert server.total == 22 and rows[20]["response"] and rows[21]["response"]
    result.rows[20] = rows[20]
    assert rows == result.rows


def test_only_rows_of_these_messages(server: Server, ask: Ask, path: Path) -> None:
    """The file may hold more; what is returned is what was asked for, in its order."""
    ask([*good(5), "more"])
    assert texts(ask(good(5)[::-1])) == good(5)[::-1]
    assert "more" in path.read_text(encoding="utf-8") and server.total == 6


def test_stopped_call_is_resumed(server: Server, ask: Ask) -> None:
    """What was answered before a stop is on disk, and the next call asks the rest."""
    messages = [*good(20), "Late. [401:ms=300,ok]"]
    with pytest.raises(StopRun, match="Test server says 401"):
        ask(messages)
    assert texts(ask(messages)) == messages and server.total == 22


def test_blank_messages_are_left_out(server: Server, ask: Ask) -> None:
    """The others keep their number; any iterable will do."""
    messages: list[Any] = ["a", "", " \n", None, math.nan, "b", "half \ud83d"]
    rows = ask(text for text in messages)
    assert [row["line"] for row in rows] == [1, 6, 7]


@pytest.mark.parametrize("messages", ["hello", "", {"text": "a"}, ["a", 5], [["a"]]])
def test_only_texts_are_asked(server: Server, ask: Ask, messages: Any) -> None:
    """One text instead of a list, or an item that is no text, is refused at once."""
    with pytest.raises((TypeError, ValueError)):
        ask(messages)
    assert server.total == 0


RECORDS = [{"title": "A", "text": "good"}, {"title": "B", "text": "bad"}]
TABLES: list[tuple[str, dict[str, str], str, list[str]]] = [
    ("{text_message}?", {}, "text", ["bad?", "good?"]),
    ("{text_message}?", {"field": "title"}, "title", ["A?", "B?"]),
    ("{title}: {text}", {}, "title", ["A: good", "B: bad"]),
    ("{title}: {text}", {"field": "text"}, "text", ["A: good", "B: bad"]),
]


@pytest.mark.parametrize("kind", [list, pd.DataFrame])
@pytest.mark.parametrize("case", TABLES, ids=str)
def test_tables(server: Server, ask: Ask, kind: Any, case: Any) -> None:
    """Of dictionaries, or a DataFrame; the message is the column that PROMPT names."""
    prompt, changes, column, inputs = case
    rows = ask(kind(RECORDS), prompt=prompt, **changes)
    assert texts(rows) == [record[column] for record in RECORDS]
    assert sorted(request.text for request in server.requests) == inputs


def test_columns_of_a_frame(server: Server, ask: Ask) -> None:
    """They come back as `fields`: long ids as they are, dates as text, NaN as null."""
    days = pd.to_datetime(["2026-01-02", "2026-01-03"])
    columns = {"text": ["a", "b"], "id": [2**60 + 1, 2], "day": days}
    first, _ = ask(pd.DataFrame({**columns, "share": [math.nan, 0.5]}))
    assert first["fields"]["id"] == 2**60 + 1 and first["fields"]["share"] is None
    assert first["fields"]["day"].startswith("2026-01-02T")


def test_column_of_a_frame(server: Server, ask: Ask) -> None:
    """A Series; a missing text has no row, and `line` counts from 1."""
    column = pd.Series(["a", None, "b"], index=[7, 8, 9])
    assert [row["line"] for row in ask(column)] == [1, 3]


def test_in_a_thread(server: Server, ask: Ask) -> None:
    """Away from the main thread, where no signal handler can be set, it works too."""
    rows = asyncio.run(asyncio.to_thread(ask, good(3)))
    assert texts(rows) == good(3)


# --- Changes

SETTINGS: list[Case] = [
    ("model", "other", lambda s, rows: body(s)["model"] == "other"),
    ("prompt", "{text_message}?", lambda s, rows: body(s)["input"].endswith("]?")),
    ("instructions", "Be kind.", lambda s, rows: body(s)["instructions"] == "Be kind."),
    ("example", Mood(mood=""), lambda s, rows: rows[0]["response"] == {"mood": "text"}),
    ("temperature", 0.5, lambda s, rows: body(s)["temperature"] == 0.5),
    ("temperature", None, lambda s, rows: "temperature" not in body(s)),
    ("extra", {"top_p": 0.9}, lambda s, rows: body(s)["top_p"] == 0.9),
    ("extra", {}, lambda s, rows: "reasoning" not in body(s)),
    ("concurrency", 1, lambda s, rows: s.peak == 1),
    ("timeout", 0.2, lambda s, rows: s.count("Slow") == 2),
    ("max_attempts", 2, lambda s, rows: rows[9]["error"]["attempts"] == 2),
]
FLAGS: list[Case] = [
    ("limit", 2, lambda s, rows: len(rows) == s.total == 2),
    ("shard", "1/2", lambda s, rows: 0 < s.total == len(rows) < 10),
    ("offline", True, lambda s, rows: not s.total and rows[0]["model"] == "offline"),
]
MESSAGES = [*good(8), "Slow. [ok:ms=500,ok]", "Bad. [bounds]"]


@pytest.mark.parametrize("case", SETTINGS + FLAGS, ids=str)
def test_change(server: Server, ask: Ask, case: Case) -> None:
    """Each setting of part 1, and each flag, may be given by its name."""
    name, value, check = case
    assert check(server, ask(MESSAGES, **{name: value}))


@pytest.mark.parametrize("case", SETTINGS, ids=str)
def test_edit(
    server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """`import async_template as t; t.MODEL = ...` is as good as an edit of the file."""
    name, value, check = case
    monkeypatch.setattr(async_template, name.upper(), value)
    assert check(server, ask(MESSAGES))


def test_prices_are_for_max_cost(server: Server, ask: Ask) -> None:
    """Both may be given, for another model too."""
    changes = {"model": "other", "prices": {"other": (1.0, 1.0, 1.0)}}
    with pytest.raises(StopRun, match="max-cost"):
        ask(good(100), **changes, max_cost=0.001, concurrency=2)
    assert 10 < server.total < 30


def test_unknown_change(server: Server, ask: Ask) -> None:
    """A slip of the pen isn't ignored: TypeError, and nothing is asked."""
    with pytest.raises(TypeError, match="concurency"):
        ask(good(3), concurency=5)
    assert server.total == 0


# --- Interrupts


def test_what_is_in_flight_lands(server: Server, path: Path) -> None:
    """Ten times, with answers coming in: all are kept, and nothing new starts."""
    server.latency = 0.003
    dice = random.Random(5)
    messages = [str(number) for number in range(1000)]

    async def cell() -> None:
        seen = server.total
        task = asyncio.create_task(answer_all(messages, path, concurrency=20))
        while server.total < seen + 8:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        await asyncio.sleep(dice.uniform(0, 0.03))
        before = server.total
        task.cancel()
        with pytest.raises((StopRun, asyncio.CancelledError)):
            await task
        assert server.total <= before + 20
        assert asyncio.all_tasks() == {asyncio.current_task()}

    for _ in range(10):
        asyncio.run(cell())
        kept = path.read_bytes().count(b"\n")
        assert kept == server.total == server.statuses[200]


# --- A real notebook

manager = pytest.importorskip("jupyter_client.manager")
in_jupyter = pytest.mark.filterwarnings("default")  # what Jupyter itself warns of


class Kernel:
    """A Jupyter kernel: run a cell, interrupt it."""

    def __init__(self) -> None:
        self.manager = manager.KernelManager(kernel_name="python3")
        self.manager.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f"]
        self.manager.kernel_cmd.append("{connection_file}")
        self.manager.start_kernel()
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=40)

    def run(self, cell: str, server: Server | None = None, count: int = 0) -> str:
        """All that the cell printed or raised, as one text without colors; it is
        interrupted so often while a request is in flight at that server."""
        asked = self.client.execute(cell)
        shown = ""
        while True:
            if server and server.in_flight and count:
                self.manager.interrupt_kernel()
                count -= 1
            try:
                message = self.client.get_iopub_msg(timeout=0.2 if count else 20)
            except queue.Empty:
                assert count, f"the cell does not end: {shown}"
                continue
            content = message["content"]
            if message["parent_header"].get("msg_id") != asked:
                continue
            if content.get("execution_state") == "idle":
                return re.sub(r"\x1b\[[\d;]*m", "", shown)
            shown += content.get("text", "") + "\n".join(content.get("traceback", []))

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    """One kernel for all tests, which has imported the template."""
    with contextlib.closing(Kernel()) as kernel:
        kernel.run(f"import os, sys; sys.path.insert(0, {str(ROOT)!r})")
        kernel.run("import async_template as t; from async_template import answer_all")
        kernel.run("%xmode Minimal")  # as README says
        yield kernel


@pytest.fixture
def cell(kernel: Kernel, server: Server, path: Path) -> str:
    """A cell that asks the server about `messages`."""
    env = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
    kernel.run(f"os.environ.update({env!r})")
    return f"rows = await answer_all(messages, {str(path)!r}, timeout=3600)"


@in_jupyter
def test_cells(kernel: Kernel, cell: str) -> None:
    """`await answer_all` gives rows, and shows a bar."""
    shown = kernel.run(f"messages = ['a', 'b']; {cell}")
    assert "2/2" in shown and "Traceback" not in shown
    assert kernel.run("print([r['text_message'] for r in rows])") == "['a', 'b']\n"


@in_jupyter
def test_stop_button(kernel: Kernel, server: Server, cell: str, path: Path) -> None:
    """What is in flight lands, and one line says so; the cell again asks the rest."""
    server.latency = 0.5
    shown = kernel.run(f"messages = {good(30)!r}; {cell}", server, count=1)
    assert "8 requests" in shown and "File" not in shown
    assert server.total == 8 == path.read_bytes().count(b"\n")
    kernel.run(cell)
    assert kernel.run("print(len(rows))") == "30\n" and server.total == 30


@in_jupyter
def test_stop_button_twice(kernel: Kernel, server: Server, cell: str) -> None:
    """The second time it ends at once, and nothing more is sent."""
    server.default = "hang"
    shown = kernel.run(f"messages = list('abcdefghijkl'); {cell}", server, count=2)
    assert "CancelledError" in shown and "File" not in shown
    kernel.run("import asyncio; await asyncio.sleep(0.3)")
    assert (server.total, server.in_flight) == (8, 0)


@in_jupyter
def test_stop_is_a_line(kernel: Kernel, cell: str) -> None:
    """A run that cannot go on shows its reason, and no screen of traceback."""
    shown = kernel.run(f"messages = ['a [401]']; {cell}")
    assert "Test server says 401" in shown and "File" not in shown


@in_jupyter
def test_run_button(kernel: Kernel) -> None:
    """It runs the file as a script: a line names what to call instead, and exit 2."""
    shown = kernel.run(f"%run {str(ROOT / 'async_template.py')!r}")
    assert "answer_all" in shown and "SystemExit: 2" in shown
