"""INPUT as people have it, PROMPT with columns, shards, the pilot, rows in pandas."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import Run
from server import Server

import async_template

BOM = b"\xef\xbb\xbf"

Content = bytes | str
Message = tuple[int, str, dict[str, Any]]  # line, text and other fields
Runner = Callable[..., Run]
Read = Callable[..., list[Message]]
Refuse = Callable[..., str]


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def texts(rows: list[dict[str, Any]]) -> list[str]:
    """The message of each row."""
    return [row["text_message"] for row in rows]


def write(path: Path, content: Content) -> Path:
    """The path, with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def files(folder: Path) -> dict[str, bytes]:
    """All there is in a folder, with the content of files."""
    paths = folder.rglob("*")
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


def reasons(said: str) -> list[str]:
    """The lines without the usage, which argparse puts before its own errors."""
    return [line for line in said.splitlines() if not line.startswith("usage: ")]


@pytest.fixture
def ask(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Runs the template on a file with this name and content, and with this PROMPT."""

    def ask(name: str, content: Content, *options: str, prompt: str = "") -> Run:
        monkeypatch.setattr(async_template, "PROMPT", prompt or async_template.PROMPT)
        return run(write(tmp_path / name, content), *options)

    return ask


@pytest.fixture
def read(server: Server, ask: Runner) -> Read:
    """The messages of a run that answers all."""

    def read(*args: Any, prompt: str = "") -> list[Message]:
        result = ask(*args, prompt=prompt)
        assert result.code == 0, result.err
        return [
            (row["line"], row["text_message"], row.get("fields", {}))
            for row in result.rows
        ]

    return read


@pytest.fixture
def refuse(server: Server, ask: Runner) -> Refuse:
    """The one line of a run that exits with 2, and asks and writes nothing."""

    def refuse(*args: Any, prompt: str = "") -> str:
        result = ask(*args, prompt=prompt)
        assert (result.code, server.total) == (2, 0), result.err
        assert not result.out_path.exists()
        (reason,) = reasons(result.err)
        return reason

    return refuse


# --- What is read ---------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\nb\n", [(1, "a"), (2, "b")]),
        (b"a\r\nb\rc\r\rd", [(1, "a"), (2, "b"), (3, "c"), (5, "d")]),
        (BOM + b"a\nb\n", [(1, "a"), (2, "b")]),
        (BOM + b"\r\n\r\na\r\n \t\r\nb", [(3, "a"), (5, "b")]),
        ("\xa0\n\u3000\na", [(3, "a")]),
        ("a\u2028b\x85c\x0bd\x0ce\n", [(1, "a\u2028b\x85c\x0bd\x0ce")]),
        ("☃\n👩‍👩‍👧\nعربى\n", [(1, "☃"), (2, "👩‍👩‍👧"), (3, "عربى")]),
        (b'"q" {x} {text_message} \\n', [(1, '"q" {x} {text_message} \\n')]),
    ],
)
def test_txt(read: Read, content: Content, expected: list[tuple[int, str]]) -> None:
    """A message a line; blank ones are skipped, `line` stays the real one."""
    assert read("in.txt", content) == [(*message, {}) for message in expected]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"text,id\r\na,1\rb,2", [(2, "a", "1"), (3, "b", "2")]),
        (b"id;text\n1;a, b, c\n2;b\n", [(2, "a, b, c", "1"), (3, "b", "2")]),
        (b"id\ttext\n1\ta; b, c\n", [(2, "a; b, c", "1")]),
        (b"text|id\na, b; c\td|1\n", [(2, "a, b; c\td", "1")]),
        (BOM + b'"id";"text"\r\n"1";"a;b"\r\n', [(2, "a;b", "1")]),
        (b'id,text\n1,"a, ""b"""\n2,c\n', [(2, 'a, "b"', "1"), (3, "c", "2")]),
        (b'id,text\n1,5" pipe\n', [(2, '5" pipe', "1")]),
        (b'id,text\n1,"a\nb"\n2,c\n', [(3, "a\nb", "1"), (4, "c", "2")]),
        (b'id,text\n"1\n1",a\n\n2,b\n', [(3, "a", "1\n1"), (5, "b", "2")]),
        (b'id,text\n1,\n2," "\n,\n3,c\n', [(5, "c", "3")]),
        ("id,text\né,a\u2028b\n", [(2, "a\u2028b", "é")]),
    ],
)
@pytest.mark.parametrize("name", ["in.csv", "IN.TSV"])
def test_table(
    read: Read, name: str, content: Content, expected: list[tuple[int, str, str]]
) -> None:
    """The delimiter is found; `line` is where a record ends; other columns stay."""
    assert read(name, content) == [(n, text, {"id": id}) for n, text, id in expected]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"text,,\na,note,\n", {"column 2": "note", "column 3": ""}),
        (b'"a,b;c|d",text\n1,a\n', {"a,b;c|d": "1"}),
        (b'"id, as in the codebook";text\n1;a\n', {"id, as in the codebook": "1"}),
        (b'5" pipe,text\n1,a\n', {'5" pipe': "1"}),
    ],
)
def test_odd_columns(read: Read, content: bytes, expected: dict[str, str]) -> None:
    """Without a name it has a number; what stands between quotes delimits nothing."""
    assert [fields for _, _, fields in read("in.csv", content)] == [expected]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b"}', [(1, "a", {}), (2, "b", {})]),
        (b'"a"\n\n"b"\n{"text": "c"}', [(1, "a", {}), (3, "b", {}), (4, "c", {})]),
        (BOM + b'{"text": "a", "n": 1}\r\n"b"', [(1, "a", {"n": 1}), (2, "b", {})]),
        (
            b'{"user": {"id": [1, null]}, "text": "a\\nb\\u00e9\\ud83d\\ude00"}',
            [(1, "a\nb\xe9\U0001f600", {"user": {"id": [1, None]}})],
        ),
        (b'{"text": "", "n": 1}\n" "\n \t\n{"text": "c"}\n', [(4, "c", {})]),
        (b'{"text": null}\n{"text": NaN}\nnull\n"a"\n', [(4, "a", {})]),
        (
            b'{"text": "a", "x": NaN, "y": -Infinity, "z": 1e999}',
            [(1, "a", {"x": None, "y": None, "z": None})],
        ),
        (b'{"text": "\\ud800", "x": "\\udc00"}', [(1, "?", {"x": "?"})]),
        ('{"text": "a\u2028b"}\n', [(1, "a\u2028b", {})]),
    ],
)
def test_jsonl(read: Read, content: Content, expected: list[Message]) -> None:
    """Objects, whose other fields travel along as strict JSON, or plain strings."""
    assert read("in.jsonl", content) == expected


