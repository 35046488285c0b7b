"""OUTPUT after every accident: resume, edits, refusals, kills, signals, a full disk."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from server import Server

import async_template

LEAD = async_template.PROMPT.split("{text_message}")[0]
TEMPLATE = str(ROOT / "async_template.py")
BOM = b"\xef\xbb\xbf"
TEN = [f"m{n}" for n in range(10)]
FIVE = ["one", "two", "zwei é", "four 😀", "two"]
NOISE = re.compile("Traceback|Task was destroyed|[Uu]nclosed|never retrieved|Warning")
SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="no such signals or limits")

Rows = list[dict[str, Any]]
Runner = Callable[..., Run]
Spawn = Callable[..., "subprocess.Popen[str]"]
Refuse = Callable[..., str]
Meanwhile = Callable[[Callable[[], None]], None]


def asked(server: Server) -> list[str]:
    """The messages of all requests so far, sorted."""
    return sorted(request.text.removeprefix(LEAD) for request in server.requests)


def load(path: Path) -> Rows:
    """The rows of a file in which every line is whole and strict JSON."""
    lines = path.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def texts(rows: Path | Rows) -> list[str]:
    """The messages of some rows, or of the rows of a file."""
    rows = load(rows) if isinstance(rows, Path) else rows
    return [row["text_message"] for row in rows]


def answers(rows: Rows) -> list[tuple[int, str, Any]]:
    """Line, message and answer of each row."""
    return [(row["line"], row["text_message"], row["response"]) for row in rows]


def dump(rows: Rows) -> bytes:
    """The rows as the template writes them."""
    return b"".join(
        json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows
    )


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def wait_until(condition: Callable[[], object]) -> None:
    """Returns as soon as the condition holds; fails after 15 s."""
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def send(name: str) -> None:
    """Sends a signal to this process, from another thread."""
    main = threading.main_thread().ident
    signal.pthread_kill(main or 0, signal.Signals[name])


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio complains of nothing, and a signal that nobody handles fails the test."""

    def fail(number: int, *_: object) -> None:
        pytest.fail(f"signal {number} is not handled")

    numbers = [number for number in signal.Signals if number.name in SIGNALS]
    before = [signal.signal(number, fail) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
    records = caplog.get_records("call")
    assert not [record for record in records if record.levelno >= logging.WARNING]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """OUTPUT of the fixture `run`."""
    return tmp_path / "out.jsonl"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """INPUT: ten messages."""
    path = tmp_path / "in.txt"
    path.write_text("\n".join(TEN), encoding="utf-8")
    return path


@pytest.fixture
def refuse(
    server: Server, source: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """The last line of a run that exits with 2, asks nothing and changes no file."""

    def refuse(*options: str) -> str:
        before = files(source.parent)
        total = server.total
        capsys.readouterr()
        code = async_template.main([str(source), str(out), *options])
        err = capsys.readouterr().err
        assert (code, server.total) == (2, total), err
        assert files(source.parent) == before
        assert "to resume" not in err
        return err.splitlines()[-1]

    return refuse


@pytest.fixture
def meanwhile() -> Iterator[Meanwhile]:
    """Starts a function in a thread; what it raises fails the test."""
    with ThreadPoolExecutor() as pool:
        futures = []

        def meanwhile(action: Callable[[], None]) -> None:
            futures.append(pool.submit(action))

        yield meanwhile
        for future in futures:
            future.result()


# --- One row --------------------------------------------------------------------------
def test_rows_are_strict_json(server: Server, run: Runner, out: Path) -> None:
    """Always the same keys, no NaN, UTF-8 as it is, \\n at the end."""
    messages = ['say "no"', "a\u2028b", "😀 é", "back\\slash\ttab", "{text_message}"]
    run([*messages, "x [nan]"], "--max-attempts", "1")
    rows = load(out)
    keys = "line text_message response error model answered_at usage settings"
    assert all(" ".join(row) == keys for row in rows)
    assert texts(rows) == [*messages, "x [nan]"]
    assert [bool(row["error"]) for row in rows] == [False] * 5 + [True]
    assert "😀 é".encode() in out.read_bytes()


def test_row_of_an_answer(server: Server, run: Runner) -> None:
    """What was answered by which model, and what it took."""
    row = run(["a"]).rows[0]
    assert row["response"] == server.answer(server.requests[0].body)
    assert row["error"] is None
    assert row["model"].startswith(async_template.MODEL)
    assert list(row["usage"]) == ["input_tokens", "output_tokens"]


def test_row_of_an_error(server: Server, run: Runner) -> None:
    """Type, message, attempts; null for what there is not."""
    row = run(["a", "b [500]"], "--max-attempts", "2").rows[1]
    assert list(row["error"]) == ["type", "message", "attempts"]
    assert (row["error"]["type"], row["error"]["attempts"]) == ("server_error", 2)
    assert row["response"] is row["usage"] is None


def test_answered_at_is_the_time_of_the_answer(server: Server, run: Runner) -> None:
    """In UTC, to the second, for an error as well; a later run does not touch it."""
    before = datetime.now(UTC).replace(microsecond=0)
    rows = run(["a", "b [refusal]"]).rows
    for row in rows:
        assert re.fullmatch(r"\d{4}(-\d\d){2}T\d\d(:\d\d){2}Z", row["answered_at"])
        when = datetime.fromisoformat(row["answered_at"])
        assert before <= when <= datetime.now(UTC)
    old = rows[0] | {"answered_at": "2026-01-02T03:04:05Z"}
    (run(["a"]).out_path).write_bytes(dump([old]))
    assert run(["new", "a"]).rows[1]["answered_at"] == "2026-01-02T03:04:05Z"


# --- Known by its text ----------------------------------------------------------------
@pytest.mark.parametrize("text", ["a", "a [ok:ms=30]", "a [500,ok]"])
def test_same_text_is_asked_once(server: Server, run: Runner, text: str) -> None:
    """All its messages get the answer, and the file adds up to the bill."""
    result = run([text, "b", text, text])
    assert (result.code, server.statuses[200]) == (0, 2)
    assert [row["line"] for row in result.rows] == [1, 2, 3, 4]
    first, _, second, third = result.rows
    assert first["response"] == second["response"] == third["response"]
    assert [bool(row["usage"]) for row in result.rows] == [True, True, False, False]


def test_same_text_fails_once(server: Server, run: Runner) -> None:
    """Each of its messages has an error row, and the next run asks once more."""
    messages = ["b [refusal,ok]", "a", "b [refusal,ok]"]
    first = run(messages)
    assert (first.code, texts(first.rows)) == (1, messages)
    assert [bool(row["error"]) for row in first.rows] == [True, False, True]
    again = run(messages)
    assert (again.code, texts(again.rows)) == (0, messages)
    assert asked(server) == sorted([messages[0], *messages[:2]])


def test_usage_moves_to_the_first(server: Server, run: Runner) -> None:
    """Whichever row of a text comes first after an edit."""
    run(["a", "b", "a"])
    for messages in (["b", "a"], ["a", "a", "b"], ["b"], ["a", "b", "a"]):
        result = run(messages)
        used = [row["text_message"] for row in result.rows if row["usage"]]
        assert sorted(used) == ["a", "b"]
        assert all(row["usage"] for row in result.rows[:1])
    assert server.total == 2


def test_another_output_asks_again(
    server: Server, tmp_path: Path, source: Path
) -> None:
    """A second OUTPUT is how to ask twice on purpose."""
    for name in ("one.jsonl", "two.jsonl"):
        assert async_template.main([str(source), str(tmp_path / name)]) == 0
    assert asked(server) == sorted(TEN * 2)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("{text_message}", 2), ("{title}: {text_message}", 3), ("{title}", 2)],
)
def test_text_is_the_prompt_filled_in(
    server: Server,
    run: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    count: int,
) -> None:
    """Messages are the same if the same is asked; each keeps fields of its own."""
    monkeypatch.setattr(async_template, "PROMPT", prompt)
    table = tmp_path / "in.csv"
    table.write_text("id,title,text\n1,A,a\n2,A,b\n3,B,a\n4,A,a\n", encoding="utf-8")
    for _ in range(2):
        rows = run(table).rows
        assert texts(rows) == ["a", "b", "a", "a"]
        assert [row["fields"]["id"] for row in rows] == ["1", "2", "3", "4"]
        assert sum(bool(row["usage"]) for row in rows) == count
    assert server.total == count


