"""answer_all, in a script and in a real notebook: changes, OUTPUT, interrupts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, ROOT, Run
from pydantic import BaseModel
from server import Server

import async_template
from async_template import StopRun, answer_all

Runner = Callable[..., Run]
Rows = list[dict[str, Any]]
Check = Callable[[Server, Rows], bool]


class Mood(BaseModel):
    """Another question's answer."""

    mood: str


def good(count: int) -> list[str]:
    """So many messages that will be answered."""
    return [f"number {number} [ok]" for number in range(count)]


def texts(rows: Rows) -> list[str]:
    """The messages of the rows."""
    return [row["text_message"] for row in rows]


def ask(messages: Any, *args: Any, **changes: Any) -> Rows:
    """The rows, from a loop of its own."""
    return asyncio.run(answer_all(messages, *args, **changes))


def body(server: Server) -> dict[str, Any]:
    """The first request."""
    return server.requests[0].body


# --- Rows


def test_rows_are_those_of_the_command_line(server: Server, run: Runner) -> None:
    """The rows that OUTPUT would hold, but for the time; twice in a process."""
    messages = [*good(12), "Bad. [400:param=input]", "Good.", "Good."]
    in_file, *in_memory = run(messages).rows, ask(messages), ask(messages)
    for row in (*in_file, *in_memory[0], *in_memory[1]):
        assert row.pop("answered_at")
    assert in_memory == [in_file, in_file] and texts(in_file) == messages
    assert server.total == 3 * 14


def test_blank_messages_are_left_out(server: Server) -> None:
    """The others keep their number; any iterable will do, nothing gives no rows."""
    rows = ask(text for text in ["a", "", " \n", "\u200b", "b", "half \ud83d"])
    assert [row["line"] for row in rows] == [1, 5, 6]
    assert ask([]) == ask([" "]) == ask(iter("")) == []


@pytest.mark.parametrize(
    "messages", ["hello", "", ["a", None], ["a", float("nan")], [5], [["a"]], [b"a"]]
)
def test_only_texts_are_asked(server: Server, messages: Any) -> None:
    """One text instead of a list, or an item that is no text: TypeError at once."""
    with pytest.raises(TypeError):
        ask(messages)
    assert server.total == 0


def test_two_cells_at_once(server: Server) -> None:
    """In one event loop, which a notebook has already."""

    async def cells() -> tuple[Rows, Rows]:
        return await asyncio.gather(answer_all(good(12)), answer_all(good(9)))

    one, other = asyncio.run(cells())
    assert texts(one) == good(12) and texts(other) == good(9)