def test_wide_cell(read: Read) -> None:
    """A document of 300,000 characters is a message like any other."""
    ((_, text, _),) = read("in.csv", b"text\n" + b"x" * 300_000 + b"\n")
    assert len(text) == 300_000


# --- What PROMPT names ----------------------------------------------------------------
RECORD = {
    "id": 7,
    "Lead text": "On {abstract}",
    "a, b": "odd",
    "abstract": "{text_message} {id} {nobody}",
    "text": "Hi {abstract}",
}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Say: {text_message}!", "Say: Hi {abstract}!"),
        ("{abstract}", "{text_message} {id} {nobody}"),
        ("{Lead text}", "On {abstract}"),
        ("{Lead text}: {text_message}", "On {abstract}: Hi {abstract}"),
        ("{id} {id} {text_message}", "7 7 Hi {abstract}"),
        ("{text}, {id}", "Hi {abstract}, 7"),
        ("{text} {{id}} {} {id", "Hi {abstract} {7} {} {id"),
        ('{text} {"a": 1} {id: 2} {x, y}', 'Hi {abstract} {"a": 1} {id: 2} {x, y}'),
        ("{text} {'id'} {\n  id\n}", "Hi {abstract} {'id'} {\n  id\n}"),
    ],
)
def test_prompt_names_columns(
    server: Server, read: Read, prompt: str, expected: str
) -> None:
    """Each {name} is filled in once, other braces stay."""
    read("in.jsonl", json.dumps(RECORD), prompt=prompt)
    assert [request.text for request in server.requests] == [expected]


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ("{text_message}", [], "c"),
        ("{headline} {lead} {text_message}", [], "c"),
        ('Like {"a": 1}: {lead} {headline}', [], "b"),
        ("{headline} {text_message}", ["--field", "lead"], "b"),
    ],
)
def test_message_column(
    read: Read, prompt: str, options: list[str], expected: str
) -> None:
    """By --field, or else `text`, or the first that PROMPT names; others are fields."""
    table = b"id,headline,lead,text\n1,a,b,c\n"
    ((_, text, fields),) = read("in.csv", table, *options, prompt=prompt)
    assert text == expected
    assert sorted([text, *fields.values()]) == ["1", "a", "b", "c"]