@pytest.mark.parametrize("directive", ["[ok:ms=50,ok]", "[refusal]", "[refusal,ok]"])
def test_fields_follow_input(
    server: Server, run: Runner, tmp_path: Path, directive: str
) -> None:
    """As `line` does: what INPUT says of a message now, and no request for it."""
    table = tmp_path / "in.csv"
    table.write_text(f"id;text\n1;a {directive}\n2;b\n", encoding="utf-8")
    run(table)
    table.write_text(f"n;text\n5;b\n6;a {directive}\n7;b\n", encoding="utf-8")
    rows = run(table).rows
    found = [(row["line"], row["fields"]) for row in rows]
    assert found == [(2, {"n": "5"}), (3, {"n": "6"}), (4, {"n": "7"})]
    assert asked(server).count("b") == 1
    assert "fields" not in run(["b"]).rows[0]


# --- Order and edits ------------------------------------------------------------------
def test_rows_end_in_the_order_of_input(server: Server, run: Runner) -> None:
    """Whatever the order of completion."""
    messages = [f"m{n} [ok:ms={n * 37 % 50}]" for n in range(20)]
    result = run(messages)
    assert texts(result.rows) == messages
    assert [row["line"] for row in result.rows] == list(range(1, 21))


@posix
def test_order_is_made_by_replacing_the_file(
    server: Server, run: Runner, out: Path
) -> None:
    """Whoever reads OUTPUT meanwhile sees whole rows: it is never rewritten."""
    run(["a", "b"])
    before = out.read_bytes()
    with open(out, "rb") as reader:
        run(["c", "a", "b"])
        assert reader.read().startswith(before)
    assert texts(out) == ["c", "a", "b"]


def test_line_follows_input(server: Server, run: Runner) -> None:
    """After edits `line` is where the message is now."""
    run(["a", "b", "a"])
    result = run(["new", "b", "", "a", "a"])
    lines = [(row["line"], row["text_message"]) for row in result.rows]
    assert lines == [(1, "new"), (2, "b"), (4, "a"), (5, "a")]
    assert asked(server) == ["a", "b", "new"]


