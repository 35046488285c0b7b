"""Without a key or a server: --offline, EXAMPLE, one file alone, what is refused."""

from __future__ import annotations

import enum
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from conftest import ROOT, Run
from pydantic import BaseModel, Field
from server import Server

import async_template

Runner = Callable[..., Run]
SCRIPT = ROOT / "async_template.py"


# --- The answers ----------------------------------------------------------------------
def test_every_answer_is_the_example(server: Server, run: Runner) -> None:
    """Nobody is asked; the rows say `offline`, so nobody takes them for answers."""
    result = run(["good", "bad"], "--offline")
    assert (result.code, server.connections) == (0, 0)
    assert [row["text_message"] for row in result.rows] == ["good", "bad"]
    for row in result.rows:
        assert (row["model"], row["error"]) == ("offline", None)
        assert row["response"] == async_template.EXAMPLE.model_dump(mode="json")


class Color(enum.Enum):
    """A choice of texts."""

    RED = "red"
    BLUE = "blue"


class Author(BaseModel):
    """What may be missing, and the same class again."""

    name: str = Field(pattern="^[A-Z][a-z]+$")
    age: int | None = Field(ge=0, le=120)
    knows: list[Author]


class Paper(BaseModel):
    """Fields of every kind."""

    topic: Literal["sports", "politics"]
    level: Literal[1, 2, 3]
    color: Color
    by: Author | Color | None
    step: float = Field(gt=0, lt=2, multiple_of=0.5)
    code: str = Field(min_length=3, max_length=3, pattern="[0-9]+")
    parts: list[Annotated[int, Field(ge=1, le=3)]] = Field(min_length=2, max_length=4)
    at: datetime
    key: UUID
    pair: tuple[int, str]
    score: float = Field(alias="The score")  # what the model reads


ADA = Author(name="Ada", age=36, knows=[Author(name="Bob", age=None, knows=[])])
PAPER: dict[str, Any] = {"topic": "sports", "level": 2, "color": Color.BLUE, "by": ADA}
PAPER |= {"step": 1.5, "code": "007", "parts": [1, 3], "at": datetime(2026, 2, 28)}
PAPER |= {"key": UUID(int=5), "pair": (1, "one"), "The score": 0.5}


@pytest.mark.parametrize("example", [ADA, Paper(**PAPER)], ids=["Author", "Paper"])
def test_any_schema_will_do(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, example: BaseModel
) -> None:
    """EXAMPLE is what --offline gives and what a server may answer; it reads back."""
    monkeypatch.setattr(async_template, "EXAMPLE", example)
    answer = json.loads(example.model_dump_json(by_alias=True))
    server.answer = lambda body: answer
    result = run(["a"])
    assert result.rows[0]["response"] == answer
    result.out_path.unlink()
    assert run(["a"], "--offline").rows[0]["response"] == answer
    assert type(example).model_validate_json(json.dumps(answer), strict=True) == example
    form = server.requests[0].body["text"]["format"]
    assert (form["name"], form["strict"]) == (type(example).__name__, True)
    assert [*form["schema"]["properties"]] == [*answer]


class Endless(BaseModel):
    """Always one more of itself."""

    next: Endless = Field(description="the next one")


class Unwritable(BaseModel):
    """JSON has no word for it."""

    code: Callable[[], int]


@pytest.mark.parametrize(
    "example",
    [
        async_template.Sentiment,
        {"score": 1.0, "explanation": "A dictionary."},
        Endless.model_construct(),
        Unwritable(code=int),
    ],
    ids=["class", "dict", "endless", "unwritable"],
)
def test_bad_example(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, example: Any
) -> None:
    """No instance, or of a class that has no schema: one line, exit 2."""
    monkeypatch.setattr(async_template, "EXAMPLE", example)
    result = run(["a"])
    assert (result.code, server.total, len(result.err.splitlines())) == (2, 0, 1)
    assert "EXAMPLE" in result.err and not result.out_path.exists()