def test_in_a_thread(server: Server) -> None:
    """Away from the main thread it works too, and no signal handler is changed."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    found = Rows()
    thread = threading.Thread(target=lambda: found.extend(ask(good(3))))
    thread.start()
    thread.join()
    assert len(found) == len(ask(good(3))) == 3
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert before == after


# --- Changes

CHANGES: list[tuple[dict[str, Any], Check]] = [
    ({"model": "other"}, lambda s, rows: body(s)["model"] == "other"),
    (
        {"prompt": "So {text_message}?"},
        lambda s, rows: body(s)["input"][:10] == "So number ",
    ),
    (
        {"instructions": "Be kind."},
        lambda s, rows: body(s)["instructions"] == "Be kind.",
    ),
    (
        {"example": Mood(mood="")},
        lambda s, rows: rows[0]["response"] == {"mood": "text"},
    ),
    ({"temperature": 0.5}, lambda s, rows: body(s)["temperature"] == 0.5),
    ({"temperature": None}, lambda s, rows: "temperature" not in body(s)),
    ({"extra": {"top_p": 0.9}}, lambda s, rows: body(s)["top_p"] == 0.9),
    ({"extra": {"top_p": 0.9}}, lambda s, rows: "reasoning" not in body(s)),
    ({"concurrency": 1}, lambda s, rows: s.peak == 1),
    ({"limit": 2}, lambda s, rows: len(rows) == s.total == 2),
    ({"shard": "2/2"}, lambda s, rows: rows[0]["line"] == 2),
    ({"offline": True}, lambda s, rows: not s.total and rows[0]["model"] == "offline"),
]


@pytest.mark.parametrize(
    ("change", "check"), CHANGES, ids=[str(change) for change, _ in CHANGES]
)
def test_every_change_is_effective(
    server: Server, change: dict[str, Any], check: Check
) -> None:
    """Each part of the question, and each flag, may be given by its name."""
    assert check(server, ask(good(8), **change))


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("MODEL", "other", lambda s, rows: body(s)["model"] == "other"),
        (
            "PROMPT",
            "{text_message}?",
            lambda s, rows: body(s)["input"][-6:] == " [ok]?",
        ),
        ("INSTRUCTIONS", "Be kind.", lambda s, rows: "kind" in body(s)["instructions"]),
        (
            "EXAMPLE",
            Mood(mood=""),
            lambda s, rows: rows[0]["response"]["mood"] == "text",
        ),
        ("TEMPERATURE", 0.5, lambda s, rows: body(s)["temperature"] == 0.5),
        ("EXTRA", {"top_p": 0.9}, lambda s, rows: body(s)["top_p"] == 0.9),
        ("CONCURRENCY", 1, lambda s, rows: s.peak == 1),
    ],
)
def test_edits_are_effective(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, check: Check
) -> None:
    """`import async_template as t; t.MODEL = ...` is as good as an edit of the file."""
    monkeypatch.setattr(async_template, name, value)
    assert check(server, ask(good(8)))


@pytest.mark.parametrize("edited", [False, True])
def test_patience_is_effective(
    server: Server, monkeypatch: pytest.MonkeyPatch, edited: bool
) -> None:
    """How long and how often a message is tried, given with the call or edited."""
    change: dict[str, Any] = {"timeout": 0.2, "max_attempts": 2}
    if edited:
        for name in [*change]:
            monkeypatch.setattr(async_template, name.upper(), change.pop(name))
    rows = ask([*good(8), "Slow. [hang]"], **change)
    assert rows[-1]["error"]["type"] == "timeout"
    assert rows[-1]["error"]["attempts"] == 2


def test_restart_is_effective(server: Server, tmp_path: Path) -> None:
    """Its rows are made anew, and the old ones are kept beside it."""
    for _ in range(2):
        assert len(ask(good(5), tmp_path / "rows.jsonl", restart=True)) == 5
    assert server.total == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rows.jsonl",
        "rows.jsonl.bak",
    ]


def test_prices_are_for_max_cost(server: Server) -> None:
    """Both may be given, for another model too; what was made by then is in `rows`."""
    changes: dict[str, Any] = {
        "model": "other",
        "prices": (1.0, 1.0),
        "max_cost": 0.001,
    }
    with pytest.raises(StopRun, match="max-cost") as stopped:
        ask(good(100), **changes)
    assert 5 <= len(stopped.value.rows) < 15


@pytest.mark.parametrize(
    "change",
    [
        {"concurrency": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"max_attempts": 0},
        {"limit": 0},
        {"max_cost": 0},
        {"shard": "5/4"},
        {"output": "rows.csv"},
    ],
    ids=str,
)
def test_bad_change(server: Server, change: dict[str, Any]) -> None:
    """What would be a wrong flag is a ValueError, and nothing is asked."""
    with pytest.raises(ValueError):
        ask(good(3), **change)
    assert server.total == 0


def test_unknown_change(server: Server) -> None:
    """A slip of the pen isn't ignored: TypeError, and nothing is asked."""
    with pytest.raises(TypeError, match="concurency"):
        ask(good(3), concurency=5)
    assert server.total == 0


# --- What stops it, and what is kept


def test_no_key() -> None:
    """A hopeless run is an exception that says what to do, not an exit."""
    with pytest.raises(StopRun, match="OPENAI_API_KEY"):
        ask(good(3))


def test_what_was_paid_for_is_kept(server: Server) -> None:
    """The exception that stops it has the rows so far, in order."""
    with pytest.raises(StopRun, match="key") as stopped:
        ask([*good(20), "Late. [401:ms=300]"])
    assert texts(stopped.value.rows) == good(20)


def test_output_is_kept_and_resumed(
    server: Server, run: Runner, tmp_path: Path
) -> None:
    """By `answer_all` and by the command line, in turn; each text is asked once."""
    path = tmp_path / "out.jsonl"
    ask(good(10), path)
    rows = ask(good(20), output=str(path))
    assert texts(rows) == good(20) and server.total == 20
    result = run([*good(30)])
    assert (result.code, server.total) == (0, 30)
    assert ask(good(30), path) == result.rows and server.total == 30


def test_output_survives_a_stop(server: Server, tmp_path: Path) -> None:
    """What stopped a call is mended, and the next call asks the rest alone."""
    path = tmp_path / "rows.jsonl"
    messages = [*good(20), "Late. [401:ms=300,ok]"]
    with pytest.raises(StopRun):
        ask(messages, path)
    assert texts(ask(messages, path)) == messages
    assert server.total == 22


