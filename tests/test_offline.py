"""Without a key: placeholders for any schema, other questions, a copy of the file."""

from __future__ import annotations

import enum
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import openai
import pytest
from conftest import ROOT, Run
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import async_template

MESSAGES = ["good", "bad", "so-so", "good"]
Runner = Callable[..., Run]


# --- Rows ---------------------------------------------------------------------


def test_rows_say_that_they_are_placeholders(run: Runner) -> None:
    """No key, and an exit status of 0; nobody can take the rows for answers."""
    assert "OPENAI_API_KEY" not in os.environ
    result = run(MESSAGES, "--offline")
    assert result.code == 0
    assert [row["text_message"] for row in result.rows] == MESSAGES
    for row in result.rows:
        assert (row["model"], row["error"]) == ("offline", None)
        assert "placeholder" in row["response"]["explanation"].lower()
        assert -1 <= row["response"]["score"] <= 1


def test_no_network_is_used(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, an endpoint or a proxy in the environment plays no part."""
    for name in "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY":
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "")
    result = run(MESSAGES, "--offline", "--timeout", "5")
    assert (result.code, len(result.rows)) == (0, 4)


def test_the_same_message_has_the_same_answer(run: Runner) -> None:
    """In one run and in the next; another message has another."""
    first = [row["response"] for row in run(MESSAGES, "--offline").rows]
    assert first[0] == first[3] != first[1]
    again = run(MESSAGES, "--offline", "--restart")
    assert [row["response"] for row in again.rows] == first


# --- Placeholders -------------------------------------------------------------


class Color(enum.Enum):
    """An enum of texts."""

    RED = "red"
    BLUE = "blue"


class Person(BaseModel):
    """Texts, and what may be missing."""

    name: str
    nickname: str | None
    age: int | None = Field(ge=0, le=120)


class Flat(BaseModel):
    """Every plain kind."""

    text: str
    count: int
    ratio: float
    yes: bool
    nothing: None


class Bounded(BaseModel):
    """Every bound."""

    score: float = Field(ge=-1, le=1)
    share: float = Field(gt=0, lt=1)
    stars: int = Field(ge=1, le=5)
    digit: int = Field(gt=0, lt=10)
    debt: float = Field(le=-1000)
    year: int = Field(ge=1900)
    short: str = Field(max_length=5)
    tags: list[str] = Field(min_length=2, max_length=4)
    pair: list[int] = Field(min_length=7, max_length=7)


class Choices(BaseModel):
    """Literal, enum, union."""

    topic: Literal["sports", "politics", "art"]
    one: Literal["only"]
    level: Literal[1, 2, 3]
    color: Color
    either: int | str
    who: Person | None


class Formats(BaseModel):
    """Texts of a form."""

    day: date
    at: datetime
    key: UUID
    long: str = Field(min_length=60)


class Nested(BaseModel):
    """Lists of objects, one class in two places ($ref)."""

    author: Person
    readers: list[Person]
    matrix: list[list[float]]
    parts: list[Annotated[int, Field(ge=1, le=3)]]
    choices: list[Choices]


class Tree(BaseModel):
    """A class that holds itself."""

    value: int
    children: list[Tree]


class Chain(BaseModel):
    """A class that may hold itself."""

    value: int
    following: Chain | None


@pytest.mark.parametrize(
    "model",
    [
        async_template.Sentiment,
        Flat,
        Formats,
        Person,
        Bounded,
        Choices,
        Nested,
        Tree,
        Chain,
    ],
)
@settings(max_examples=50, deadline=None, database=None)
@given(seed=st.integers(0, 2**32))
def test_placeholders_fit_the_schema(model: type[BaseModel], seed: int) -> None:
    """Whatever class one puts in the place of Sentiment."""
    tool: Any = openai.pydantic_function_tool(model)
    schema = tool["function"]["parameters"]
    value = async_template.placeholder(schema, random.Random(seed), schema)
    text = json.dumps(value, allow_nan=False)
    model.model_validate_json(text)
    same = async_template.placeholder(schema, random.Random(seed), schema)
    assert json.dumps(same) == text


# --- The real command ---------------------------------------------------------


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
    """Thirty rows, exit 0, nothing on standard output, no bar of thousands of lines."""
    out = tmp_path / "out.jsonl"
    done = command(ROOT, "async_template.py", "messages.txt", out, "--offline")
    assert (done.returncode, done.stdout) == (0, "")
    messages = (ROOT / "messages.txt").read_text(encoding="utf-8").splitlines()
    assert [row["text_message"] for row in load(out)] == messages
    assert len(messages) == 30
    assert "30" in done.stderr
    assert not re.search("Traceback|Warning|[Uu]nclosed|\r", done.stderr)


def test_a_copy_of_the_one_file_is_enough(tmp_path: Path) -> None:
    """In an empty folder, under another name."""
    shutil.copy(ROOT / "async_template.py", tmp_path / "my_question.py")
    (tmp_path / "texts.txt").write_text("one\ntwo\n", encoding="utf-8")
    done = command(tmp_path, "my_question.py", "texts.txt", "out.jsonl", "--offline")
    assert done.returncode == 0, done.stderr
    assert len(load(tmp_path / "out.jsonl")) == 2
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"my_question.py", "texts.txt", "out.jsonl"}


TOPIC = """\
# --- 1. Edit this ---
from typing import Literal

MODEL = "gpt-5-mini"
TEMPERATURE: float | None = None
EXTRA: dict[str, Any] = {"reasoning": {"effort": "low"}}
INSTRUCTIONS = "You sort news."
PROMPT = "Which topic has {text_message}, and {what} else?"


class Topic(BaseModel):
    topic: Literal["politics", "sports", "economy", "culture", "other"]
    confidence: float = Field(ge=0, le=1)
    keywords: list[str]


SCHEMA: type[BaseModel] = Topic
PRICES: tuple[float, float] | None = None
CONCURRENCY = 3
TIMEOUT = 10.0
MAX_ATTEMPTS = 2

"""


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """The template with another edit block, as topics.py."""
    source = (ROOT / "async_template.py").read_text(encoding="utf-8")
    head, rest = source.split("# --- 1. Edit this", 1)
    tail = rest.split("# --- 2. ", 1)[1]
    path = tmp_path / "topics.py"
    path.write_text(f"{head}{TOPIC}# --- 2. {tail}", encoding="utf-8")
    return path


def test_another_question_needs_the_edit_block_only(topics: Path) -> None:
    """Another schema, prompt and model, no prices: all below works unchanged."""
    (topics.parent / "in.txt").write_text("Goal!\nTaxes\n", encoding="utf-8")
    done = command(topics.parent, "topics.py", "in.txt", "out.jsonl", "--offline")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Traceback" not in done.stderr
    rows = load(topics.parent / "out.jsonl")
    assert [row["text_message"] for row in rows] == ["Goal!", "Taxes"]
    for row in rows:
        answer = row["response"]
        assert set(answer) == {"topic", "confidence", "keywords"}
        assert f'"{answer["topic"]}"' in TOPIC
        assert 0 <= answer["confidence"] <= 1
        assert all(isinstance(word, str) for word in answer["keywords"])
