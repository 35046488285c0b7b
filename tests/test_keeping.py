"""OUTPUT after every accident: resume, edits, refusals, kills, signals, a full disk."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from server import Server

import async_template

LEAD = async_template.PROMPT.split("{text_message}")[0]
FIVE = ["one", "two", "zwei é", "four 😀", "two"]
NOISE = re.compile("Traceback|Task was destroyed|[Uu]nclosed|never retrieved|Warning")
posix = pytest.mark.skipif(sys.platform == "win32", reason="no such signals or limits")

Runner = Callable[..., Run]
Spawn = Callable[..., "subprocess.Popen[str]"]
Refuse = Callable[..., str]


def asked(server: Server) -> list[str]:
    """The messages of all requests so far."""
    return [request.text.removeprefix(LEAD) for request in server.requests]


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of a file in which every line is whole and strict JSON."""
    lines = path.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def texts(path: Path) -> list[str]:
    """The messages of the rows of a file, in their order there."""
    return [row["text_message"] for row in load(path)]


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def wait_until(condition: Callable[[], object]) -> None:
    """Returns as soon as the condition holds; fails after 20 s."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """OUTPUT of the fixture `run`."""
    return tmp_path / "out.jsonl"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """INPUT: ten messages."""
    path = tmp_path / "in.txt"
    path.write_text("\n".join(f"m{n}" for n in range(10)), encoding="utf-8")
    return path


@pytest.fixture
def refuse(
    server: Server, source: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """Sees that a run exits with 2, asks nothing, changes no file; what it printed."""

    def refuse(*options: str) -> str:
        before, total = files(source.parent), server.total
        code = async_template.main([str(source), str(out), *options])
        assert (code, server.total) == (2, total)
        assert files(source.parent) == before
        return capsys.readouterr().err

    return refuse


# --- Resume -------------------------------------------------------------------


@pytest.mark.parametrize("k", range(6))
def test_resume_after_any_row_asks_only_the_rest(
    server: Server, run: Runner, out: Path, k: int
) -> None:
    """OUTPUT cut to k rows is made whole again by requests for the others alone."""
    run(FIVE)
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:k]))
    server.requests.clear()
    again = run(FIVE)
    assert (again.code, out.read_bytes()) == (0, whole)
    assert sorted(asked(server)) == sorted(FIVE[k:])


@pytest.mark.parametrize(
    "messages",
    [["a", "b [refusal,ok]", "c"], ["b [refusal,ok]", "b [refusal,ok]"]],
    ids=["one", "one of two the same"],
)
def test_error_rows_are_asked_again(
    server: Server, run: Runner, messages: list[str]
) -> None:
    """The same command retries just the error row, and replaces it."""
    assert run(messages).code == 1
    server.requests.clear()
    again = run(messages)
    assert (again.code, asked(server)) == (0, ["b [refusal,ok]"])
    assert [row["text_message"] for row in again.rows] == messages
    assert not any(row["error"] for row in again.rows)


def test_an_error_row_never_becomes_two(server: Server, run: Runner) -> None:
    """What fails again and again keeps one row, and the count of errors is of now."""
    for _ in range(3):
        result = run(["a", "b [refusal]"])
        assert (result.code, len(result.rows)) == (1, 2)
    assert asked(server).count("a") == 1


def test_a_line_torn_at_any_byte_is_dropped(
    server: Server, run: Runner, out: Path
) -> None:
    """A last line cut anywhere, within a character too, goes with a notice."""
    run(["a", "é😀"])
    whole = out.read_bytes()
    first = whole.splitlines(keepends=True)[0]
    for cut in range(len(first) + 1, len(whole)):
        out.write_bytes(whole[:cut])
        again = run(["a", "é😀"], "--limit", "1")
        assert (again.code, out.read_bytes()) == (0, first), cut
        assert "line 2" in again.err
    assert server.total == 2


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 9])
def test_a_torn_line_is_asked_again(
    server: Server, run: Runner, out: Path, after: int
) -> None:
    """And it alone, wherever it was cut in these two characters of six bytes."""
    run(["a", "é😀"])
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index("é".encode()) + after])
    again = run(["a", "é😀"])
    assert (again.code, out.read_bytes()) == (0, whole)
    assert sorted(asked(server)) == ["a", "é😀", "é😀"]


def test_a_torn_line_may_be_the_only_one(
    server: Server, run: Runner, out: Path
) -> None:
    """A crash in the first row does not make OUTPUT a stranger."""
    run(["a"])
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    again = run(["a"])
    assert (again.code, out.read_bytes()) == (0, whole)


def test_a_run_with_nothing_to_do_leaves_output_alone(
    server: Server, run: Runner, out: Path
) -> None:
    """Not a byte, not the time, not the inode."""
    run(FIVE)
    content, before = out.read_bytes(), out.stat()
    assert run(FIVE).code == 0
    after = out.stat()
    assert out.read_bytes() == content
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert server.total == len(FIVE)


# --- Order and edits ----------------------------------------------------------


def test_rows_end_in_the_order_of_input(server: Server, run: Runner) -> None:
    """Whatever the order of completion."""
    messages = [f"m{n} [ok:ms={n * 37 % 50}]" for n in range(20)]
    result = run(messages)
    assert [row["text_message"] for row in result.rows] == messages
    assert [row["line"] for row in result.rows] == list(range(1, 21))


def test_line_follows_input(server: Server, run: Runner) -> None:
    """After edits `line` is where the message is now."""
    run(["a", "b", "a"])
    result = run(["new", "b", "", "a", "a"])
    lines = [(row["line"], row["text_message"]) for row in result.rows]
    assert lines == [(1, "new"), (2, "b"), (4, "a"), (5, "a")]
    assert Counter(asked(server)) == {"a": 2, "b": 1, "new": 1}


def test_rows_without_a_message_stay_at_the_end(server: Server, run: Runner) -> None:
    """Answers whose message left INPUT are kept and counted."""
    run(["a", "b", "c", "a"])
    result = run(["new", "c"])
    kept = [row["text_message"] for row in result.rows]
    assert kept[:2] == ["new", "c"]
    assert sorted(kept[2:]) == ["a", "a", "b"]
    assert re.search(r"\b3 rows\b", result.err)
    assert server.total == 5


@settings(
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    versions=st.lists(
        st.lists(st.sampled_from(["a", "b", "c", "[refusal]"]), min_size=1, max_size=5),
        min_size=2,
        max_size=4,
    )
)
@example(versions=[["a"], ["b"]])
@example(versions=[["a", "a", "b"], ["b", "a"], ["a", "a", "a"]])
@example(versions=[["[refusal]", "a", "[refusal]"], ["a"], ["a", "[refusal]"]])
def test_any_edits_between_runs(
    server: Server, run: Runner, out: Path, versions: list[list[str]]
) -> None:
    """INPUT's order, the gone ones behind, and not one request too many."""
    out.unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    for messages in versions:
        server.requests.clear()
        before = rows
        paid = Counter(row["text_message"] for row in before if row["response"])
        result = run(messages)
        rows = result.rows
        if before and not {row["text_message"] for row in before} & set(messages):
            assert (result.code, rows, asked(server)) == (2, before, [])
            continue
        there, gone = rows[: len(messages)], rows[len(messages) :]
        assert [row["text_message"] for row in there] == messages
        assert Counter(asked(server)) == Counter(messages) - paid
        left = Counter(row["text_message"] for row in gone if row["response"])
        assert left == paid - Counter(messages)


