"""Without a key or a server: --offline, EXAMPLE, one file alone, what is refused."""

from __future__ import annotations

import asyncio
import enum
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from datetime import date, datetime
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
MESSAGES = ["good", "bad", "so-so"]


# --- The answers


def test_every_answer_is_the_example(run: Runner) -> None:
    """No key, exit 0; the rows say `offline`, so nobody takes them for answers."""
    result = run(MESSAGES, "--offline")
    assert result.code == 0
    assert [row["text_message"] for row in result.rows] == MESSAGES
    for row in result.rows:
        assert (row["model"], row["error"]) == ("offline", None)
        assert row["response"] == async_template.EXAMPLE.model_dump(mode="json")


def test_no_network_is_used(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key, a server or a proxy in the environment plays no part."""
    for name in "HTTP_PROXY", "http_proxy", "ALL_PROXY":
        monkeypatch.setenv(name, server.url)
    result = run(MESSAGES, "--offline", "--timeout", "5")
    assert (result.code, len(result.rows)) == (0, 3)
    assert server.connections == 0


class Color(enum.Enum):
    """A choice of texts."""

    RED = "red"
    BLUE = "blue"


class Person(BaseModel):
    """What may be missing, and the same class again."""

    name: str = Field(pattern="^[A-Z][a-z]+$")
    age: int | None = Field(ge=0, le=120)
    friends: list[Person]


class Bounded(BaseModel):
    """Bounds of every kind."""

    step: float = Field(multiple_of=0.5)
    share: float = Field(gt=0, lt=1)
    code: str = Field(min_length=3, max_length=3, pattern="[0-9]+")
    parts: list[Annotated[int, Field(ge=1, le=3)]] = Field(min_length=2, max_length=4)


class Choices(BaseModel):
    """A codebook, with a choice of other classes."""

    topic: Literal["sports", "politics"]
    level: Literal[1, 2, 3]
    color: Color
    about: Person | Bounded | None


class Formats(BaseModel):
    """Texts of a certain form, and tuples."""

    day: date
    at: datetime
    key: UUID
    pair: tuple[int, str]
    many: tuple[float, ...]


ADA = Person(name="Ada", age=36, friends=[Person(name="Bob", age=None, friends=[])])
BOUNDED = Bounded(step=1.5, share=0.5, code="007", parts=[1, 3])
EXAMPLES = [
    ADA,
    BOUNDED,
    Choices(topic="sports", level=2, color=Color.BLUE, about=BOUNDED),
    Formats(
        day=date(2026, 2, 28),
        at=datetime(2026, 2, 28, 12),
        key=UUID(int=5),
        pair=(1, "one"),
        many=(0.5, 1.5),
    ),
]


def test_any_schema_will_do() -> None:
    """Whatever class one puts in the place of Sentiment, with an EXAMPLE of it."""

    async def answers() -> list[Any]:
        runs = [
            async_template.answer_all(["a"], example=example, offline=True)
            for example in EXAMPLES
        ]
        return [rows[0]["response"] for rows in await asyncio.gather(*runs)]

    found = asyncio.run(answers())
    assert found == [example.model_dump(mode="json") for example in EXAMPLES]


def test_schema_is_the_class_of_the_example(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EXAMPLE alone says what is asked for and what is an answer; no name matters."""
    monkeypatch.setattr(async_template, "EXAMPLE", BOUNDED)
    good = {"step": 2.5, "share": 0.25, "code": "123", "parts": [2, 2]}
    server.answer = lambda body: (
        good if "good" in body["input"] else {**good, "step": 1.2}
    )
    result = run(["good", "other"], "--max-attempts", "1")
    assert result.rows[0]["response"] == good
    assert result.rows[1]["error"]["type"] == "invalid_answer"
    form = server.requests[0].body["text"]["format"]
    assert (form["name"], form["strict"]) == ("Bounded", True)
    assert [*form["schema"]["properties"]] == [*good]


# --- One file


def command(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Runs Python in a folder, without a key."""
    words = [sys.executable, *map(str, args)]
    return subprocess.run(
        words, cwd=folder, capture_output=True, encoding="utf-8", timeout=50
    )


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def test_the_command_that_people_type_first(tmp_path: Path) -> None:
    """Thirty rows, exit 0, nothing on standard output, no noise."""
    out = tmp_path / "try.jsonl"
    done = command(ROOT, "async_template.py", "messages.txt", out, "--offline")
    assert (done.returncode, done.stdout) == (0, "")
    messages = (ROOT / "messages.txt").read_text(encoding="utf-8").splitlines()
    assert [row["text_message"] for row in load(out)] == messages
    assert len(messages) == 30 and "30 of 30 answered" in done.stderr
    assert not re.search("Traceback|Warning|[Uu]nclosed|\r", done.stderr)


TOPIC = """\
# --- 1. Edit this ---
MODEL = "gpt-5-mini"
TEMPERATURE = None
EXTRA: dict[str, Any] = {"reasoning": {"effort": "low"}}
INSTRUCTIONS = "You sort news."
PROMPT = "Which topic has {text_message}, and what else?"


class Topic(BaseModel):
    topic: Literal["politics", "sports", "economy", "other"]
    confidence: float = Field(ge=0, le=1)


EXAMPLE = Topic(topic="sports", confidence=0.5)
PRICES = None
CONCURRENCY = 3
TIMEOUT = 10.0
MAX_ATTEMPTS = 2

"""


def test_another_question_needs_the_edit_block_only(tmp_path: Path) -> None:
    """A copy of the one file under another name, in an empty folder, with another
    schema, prompt and model, and no prices: all else works unchanged."""
    source = SCRIPT.read_text(encoding="utf-8")
    head, rest = source.split("# --- 1. ", 1)
    tail = rest.split("# --- 2. ", 1)[1]
    (tmp_path / "topics.py").write_text(f"{head}{TOPIC}# --- 2. {tail}", "utf-8")
    (tmp_path / "in.txt").write_text("Goal!\nTaxes\n", encoding="utf-8")
    done = command(tmp_path, "topics.py", "in.txt", "out.jsonl", "--offline")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    rows = load(tmp_path / "out.jsonl")
    assert [row["text_message"] for row in rows] == ["Goal!", "Taxes"]
    assert rows[0]["response"] == {"topic": "sports", "confidence": 0.5}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"topics.py", "in.txt", "out.jsonl"}


def test_the_edit_block_is_at_the_top() -> None:
    """It begins before line 60, ends before line 130, and has all that one edits."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    start, end = (
        next(n for n, line in enumerate(lines, 1) if line.startswith(f"# --- {part}. "))
        for part in (1, 2)
    )
    assert start < 60 and end < 130
    block = "\n".join(lines[start:end])
    names = "MODEL TEMPERATURE EXTRA INSTRUCTIONS PROMPT EXAMPLE PRICES CONCURRENCY"
    for name in [*names.split(), "TIMEOUT", "MAX_ATTEMPTS", "class Sentiment"]:
        assert re.search(rf"(?m)^{name}\b", block), name
    assert re.search(r"(?m)^ *# .*Literal\[", block)  # the example of a codebook


def test_the_first_settings() -> None:
    """A model that isn't about to be shut down; the provider keeps no messages."""
    assert async_template.MODEL == "gpt-6-luna"
    assert async_template.PRICES == (0.10, 0.50)
    assert async_template.EXTRA == {"reasoning": {"effort": "none"}, "store": False}


def test_packages_are_listed_twice_alike() -> None:
    """What uv reads in the file is what pip reads in requirements.txt."""
    source = SCRIPT.read_text(encoding="utf-8")
    found = re.search(r"(?ms)^# /// script\n(.*?)^# ///$", source)
    assert found
    block = tomllib.loads(re.sub("(?m)^# ?", "", found[1]))
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert block["dependencies"] == [line for line in listed if line]
    assert block["requires-python"] == ">=3.11"


@pytest.mark.parametrize("version", ["3.8", "3.10"])
def test_older_python(tmp_path: Path, version: str) -> None:
    """One line that says which Python it takes, and exit 2."""
    paths = (Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python")
    old = next(paths, None)
    if not old:
        pytest.skip(f"there is no Python {version} here")
    args = [str(old), str(SCRIPT), "in.txt", "out.jsonl"]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "3.11" in done.stderr


# --- What is refused


@pytest.mark.parametrize(
    "options",
    [
        "--concurrency 0",
        "--concurrency -1",
        "--concurrency 1.5",
        "--timeout nan",
        "--timeout 0",
        "--timeout inf",
        "--max-attempts x",
        "--max-attempts 0",
        "--limit 0",
        "--limit x",
        "--max-cost nan",
        "--max-cost -1",
        "--shard 0/4",
        "--shard 5/4",
        "--shard x",
        "--shard 1/0",
        "--shard 1/2/3",
        "--shard -1/4",
        "--no-such-option",
        "--conc 5",
    ],
)
def test_bad_flags(server: Server, run: Runner, tmp_path: Path, options: str) -> None:
    """One line names the flag, exit 2; nothing is asked, written, or to be resumed."""
    name, *value = options.split(" ")
    result = run(["a"], *([f"{name}={value[0]}"] if value else [name]))
    said = [line for line in result.err.splitlines() if not line.startswith("usage:")]
    assert (result.code, server.total, len(said)) == (2, 0, 1)
    assert name in said[0] and "resume" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("in.txt", "OUTPUT"),
        ("", "INPUT"),
        ("in.txt out.jsonl more", "more"),
        ("in.txt out.csv", ".jsonl"),
        ("in.txt out", ".jsonl"),
    ],
)
def test_bad_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    names: str,
    reason: str,
) -> None:
    """One line, exit 2, nothing written, if OUTPUT is missing or of another kind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("a", encoding="utf-8")
    try:
        code: Any = async_template.main([*names.split(), "--offline"])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    (line,) = (one for one in said.err.splitlines() if not one.startswith("usage:"))
    assert reason in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_help_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """The one thing that is printed there."""
    with pytest.raises(SystemExit) as stop:
        async_template.main(["--help"])
    said = capsys.readouterr()
    assert stop.value.code == 0 and "--concurrency" in said.out and not said.err
