"""OUTPUT after every accident: resume, edits, refusals, kills, signals, a full disk."""

from __future__ import annotations

import errno
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
from pydantic import BaseModel, Field, create_model
from server import OUTPUT_TOKENS, Server, input_tokens, score_of

import async_template

LEAD = async_template.PROMPT.split("{text_message}")[0]
EXTRA = async_template.EXTRA
TEMPLATE = [sys.executable, str(ROOT / "async_template.py")]
SMALL_DISK = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *TEMPLATE]
SETTINGS = "aeedb200"  # of the template as it is shipped
BOM = b"\xef\xbb\xbf"
TEN = [f"m{n}" for n in range(10)]
FIVE = ["one", "two", "zwei é", "four 😀", "two"]
SLOW = ["a [ok:ms=50]", "b"]  # answered in another order
NOISE = re.compile("Traceback|Task was destroyed|[Uu]nclosed|never retrieved|Warning")
SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="no such signals or limits")

Rows = list[dict[str, Any]]
Runner = Callable[..., Run]
Spawn = Callable[..., "subprocess.Popen[str]"]
Refuse = Callable[..., str]
Start = Callable[[Callable[[], None]], None]
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


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


def dump(rows: Rows) -> bytes:
    """The rows as the template writes them."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return "".join(lines).encode()


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
def quiet(server: Server, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio complains of nothing; no signal goes unhandled; handlers are put back."""

    def fail(number: int, *_: object) -> None:
        pytest.fail(f"signal {number} is not handled")

    numbers = [number for number in signal.Signals if number.name in SIGNALS]
    before = [signal.signal(number, fail) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
    assert all(handler in (fail, signal.SIG_IGN) for handler in after)
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
def rows(run: Runner, source: Path) -> Rows:
    """The rows that INPUT has got by now."""
    return run(source).rows


@pytest.fixture
def refuse(server: Server, source: Path, out: Path, capsys: Capture) -> Refuse:
    """The last line of a run that exits with 2, asks nothing and changes no file."""

    def refuse(*options: str) -> str:
        before = files(source.parent)
        total = server.total
        capsys.readouterr()
        code = async_template.main([str(source), str(out), *options])
        err = capsys.readouterr().err
        assert (code, server.total) == (2, total), err
        assert files(source.parent) == before
        return err.splitlines()[-1]

    return refuse


@pytest.fixture
def meanwhile() -> Iterator[Start]:
    """Starts a function in a thread; what it raises fails the test."""
    with ThreadPoolExecutor() as pool:
        futures = []

        def meanwhile(action: Callable[[], None]) -> None:
            futures.append(pool.submit(action))

        yield meanwhile
        for future in futures:
            future.result()


# --- One row, known by its text -------------------------------------------------------
def test_rows_are_strict_json(run: Runner, out: Path) -> None:
    """Always the same keys, no NaN, UTF-8 as it is, \\n at the end."""
    messages = ['say "no"', "a\u2028b", "😀 é", "back\\slash\ttab", "{text_message}"]
    run([*messages, "x [nan]"], "--max-attempts", "1")
    rows = load(out)
    keys = "line text_message response error model answered_at usage settings"
    assert all(" ".join(row) == keys for row in rows)
    assert texts(rows) == [*messages, "x [nan]"]
    assert [bool(row["error"]) for row in rows] == [False] * 5 + [True]
    assert "😀 é".encode() in out.read_bytes()


def test_row_of_an_answer_and_of_an_error(run: Runner) -> None:
    """What was answered, when, by which model, and what it took; or what went wrong."""
    answer, error = run(["a", "b [500]"], "--max-attempts", "2").rows
    assert answer["response"]["score"] == score_of(LEAD + "a")
    assert answer["error"] is error["response"] is error["usage"] is None
    assert answer["model"].startswith(async_template.MODEL)
    for row in (answer, error):
        assert re.fullmatch(r"\d{4}(-\d\d){2}T\d\d(:\d\d){2}Z", row["answered_at"])
        ago = datetime.now(UTC) - datetime.fromisoformat(row["answered_at"])
        assert 0 <= ago.total_seconds() < 60
    assert list(answer["usage"]) == ["input_tokens", "output_tokens"]
    assert list(error["error"]) == ["type", "message", "attempts"]
    assert (error["error"]["type"], error["error"]["attempts"]) == ("server_error", 2)


@pytest.mark.parametrize("order", [1, -1])
def test_usage_wins(server: Server, run: Runner, out: Path, order: int) -> None:
    """It goes to the first row, whichever was first in OUTPUT or is after an edit."""
    out.write_bytes(dump(run(["a", "b", "a"]).rows[::order]))
    for messages in (["b", "a"], ["a", "a", "b"], ["b"], ["a", "b", "a"]):
        result = run(messages)
        used = [row["text_message"] for row in result.rows if row["usage"]]
        assert sorted(used) == ["a", "b"]
        assert result.rows[0]["usage"]
    assert server.total == 2


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("{text_message}", 2), ("{title}: {text_message}", 3), ("{title}", 2)],
)
def test_text_is_the_prompt_filled_in(
    run: Runner, tmp_path: Path, monkeypatch: Patch, prompt: str, count: int
) -> None:
    """The same text is asked once, and has one usage; each row keeps its own fields."""
    monkeypatch.setattr(async_template, "PROMPT", prompt)
    table = tmp_path / "in.csv"
    table.write_text("id,title,text\n1,A,a\n2,A,b\n3,B,a\n4,A,a\n", encoding="utf-8")
    for _ in range(2):
        rows = run(table, "--field", "text").rows
        assert texts(rows) == ["a", "b", "a", "a"]
        assert [row["fields"]["id"] for row in rows] == ["1", "2", "3", "4"]
        assert sum(bool(row["usage"]) for row in rows) == count