def test_only_rows_of_these_messages(server: Server, tmp_path: Path) -> None:
    """OUTPUT may hold more, even behind a stop; the rows are those asked for."""
    path = tmp_path / "rows.jsonl"
    ask([*good(5), "more"], path)
    assert texts(ask(good(5)[::-1], path)) == good(5)[::-1]
    with pytest.raises(StopRun) as stopped:
        ask(["new [401]", *good(2)], path)
    assert texts(stopped.value.rows) == good(2)


# --- Interrupts


@pytest.mark.parametrize("busy", [False, True])
def test_cancelled(server: Server, tmp_path: Path, busy: bool) -> None:
    """Twenty times: it ends at once, nothing of it runs on, and what was answered is
    kept; with all requests hanging or, the harder case, with answers coming in."""
    path = tmp_path / "rows.jsonl"
    messages = [f"{n}" for n in range(1000 if busy else 50)]
    server.latency = 0.003
    dice = random.Random(5)

    async def cell() -> None:
        seen = server.total
        if not busy:
            server.hold = 10**6
        task = asyncio.create_task(answer_all(messages, path, concurrency=20))
        while server.total < seen + 8:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        if busy:
            await asyncio.sleep(dice.uniform(0, 0.03))
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        assert done and task.cancelled()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    for _ in range(20):
        asyncio.run(cell())
    server.release()
    kept = path.read_text("utf-8").count("\n")
    assert server.statuses[200] - 20 * 20 <= kept <= server.statuses[200]
    assert busy == (kept > 0)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends signals in another way")
@pytest.mark.parametrize("count", range(3))
def test_interrupted(server: Server, tmp_path: Path, count: int) -> None:
    """Ctrl-C in a script is a KeyboardInterrupt; the same call again asks the rest."""
    path = tmp_path / "rows.jsonl"
    at = 20 + 3 * count

    def latency(dice: random.Random) -> float:
        if server.total == at:
            os.kill(os.getpid(), signal.SIGINT)
        return 0.01

    server.latency = latency
    with pytest.raises(KeyboardInterrupt):
        ask(good(100), path, concurrency=5)
    assert server.total <= at + 10
    assert texts(ask(good(100), path, concurrency=5)) == good(100)
    assert server.total <= 105


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

    def outputs(self, cell: str, interrupt: Server | None = None) -> Iterator[Any]:
        """What running the cell sends, until the kernel is idle again; interrupted as
        soon as a request is in flight at that server."""
        asked = self.client.execute(cell)
        while True:
            if interrupt and interrupt.in_flight:
                self.manager.interrupt_kernel()
                interrupt = None
            try:
                message = self.client.get_iopub_msg(timeout=0.1 if interrupt else 40)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            if message["content"].get("execution_state") == "idle":
                return
            yield message["content"]

    def run(self, cell: str, interrupt: Server | None = None) -> str:
        """All that the cell printed, shown or raised, as one text."""
        return "\n".join(map(str, self.outputs(cell, interrupt)))

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    """One kernel for all tests, which has imported the template."""
    with contextlib.closing(Kernel()) as kernel:
        kernel.run(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
        kernel.run("import async_template as t; from async_template import answer_all")
        yield kernel


@in_jupyter
def test_cells(kernel: Kernel) -> None:
    """`await answer_all` gives rows, shows a bar; an edit counts for the next cell."""
    shown = kernel.run("rows = await answer_all(['a', 'b'], offline=True)")
    assert "2/2" in shown and "Traceback" not in shown
    assert "['a', 'b']" in kernel.run("print([r['text_message'] for r in rows])")
    kernel.run("t.EXAMPLE = t.Sentiment(score=0.25, explanation='')")
    cell = "print((await answer_all((c for c in 'abc'), offline=True))[2]['response'])"
    assert "'score': 0.25" in kernel.run(cell)


@in_jupyter
def test_stop_button(kernel: Kernel, server: Server, tmp_path: Path) -> None:
    """It ends a call that hangs, twice; what was answered isn't asked again."""
    kernel.run(
        f"import os; os.environ.update(OPENAI_BASE_URL={server.url!r},"
        f" OPENAI_API_KEY={KEY!r}); path = {str(tmp_path / 'rows.jsonl')!r}"
    )
    messages = [*good(5), *[f"Late {n}. [hang]" for n in range(30)]]
    for _ in range(2):
        cell = f"rows = await answer_all({messages!r}, path, timeout=3600)"
        shown = kernel.run(cell, interrupt=server)
        assert "Interrupt" in shown or "Cancelled" in shown
    cell = f"print(len(await answer_all({good(5)!r}, path)))"
    assert "'5\\n'" in kernel.run(cell)
    assert server.count("number") <= 5 + 8