def test_rows_without_a_message_stay_at_the_end(server: Server, run: Runner) -> None:
    """Answers whose text left INPUT are kept, and are there when it comes back."""
    run(["a", "b", "c", "a"])
    result = run(["new", "c"])
    kept = texts(result.rows)
    assert kept[:2] == ["new", "c"]
    assert {*kept[2:]} == {"a", "b"}
    again = run(["b", "a", "c"])
    assert (again.code, texts(again.rows)) == (0, ["b", "a", "c", "new"])
    assert server.total == 4


EDITS = st.lists(st.sampled_from(["a", "b", "c", "[refusal]"]), max_size=4)


@settings(
    max_examples=20,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(versions=st.lists(st.tuples(EDITS, EDITS), min_size=2, max_size=4))
@example(versions=[(["a", "a"], ["b"]), (["b"], ["a"]), (["a"], ["a", "a"])])
@example(versions=[(["[refusal]"], ["[refusal]"]), ([], []), ([], ["[refusal]"])])
def test_any_edits_between_runs(
    server: Server,
    run: Runner,
    out: Path,
    versions: list[tuple[list[str], list[str]]],
) -> None:
    """INPUT's order, the gone ones behind, not one request too many, the bill right."""
    out.unlink(missing_ok=True)
    answered: set[str] = set()
    for before, behind in versions:
        messages = [*before, "kept", *behind]
        server.requests.clear()
        result = run(messages)
        assert asked(server) == sorted({*messages} - answered)
        assert result.code == int("[refusal]" in messages)
        answered |= {*messages} - {"[refusal]"}
        there, gone = result.rows[: len(messages)], result.rows[len(messages) :]
        assert texts(there) == messages
        assert [row["line"] for row in there] == list(range(1, len(messages) + 1))
        assert {*texts(gone)} - {"[refusal]"} == answered - {*messages}
        errors = {row["text_message"] for row in result.rows if row["error"]}
        assert errors <= {"[refusal]"}
        used = texts([row for row in result.rows if row["usage"]])
        assert sorted(used) == sorted({*texts(result.rows)})


def test_pilot_of_doubled_messages(server: Server, run: Runner) -> None:
    """--limit counts messages, and asks each text once."""
    result = run(["a", "a", "b", "c"], "--limit", "3")
    assert (texts(result.rows), asked(server)) == (["a", "a", "b"], ["a", "b"])


# --- Resume ---------------------------------------------------------------------------
@pytest.mark.parametrize("k", range(6))
def test_resume_after_any_row_asks_only_the_rest(
    server: Server, run: Runner, out: Path, k: int
) -> None:
    """OUTPUT cut to k rows is made whole again by requests for the others alone."""
    whole = run(FIVE).rows
    out.write_bytes(dump(whole[:k]))
    server.requests.clear()
    again = run(FIVE)
    assert (again.code, answers(again.rows)) == (0, answers(whole))
    assert asked(server) == sorted({*FIVE[k:]} - {*FIVE[:k]})


def test_error_rows_are_asked_again(server: Server, run: Runner) -> None:
    """The same command retries just the error row, and replaces it."""
    messages = ["a", "b [refusal,ok]", "c"]
    assert run(messages).code == 1
    server.requests.clear()
    again = run(messages)
    assert (again.code, asked(server)) == (0, ["b [refusal,ok]"])
    assert texts(again.rows) == messages
    assert not any(row["error"] for row in again.rows)


def test_error_row_stays_until_it_is_asked_again(server: Server, run: Runner) -> None:
    """A pilot into an OUTPUT that holds more leaves its errors as they are."""
    messages = ["a", "b [refusal]", "c"]
    before = run(messages).rows
    after = run(messages, "--limit", "1")
    assert (after.code, after.rows, server.total) == (0, before, 3)
    assert "1 of 1 answered" in after.err


def test_old_errors_do_not_hold_up_new_messages(server: Server, run: Runner) -> None:
    """Fifty rejected in a row end the run, so those of earlier runs go last."""
    rejected = [f"m{n} [403]" for n in range(60)]
    assert run(["good", *rejected], "--concurrency", "1").code == 2
    result = run(["good", *rejected, "new"], "--concurrency", "1")
    answered = [row["text_message"] for row in result.rows if row["response"]]
    assert (result.code, answered) == (1, ["good", "new"])


def test_error_row_never_becomes_two(server: Server, run: Runner) -> None:
    """What fails again and again keeps one row."""
    for _ in range(3):
        result = run(["a", "b [refusal]"])
        assert (result.code, len(result.rows)) == (1, 2)
    assert asked(server).count("a") == 1


@pytest.mark.parametrize("order", [1, -1])
def test_answer_counts_more_than_an_error(
    server: Server, run: Runner, out: Path, order: int
) -> None:
    """Where OUTPUT has both for a text, say two shards joined, the answer stays."""
    answer = run(["a"]).rows[0]
    error = answer | {"response": None, "error": {"type": "timeout", "attempts": 5}}
    out.write_bytes(dump([answer, error][::order]))
    result = run(["b", "a"])
    assert (result.code, texts(out), server.total) == (0, ["b", "a"], 2)
    assert result.rows[1] == answer | {"line": 2}


@pytest.mark.parametrize("after", [1, 2, 8, 9, 10, 30, "é", "😀", -3, -2])
def test_torn_line_is_asked_again(
    server: Server, run: Runner, out: Path, after: int | str
) -> None:
    """A last line cut anywhere, within a character too, is dropped with a notice."""
    run(["a", "é😀"])
    first, second = out.read_bytes().splitlines(keepends=True)
    cut = second.index(after.encode()) + 1 if isinstance(after, str) else after
    out.write_bytes(first + second[:cut])
    again = run(["a", "é😀"])
    assert (again.code, texts(again.rows)) == (0, ["a", "é😀"])
    assert asked(server) == ["a", "é😀", "é😀"]
    assert re.search(r"out\.jsonl\b.*\bline 2\b", again.err)


def test_torn_line_may_be_the_only_one(server: Server, run: Runner, out: Path) -> None:
    """A crash in the first row does not make OUTPUT a stranger."""
    run(["a"])
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    assert (run(["a"]).code, server.total) == (0, 2)


@pytest.mark.parametrize("messages", [["a", "b"], ["a", "b", "c"], ["c", "b", "a"]])
def test_whole_row_without_its_line_break(
    server: Server, run: Runner, out: Path, messages: list[str]
) -> None:
    """It is kept, the break is added, and the next row is not glued to it."""
    run(["a", "b"])
    out.write_bytes(out.read_bytes()[:-1])
    result = run(messages)
    assert (result.code, texts(load(out))) == (0, messages)
    assert asked(server) == sorted(messages)


def compact(rows: Rows) -> bytes:
    """As `jq -cS` writes them: no blanks, the keys sorted."""
    line = [json.dumps(row, separators=(",", ":"), sort_keys=True) for row in rows]
    return ("\n".join(line) + "\n").encode()


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda rows: BOM + dump(rows),
        lambda rows: dump(rows) + b"\n",
        lambda rows: b"\n" + dump(rows) + b" \n\n",
        lambda rows: dump(rows[:1]) + b"\n\r\n" + dump(rows[1:]),
        lambda rows: dump(rows).replace(b"\n", b"\r\n"),
        lambda rows: compact(rows),
        lambda rows: compact(rows)[:-1],
        lambda rows: BOM + compact(rows)[:-1] + b"\r\n\r\n",
        lambda rows: dump(rows[:1]) + BOM + dump(rows[1:]),
        lambda rows: dump([row | {"mine": 1} for row in rows[::-1]]),
    ],
)
def test_output_that_another_tool_has_saved(
    server: Server, run: Runner, out: Path, rewrite: Callable[[Rows], bytes]
) -> None:
    """A BOM, blank lines, other line ends, order, blanks or keys are no error."""
    rows = run(["a", "é", "c"]).rows
    out.write_bytes(rewrite(rows))
    assert (run(["a", "é", "c"]).code, server.total) == (0, 3)
    again = run(["new", "é", "a", "c"])
    assert (again.code, server.total) == (0, 4)
    assert texts(load(out)) == ["new", "é", "a", "c"]
    assert [row["response"] for row in again.rows[1:]] == [
        rows[n]["response"] for n in (1, 0, 2)
    ]