# --- Order and edits ------------------------------------------------------------------
@posix
def test_order_is_made_by_replacing_the_file(
    run: Runner, out: Path, monkeypatch: Patch
) -> None:
    """Whoever reads OUTPUT meanwhile sees whole rows; the new file is on disk first."""
    synced: list[Rows] = []
    run(["a", "b"])
    before = out.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(load(out)))
    with open(out, "rb") as reader:
        run(["c", "a", "b"])
        assert reader.read().startswith(before)
    assert texts(out) == ["c", "a", "b"]
    assert [texts(rows) for rows in synced] == [["a", "b", "c"]]


EDITS = st.lists(st.sampled_from(["a", "b", "c", "[refusal]"]), max_size=4)
HEALTH = [HealthCheck.function_scoped_fixture]


@settings(max_examples=20, deadline=None, database=None, suppress_health_check=HEALTH)
@given(versions=st.lists(st.tuples(EDITS, EDITS), min_size=2, max_size=4))
@example(versions=[(["a", "a"], ["b"]), (["b"], ["a"]), (["a"], ["a", "a"])])
@example(versions=[(["[refusal]"], ["[refusal]"]), ([], []), ([], ["[refusal]"])])
def test_any_edits_between_runs(
    server: Server, run: Runner, out: Path, versions: list[tuple[list[str], list[str]]]
) -> None:
    """INPUT's order, the gone ones behind and counted, no request or bill too many."""
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
        said = re.search(r"\b(\d+) .*no longer in INPUT", result.err)
        assert int(said[1] if said else 0) == len(gone)
        errors = {row["text_message"] for row in result.rows if row["error"]}
        assert errors <= {"[refusal]"}
        used = texts([row for row in result.rows if row["usage"]])
        assert sorted(used) == sorted({*texts(result.rows)})


# --- Resume ---------------------------------------------------------------------------
@pytest.mark.parametrize("k", range(6))
def test_resume_after_any_row(server: Server, run: Runner, out: Path, k: int) -> None:
    """OUTPUT cut to k rows is made whole again by requests for the others alone."""
    whole = run(FIVE).rows
    out.write_bytes(dump(whole[:k]))
    server.requests.clear()
    again = run(FIVE)
    assert (again.code, texts(again.rows)) == (0, FIVE)
    assert [row["response"] for row in again.rows] == [r["response"] for r in whole]
    assert asked(server) == sorted({*FIVE[k:]} - {*FIVE[:k]})
    assert k < 5 or again.rows == whole


def test_old_errors_do_not_hold_up_new_messages(run: Runner) -> None:
    """25 rejected in a row end the run, so those of earlier runs go last."""
    rejected = [f"m{n} [403]" for n in range(30)]
    assert run(["good", *rejected], "--concurrency", "1").code == 2
    result = run(["good", *rejected, "new"], "--concurrency", "1")
    answered = [row["text_message"] for row in result.rows if row["response"]]
    assert answered == ["good", "new"]