@pytest.mark.parametrize(
    "name", ["titel", "Title", "ID", " id ", "id ", "Leadtext", "0", "id!r", "id.x"]
)
@pytest.mark.parametrize("prompt", ["{%s}", "{%s}: {text_message}"])
def test_prompt_names_no_column(refuse: Refuse, name: str, prompt: str) -> None:
    """Another case, a misspelling or blanks stop, with the names there are."""
    table = b"id,title,Lead text,text\n1,A,L,a\n"
    err = refuse("in.csv", table, prompt=prompt % name)
    for word in [name, "id", "title", "Lead text", "text"]:
        assert word in err, err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.txt", b"a\nb\n", "text_message"),
        ("in.jsonl", b'{"titel": "A", "text": "a"}\n{"text": "b"}', "line 2"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--offline"], ["--limit", "1"]])
def test_column_that_is_not_everywhere(
    refuse: Refuse, name: str, content: bytes, said: str, options: list[str]
) -> None:
    """Refused however late in INPUT the first lack shows."""
    err = refuse(name, content, *options, prompt="{titel}: {text_message}")
    assert "titel" in err and said in err


@pytest.mark.parametrize("prompt", ["Is it good?", 'Like {"a": 1} {}'])
@pytest.mark.parametrize("name", ["in.txt", "in.jsonl"])
def test_prompt_without_a_column(refuse: Refuse, prompt: str, name: str) -> None:
    """The same question for every message is a slip."""
    assert "{text_message}" in refuse(name, b'"a"\n"b"\n', prompt=prompt)


# --- What is refused ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "in.csv",
            b"id,tweet\n1,hello\n",
            "line 2.*'text'.*id, tweet",
        ),
        ("in.csv", b"id,text\n1,a\n2,b,c\n", "line 3"),
        ("in.csv", b"id;text\r1;a\r2;b;c\r", "line 3"),
        ("in.csv", b"id,text\n1,a\n2\n", "line 3"),
        ("in.csv", b'id,text\n1,"a\nb"\n2\n', "line 4"),
        ("in.csv", b'id,text\n1,a\n2,"b\n3,c\n', "line 4"),
        ("in.csv", b'id,text\n1,"5" pipe"\n', "line 2"),
        ("in.csv", b"text,id,text\n1,a,2\n", "line 1.*text, id, text"),
        ("in.tsv", b'id\ttext\n1\t"a\n2\tb"\n3\tc\n', "line 3.*quote"),
        ("in.tsv", b'id\ttext\n1\t"a\n2\tb\n3\tc\n', "line 4"),
        ("in.jsonl", b'{"text": "a"}\n{"tweet": "b", "id": 1}\n', "line 2.*tweet"),
        ("in.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n["b"]\n', "line 2"),
        ("in.jsonl", b'"a"\r17\r', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b"} {"text": "c"}\n', "line 2"),
        pytest.param("in.jsonl", b'"a"\n' + b"[" * 100_000, "line 2", id="deep"),
    ],
)
def test_bad_input_is_named(
    refuse: Refuse, name: str, content: bytes, said: str
) -> None:
    """One line with file and line, before anything is asked or written."""
    assert re.search(rf"{name}, {said}\b", refuse(name, content))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("in.csv", 'id,text\n1,"a\nb"\n2,schön\n'.encode("cp1252"), 4),
        ("in.txt", b"good\r\nb\xe9d\r\n", 2),
        ("in.txt", b"good\n\xed\xa0\x80\n", 2),
        ("in.txt", "good\nbad\n".encode("utf-16"), 1),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b\xe9"}\n', 2),
        pytest.param("in.txt", b"good\n" * 50_000 + b"b\xe9d\n", 50_001, id="long"),
    ],
)
def test_another_encoding(refuse: Refuse, name: str, content: bytes, line: int) -> None:
    """Excel's other CSV: file and line, and what to save it as."""
    err = refuse(name, content)
    assert name in err and "CSV UTF-8" in err
    assert re.search(rf"line {line}\b", err), err


