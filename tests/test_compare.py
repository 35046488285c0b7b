"""compare_sync_async.py: four ways to ask the same question, one table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import ROOT
from pydantic import BaseModel
from server import Server

import async_template
import compare_sync_async

SCRIPT = ROOT / "compare_sync_async.py"
WAYS = ["loop", "threads", "gather", "async_template"]
BAD = "--latency=-1 --latency=nan --repeat=0 --repeat=2 --concurrency=0 --n=0 --n=some"
COLUMNS = ["", "best", "spread", "rows/s", "speedup", "errors", "in flight"]

Result = tuple[int, str, str]
Compare = Callable[..., Result]


class Digest(BaseModel):
    """Another answer than the template's."""

    topic: Literal["economy", "health"]
    year: int


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Runs the script on messages; gives exit status, standard output and error."""

    def compare(messages: list[str], *options: str) -> Result:
        path = tmp_path / "in.txt"
        path.write_text("\n".join(messages), encoding="utf-8")
        try:
            status = compare_sync_async.main([str(path), *options])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return compare


def table(printed: str) -> list[list[str]]:
    """The cells of the table, with the head and without the rule."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def column(printed: str, name: str) -> list[str]:
    """A column of the table."""
    number = COLUMNS.index(name)
    return [row[number] for row in table(printed)[1:]]


