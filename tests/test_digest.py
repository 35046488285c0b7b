"""The arXiv digest: a day's abstracts, sorted by topic, from one CSV to one table."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
from conftest import Run
from pydantic import BaseModel, Field
from server import Server

import async_template

Runner = Callable[..., Run]
Topic = Literal["networks", "language", "health", "politics", "other"]


class Paper(BaseModel):
    """What to tell about a paper."""

    topic: Topic = Field(description="the field that the paper adds to")
    relevance: int = Field(ge=0, le=10, description="to computational social science")
    confidence: float = Field(ge=0, le=1)


EXAMPLE = Paper(topic="networks", relevance=8, confidence=0.9)
PROMPT = """\
Sort the paper below: its topic, and how relevant it is.

Title: {title}
Abstract: {abstract}"""

# id, title, abstract; identifiers look like numbers, and abstracts are what they are.
PAPERS = [
    ("2611.00010", "Networks of trust", "We study ties, and\nhow they break."),
    ("2611.00020", 'A "large" language model', "It costs 3 \\$, i.e. {title}, {x}."),
    ("2611.00030", "Vaccines; and health", "Randomised, n = 1,200. Größe: ½."),
    ("2611.00100", "Politics of the feed", "Feeds, ranked."),
]
TOPICS = ["networks", "language", "health", "politics"]


def write(path: Path, papers: list[tuple[str, str, str]]) -> Path:
    """A CSV of papers, as spreadsheets and scripts write it."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "title", "abstract"), *papers])
    return path


def sort_paper(body: dict[str, Any]) -> dict[str, Any]:
    """The server's answer: the topic that the title names, the abstract's length."""
    title, abstract = body["input"].split("Title: ")[1].split("\nAbstract: ", 1)
    topic = next(topic for topic in TOPICS if topic in title.lower())
    return {"topic": topic, "relevance": len(abstract) % 11, "confidence": 0.5}


@pytest.fixture
def papers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The CSV; the template asks about papers, and the server knows the answers."""
    monkeypatch.setattr(async_template, "PROMPT", PROMPT)
    monkeypatch.setattr(async_template, "EXAMPLE", EXAMPLE)
    server.answer = sort_paper
    return write(tmp_path / "papers.csv", PAPERS)


def read_rows(path: Path) -> pd.DataFrame:
    """The rows of OUTPUT as a table."""
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    return pd.json_normalize(rows)


def test_digest(papers: Path, server: Server, run: Runner) -> None:
    """Each paper is asked about to the letter, and joins its topic by its own id."""
    rows = read_rows(run(papers, "--field", "abstract").out_path)
    lead = PROMPT.partition("{title}")[0]
    asked = {request.text for request in server.requests}
    assert asked == {f"{lead}{t}\nAbstract: {a}" for _, t, a in PAPERS}
    own = pd.read_csv(papers, dtype={"id": str})
    table = own.merge(rows, left_on="id", right_on="fields.id", validate="1:1")
    assert table["id"].tolist() == [paper[0] for paper in PAPERS]
    assert table["response.topic"].tolist() == TOPICS
    assert table["abstract"].tolist() == table["text_message"].tolist()
    properties = server.requests[0].body["text"]["format"]["schema"]["properties"]
    assert properties["topic"]["enum"] == [*TOPICS, "other"]
    assert properties["relevance"]["maximum"] == 10


@pytest.mark.parametrize(
    "change", [{"topic": "astrology"}, {"relevance": 11}, {"confidence": "high"}]
)
def test_answer_of_no_topic(
    papers: Path, server: Server, run: Runner, change: dict[str, Any]
) -> None:
    """An answer outside the codebook is an error row, and empty in the table."""
    server.answer = lambda body: (
        sort_paper(body) | (change if "Vaccines" in body["input"] else {})
    )
    rows = read_rows(run(papers, "--field", "abstract").out_path)
    assert rows["response.topic"].isna().tolist() == [False, False, True, False]
    assert rows["error.type"].tolist()[2] == "invalid_answer"
    assert next(iter(change)) in rows["error.message"].tolist()[2]


def test_next_day(papers: Path, server: Server, run: Runner) -> None:
    """With new papers on top, only those are asked; the rows are in the new order."""
    assert run(papers, "--field", "abstract").code == 0
    new = ("2611.00110", "Language and health", "Both.")
    result = run(write(papers, [new, *PAPERS]), "--field", "abstract")
    assert result.code == 0 and server.total == len(PAPERS) + 1
    ids = [row["fields"]["id"] for row in result.rows]
    assert ids == [new[0], *(paper[0] for paper in PAPERS)]


def test_notebook(server: Server, tmp_path: Path) -> None:
    """The same from a notebook, where the table itself is given."""
    server.answer = sort_paper
    own = pd.read_csv(write(tmp_path / "papers.csv", PAPERS), dtype={"id": str})
    output = tmp_path / "rows.jsonl"
    changes: dict[str, Any] = {"prompt": PROMPT, "example": EXAMPLE}
    asking = async_template.answer_all(own, output, field="abstract", **changes)
    table = own.join(pd.json_normalize(asyncio.run(asking)))
    assert table["response.topic"].tolist() == TOPICS
    assert table["text_message"].tolist() == own["abstract"].tolist()
    assert table["fields.id"].tolist() == own["id"].tolist()