@pytest.mark.parametrize("name", ["in.xlsx", "in"])
def test_files_of_other_kinds(refuse: Refuse, name: str) -> None:
    """Which kinds there are, and how a spreadsheet becomes one of them."""
    err = refuse(name, b"PK\x03\x04")
    for word in [".txt", ".csv", ".tsv", ".jsonl", "CSV UTF-8"]:
        assert word in err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.txt", BOM + b"\n \t\r\n"),
        ("in.csv", b""),
        ("in.csv", b"id,text\n"),
        ("in.jsonl", b'{"text": null}\n'),
    ],
)
def test_no_message(refuse: Refuse, name: str, content: bytes) -> None:
    """An INPUT without any is a slip."""
    assert "no message in INPUT" in refuse(name, content)


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("in.jsonl", "in.jsonl"),
        ("in.jsonl", "folder.jsonl/../in.jsonl"),
        ("in.jsonl", "link.jsonl"),
        ("in.jsonl", "hard.jsonl"),
        ("link.jsonl", "in.jsonl"),
        ("no.txt", "out.jsonl"),
        ("folder.jsonl", "out.jsonl"),
        ("in.jsonl", "folder.jsonl"),
        ("in.jsonl", "no/out.jsonl"),
        ("in.jsonl", "in.jsonl/out.jsonl"),
    ],
)
def test_bad_paths(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    out: str,
) -> None:
    """OUTPUT is INPUT, or one of them is no file: one line, and nothing is lost."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", b'"precious"\n')
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    os.link("in.jsonl", "hard.jsonl")
    before = files(tmp_path)
    try:
        code = async_template.main([str(tmp_path / source), out])
    except SystemExit as stop:
        code = int(stop.code or 0)
    (reason,) = reasons(capsys.readouterr().err)
    assert (code, server.total, files(tmp_path)) == (2, 0, before)
    assert "OUTPUT" in reason or Path(source).name in reason or out in reason


# --- Exit status, shards --------------------------------------------------------------
def test_exit_statuses(server: Server, run: Runner) -> None:
    """0 when all is answered, 1 with an error row, 2 when stopped."""
    assert run(["a"]).code == 0
    assert run(["a", "b [refusal]"]).code == 1
    assert run(["a"]).code == 0
    assert run(["a", "b [401]"]).code == 2


def split(folder: Path, messages: list[str]) -> list[Path]:
    """The OUTPUTs of four shards, all of them run."""
    source = write(folder / "in.txt", "\n".join(messages))
    outs = [folder / f"out{k}.jsonl" for k in range(1, 5)]
    for k, out in enumerate(outs, 1):
        command = [str(source), str(out), "--shard", f"{k}/4"]
        assert async_template.main(command) == 0
    return outs


def test_shards_are_input(server: Server, tmp_path: Path) -> None:
    """Each text is in one shard; joined they are the OUTPUT of one run."""
    messages = [f"m{n % 40}" if n % 5 else "" for n in range(99)]
    joined = tmp_path / "joined.jsonl"
    write(joined, b"".join(out.read_bytes() for out in split(tmp_path, messages)))
    assert server.total == len({*messages} - {""})
    assert async_template.main([str(tmp_path / "in.txt"), str(joined)]) == 0
    assert server.total == len({*messages} - {""})
    found = [(row["line"], row["text_message"]) for row in load(joined)]
    assert found == [(n, text) for n, text in enumerate(messages, 1) if text]


def test_added_line_moves_no_other(server: Server, tmp_path: Path) -> None:
    """A text stays in its shard, so that only the new one is asked."""
    messages = [f"m{n}" for n in range(40)]
    split(tmp_path, messages)
    outs = split(tmp_path, ["new", *messages])
    assert server.total == 41
    assert all(load(out) for out in outs)


# --- The pilot ------------------------------------------------------------------------
def test_full_run_keeps_the_pilot(server: Server, run: Runner) -> None:
    """--limit asks the first N messages; what follows asks only the others."""
    messages = ["m0", "", "m1", "m1", *[f"m{n}" for n in range(2, 9)]]
    pilot = run(messages, "--limit", "3")
    assert (pilot.code, texts(pilot.rows)) == (0, ["m0", "m1", "m1"])
    assert (run(messages, "--limit", "3").code, server.total) == (0, 2)
    assert len(run(messages, "--limit", "99").rows) == 10
    assert (run(messages).code, server.total) == (0, 9)


def test_pilot_of_new_messages(server: Server, run: Runner) -> None:
    """OUTPUT may hold answers about later messages, which stay."""
    run(["a", "b"])
    result = run(["new", "a", "b"], "--limit", "1")
    assert (result.code, texts(result.rows)) == (0, ["new", "a", "b"])


def test_pilot_shows_the_first_prompt(server: Server, ask: Runner) -> None:
    """As it is asked, line by line; a full run doesn't."""
    prompt, table = "News:\n{title}\n{text_message}", "title,text\nOne,eins\nTwo,zwei\n"
    shown = ask("in.csv", table, "--limit", "1", prompt=prompt).err
    assert re.search(r"News:\n *One\n *eins\n", shown)
    assert "News:" not in ask("in.csv", table, prompt=prompt).err