def test_run_with_nothing_to_do_leaves_output_alone(
    server: Server, run: Runner, out: Path
) -> None:
    """Not a byte changes."""
    run(FIVE)
    before = out.read_bytes()
    assert run(FIVE).code == 0
    assert (out.read_bytes(), server.total) == (before, 4)


# --- Refusals -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "broken"),
    [
        (1, b"garbage"),
        (2, b"garbage"),
        (10, b"garbage"),
        (2, b"[]"),
        (2, b"null"),
        (2, b"7"),
        (2, b'{"line": 2, "text_mess'),
        (10, b'{"line": 10, "text_mess'),
        (2, b'{"line": 2, "text_message": "two"}'),
        (2, b"\xff\xfe"),
        (2, b"\x00\x00"),
        pytest.param(2, b"[" * 100_000, id="deep"),
    ],
)
def test_broken_line_is_named(
    run: Runner, refuse: Refuse, source: Path, out: Path, number: int, broken: bytes
) -> None:
    """It may hold something paid for, so it is for people to look at."""
    run(source)
    lines = out.read_bytes().splitlines(keepends=True)
    lines[number - 1] = broken + b"\n"
    out.write_bytes(b"".join(lines))
    assert re.search(rf"out\.jsonl\b.*\bline {number}\b", refuse())


@pytest.mark.parametrize(
    "content",
    [
        b"My thesis.\nChapter 1\n",
        b"My thesis, one line, no newline",
        b"id,text\n1,hello\n",
        b'{"text": "hello"}\n',
        b'{"text": "hello"}',
        b'{"text": "hel',
        b'"hello"',
        b'[\n  {"line": 1}\n]\n',
        b'{"line": 1, "text_message": "m1"}\n',
        b'{"line": 1, "text_message": "m1"}',
        b"\x89PNG\r\n\x1a\n\x00\x00",
        b"\x00\xff",
    ],
)
def test_file_of_someone_else_is_refused(
    refuse: Refuse, out: Path, content: bytes
) -> None:
    """A slip of the hand must not cost a file."""
    out.write_bytes(content)
    assert "out.jsonl" in refuse()