# --- What a row is ------------------------------------------------------------


def test_rows_are_strict_json(server: Server, run: Runner, out: Path) -> None:
    """Always the same keys, no NaN, UTF-8 as it is, \\n at the end."""
    messages = ['say "no"', "a\u2028b", "😀 é", "back\\slash\ttab", "{text_message}"]
    run([*messages, "x [nan]"])
    keys = ["line", "text_message", "response", "error", "model", "usage", "settings"]
    rows = load(out)
    assert all(list(row) == keys for row in rows)
    assert [row["text_message"] for row in rows] == [*messages, "x [nan]"]
    assert [bool(row["error"]) for row in rows] == [False] * 5 + [True]
    assert "😀 é".encode() in out.read_bytes()


# --- Refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        b"garbage",
        b"",
        b"[]",
        b"null",
        b'{"line": 2, "text_mess',
        b'{"line": 2, "text_message": "two"}',
        b"\xff\xfe",
    ],
)
def test_a_broken_line_in_the_middle_is_named(
    run: Runner, refuse: Refuse, source: Path, out: Path, broken: bytes
) -> None:
    """It may hold something paid for, so it is for people to look at."""
    run(FIVE)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([lines[0], broken + b"\n", *lines[2:]]))
    assert "line 2" in refuse()