@pytest.mark.parametrize("order", [1, -1])
def test_answer_counts_more_than_an_error(run: Runner, out: Path, order: int) -> None:
    """Where OUTPUT has both for a text, say two shards joined, the answer stays."""
    answer = run(["a"]).rows[0]
    error = answer | {"response": None, "error": {"type": "timeout", "attempts": 5}}
    out.write_bytes(dump([answer, error][::order]))
    assert run(["b", "a"]).rows[1:] == [answer | {"line": 2}]


@pytest.mark.parametrize("after", [1, 2, 8, 9, 10, 30, "é", "😀", -3, -2])
@pytest.mark.parametrize("others", [1, 0])
def test_torn_line_is_asked_again(
    server: Server, run: Runner, out: Path, after: int | str, others: int
) -> None:
    """A last line cut anywhere, within a character too, is dropped with a notice."""
    run(["a", "é😀"])
    first, second = out.read_bytes().splitlines(keepends=True)
    cut = second.index(after.encode()) + 1 if isinstance(after, str) else after
    out.write_bytes(first * others + second[:cut])
    again = run(["a", "é😀"])
    assert (again.code, texts(again.rows)) == (0, ["a", "é😀"])
    assert asked(server) == [*["a"] * (2 - others), "é😀", "é😀"]
    assert re.search(rf"out\.jsonl\b.*\bline {others + 1}\b", again.err)


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda rows: dump(rows)[:-1],
        lambda rows: b"\n" + dump(rows) + b" \n\n",
        lambda rows: dump(rows[:1]) + b"\n\r\n" + dump(rows[1:]),
        lambda rows: dump(rows).replace(b"\n", b"\r\n"),
        lambda rows: BOM + dump(rows).replace(b'": ', b'":')[:-1] + b"\r\n\r\n",
        lambda rows: dump(rows[:1]) + BOM + dump(rows[1:]),
        lambda rows: dump([row | {"mine": 1} for row in rows[::-1]]),
    ],
)
def test_output_that_another_tool_has_saved(
    server: Server, run: Runner, out: Path, rewrite: Callable[[Rows], bytes]
) -> None:
    """A BOM, blank lines, other line ends, blanks, order or keys are no error."""
    rows = run(["a", "é", "c"]).rows
    out.write_bytes(rewrite(rows))
    again = run(["new", "é", "a", "c"])
    assert (again.code, server.total) == (0, 4)
    assert texts(out) == ["new", "é", "a", "c"]
    old = [rows[n]["response"] for n in (1, 0, 2)]
    assert [row["response"] for row in again.rows[1:]] == old


# --- Refusals -------------------------------------------------------------------------
TORN = b'{"line": 2, "text_mess'
BROKEN = [
    b"garbage",
    b"[]",
    b"null",
    b"7",
    TORN,
    TORN[:-5] + b'": 1}',
    b"\xff",
    b"\0\0",
]


@pytest.mark.parametrize("broken", [*BROKEN, pytest.param(b"[" * 100_000, id="deep")])
@pytest.mark.parametrize("number", [1, 10])
def test_broken_line_is_named(
    rows: Rows, refuse: Refuse, out: Path, number: int, broken: bytes
) -> None:
    """It may hold something paid for, so it is for people to look at."""
    before, after = dump(rows[: number - 1]), dump(rows[number:])
    out.write_bytes(before + broken + b"\n" + after)
    assert re.search(rf"out\.jsonl\b.*\bline {number}\b", refuse())


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda rows: dump(rows).replace(b"\n", b""),
        lambda rows: dump(rows).replace(b"\n", b",\n")[:-2],
        lambda rows: json.dumps(rows).encode(),
        lambda rows: json.dumps(rows, indent=2).encode(),
        lambda rows: dump(rows)[:-1] + TORN,
        lambda rows: TORN + dump(rows[:1])[:-1],
        lambda _: b"My thesis.\nChapter 1\n",
        lambda _: b"My thesis, one line, no newline",
        lambda _: b'{"text": "hel',
        lambda _: b"\x89PNG\r\n\x1a\n\x00\x00",
        lambda _: b"\x00\xff",
    ],
)
def test_file_of_another_kind_is_refused(
    rows: Rows, refuse: Refuse, out: Path, rewrite: Callable[[Rows], bytes]
) -> None:
    """Rows in one line, or without a final break, or a stranger: no byte is lost."""
    out.write_bytes(rewrite(rows))
    assert "out.jsonl" in refuse()