# --- The table ------------------------------------------------------------------------
def test_offline_command() -> None:
    """No key: a table of four rows without errors, and a bar for each run."""
    options = ["--offline", "--n=4", "--latency=0.05", "--concurrency=2"]
    command = [sys.executable, "-W", "error", str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert column(done.stdout, "") == WAYS
    assert column(done.stdout, "errors") == ["0"] * 4
    loop, threads, gather, pool = map(int, column(done.stdout, "in flight"))
    assert loop == 1 and threads <= 2 and gather <= 4 and pool <= 2
    assert done.stderr.count("#\n") == len(done.stderr.splitlines()) == 12


def test_head(server: Server, compare: Compare) -> None:
    """The table bears date, versions and settings. All messages of the cycle are asked,
    though the template asks a text only once; how many at a time only we can tell."""
    status, out, _ = compare(["a", "b", "a"], "--yes", "--n=7", "--concurrency=2")
    day, settings = out.splitlines()[:2]
    assert status == 0 and table(out)[0] == COLUMNS
    assert re.fullmatch(r"\d{4}-\d\d-\d\d, Python 3\.\d+\.\S+, openai [\d.]+", day)
    assert settings == f"{async_template.MODEL}, n 7, concurrency 2, 3 runs"
    assert column(out, "in flight") == ["?"] * 4
    assert server.total == 4 * (3 * 7 + 1)


def test_errors_are_counted(server: Server, compare: Compare) -> None:
    """Four bad messages are twelve errors in three runs. A fifth one is answered from
    its fifth request on: an error for three ways, but the template asks once more."""
    bad = ["[400]", "[refusal]", "[prose]", "[incomplete]"]
    status, out, _ = compare(["fine", *bad, "[500,500,500,500,ok]"], "--yes")
    assert status == 1
    assert column(out, "errors") == ["13", "13", "13", "12"]


# --- The question ---------------------------------------------------------------------
def test_same_question(server: Server, compare: Compare) -> None:
    """All ways send the same bodies, EXTRA included."""
    assert compare(["a", "b"], "--yes")[0] == 0
    bodies = [json.dumps(request.body, sort_keys=True) for request in server.requests]
    assert sorted(map(bodies.count, set(bodies))) == [12, 12 + 4]  # 4 of the warm-up
    body = server.requests[0].body
    assert body.items() >= async_template.EXTRA.items()


def test_edited_question(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ways ask what the user made of the template: a PROMPT with a column of a CSV,
    another schema."""
    monkeypatch.setattr(async_template, "PROMPT", "{title}: {text_message}")
    monkeypatch.setattr(async_template, "EXAMPLE", Digest(topic="health", year=1))
    path = tmp_path / "in.csv"
    path.write_text("title,text\nFirst,one {title}\nSecond,two\n", encoding="utf-8")
    assert compare_sync_async.main([str(path), "--yes"]) == 0
    begins = {request.text[:13] for request in server.requests}
    assert begins == {"First: one {t", "Second: two ("}
    schema = server.requests[-1].body["text"]["format"]["schema"]
    assert set(schema["properties"]) == {"topic", "year"}


def test_question_is_not_copied() -> None:
    """There is one prompt: the one in async_template.py."""
    source = SCRIPT.read_text(encoding="utf-8")
    assert async_template.INSTRUCTIONS not in source
    assert async_template.PROMPT.splitlines()[0] not in source


def test_way_home() -> None:
    """The first line says where the file is from, and what it needs beside it."""
    line = SCRIPT.read_text(encoding="utf-8").splitlines()[0]
    assert "https://github.com/yang3kc/llm_for_css" in line
    assert "async_template.py" in line


def test_messages() -> None:
    """30 lines, no blank ones, no duplicates."""
    lines = (ROOT / "messages.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == len(lines) == 30 and all(map(str.strip, lines))


# --- The stand-in ---------------------------------------------------------------------
def test_stand_in(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends EXAMPLE, the length, and rate limits as OpenAI does; a second request
    may come through the same connection."""
    monkeypatch.setenv("no_proxy", "*")
    load = {"now": 0, "peak": 0}
    compare_sync_async.start_server(0.0, load)
    url = os.environ["OPENAI_BASE_URL"] + "/responses"
    with urllib.request.urlopen(url, data=b"{}") as reply:
        body = json.load(reply)
    text = body["output"][0]["content"][0]["text"]
    assert json.loads(text) == async_template.EXAMPLE.model_dump()
    assert int(reply.headers["x-ratelimit-limit-requests"]) >= 30_000
    assert int(reply.headers["x-ratelimit-remaining-requests"]) > 0
    assert load == {"now": 0, "peak": 1}


# --- How it ends ----------------------------------------------------------------------
@pytest.mark.parametrize("option", BAD.split())
def test_bad_usage(compare: Compare, option: str) -> None:
    """argparse's own error line."""
    status, out, err = compare(["a"], "--offline", option)
    assert status == 2 and not out
    assert f"error: argument {option.split('=')[0]}: " in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("messages", "options", "line"),
    [
        (["a"], [], "no key: "),
        ([], ["--offline"], "there is no message"),
        (["", " "], ["--offline", "--n", "5"], "there is no message"),
        (["a"], ["--offline", "--n", "5", "gone.txt"], "usage: "),
    ],
)
def test_cannot_start(
    compare: Compare, messages: list[str], options: list[str], line: str
) -> None:
    """Exit status 2, and a line that says why."""
    status, out, err = compare(messages, *options)
    assert status == 2 and not out
    assert err.startswith(line)


def test_no_such_file(capsys: pytest.CaptureFixture[str]) -> None:
    """One line with its name."""
    assert compare_sync_async.main(["gone.txt", "--offline"]) == 2
    out, err = capsys.readouterr()
    assert not out and "gone.txt" in err and err.count("\n") == 1


def test_real_api_needs_a_yes(server: Server, compare: Compare) -> None:
    """4 ways * (3 runs * 30 messages + a warm-up), their price, and nothing asked."""
    status, out, err = compare([str(n) for n in range(30)])
    assert status == 2 and not out and server.total == 0
    assert re.fullmatch(r"364 calls, some 0\.\d\d USD: .*--yes.*\n", err)


def test_wrong_key(server: Server, compare: Compare) -> None:
    """It is found by the warm-up, after one request of each way."""
    server.default = "401"
    status, out, err = compare(["a", "b"], "--yes")
    assert status == 2 and not out and server.total == 4
    assert "OPENAI_API_KEY" in err and err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is another thing there")
def test_interrupt(server: Server) -> None:
    """Ctrl-C ends the loop at once, with 130 and no traceback."""
    server.hold = 2  # never reached: the loop has one request in flight
    command: list[Any] = [sys.executable, SCRIPT, "--yes"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not server.in_flight:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    server.release()
    assert process.returncode == 130
    assert err == "interrupted\n"