def test_another_model_is_refused(run: Runner, refuse: Refuse, source: Path) -> None:
    """The line says which model it was, and the two ways on."""
    run(source)
    said = refuse("--model", "other-model")
    assert "gpt-4.1-mini" in said
    assert "--restart" in said
    assert "another OUTPUT" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INSTRUCTIONS", "You are a poet."),
        ("PROMPT", "Sentiment? {text_message}"),
        ("TEMPERATURE", 0.5),
        ("EXTRA", {"top_p": 0.5}),
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
    said = refuse()
    assert "--restart" in said
    assert "another OUTPUT" in said


@pytest.mark.parametrize("first", [["--offline"], []], ids=["offline", "real"])
def test_offline_and_real_rows_never_mix(
    run: Runner, refuse: Refuse, source: Path, first: list[str]
) -> None:
    """Neither is added to the other."""
    assert run(source, *first).code == 0
    assert "--restart" in refuse(*([] if first else ["--offline"]))


def test_output_for_other_messages_is_refused(
    run: Runner, refuse: Refuse, source: Path
) -> None:
    """An OUTPUT that shares no message with INPUT is a slip of the hand."""
    run(source)
    source.write_text("quite\nanother\n", encoding="utf-8")
    said = refuse()
    assert "out.jsonl" in said
    assert "another OUTPUT" in said


@pytest.mark.parametrize(
    "content",
    [
        b"My thesis.\nChapter 1\n",
        b"My thesis, one line, no newline",
        b"id,text\n1,hello\n",
        b'{"text": "hello"}\n',
        b'{"text": "hello"}',
        b'[\n  {"line": 1}\n]\n',
        b"\x89PNG\r\n\x1a\n\x00\x00",
        b"\x00\xff",
        b"\n",
    ],
)
def test_a_file_that_is_no_result_file_is_refused(
    refuse: Refuse, out: Path, content: bytes
) -> None:
    """A slip of the hand must not cost a file."""
    out.write_bytes(content)
    assert "out.jsonl" in refuse()


# --- Restart ------------------------------------------------------------------


def test_restart_keeps_every_old_output(server: Server, run: Runner, out: Path) -> None:
    """As .bak, .bak1, .bak2, and no file of these names is overwritten."""
    backups = [out.with_name(f"out.jsonl.bak{n}") for n in ("", 1, 2)]
    backups[1].write_text("mine", encoding="utf-8")
    run(["a"])
    for message in "b", "c":
        assert run([message], "--restart").code == 0
    assert backups[1].read_text(encoding="utf-8") == "mine"
    assert [texts(path) for path in (backups[0], backups[2])] == [["a"], ["b"]]
    assert texts(out) == ["c"]