def test_output_for_other_messages_is_refused(
    rows: Rows, refuse: Refuse, source: Path
) -> None:
    """An OUTPUT that shares no message with INPUT is a slip of the hand."""
    source.write_text("quite\nanother\n", encoding="utf-8")
    assert "out.jsonl" in refuse()


# --- Settings -------------------------------------------------------------------------
AXIS = "-1 negative, 0 neutral, 1 positive"


def sentiment(bound: float, description: str) -> BaseModel:
    """An answer of a class that is like the template's, but for these two."""
    kind = create_model(
        "Sentiment",
        __doc__=async_template.Sentiment.__doc__,
        score=(float, Field(ge=-bound, le=bound, description=description)),
        explanation=(str, Field(description="one sentence that says why")),
    )
    return kind(score=0, explanation="Another example.")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TEMPERATURE", 0),
        ("EXAMPLE", sentiment(1, AXIS)),
        ("EXAMPLE", sentiment(1.0, AXIS)),
    ],
)
def test_settings_are_a_constant(
    server: Server, run: Runner, monkeypatch: Patch, name: str, value: object
) -> None:
    """Under any pydantic, which writes 1 or 1.0, and in years: a resume hangs on it."""
    run(["a"])
    monkeypatch.setattr(async_template, name, value)
    result = run(["a", "b"])
    assert (result.code, server.total) == (0, 2)
    assert {row["settings"] for row in result.rows} == {SETTINGS}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODEL", "another-model"),
        ("INSTRUCTIONS", "You are a poet."),
        ("PROMPT", "Sentiment? {text_message}"),
        ("TEMPERATURE", 0.5),
        ("TEMPERATURE", None),
        ("EXAMPLE", sentiment(1, "how good it is")),
        ("EXAMPLE", sentiment(2, AXIS)),
        ("EXTRA", EXTRA | {"top_p": 0.5}),
        ("EXTRA", EXTRA | {"reasoning": {"effort": "low"}}),
        ("EXTRA", EXTRA | {"text": {"verbosity": "low"}}),
    ],
)
def test_other_settings_are_refused(
    rows: Rows, refuse: Refuse, monkeypatch: Patch, name: str, value: object
) -> None:
    """Whatever shapes an answer; the line names the old model, and the way on."""
    old = async_template.MODEL
    monkeypatch.setattr(async_template, name, value)
    assert re.search(f"{old}.*another OUTPUT", refuse())


def test_what_does_not_shape_an_answer_may_change(
    server: Server, run: Runner, monkeypatch: Patch
) -> None:
    """It is sent, and a run with it goes on where one without it has stopped."""
    monkeypatch.setattr(async_template, "EXTRA", {"reasoning": {"effort": "none"}})
    run(["a"])
    neutral = {"service_tier": "flex", "store": True, "metadata": {"project": "thesis"}}
    neutral |= {"max_output_tokens": 300, "safety_identifier": "me", "user": "me"}
    neutral |= {"prompt_cache_key": "thesis", "prompt_cache_retention": "24h"}
    monkeypatch.setattr(async_template, "EXTRA", neutral | async_template.EXTRA)
    assert (run(["a", "b"]).code, asked(server)) == (0, ["a", "b"])
    assert server.requests[1].body.items() >= neutral.items()


def test_offline_and_real_rows_never_mix(rows: Rows, refuse: Refuse) -> None:
    """What the model has answered is not added to placeholders, nor these to it."""
    assert "another OUTPUT" in refuse("--offline")


@pytest.mark.parametrize(("old", "code"), [("a [refusal]", 0), ("a", 2)])
def test_rows_without_a_column_that_prompt_names(
    run: Runner, tmp_path: Path, monkeypatch: Patch, old: str, code: int
) -> None:
    """An error never blocks; an answer was made with another prompt."""
    run([old])
    monkeypatch.setattr(async_template, "PROMPT", "{title}: {text_message}")
    table = tmp_path / "in.csv"
    table.write_text("title,text\nA,a\n", encoding="utf-8")
    result = run(table)
    assert result.code == code, result.err
    assert ("another OUTPUT" in result.err) == (code == 2)