def test_output_for_other_messages_is_refused(
    run: Runner, refuse: Refuse, source: Path
) -> None:
    """An OUTPUT that shares no message with INPUT is a slip of the hand."""
    run(source)
    source.write_text("quite\nanother\n", encoding="utf-8")
    assert "out.jsonl" in refuse()


# --- Settings -------------------------------------------------------------------------
class Longer(BaseModel):
    """The schema of the template, and one field more."""

    score: float
    explanation: str
    topic: str


class Other(BaseModel):
    """The schema of the template, but for a description."""

    score: float = Field(ge=-1, le=1, description="how good it is")
    explanation: str


EXTRA = async_template.EXTRA


def test_another_model_is_refused(run: Runner, refuse: Refuse, source: Path) -> None:
    """The line says which model it was, and the two ways on."""
    run(source)
    said = refuse("--model", "other-model")
    assert all(word in said for word in (async_template.MODEL, "--restart", "OUTPUT"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INSTRUCTIONS", "You are a poet."),
        ("PROMPT", "Sentiment? {text_message}"),
        ("TEMPERATURE", 0.5),
        ("TEMPERATURE", None),
        ("EXAMPLE", Longer(score=0, explanation="", topic="")),
        ("EXAMPLE", Other(score=0, explanation="")),
        ("EXTRA", {}),
        ("EXTRA", EXTRA | {"top_p": 0.5}),
        ("EXTRA", EXTRA | {"reasoning": {"effort": "low"}}),
        ("EXTRA", EXTRA | {"text": {"verbosity": "low"}}),
        ("EXTRA", EXTRA | {"truncation": "auto"}),
    ],
)
def test_other_settings_are_refused(
    run: Runner,
    refuse: Refuse,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: object,
) -> None:
    """Whatever shapes an answer: answers of two questions are never in one file."""
    run(source)
    monkeypatch.setattr(async_template, name, value)
    assert "--restart" in refuse()


@pytest.mark.parametrize(
    "extra",
    [
        {"service_tier": "flex"},
        {"store": True},
        {"metadata": {"project": "thesis"}},
        {"max_output_tokens": 300},
        {"prompt_cache_key": "thesis"},
        {"prompt_cache_retention": "24h"},
        {"prompt_cache_options": {"mode": "explicit"}},
        {"safety_identifier": "someone"},
        {"user": "someone"},
    ],
)
def test_what_does_not_shape_an_answer_may_change(
    server: Server,
    run: Runner,
    monkeypatch: pytest.MonkeyPatch,
    extra: dict[str, Any],
) -> None:
    """It is sent, and a run with it goes on where one without it has stopped."""
    monkeypatch.setattr(async_template, "EXTRA", {"reasoning": {"effort": "none"}})
    run(["a"])
    monkeypatch.setattr(async_template, "EXTRA", extra | async_template.EXTRA)
    assert (run(["a", "b"]).code, asked(server)) == (0, ["a", "b"])
    assert server.requests[1].body.items() >= extra.items()
    monkeypatch.setattr(async_template, "EXTRA", {"reasoning": {"effort": "none"}})
    assert (run(["a", "b", "c"]).code, server.total) == (0, 3)