def test_restart_waits_for_a_good_input(
    run: Runner, refuse: Refuse, source: Path
) -> None:
    """Nothing is set aside for a run that cannot start."""
    run(source)
    source.write_text("\n\n", encoding="utf-8")
    refuse("--restart")


def test_the_command_to_go_on_does_not_restart(server: Server, run: Runner) -> None:
    """Typed as printed, it must resume and not begin again."""
    result = run(["a", "b [refusal]"], "--restart")
    assert result.code == 1
    assert re.search("python .*out.jsonl", result.err)
    assert "--restart" not in result.err


# --- Where OUTPUT is ----------------------------------------------------------


@posix
def test_a_link_stays_a_link_and_the_mode_is_kept(
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
    server.release()
    assert first.wait() == 0
    assert (len(load(out)), server.total) == (10, 10)


@posix
@pytest.mark.parametrize("gone", ["file", "folder"])
def test_output_deleted_in_mid_run(
    server: Server, spawn: Spawn, tmp_path: Path, gone: str
) -> None:
    """Exit 2 and a line, not a run that pays for rows that go nowhere."""
    out = tmp_path / "results" / "out.jsonl"
    out.parent.mkdir()
    (tmp_path / "in.txt").write_text("a\nb [ok:ms=700]", encoding="utf-8")
    process = spawn("in.txt", out)
    wait_until(lambda: out.is_file() and out.read_bytes().endswith(b"\n"))
    out.unlink() if gone == "file" else shutil.rmtree(out.parent)
    err = process.communicate()[1]
    assert process.returncode == 2
    assert "out.jsonl" in err
    assert not NOISE.search(err)


@posix
def test_a_full_disk(server: Server, run: Runner, tmp_path: Path, out: Path) -> None:
    """Exit 2, every line whole, what was lost is said; with room it is finished."""
    messages = [f"m{n}" for n in range(100)]
    (tmp_path / "in.txt").write_text("\n".join(messages), encoding="utf-8")
    script = [sys.executable, str(ROOT / "async_template.py"), "in.txt", "out.jsonl"]
    command = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *script]
    full = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    saved, answered = len(load(out)), server.statuses[200]
    assert full.returncode == 2
    assert 0 < saved < answered < 100
    assert not NOISE.search(full.stderr)
    why = [line for line in full.stderr.splitlines() if "out.jsonl" in line]
    assert len(why) == 2  # what is wrong, and the command to go on
    assert re.search(rf"\b{answered - saved} (answer|row)", full.stderr)
    again = run(messages)
    assert (again.code, texts(out)) == (0, messages)
    assert server.total == answered + 100 - saved


# --- Kill and interrupt -------------------------------------------------------


@posix
def test_kill_at_random_moments(
    server: Server, spawn: Spawn, run: Runner, out: Path
) -> None:
    """No row lost, none twice; at most the requests in flight are asked again."""
    dice = random.Random(4)
    messages = [f"m{n % 60}" for n in range(80)]
    (out.parent / "in.txt").write_text("\n".join(messages), encoding="utf-8")
    server.latency = lambda chance: chance.uniform(0.005, 0.03)
    for _ in range(4):
        goal = server.total + dice.randint(1, 20)
        process = spawn("in.txt", out, "--concurrency", 8)
        while server.total < goal and process.poll() is None:
            time.sleep(dice.uniform(0.001, 0.01))
        process.kill()
        process.wait()
    saved, before = out.read_bytes().count(b"\n"), server.total
    assert run(messages, "--concurrency", "8").code == 0
    assert texts(out) == messages
    assert server.total - before == 80 - saved
    assert server.total <= 80 + 4 * 8