# --- When a run stops -----------------------------------------------------------------
def test_command_to_resume(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Typed as printed it goes on, and does not begin again."""
    source, out = tmp_path / "my 'texts'.txt", tmp_path / "my rows.jsonl"
    source.write_text("a\nb [refusal,ok]", encoding="utf-8")
    command = [str(source), str(out), "--concurrency", "3"]
    assert async_template.main(command) == 1
    line = capsys.readouterr().err.partition("to resume: ")[2].splitlines()[0]
    python, _, *words = shlex.split(line)
    assert (python, words) == ("python", command)
    assert (async_template.main(words), server.total) == (0, 3)
    assert "to resume" not in capsys.readouterr().err


def test_bill_of_a_run_that_stops(server: Server, run: Runner) -> None:
    """All that was billed: what landed late, and tries of a message without a row."""
    late = [f"m{n} [ok:ms=300]" for n in range(5)]
    result = run(["a", "b [prose,401]", *late])
    paid = [request for request in server.requests if request.status == 200]
    tokens = sum(input_tokens(request.text) for request in paid)
    used = f"{tokens:,} input tokens, {len(paid) * OUTPUT_TOKENS} output tokens"
    assert re.search(f"used: .*{used}", result.err), result.err
    answered = sum(bool(row["response"]) for row in result.rows)
    assert (result.code, answered, len(paid)) == (2, 6, 7)
    assert result.err.count("to resume: python ") == 1


# --- Where OUTPUT is ------------------------------------------------------------------
@posix
def test_link_stays_a_link_and_the_mode_is_kept(run: Runner, out: Path) -> None:
    """Though the order is made by replacing the file."""
    target = out.parent / "elsewhere" / "kept.jsonl"
    target.parent.mkdir()
    target.touch(0o640)
    out.symlink_to(target)
    assert (run(SLOW).code, texts(target)) == (0, SLOW)
    assert out.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert list(target.parent.iterdir()) == [target]


def test_two_runs_on_one_output(
    server: Server, spawn: Spawn, refuse: Refuse, source: Path, out: Path
) -> None:
    """The second is refused, the first does not notice."""
    server.hold = 99
    first = spawn(source, out)
    wait_until(lambda: server.in_flight == 8)
    assert "out.jsonl" in refuse()
    server.release()
    assert (first.wait(), len(load(out)), server.total) == (0, 10, 10)


@posix
@pytest.mark.parametrize("function", ["os.chmod", "pathlib.Path.chmod", "fcntl.flock"])
def test_drive_without_modes_or_locks(
    run: Runner, monkeypatch: Patch, function: str
) -> None:
    """No reason to fail; without a lock a line says so."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(function, fail)
    result = run(SLOW)
    assert (result.code, texts(result.rows)) == (0, SLOW), result.err
    assert ("lock" in result.err) == (function == "fcntl.flock")
    assert sorted(files(result.out_path.parent)) == ["in.txt", "out.jsonl"]


@pytest.mark.parametrize("refusals", [3, 10**6])
def test_replace_that_is_refused(
    server: Server, run: Runner, monkeypatch: Patch, refusals: int
) -> None:
    """For a moment, as by a virus scanner: tried for two seconds. For good: said."""
    naps: list[float] = []
    move = os.replace

    def replace(*paths: Path) -> None:
        if len(naps) < refusals:
            raise PermissionError(errno.EACCES, "The file is in use")
        move(*paths)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", naps.append)
    result = run(SLOW)
    if refusals > 3:
        assert (result.code, texts(result.rows)) == (2, SLOW[::-1])
        assert re.search("out.jsonl .*order in which they came.*in use", result.err)
        assert 1.5 < sum(naps) < 3
        monkeypatch.setattr(os, "replace", move)
        result = run(SLOW)
    assert (result.code, texts(result.rows), server.total) == (0, SLOW, 2)
    assert sorted(files(result.out_path.parent)) == ["in.txt", "out.jsonl"]


@posix
@pytest.mark.parametrize(
    ("accident", "code", "left"),
    [
        (lambda out: Path(shutil.copy(out, f"{out}.new")).replace(out), 0, TEN),
        (lambda out: out.unlink(), 0, TEN),
        (lambda out: out.write_bytes(b""), 2, TEN[1:]),
        (lambda out: shutil.rmtree(out.parent), 2, []),
    ],
)
def test_accident_in_mid_run(
    server: Server, source: Path, accident: Any, code: int, left: list[str]
) -> None:
    """An editor's copy, or none, is replaced by all rows; no answer gets mixed up."""
    out = source.parent / "results" / "out.jsonl"
    out.parent.mkdir()

    def look(_: random.Random) -> float:
        if server.total == 2:
            accident(out)
        return 0.01

    server.latency = look
    options = [str(source), str(out), "--concurrency", "1"]
    assert (async_template.main(options), server.total) == (code, 10)
    rows = load(out) if left else []
    found = [(row["text_message"], row["response"]["score"]) for row in rows]
    assert found == [(text, score_of(LEAD + text)) for text in left]


@posix
@pytest.mark.parametrize("count", [300, 3])
def test_full_disk(
    server: Server, run: Runner, source: Path, out: Path, count: int
) -> None:
    """At a row, or when the order is made: what is on disk is whole, and goes on."""
    messages = [f"m{n % count}" for n in range(300)]
    source.write_text("\n".join(messages), encoding="utf-8")
    command = [*SMALL_DISK, str(source), str(out)]
    full = subprocess.run(command, capture_output=True, text=True)
    saved, answered = len(load(out)), server.statuses[200]
    assert full.returncode == 2
    assert 0 < saved < answered < 300 if count == 300 else saved == answered == 3
    assert not NOISE.search(full.stderr)
    assert sorted(files(out.parent)) == ["in.txt", "out.jsonl"]
    assert (run(messages).code, texts(out)) == (0, messages)
    assert server.total == answered + count - saved


# --- Kills, signals, memory -----------------------------------------------------------
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


@posix
@pytest.mark.parametrize("reply", ["ok", "500", "prose", "429"])
def test_first_signal_lets_requests_land(
    server: Server, run: Runner, meanwhile: Start, capsys: Capture, reply: str
) -> None:
    """Nothing new starts, not a retry either; what is answered is written."""

    def interrupt() -> None:
        wait_until(lambda: server.in_flight == 4)
        send("SIGINT")
        wait_until(lambda: "waiting for 4 requests" in capsys.readouterr().err)
        server.release()

    server.hold = 99
    server.default = reply
    meanwhile(interrupt)
    result = run(TEN, "--concurrency", "4")
    assert (result.code, server.total) == (130, 4), result.err
    assert sum(bool(row["response"]) for row in result.rows) == 4 * (reply == "ok")
    assert re.search("to resume: python .*in.txt .*out.jsonl .*4", result.err)
    server.default = "ok"
    assert texts(run(TEN).rows) == TEN


@posix
@pytest.mark.parametrize("name", SIGNALS)
def test_second_signal_stops_at_once(
    run: Runner, meanwhile: Start, capsys: Capture, out: Path, name: str
) -> None:
    """Without waiting for what hangs; the rows that were there stay."""

    def interrupt() -> None:
        wait_until(lambda: out.is_file() and len(load(out)) == 2)
        send(name)
        wait_until(lambda: "waiting for" in capsys.readouterr().err)
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
@pytest.mark.parametrize("reply", ["429:retry-after=500", "500"])
def test_signal_ends_every_wait(
    server: Server, run: Runner, meanwhile: Start, monkeypatch: Patch, reply: str
) -> None:
    """A long pause or backoff does not have to be sat out."""

    def interrupt() -> None:
        wait_until(lambda: server.total and not server.in_flight)
        send("SIGINT")

    monkeypatch.setattr(async_template, "BACKOFF", 1e6)
    server.default = reply
    meanwhile(interrupt)
    result = run(["a"])
    assert (result.code, result.rows, server.total) == (130, [], 1)


@posix
@pytest.mark.parametrize("name", SIGNALS)
def test_ignored_signal_stays_ignored(
    server: Server, run: Runner, meanwhile: Start, name: str
) -> None:
    """As by `nohup`, or in the background of a script."""

    def interrupt() -> None:
        wait_until(lambda: server.in_flight == 8)
        send(name)
        server.release()

    signal.signal(signal.Signals[name], signal.SIG_IGN)
    server.hold = 99
    meanwhile(interrupt)
    assert texts(run(TEN).rows) == TEN
    assert signal.getsignal(signal.Signals[name]) == signal.SIG_IGN


PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""


@posix
def test_memory_of_a_message(run: Runner, source: Path, out: Path) -> None:
    """Each further message takes at most 900 bytes besides its text."""
    row = run(["m0"]).rows[0]
    peaks = []
    for count in (1_000, 21_000):
        messages = [f"message number {n:06}" for n in range(count)]
        source.write_text("\n".join(messages), encoding="utf-8")
        out.write_bytes(dump([row | {"text_message": text} for text in messages]))
        command = [sys.executable, "-c", PEAK, *TEMPLATE, str(source), str(out)]
        peaks.append(int(subprocess.check_output(command, stderr=subprocess.DEVNULL)))
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    assert (peaks[1] - peaks[0]) * unit <= (900 + len(messages[0])) * 20_000