def test_example_shapes_no_answer(
    server: Server, run: Runner, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one of the same schema changes nothing."""
    run(source)
    other = async_template.Sentiment(score=-1, explanation="Another example.")
    monkeypatch.setattr(async_template, "EXAMPLE", other)
    assert (run(source).code, server.total) == (0, 10)


def test_more_output_tokens_for_the_incomplete(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger max_output_tokens asks again just for what was cut off."""
    messages = ["a", "b [incomplete,ok]", "c"]
    monkeypatch.setattr(async_template, "EXTRA", EXTRA | {"max_output_tokens": 16})
    assert run(messages).code == 1
    server.requests.clear()
    monkeypatch.setattr(async_template, "EXTRA", EXTRA | {"max_output_tokens": 500})
    assert (run(messages).code, asked(server)) == (0, [messages[1]])
    assert server.requests[0].body["max_output_tokens"] == 500


@pytest.mark.parametrize("first", [["--offline"], []], ids=["offline", "real"])
def test_offline_and_real_rows_never_mix(
    run: Runner, refuse: Refuse, source: Path, first: list[str]
) -> None:
    """Neither is added to the other."""
    assert run(source, *first).code == 0
    assert "--restart" in refuse(*([] if first else ["--offline"]))


@pytest.mark.parametrize("messages", [["a [refusal]"], ["a [refusal]", "b", "c"]])
def test_errors_of_other_settings_are_dropped(
    server: Server, run: Runner, messages: list[str]
) -> None:
    """A run that brought nothing but errors does not block the next attempt."""
    assert run(["a [refusal]", "x [refusal]"], "--model", "wrong").code == 1
    result = run(messages)
    assert (result.code, texts(result.rows)) == (1, messages)
    assert all(row["model"].startswith(async_template.MODEL) for row in result.rows)


def test_one_answer_of_other_settings_is_refused(
    run: Runner, refuse: Refuse, source: Path, out: Path
) -> None:
    """Though it stands behind errors of these settings, and of others."""
    rows = run(["m1 [refusal]", "m2"], "--model", "wrong-model").rows
    rows += run(["m1 [refusal]"], "--restart").rows
    out.write_bytes(dump([rows[2], rows[0], rows[1]]))
    source.write_text("\n".join(TEN), encoding="utf-8")
    assert "wrong-model" in refuse()


# --- Restart --------------------------------------------------------------------------
def test_restart_keeps_every_old_output(server: Server, run: Runner, out: Path) -> None:
    """As .bak, .bak1, .bak2, and no file of these names is overwritten."""
    backups = [out.with_name(f"out.jsonl.bak{n}") for n in ("", 1, 2)]
    backups[1].write_text("mine", encoding="utf-8")
    run(["a"])
    for message in ("b", "c"):
        assert run([message], "--restart").code == 0
    assert backups[1].read_text(encoding="utf-8") == "mine"
    assert [texts(path) for path in (backups[0], backups[2])] == [["a"], ["b"]]
    assert texts(out) == ["c"]


def test_restart_of_nothing(server: Server, run: Runner, tmp_path: Path) -> None:
    """Without an OUTPUT, or with an empty one, there is nothing to set aside."""
    assert run(["a"], "--restart").code == 0
    (tmp_path / "out.jsonl").write_bytes(b"")
    assert run(["a"], "--restart").code == 0
    assert sorted(files(tmp_path)) == ["in.txt", "out.jsonl"]


def test_restart_waits_for_a_good_input(
    run: Runner, refuse: Refuse, source: Path
) -> None:
    """Nothing is set aside for a run that cannot start."""
    run(source)
    source.write_text("\n\n", encoding="utf-8")
    refuse("--restart")


# --- The command to resume ------------------------------------------------------------
def test_command_to_resume(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed as printed it goes on, and does not begin again."""
    source, out = tmp_path / "my 'texts'.txt", tmp_path / "my rows.jsonl"
    source.write_text("a\nb [refusal,ok]", encoding="utf-8")
    command = [str(source), str(out), "--restart", "--concurrency", "3"]
    assert async_template.main(command) == 1
    line = capsys.readouterr().err.partition("to resume: ")[2].splitlines()[0]
    python, _, *words = shlex.split(line)
    assert (python, async_template.main(words)) == ("python", 0)
    assert (server.total, "--restart" in words, "3" in words) == (3, False, True)
    assert "to resume" not in capsys.readouterr().err


@pytest.mark.parametrize("last", ["[401]", "[refusal]"])
def test_command_to_resume_what_has_stopped(
    server: Server, run: Runner, last: str
) -> None:
    """Whether the run was stopped or some messages have errors."""
    assert run(["a", last]).err.count("to resume: python ") == 1


# --- Where OUTPUT is ------------------------------------------------------------------
@posix
def test_link_stays_a_link_and_the_mode_is_kept(
    server: Server, run: Runner, out: Path
) -> None:
    """Though the order is made by replacing the file."""
    target = out.parent / "elsewhere" / "kept.jsonl"
    target.parent.mkdir()
    target.touch()
    target.chmod(0o640)
    out.symlink_to(target)
    assert run(["a [ok:ms=50]", "b"]).code == 0
    assert out.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert texts(target) == ["a [ok:ms=50]", "b"]
    assert list(target.parent.iterdir()) == [target]


def test_two_runs_on_one_output(
    server: Server, spawn: Spawn, refuse: Refuse, source: Path, out: Path
) -> None:
    """The second is refused, the first does not notice."""
    server.hold = 99
    first = spawn(source, out)
    wait_until(lambda: server.in_flight == 8)
    assert "out.jsonl" in refuse()
    assert "out.jsonl" in refuse("--restart")
    server.release()
    assert first.wait() == 0
    assert (len(load(out)), server.total) == (10, 10)


@posix
@pytest.mark.parametrize("path", ["/proc/out.jsonl", "locked/out.jsonl"])
def test_output_that_cannot_be_written(
    server: Server, source: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line before anything is asked."""
    (source.parent / "locked").mkdir(mode=0o555)
    if "locked" in path and os.access(source.parent / "locked", os.W_OK):
        pytest.skip("root may write everywhere")
    code = async_template.main([str(source), str(source.parent / path)])
    err = capsys.readouterr().err
    assert (code, server.total, len(err.splitlines())) == (2, 0, 1), err


def delete(out: Path) -> None:
    """OUTPUT is deleted."""
    out.unlink()


def delete_folder(out: Path) -> None:
    """OUTPUT's folder is deleted."""
    shutil.rmtree(out.parent)


def replace(out: Path) -> None:
    """OUTPUT is moved, and another file takes its place."""
    out.rename(out.with_name("moved.jsonl"))
    out.write_bytes(b'{"line": 1, "te')


def empty(out: Path) -> None:
    """OUTPUT is emptied."""
    out.write_bytes(b"")


def test_output_that_leaves_no_room_for_a_copy(server: Server, source: Path) -> None:
    """Where its name is too long for another one beside it, nothing is paid in vain."""
    out = source.parent / ("x" * 249 + ".jsonl")
    code = async_template.main([str(source), str(out)])
    assert (code, server.total) in [(2, 0), (0, 10)]


@posix
@pytest.mark.parametrize(
    ("accident", "before"),
    [
        (delete, b""),
        (delete_folder, b""),
        (replace, b""),
        (empty, b""),
        (empty, b'{"line": 1, "te'),  # a run that begins by mending the end of OUTPUT
    ],
)
def test_output_that_is_lost_in_mid_run(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    accident: Callable[[Path], None],
    before: bytes,
) -> None:
    """Noticed long before all is paid for; what is lost is said, the rest is whole."""
    source, out = tmp_path / "in.txt", tmp_path / "results" / "out.jsonl"
    source.write_text("\n".join(f"m{n}" for n in range(999)), encoding="utf-8")
    out.parent.mkdir()
    out.write_bytes(before)

    def look(_: random.Random) -> float:
        if server.total == 20:
            accident(out)
        return 0.02

    server.latency = look
    assert async_template.main([str(source), str(out), "--concurrency", "4"]) == 2
    assert 20 <= server.total < 900
    err = capsys.readouterr().err
    assert "out.jsonl" in err
    if accident is replace:
        assert out.read_bytes() == b'{"line": 1, "te'
        assert len(load(out.with_name("moved.jsonl"))) == server.statuses[200]
    elif accident is empty:
        load(out)
    else:
        assert not out.exists()
        assert re.search(rf"\b{server.statuses[200]} answers?\b", err), err


@posix
@pytest.mark.parametrize("content", [None, b"m3\n", b"m3\n\xff\n"])
def test_input_that_is_lost_in_mid_run(
    server: Server, run: Runner, out: Path, source: Path, content: bytes | None
) -> None:
    """INPUT deleted, cut or broken: OUTPUT keeps whatever was paid for, whole rows."""
    out.write_bytes(b'{"line": 1, "te')

    def look(_: random.Random) -> float:
        if server.total == 5 and content is None:
            source.unlink()
        elif server.total == 5 and content is not None:
            source.write_bytes(content)
        return 0.01

    server.latency = look
    result = run(source, "--concurrency", "2")
    assert result.code == (0 if content == b"m3\n" else 2), result.err
    assert sorted(texts(out)) == asked(server)
    assert sorted(files(out.parent)) == ["in.txt"] * bool(content) + ["out.jsonl"]


@posix
def test_full_disk(server: Server, run: Runner, source: Path, out: Path) -> None:
    """Exit 2, every line whole, what was lost is said; with room it is finished."""
    messages = [f"m{n}" for n in range(100)]
    source.write_text("\n".join(messages), encoding="utf-8")
    command = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", sys.executable, TEMPLATE]
    command += ["in.txt", "out.jsonl"]
    full = subprocess.run(command, cwd=out.parent, capture_output=True, text=True)
    saved, answered = len(load(out)), server.statuses[200]
    assert full.returncode == 2
    assert 0 < saved < answered < 100
    assert not NOISE.search(full.stderr)
    assert re.search(rf"\b{answered - saved} answers?\b", full.stderr), full.stderr
    assert sorted(files(out.parent)) == ["in.txt", "out.jsonl"]
    again = run(messages)
    assert (again.code, texts(out)) == (0, messages)
    assert server.total == answered + 100 - saved


@posix
def test_disk_without_room_for_the_copy(
    server: Server, run: Runner, source: Path, out: Path
) -> None:
    """What is full at the very end, when the order is made, costs no row."""
    messages = [f"m{n % 3}" for n in range(100)]  # three rows until the end
    source.write_text("\n".join(messages), encoding="utf-8")
    command = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", sys.executable, TEMPLATE]
    command += ["in.txt", "out.jsonl"]
    full = subprocess.run(command, cwd=out.parent, capture_output=True, text=True)
    assert (full.returncode, len(load(out)), server.total) == (2, 3, 3)
    assert not NOISE.search(full.stderr)
    assert sorted(files(out.parent)) == ["in.txt", "out.jsonl"]
    assert (run(messages).code, texts(out), server.total) == (0, messages, 3)


# --- Kill -----------------------------------------------------------------------------
@posix
def test_kill_at_random_moments(
    server: Server, spawn: Spawn, run: Runner, source: Path, out: Path
) -> None:
    """No row lost, none twice, no lock left; only what was in flight is paid again."""
    dice = random.Random(4)
    messages = [f"m{n}" for n in range(60)]
    source.write_text("\n".join(messages), encoding="utf-8")
    server.latency = lambda chance: chance.uniform(0.005, 0.03)
    for _ in range(2):
        goal = server.total + dice.randint(1, 20)
        process = spawn(source, out, "--concurrency", 8)
        while server.total < goal and process.poll() is None:
            time.sleep(dice.uniform(0.001, 0.01))
        process.kill()
        process.wait()
    saved, before = out.read_bytes().count(b"\n"), server.total
    assert run(messages, "--concurrency", "8").code == 0
    assert texts(out) == messages
    assert server.total - before == 60 - saved
    assert server.total <= 60 + 2 * 8
    assert sorted(files(out.parent)) == ["in.txt", "out.jsonl"]


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_stopped_while_the_order_is_made(
    server: Server, spawn: Spawn, run: Runner, source: Path, out: Path, name: str
) -> None:
    """OUTPUT is the old or the new file, whole; no stray file hinders the next run."""
    row, messages = run(["m0"]).rows[0], [f"m{n}" for n in range(5000)]
    out.write_bytes(dump([row | {"text_message": text} for text in messages[:0:-1]]))
    source.write_text("\n".join(messages), encoding="utf-8")
    process = spawn(source, out)
    wait_until(lambda: server.statuses[200] == 2)
    wait_until(lambda: len(files(out.parent)) > 2 or process.poll() is not None)
    process.send_signal(signal.Signals[name])
    err = process.communicate()[1]
    assert process.returncode in (0, 130, -signal.SIGKILL)
    assert not NOISE.search(err)
    assert sorted(texts(out)) == sorted(messages)
    assert run(messages).code == 0
    assert (texts(out), server.total) == (messages, 2)
    assert sorted(files(out.parent)) == ["in.txt", "out.jsonl"]


# --- Signals --------------------------------------------------------------------------
@posix
@pytest.mark.parametrize("name", SIGNALS)
def test_first_signal_lets_requests_land(
    server: Server,
    run: Runner,
    meanwhile: Meanwhile,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """Nothing new starts, what is in flight is written, a line says so."""

    def interrupt() -> None:
        wait_until(lambda: server.in_flight == 4)
        send(name)
        wait_until(lambda: "4" in capsys.readouterr().err)
        server.release()

    server.hold = 99
    meanwhile(interrupt)
    result = run(TEN, "--concurrency", "4")
    assert (result.code, len(result.rows), server.total) == (130, 4, 4)
    assert re.search("to resume: python .*in.txt .*out.jsonl .*4", result.err)
    assert texts(run(TEN).rows) == TEN


@posix
@pytest.mark.parametrize("name", SIGNALS)
def test_second_signal_stops_at_once(
    server: Server,
    run: Runner,
    meanwhile: Meanwhile,
    capsys: pytest.CaptureFixture[str],
    out: Path,
    name: str,
) -> None:
    """Without waiting for what hangs; the rows that were there stay."""

    def interrupt() -> None:
        wait_until(lambda: out.is_file() and len(load(out)) == 2 == server.in_flight)
        send(name)
        wait_until(lambda: capsys.readouterr().err)
        send(name)

    meanwhile(interrupt)
    result = run(["a", "b", "c [hang]", "d [hang]"], "--timeout", "3600")
    assert (result.code, texts(result.rows)) == (130, ["a", "b"])
    assert re.search("to resume: python .*in.txt .*out.jsonl", result.err)


@posix
def test_signals_of_all_kinds_at_once(
    server: Server, spawn: Spawn, source: Path, out: Path
) -> None:
    """Ctrl-C leaned upon, with 100 in flight: 130, nothing of asyncio's, rows whole."""
    server.latency = 0.01
    source.write_text("\n".join(f"m{n}" for n in range(3000)), encoding="utf-8")
    process = spawn(source, out)
    wait_until(lambda: out.is_file() and out.read_bytes().count(b"\n") > 100)
    for name in SIGNALS * 3:
        process.send_signal(signal.Signals[name])
    err = process.communicate()[1]
    assert process.returncode == 130, err
    assert not NOISE.search(err)
    assert 100 < len(load(out)) < 3000


@posix
@pytest.mark.parametrize("reply", ["429:retry-after=60", "500"])
def test_signal_ends_every_wait(
    server: Server,
    run: Runner,
    meanwhile: Meanwhile,
    monkeypatch: pytest.MonkeyPatch,
    reply: str,
) -> None:
    """A minute's pause or a long backoff does not have to be sat out."""

    def interrupt() -> None:
        wait_until(lambda: server.total and not server.in_flight)
        send("SIGINT")

    monkeypatch.setattr(async_template, "BACKOFF", 1e6)
    server.default = reply
    meanwhile(interrupt)
    start = time.monotonic()
    result = run(["a"])
    assert (result.code, result.rows) == (130, [])
    assert time.monotonic() - start < 30


@posix
def test_signal_while_input_is_read(spawn: Spawn, server: Server, out: Path) -> None:
    """Before anything is asked it is no different: 130 and no traceback."""
    process = spawn("-", out)
    assert process.stdin
    process.stdin.write("message\n" * 50_000)  # more than a pipe holds: main is reading
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert (process.returncode, server.total, out.exists()) == (130, 0, False)
    assert not NOISE.search(err)


@posix
def test_nohup(server: Server, run: Runner, meanwhile: Meanwhile) -> None:
    """A SIGHUP that is ignored from the start stays ignored."""

    def hang_up() -> None:
        wait_until(lambda: server.in_flight == 8)
        send("SIGHUP")
        server.release()

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    server.hold = 99
    meanwhile(hang_up)
    result = run(TEN)
    assert (result.code, texts(result.rows)) == (0, TEN)


# --- Memory ---------------------------------------------------------------------------
PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""


@posix
def test_memory_of_a_message(
    server: Server, run: Runner, source: Path, out: Path
) -> None:
    """Each further message takes at most 200 bytes."""
    row = run(["m0"]).rows[0]
    peaks = []
    for count in (1_000, 31_000):
        messages = [f"message number {n}" for n in range(count)]
        source.write_text("\n".join(messages), encoding="utf-8")
        out.write_bytes(dump([row | {"text_message": text} for text in messages]))
        command = [sys.executable, "-c", PEAK, sys.executable, TEMPLATE]
        command += [str(source), str(out)]
        peaks.append(int(subprocess.check_output(command, stderr=subprocess.DEVNULL)))
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    assert (peaks[1] - peaks[0]) * unit <= 200 * 30_000