# --- One file -------------------------------------------------------------------------
def command(folder: Path, *args: object) -> str:
    """Runs Python without a key and with no word on standard output; what it said."""
    words = [sys.executable, *map(str, args), "--offline"]
    done = subprocess.run(words, cwd=folder, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return done.stderr


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_the_command_that_people_type_first(tmp_path: Path) -> None:
    """Thirty rows, exit 0, nothing on standard output, no noise."""
    out = tmp_path / "try.jsonl"
    said = command(ROOT, "async_template.py", "messages.txt", out)
    messages = (ROOT / "messages.txt").read_text(encoding="utf-8").splitlines()
    assert [row["text_message"] for row in load(out)] == messages
    assert len(messages) == 30 and "30 of 30" in said
    assert not re.search("Traceback|Warning|[Uu]nclosed|\r", said)


TOPIC = """\
MODEL, TEMPERATURE, EXTRA = "gpt-5-mini", None, {"reasoning": {"effort": "low"}}
INSTRUCTIONS, PROMPT = "You sort news.", "Which topic has {text_message}?"
class Topic(BaseModel):
    topic: Literal["politics", "sports", "economy", "other"]
    confidence: float = Field(ge=0, le=1)
EXAMPLE = Topic(topic="sports", confidence=0.5)
PRICES, CONCURRENCY, TIMEOUT, MAX_ATTEMPTS = None, 3, 10.0, 2
"""


def test_another_question_needs_the_edit_block_only(tmp_path: Path) -> None:
    """A copy of the one file, under another name, alone, with another question."""
    source = SCRIPT.read_text(encoding="utf-8")
    head, _, tail = re.split("(?m)^(?=# --- [12]. )", source)
    (tmp_path / "topics.py").write_text(head + TOPIC + tail, encoding="utf-8")
    (tmp_path / "in.txt").write_text("Goal!\nTaxes\n", encoding="utf-8")
    command(tmp_path, "topics.py", "in.txt", "out.jsonl")
    rows = load(tmp_path / "out.jsonl")
    assert [row["text_message"] for row in rows] == ["Goal!", "Taxes"]
    assert rows[0]["response"] == {"topic": "sports", "confidence": 0.5}
    assert len([*tmp_path.iterdir()]) == 3


def test_the_edit_block_is_at_the_top() -> None:
    """It begins before line 60, ends before line 95, and has all that one edits."""
    source = SCRIPT.read_text(encoding="utf-8")
    head, block, _ = re.split(r"(?m)^# --- [12]\. .*$", source)
    start = head.count("\n") + 1
    assert start < 60 and start + block.count("\n") < 95
    names = "MODEL TEMPERATURE EXTRA INSTRUCTIONS PROMPT Sentiment EXAMPLE PRICES"
    for name in f"{names} CONCURRENCY TIMEOUT MAX_ATTEMPTS".split():
        assert re.search(rf"(?m)^(class )?{name}\b", block), name
    assert re.search(r"(?m)^ *# .*Literal\[", block)  # the example of a codebook


def test_the_first_settings() -> None:
    """A model that isn't about to be shut down; the provider keeps no messages."""
    assert async_template.PRICES == {async_template.MODEL: (0.10, 0.01, 0.50)}
    assert async_template.EXTRA == {"reasoning": {"effort": "none"}, "store": False}


def test_the_file_runs_by_itself() -> None:
    """By uv, which reads the packages in the file that pip reads beside it."""
    source = SCRIPT.read_text(encoding="utf-8")
    assert source.startswith("#!/usr/bin/env -S uv run --script\n")
    assert os.access(SCRIPT, os.X_OK)
    (found,) = re.findall(r"(?ms)^# /// script\n(.*?)^# ///$", source)
    block = tomllib.loads(re.sub("(?m)^# ?", "", found))
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert block["dependencies"] == [line for line in listed if line]
    assert block["requires-python"] == ">=3.11"


def test_older_python(tmp_path: Path) -> None:
    """The last line says which Python it takes, since the packages may be there."""
    code = "import aiohttp, openai, pydantic, runpy, sys, tqdm.auto; "
    code += f"sys.version_info = (3, 10, 12); runpy.run_path({str(SCRIPT)!r})"
    args = [sys.executable, "-c", code]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode and "needs Python 3.11" in done.stderr.splitlines()[-1]


# --- What is refused ------------------------------------------------------------------
FLAGS = """
--concurrency=0 --concurrency=1.5 --timeout=0 --timeout=nan --max-attempts=x
--max-attempts=0 --limit=0 --limit=-1 --max-cost=-1 --max-cost=nan --no-such-flag
--shard=0/4 --shard=5/4 --shard=x --shard=1/0 --shard=1/2/3 --shard=-1/4 --conc=5"""


@pytest.mark.parametrize("flag", FLAGS.split())
def test_bad_flags(run: Runner, tmp_path: Path, flag: str) -> None:
    """One line names the flag, exit 2; nothing is written, or to be resumed."""
    result = run(["a"], flag, "--offline")
    assert result.code == 2
    lines = result.err.splitlines()
    (reason,) = (line for line in lines if not line.startswith("usage: "))
    assert flag.strip("-").split("=")[0] in reason.replace("_", "-")
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("in.txt", "OUTPUT"),
        ("in.txt out.jsonl more", "more"),
        ("in.txt out.csv", ".jsonl"),
        ("in.txt jsonl", ".jsonl"),
    ],
)
def test_names(capsys: pytest.CaptureFixture[str], words: str, reason: str) -> None:
    """OUTPUT is missing or of another kind."""
    with pytest.raises(SystemExit) as stop:
        async_template.main(words.split())
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (2, "")
    assert reason in said.err.splitlines()[-1]