@posix
def test_a_killed_run_leaves_no_lock(
    server: Server, spawn: Spawn, run: Runner, source: Path, out: Path
) -> None:
    """Nothing to clean up by hand."""
    server.hold = 99
    process = spawn(source, out)
    wait_until(lambda: server.in_flight)
    process.kill()
    process.wait()
    server.release()
    assert run(source).code == 0
    assert sorted(files(out.parent)) == ["in.txt", "out.jsonl"]


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_requests_land(
    server: Server, spawn: Spawn, source: Path, out: Path, number: int
) -> None:
    """Nothing new starts, what is in flight is written, the way to resume is shown."""
    server.hold = 99
    process = spawn(source, out, "--concurrency", 4)
    wait_until(lambda: server.in_flight == 4)
    process.send_signal(number)
    assert process.stderr
    assert "4" in process.stderr.readline()
    server.release()
    err = process.communicate()[1]
    assert process.returncode == 130
    assert (len(load(out)), server.total) == (4, 4)
    assert re.search("python .*in.txt .*out.jsonl --concurrency 4", err)
    assert not NOISE.search(err)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(
    server: Server, spawn: Spawn, tmp_path: Path, out: Path, number: int
) -> None:
    """Without waiting for what hangs; the rows that were there stay."""
    (tmp_path / "in.txt").write_text("a\nb\nc [hang]\nd [hang]", encoding="utf-8")
    process = spawn("in.txt", out)
    wait_until(lambda: out.is_file() and len(load(out)) == 2 == server.in_flight)
    assert process.stderr
    process.send_signal(number)
    process.stderr.readline()
    process.send_signal(number)
    err = process.communicate(timeout=10)[1]
    assert process.returncode == 130
    assert texts(out) == ["a", "b"]
    assert re.search("python .*in.txt .*out.jsonl", err)
    assert not NOISE.search(err)


@posix
def test_two_signals_at_once_while_busy(
    server: Server, spawn: Spawn, tmp_path: Path, out: Path
) -> None:
    """Ctrl-C leaned upon, with 100 in flight: one line, nothing of asyncio's."""
    server.latency = 0.01
    text = "\n".join(f"m{n}" for n in range(3000))
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    process = spawn("in.txt", out)
    wait_until(lambda: out.is_file() and out.read_bytes().count(b"\n") > 100)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and not NOISE.search(err)
    assert len(load(out)) > 100


@posix
@pytest.mark.parametrize("status", [429, 500], ids=["braked", "backing off"])
def test_a_signal_ends_every_wait(
    server: Server, spawn: Spawn, tmp_path: Path, out: Path, status: int
) -> None:
    """A minute's brake does not have to be sat out."""
    server.default = f"{status}:retry-after=60"
    (tmp_path / "in.txt").write_text("a", encoding="utf-8")
    process = spawn("in.txt", out, "--max-attempts", 99)
    wait_until(lambda: server.statuses[status] and not server.in_flight)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=10)[1]
    assert (process.returncode, out.read_bytes()) == (130, b"")
    assert not NOISE.search(err)


@posix
def test_a_signal_while_input_is_read(spawn: Spawn, server: Server, out: Path) -> None:
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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_the_order_is_made(
    server: Server, spawn: Spawn, run: Runner, out: Path, number: int
) -> None:
    """OUTPUT is the old or the new file, whole; no stray file hinders the next run."""
    row, messages = run(["m0"]).rows[0], [f"m{n}" for n in range(10_000)]
    rows = [json.dumps(row | {"text_message": text}) + "\n" for text in messages]
    out.write_text("".join(reversed(rows[1:])), encoding="utf-8", newline="\n")
    (out.parent / "in.txt").write_text("\n".join(messages), encoding="utf-8")
    process = spawn("in.txt", out)
    wait_until(lambda: len(files(out.parent)) > 2 or process.poll() is not None)
    process.send_signal(number)
    err = process.communicate()[1]
    assert process.returncode in (0, 130, -signal.SIGKILL)
    assert not NOISE.search(err)
    assert sorted(texts(out)) == sorted(messages)
    assert run(messages).code == 0
    assert (texts(out), server.total) == (messages, 2)
    assert sorted(files(out.parent)) == ["in.txt", "out.jsonl"]
