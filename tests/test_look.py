"""What one looks at: the bar in a terminal, lines in a log, any code page."""

from __future__ import annotations

import asyncio
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server import Server

import async_template

Runner = Callable[..., Any]
Spawn = Callable[..., Any]
SCRIPT = Path(async_template.__file__)


def in_terminal(columns: int, folder: Path, messages: list[str], **env: str) -> str:
    """What a run shows in a terminal of so many columns, control characters and all."""
    pty = pytest.importorskip("pty")
    from fcntl import ioctl
    from termios import TIOCSWINSZ

    (folder / "in.txt").write_text("\n".join(messages), encoding="utf-8")
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, str(SCRIPT), "in.txt", "out.jsonl", "--timeout", "5"]
    process = subprocess.Popen(
        command, cwd=folder, env=os.environ | env, stdin=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = bytearray()
    try:
        while part := os.read(ours, 10_000):
            seen += part
    except OSError:  # Linux: nobody has the terminal open any more
        pass
    os.close(ours)
    assert process.wait() in (0, 1)
    return seen.decode()


@pytest.mark.parametrize("columns", [80, 40])
def test_bar_fits_the_terminal(server: Server, tmp_path: Path, columns: int) -> None:
    """Counts, errors and the reason of a wait, never wider than the terminal."""
    server.latency = 0.05
    messages = [f"m{n}" for n in range(60)]
    messages += ["Bad. [refusal]", "Late. [429:retry-after=2,ok]"]
    seen = in_terminal(columns, tmp_path, messages, NO_COLOR="1")
    frames = [frame for frame in re.split(r"[\r\n]+", seen) if "/62 [" in frame]
    assert max(map(len, frames)) <= columns
    assert any(frame.startswith("62/62") for frame in frames[-2:])
    if columns == 80:
        assert any("rate limited, " in frame for frame in frames)
        assert "1 errors" in frames[-1]
    assert not re.search(r"\x1b\[\d*m", seen)  # no colors, with NO_COLOR or without
    assert "61 answered, 1 refusal" in seen and "to go on: python" in seen


def test_log_has_a_line_now_and_then(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no terminal: how far it is, not a bar."""
    monkeypatch.setattr(async_template, "BEAT", 0.002)
    server.latency = 0.1
    run([f"m{n}" for n in range(10)])
    server.default = "ok:ms=50"
    result = run([f"m{n}" for n in range(200)], "--concurrency", "20")
    lines = re.findall(r"(?m)^(\d+) of 200 rows, 0 errors, \d+ in flight", result.err)
    assert 1 <= len(lines) < 100
    assert int(lines[0]) >= 10 and sorted(map(int, lines)) == [*map(int, lines)]
    assert "%|" not in result.err


def test_log_without_a_total(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator and no bar, as by TQDM_DISABLE=1: lines of how many are done."""
    monkeypatch.setitem(async_template.LOOK, "disable", True)
    monkeypatch.setattr(async_template, "BEAT", 0.002)
    server.latency = 0.1
    messages = (f"m{n}" for n in range(60))
    assert len(asyncio.run(async_template.answer_all(messages))) == 60
    assert re.search(r"(?m)^\d+ rows, 0 errors", capsys.readouterr().err)


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_any_code_page(
    server: Server, spawn: Spawn, tmp_path: Path, encoding: str
) -> None:
    """A message of emoji, quoted in what is said, is no crash in an old terminal."""
    text = "Grüße 🙂 [prose]"
    (tmp_path / "🙂.txt").write_text(text, encoding="utf-8")
    process = spawn(
        "🙂.txt", "out.jsonl", "--max-attempts", "1", PYTHONIOENCODING=encoding
    )
    assert process.wait(30) == 1
    rows = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert text in rows
    said = process.stderr.read()
    assert "Traceback" not in said and "1 invalid_answer" in said