# --- Prices ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "usd"),
    [("gpt-6-luna", [0.12, 0.24]), ("dear", [1.2, 2.4]), ("unknown", [])],
)
def test_prices_are_of_a_model(
    server: Server,
    run: Runner,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    usd: list[float],
) -> None:
    """A changed MODEL never goes by another's price: without one there is no cost."""
    prices = {"gpt-6-luna": (0.0, 0.0, 5000.0), "dear": (0.0, 0.0, 50_000.0)}
    monkeypatch.setattr(async_template, "PRICES", prices)
    monkeypatch.setattr(async_template, "MODEL", model)
    said = run(["a", "b", "c"], "--limit", "1").err.partition("answered")[2]
    assert [float(text) for text in re.findall(r"([\d.]+) USD", said)] == usd


# --- pandas ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "messages",
    [["a", "b"], ["a", "b [nousage]", "c [refusal]", "d [incomplete]"]],
    ids=["no errors", "errors"],
)
def test_pandas(server: Server, run: Runner, messages: list[str]) -> None:
    """The same columns with and without errors; a time is a time, settings a text."""
    frame = pd.read_json(run(messages).out_path, lines=True)
    columns = "line text_message response error model answered_at usage settings"
    assert " ".join(frame.columns) == columns
    assert frame["line"].tolist() == list(range(1, len(messages) + 1))
    assert frame["text_message"].tolist() == messages
    assert frame["answered_at"].dt.year.min() > 2025
    assert frame["settings"].str.fullmatch("[a-z][0-9a-z]{7}").all()
    good = frame[frame["error"].isna()]
    answers = pd.json_normalize(good["response"].tolist())
    assert list(answers.columns) == ["score", "explanation"]
    assert answers["score"].between(-1, 1).all()
