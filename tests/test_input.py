"""INPUT as people have it, PROMPT with columns, the options, the rows in pandas."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import ROOT, Run
from server import Server

import async_template

LEAD = async_template.PROMPT.split("{text_message}")[0]
TEMPLATE = str(ROOT / "async_template.py")
BOM = b"\xef\xbb\xbf"
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")

Runner = Callable[..., Run]
Refuse = Callable[..., str]
Spawn = Callable[..., "subprocess.Popen[str]"]


def asked(server: Server) -> list[str]:
    """The messages of all requests so far, sorted."""
    return sorted(request.text.removeprefix(LEAD) for request in server.requests)


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def lines(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Line and message of each row."""
    return [(row["line"], row["text_message"]) for row in rows]


def fields(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The other fields of each row."""
    return [row.get("fields") or {} for row in rows]


def write(path: Path, content: bytes | str) -> Path:
    """The path, with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def files(folder: Path) -> dict[str, bytes]:
    """All there is in a folder, with the content of files."""
    paths = folder.rglob("*")
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


@pytest.fixture
def refuse(server: Server, run: Runner, tmp_path: Path) -> Refuse:
    """The one line of a run that exits with 2, and asks and writes nothing."""

    def refuse(source: Path, *options: str) -> str:
        before = files(tmp_path)
        total = server.total
        result = run(source, *options)
        assert (result.code, server.total) == (2, total), result.err
        assert files(tmp_path) == before
        assert len(result.err.splitlines()) == 1
        return result.err

    return refuse


# --- Texts ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\nb\n", [(1, "a"), (2, "b")]),
        (b"a\nb", [(1, "a"), (2, "b")]),
        (b"a\r\nb\r\n", [(1, "a"), (2, "b")]),
        (b"a\rb\r", [(1, "a"), (2, "b")]),
        (b"a\r\rb", [(1, "a"), (3, "b")]),
        (b"a\r\nb\rc\nd", [(1, "a"), (2, "b"), (3, "c"), (4, "d")]),
        (BOM + b"a\nb\n", [(1, "a"), (2, "b")]),
        (BOM + b"a\n" + BOM + b"b\n", [(1, "a"), (2, "b")]),
        (BOM + b"\r\n\r\na\r\n \t\r\nb", [(3, "a"), (5, "b")]),
        (b"\n\n\na\n\n", [(4, "a")]),
        ("\u200b\n\u200c\u2060 \u200d\ufeff\n\u200e\xa0\n\u3000\na", [(5, "a")]),
        ("a\u2028b\u2029c\x85d\ne", [(1, "a\u2028b\u2029c\x85d"), (2, "e")]),
        (b"a\x0bb\x0cc\x1cd\ne", [(1, "a\x0bb\x0cc\x1cd"), (2, "e")]),
        ("☃\n👩‍👩‍👧\nعربى\n", [(1, "☃"), (2, "👩‍👩‍👧"), (3, "عربى")]),
        (b'"q" {x} {text_message} \\n', [(1, '"q" {x} {text_message} \\n')]),
    ],
)
def test_txt(
    server: Server,
    run: Runner,
    tmp_path: Path,
    content: bytes | str,
    expected: list[tuple[int, str]],
) -> None:
    """A message a line; blank ones are skipped, `line` stays the real one."""
    result = run(write(tmp_path / "in.txt", content))
    assert (result.code, lines(result.rows)) == (0, expected)
    assert asked(server) == sorted(text for _, text in expected)


# --- Tables ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"id,text\n1,a\n2,b\n", [(2, "a", "1"), (3, "b", "2")]),
        (b"text,id\r\na,1\r\nb,2", [(2, "a", "1"), (3, "b", "2")]),
        (b"id,text\r1,a\r2,b\r", [(2, "a", "1"), (3, "b", "2")]),
        (b"id;text\n1;a, b, c\n2;b\n", [(2, "a, b, c", "1"), (3, "b", "2")]),
        (b"id\ttext\n1\ta; b, c\n", [(2, "a; b, c", "1")]),
        (b"text|id\na, b; c\td|1\n", [(2, "a, b; c\td", "1")]),
        (BOM + b'"id";"text"\r\n"1";"a;b"\r\n', [(2, "a;b", "1")]),
        (BOM + b"text,id\na,1\n" + BOM + b"b,2\n", [(2, "a", "1"), (3, "b", "2")]),
        (b'id,text\n1,"a, ""b"""\n2,c\n', [(2, 'a, "b"', "1"), (3, "c", "2")]),
        (b'id,text\n1,5" pipe\n', [(2, '5" pipe', "1")]),
        (b'id,text\n1,"a\nb"\n2,c\n', [(2, "a\nb", "1"), (4, "c", "2")]),
        (b'id,text\n"1\n1",a\n\n2,b\n', [(2, "a", "1\n1"), (5, "b", "2")]),
        (b'id,text\n1,\n2," "\n,\n3,c\n', [(5, "c", "3")]),
        ("id,text\n1,\u200b\né,a\u2028b\n", [(3, "a\u2028b", "é")]),
        (b"id,text,,\n1,a,,\n2,b,,\n", [(2, "a", "1"), (3, "b", "2")]),
        (b";id;text;\r\n;1;a;\r\n", [(2, "a", "1")]),
    ],
)
def test_csv(
    server: Server,
    run: Runner,
    tmp_path: Path,
    content: bytes | str,
    expected: list[tuple[int, str, str]],
) -> None:
    """Any delimiter, quotes, empty columns; the other column travels along."""
    result = run(write(tmp_path / "in.csv", content))
    assert (result.code, lines(result.rows)) == (0, [row[:2] for row in expected])
    assert fields(result.rows) == [{"id": row[2]} for row in expected]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'"the\nid";text\n1;a\n2;b\n', [(3, "a"), (4, "b")]),
        (b'"id, as in the codebook";text\n1;a\n', [(2, "a")]),
        (b'"a,b;c|d",text\n1,a\n', [(2, "a")]),
        (b'5" pipe,text\n1,a\n2,b\n', [(2, "a"), (3, "b")]),
    ],
)
def test_odd_name_of_a_column(
    server: Server,
    run: Runner,
    tmp_path: Path,
    content: bytes,
    expected: list[tuple[int, str]],
) -> None:
    """What stands between quotes delimits nothing; a quote alone is a character."""
    result = run(write(tmp_path / "in.csv", content))
    assert (result.code, lines(result.rows)) == (0, expected), result.err
    assert [*fields(result.rows)[0].values()] == ["1"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"id,text,,\n1,a,note,\n", [["1", "note"]]),
        (b",text,\n1,a,note\n", [["1", "note"]]),
        (b"id,text,\n1,a,\n2,b,note\n3,c,\n", [["1"], ["2", "note"], ["3"]]),
    ],
)
def test_column_without_a_name(
    server: Server,
    run: Runner,
    tmp_path: Path,
    content: bytes,
    expected: list[list[str]],
) -> None:
    """What it holds is kept under some name."""
    rows = fields(run(write(tmp_path / "in.csv", content)).rows)
    assert [[*filter(None, row.values())] for row in rows] == expected


def test_csv_field(server: Server, run: Runner, tmp_path: Path) -> None:
    """--field names the column, all others are in `fields`."""
    table = write(tmp_path / "IN.CSV", b"id,tweet,lang\n7,hello,en\n")
    result = run(table, "--field", "tweet")
    assert lines(result.rows) == [(2, "hello")]
    assert fields(result.rows) == [{"id": "7", "lang": "en"}]


def test_wide_field(server: Server, run: Runner, tmp_path: Path) -> None:
    """A document of 300,000 characters is a message like any other."""
    table = write(tmp_path / "in.csv", b"text\n" + b"x" * 300_000 + b"\n")
    assert len(run(table).rows[0]["text_message"]) == 300_000


# --- JSON Lines -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b"}', [(1, "a", {}), (2, "b", {})]),
        (b'{"text": "a"}\r{"text": "b"}\r', [(1, "a", {}), (2, "b", {})]),
        (b'"a"\n\n"b"\n{"text": "c"}', [(1, "a", {}), (3, "b", {}), (4, "c", {})]),
        (
            BOM + b'{"text": "a", "n": 1}\r\n' + BOM + b'"b"',
            [(1, "a", {"n": 1}), (2, "b", {})],
        ),
        (
            b'{"user": {"id": [1, null]}, "text": "a\\nb\\u00e9\\ud83d\\ude00"}',
            [(1, "a\nb\xe9\U0001f600", {"user": {"id": [1, None]}})],
        ),
        (b'{"text": ""}\n{"text": "\\u200b"}\n" "\n{"text": "c"}\n', [(4, "c", {})]),
        ('\u200b\n \t\n{"text": "a\u2028b"}\n', [(3, "a\u2028b", {})]),
    ],
)
def test_jsonl(
    server: Server,
    run: Runner,
    tmp_path: Path,
    content: bytes | str,
    expected: list[tuple[int, str, dict[str, Any]]],
) -> None:
    """Objects, whose other fields travel along, or plain strings."""
    result = run(write(tmp_path / "in.jsonl", content))
    assert (result.code, lines(result.rows)) == (0, [row[:2] for row in expected])
    assert fields(result.rows) == [row[2] for row in expected]


# --- Standard input -------------------------------------------------------------------
def test_standard_input(server: Server, spawn: Spawn, tmp_path: Path) -> None:
    """As .txt; the same again asks nothing."""
    for _ in range(2):
        process = spawn("-", "out.jsonl")
        printed, err = process.communicate("one\n\nzwei é 😀\n", timeout=30)
        assert (process.returncode, printed) == (0, ""), err
    rows = load(tmp_path / "out.jsonl")
    assert lines(rows) == [(1, "one"), (3, "zwei é 😀")]
    assert server.total == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_json_lines_from_standard_input(
    server: Server, spawn: Spawn, tmp_path: Path
) -> None:
    """With --field a pipe holds JSON Lines."""
    process = spawn("-", "out.jsonl", "--field", "tweet")
    err = process.communicate('{"tweet": "a", "n": 1}\n"b"\n', timeout=30)[1]
    assert process.returncode == 0, err
    rows = load(tmp_path / "out.jsonl")
    assert (lines(rows), fields(rows)) == ([(1, "a"), (2, "b")], [{"n": 1}, {}])


@pytest.mark.parametrize("content", [b"\n", b"good\nb\xe9d\n"], ids=["empty", "latin"])
def test_bad_standard_input(server: Server, tmp_path: Path, content: bytes) -> None:
    """One line, exit 2, nothing written."""
    command = [sys.executable, TEMPLATE, "-", "out.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, input=content, capture_output=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert not list(tmp_path.iterdir())


@posix
def test_closed_standard_input(server: Server, tmp_path: Path) -> None:
    """One line, exit 2, nothing written."""
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, TEMPLATE]
    command += ["-", "out.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert not list(tmp_path.iterdir())


# --- What PROMPT names ----------------------------------------------------------------
RECORD = {
    "id": 7,
    "Article Title": "On {abstract}",
    "abstract": "{text_message} {id} {nobody}",
    "text": "Hi {abstract}",
}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Say: {text_message}!", "Say: Hi {abstract}!"),
        ("{abstract}", "{text_message} {id} {nobody}"),
        ("{Article Title}: {text_message}", "On {abstract}: Hi {abstract}"),
        ("{id} {id} {text_message}", "7 7 Hi {abstract}"),
        ("{text}, {id}", "Hi {abstract}, 7"),
        ('{"a": 1} {} { id } {0} {{id}} {id', '{"a": 1} {} { id } {0} {7} {id'),
        ("{id!r} {id:>3} {a.b} {-} {id}}", "{id!r} {id:>3} {a.b} {-} 7}"),
    ],
)
def test_prompt_names_columns(
    server: Server,
    run: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    expected: str,
) -> None:
    """Each {name} is filled in once, all other braces stay."""
    monkeypatch.setattr(async_template, "PROMPT", prompt)
    result = run(write(tmp_path / "in.jsonl", json.dumps(RECORD)))
    assert result.code == 0, result.err
    assert server.requests[0].body["input"] == expected


def test_prompt_names_columns_of_a_csv(
    server: Server, run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Title and abstract, of which --field chooses the message; the same to resume."""
    monkeypatch.setattr(async_template, "PROMPT", "{title}: {abstract}")
    table = write(tmp_path / "in.csv", b"id;title;abstract\n1;A;a {id}\n2;B;b\n")
    for _ in range(2):
        result = run(table, "--field", "abstract")
        assert result.code == 0, result.err
        assert asked(server) == ["A: a {id}", "B: b"]
        assert lines(result.rows) == [(2, "a {id}"), (3, "b")]
        assert [row["title"] for row in fields(result.rows)] == ["A", "B"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.csv", b"id,title,text\n1,A,a\n", ["text_message", "id", "title"]),
        ("in.jsonl", b'{"id": 1, "title": "A", "text": "a"}', ["title", "id"]),
        ("in.jsonl", b'{"titel": "A", "text": "a"}\n{"text": "b"}', ["line 2"]),
        ("in.txt", b"a\n", ["text_message"]),
    ],
)
def test_prompt_names_no_column(
    refuse: Refuse,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    said: list[str],
) -> None:
    """Exit 2 with the names there are, however late in INPUT the first lack shows."""
    monkeypatch.setattr(async_template, "PROMPT", "{titel}: {text_message}")
    source = write(tmp_path / name, content)
    for options in ([], ["--offline"], ["--limit", "1"]):
        err = refuse(source, *options)
        assert all(re.search(rf"\b{word}\b", err) for word in ["titel", *said]), err


@pytest.mark.parametrize("prompt", ["Is it good?", 'Like {"a": 1} {} {0}'])
def test_prompt_without_a_column(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    """The same question for every message is a slip."""
    monkeypatch.setattr(async_template, "PROMPT", prompt)
    assert "{text_message}" in refuse(write(tmp_path / "in.txt", b"a\nb\n"))


# --- What is refused ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.txt", b"good\nb\xe9d\n", "line 2"),
        ("in.txt", b"good\rb\xe9d\r", "line 2"),
        ("in.txt", "good\nbad\n".encode("utf-16"), "line 1"),
        ("in.txt", b"good\n\xed\xa0\x80\n", "line 2"),
        ("in.txt", b"", "in.txt"),
        ("in.txt", BOM + b"\n \t\r\n\xe2\x80\x8b\n", "in.txt"),
        ("in.csv", b"", "in.csv"),
        ("in.csv", b"id,text\n", "in.csv"),
        ("in.csv", b"id,tweet,lang\n1,hello,en\n", "line [12]"),
        ("in.csv", b"id,tweet,lang\n1,hello,en\n", "lang"),
        ("in.csv", b"id,tweet,lang\n1,hello,en\n", "--field"),
        ("in.csv", b"id,text\n1,a\n2,b,c\n", "line 3"),
        ("in.csv", b"id;text\r1;a\r2;b;c\r", "line 3"),
        ("in.csv", b"id,text\n1,a\n2\n", "line 3"),
        ("in.csv", b"id,text,\n1,a,\n2,b\n", "line 3"),
        ("in.csv", b'id,text\n1,"a\nb"\n2\n', "line 4"),
        ("in.csv", b'id,text\n1,a\n2,"b\n3,c\n', "line 3"),
        ("in.csv", b"id,text\n1,a\n2,b\xe9\n", "line 3"),
        ("in.csv", b'id,text\n1,"a\nb"\n2,b\xe9\n', "line 4"),
        ("in.csv", b"id,text,id\n1,a,2\n", "line 1"),
        ("in.csv", b"text,id,text\n1,a,2\n", "text"),
        ("in.jsonl", b'{"text": "a"}\n{"tweet": "b", "id": 1}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"tweet": "b", "id": 1}\n', "tweet"),
        ("in.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n["b"]\n', "line 2"),
        ("in.jsonl", b'"a"\r17\r', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b", "x": NaN}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b", "x": -Infinity}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b", "x": 1e999}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b", "x": "\\udc00"}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b"} {"text": "c"}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b\xe9"}\n', "line 2"),
        pytest.param("in.jsonl", b'"a"\n' + b"[" * 100_000, "line 2", id="deep"),
        ("in.xlsx", b"PK\x03\x04", ".csv"),
        ("in.xlsx", b"PK\x03\x04", ".jsonl"),
        ("in.xlsx", b"PK\x03\x04", ".txt"),
        ("in.json", b'[{"text": "a"}]', ".jsonl"),
        ("in", b"a\n", ".txt"),
    ],
)
def test_bad_input_is_named(
    refuse: Refuse, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    """One line with file and line, before anything is asked or written."""
    err = refuse(write(tmp_path / name, content))
    assert name in err
    assert re.search(rf"{said}\b", err), err


def test_field_that_is_missing(refuse: Refuse, tmp_path: Path) -> None:
    """A slip in --field: which names there are is said."""
    table = write(tmp_path / "in.csv", b"id,text\n1,a\n")
    err = refuse(table, "--field", "txet")
    assert all(word in err for word in ("in.csv", "line", "txet", "id", "text"))


def test_bad_input_leaves_output_alone(
    run: Runner, refuse: Refuse, tmp_path: Path
) -> None:
    """What was there before stays as it was."""
    run(["a", "b"])
    refuse(write(tmp_path / "in.txt", b"a\nb\nc\n\xe9\n"))


# --- Paths ----------------------------------------------------------------------------
def same(folder: Path) -> tuple[Path, Path]:
    """One path for both."""
    return write(folder / "in.jsonl", b'"precious"\n'), folder / "in.jsonl"


def through_link(folder: Path) -> tuple[Path, Path]:
    """OUTPUT is a symbolic link to INPUT."""
    (folder / "out.jsonl").symlink_to(folder / "in.txt")
    return folder / "in.txt", folder / "out.jsonl"


def hard_link(folder: Path) -> tuple[Path, Path]:
    """OUTPUT is another name of INPUT."""
    os.link(folder / "in.txt", folder / "out.jsonl")
    return folder / "in.txt", folder / "out.jsonl"


def no_input(folder: Path) -> tuple[Path, Path]:
    """INPUT is not there."""
    return folder / "no.txt", folder / "out.jsonl"


def folder_as_input(folder: Path) -> tuple[Path, Path]:
    """INPUT is a folder."""
    (folder / "in.csv").mkdir()
    return folder / "in.csv", folder / "out.jsonl"


def folder_as_output(folder: Path) -> tuple[Path, Path]:
    """OUTPUT is a folder."""
    (folder / "out.jsonl").mkdir()
    return folder / "in.txt", folder / "out.jsonl"


def device_as_input(folder: Path) -> tuple[Path, Path]:
    """INPUT is a device."""
    (folder / "null.txt").symlink_to("/dev/null")
    return folder / "null.txt", folder / "out.jsonl"


def pipe_as_input(folder: Path) -> tuple[Path, Path]:
    """INPUT is a named pipe, which can be read once."""
    os.mkfifo(folder / "pipe.txt")
    return folder / "pipe.txt", folder / "out.jsonl"


def pipe_as_output(folder: Path) -> tuple[Path, Path]:
    """OUTPUT is a named pipe."""
    os.mkfifo(folder / "out.jsonl")
    return folder / "in.txt", folder / "out.jsonl"


def no_folder(folder: Path) -> tuple[Path, Path]:
    """OUTPUT's folder is not there."""
    return folder / "in.txt", folder / "no" / "out.jsonl"


def file_as_folder(folder: Path) -> tuple[Path, Path]:
    """OUTPUT's folder is a file."""
    return folder / "in.txt", folder / "in.txt" / "out.jsonl"


@pytest.mark.parametrize("options", [[], ["--restart"]], ids=["", "restart"])
@pytest.mark.parametrize(
    "paths",
    [
        same,
        through_link,
        hard_link,
        no_input,
        folder_as_input,
        folder_as_output,
        pytest.param(device_as_input, marks=posix),
        pytest.param(pipe_as_input, marks=posix),
        pytest.param(pipe_as_output, marks=posix),
        no_folder,
        file_as_folder,
    ],
)
def test_bad_paths(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    paths: Callable[[Path], tuple[Path, Path]],
    options: list[str],
) -> None:
    """One line, before anything is asked; nothing written or lost."""
    write(tmp_path / "in.txt", b"precious\n")
    source, out = paths(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code = async_template.main([str(source), str(out), *options])
    said = capsys.readouterr().err.splitlines()
    assert (code, server.total, len(said)) == (2, 0, 1), said
    assert source.name in said[0] or out.name in said[0]
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "in.txt").read_bytes() == b"precious\n"


@pytest.mark.parametrize("name", ["out.csv", "out.txt", "out", "out.json", "jsonl"])
def test_output_of_another_kind(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """JSON Lines in a file called .csv would be a wrong run that looks right."""
    source = write(tmp_path / "in.txt", b"a\n")
    try:
        code = async_template.main([str(source), str(tmp_path / name)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert (code, server.total, [*tmp_path.iterdir()]) == (2, 0, [source])
    assert ".jsonl" in capsys.readouterr().err.splitlines()[-1]


# --- Options --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "option",
    [
        "--concurrency=0",
        "--concurrency=-1",
        "--concurrency=1.5",
        "--timeout=nan",
        "--timeout=0",
        "--timeout=inf",
        "--max-attempts=x",
        "--max-attempts=0",
        "--limit=0",
        "--limit=x",
        "--max-cost=nan",
        "--max-cost=-1",
        "--shard=0/4",
        "--shard=5/4",
        "--shard=x",
        "--shard=1/0",
        "--shard=1/2/3",
        "--shard=-1/4",
        "--no-such-option",
        "--conc=5",
    ],
)
def test_bad_options(server: Server, run: Runner, option: str) -> None:
    """What is wrong with which option; nothing asked or written, nothing to resume."""
    result = run(["a"], option)
    assert (result.code, server.total) == (2, 0)
    assert option.partition("=")[0] in result.err.splitlines()[-1]
    assert "to resume" not in result.err
    assert not result.out_path.exists()


def test_exit_statuses(server: Server, run: Runner) -> None:
    """0 when all is answered, 1 with an error row, 2 when stopped."""
    assert run(["a"]).code == 0
    assert run(["a", "b [refusal]"]).code == 1
    assert run(["a", "b [refusal]"]).code == 1
    assert run(["a"]).code == 0
    assert run(["a", "b [401]"]).code == 2


@pytest.mark.parametrize("k", [1, 2, 3])
def test_shard_is_every_nth_message(server: Server, run: Runner, k: int) -> None:
    """Blank lines are not counted."""
    result = run(["a", "", "b", "c", "", "d", "e"], "--shard", f"{k}/3")
    expected = [(1, "a"), (3, "b"), (4, "c"), (6, "d"), (7, "e")]
    assert lines(result.rows) == expected[k - 1 :: 3]


def test_shards_are_input(server: Server, tmp_path: Path) -> None:
    """Four runs, each with its OUTPUT: joined they are the OUTPUT of one run."""
    messages = [f"m{n % 15}" if n % 5 else "" for n in range(42)]
    source, joined = tmp_path / "in.txt", tmp_path / "joined.jsonl"
    write(source, "\n".join(messages))
    outs = [tmp_path / f"out{k}.jsonl" for k in range(1, 5)]
    for k, out in enumerate(outs, 1):
        command = [str(source), str(out), "--shard", f"{k}/4"]
        assert async_template.main(command) == 0
    write(joined, b"".join(out.read_bytes() for out in outs))
    expected = [(n, text) for n, text in enumerate(messages, 1) if text]
    assert sorted(lines(load(joined))) == expected
    total = server.total
    assert async_template.main([str(source), str(joined)]) == 0
    assert (lines(load(joined)), server.total) == (expected, total)


# --- The pilot ------------------------------------------------------------------------
def test_full_run_keeps_the_pilot(server: Server, run: Runner) -> None:
    """--limit asks the first N messages; what follows asks only the others."""
    messages = [f"m{n}" for n in range(10)]
    pilot = run(messages, "--limit", "3")
    assert pilot.code == 0
    assert lines(pilot.rows) == [(1, "m0"), (2, "m1"), (3, "m2")]
    assert (run(messages, "--limit", "3").code, server.total) == (0, 3)
    assert len(run(messages, "--limit", "99").rows) == 10
    assert (run(messages).code, server.total) == (0, 10)


def test_pilot_keeps_the_full_run(server: Server, run: Runner) -> None:
    """A pilot into an OUTPUT that holds more loses nothing."""
    run(["a", "b", "c"])
    result = run(["a", "b", "c"], "--limit", "1")
    assert (result.code, server.total) == (0, 3)
    assert lines(result.rows) == [(1, "a"), (2, "b"), (3, "c")]


@pytest.mark.parametrize(
    ("before", "messages"),
    [
        (["b"], ["a", "b", "c", "d"]),
        (["x", "a"], ["a", "", "a", "c", "d"]),
    ],
)
def test_pilot_counts_messages(
    server: Server, run: Runner, before: list[str], messages: list[str]
) -> None:
    """The first N of INPUT, some of which may be answered already, or doubled."""
    run(before)
    result = run(messages, "--limit", "3")
    first = [text for text in messages if text][:3]
    there = [row["text_message"] for row in result.rows if row["text_message"] != "x"]
    assert (result.code, there) == (0, first)
    assert server.total == len({*before, *first})


def test_pilot_estimates_the_rest(server: Server, run: Runner) -> None:
    """USD and minutes, and what the rest then costs is about that."""
    messages = [f"m{n:03}" for n in range(300)]
    err = run(messages, "--limit", "20").err
    estimate = re.search(r"\b280\b.*?([\d.,]+) USD.*\bminutes?\b", err)
    assert estimate, err
    rows = run(messages).rows[20:]
    tokens = [row["usage"]["input_tokens"] * 0.1 for row in rows]
    tokens += [row["usage"]["output_tokens"] * 0.5 for row in rows]
    assert float(estimate[1]) == pytest.approx(sum(tokens) / 1e6, rel=0.1)


def test_max_cost_is_never_passed(server: Server, run: Runner) -> None:
    """Exit 2 below the cap, yet not far below; the same without a cap goes on."""
    messages = [f"m{n:03}" for n in range(150)]
    stopped = run(messages, "--max-cost", "0.001")
    usage = [row["usage"] for row in stopped.rows]
    tokens = [used["input_tokens"] * 0.1 for used in usage]
    tokens += [used["output_tokens"] * 0.5 for used in usage]
    assert stopped.code == 2
    assert 0.0005 < sum(tokens) / 1e6 <= 0.001
    assert len(stopped.rows) == server.total
    assert "--max-cost" in stopped.err
    assert (run(messages).code, server.total) == (0, 150)


def test_no_prices_no_usd(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody knows what it costs, no cost is shown or estimated."""
    monkeypatch.setattr(async_template, "PRICES", None)
    err = run(["a", "b", "c"], "--limit", "2").err
    assert "tokens" in err and "minute" in err
    assert "USD" not in err and "$" not in err


def test_max_cost_needs_prices(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cap that cannot be kept is refused, not silently ignored."""
    monkeypatch.setattr(async_template, "PRICES", None)
    assert "PRICES" in refuse(write(tmp_path / "in.txt", "a"), "--max-cost", "1")


# --- pandas ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "messages",
    [["a", "b"], ["a", "b [refusal]"], ["a", "b [nousage]", "c [incomplete]"]],
    ids=["no errors", "errors", "no usage"],
)
def test_pandas(server: Server, run: Runner, messages: list[str]) -> None:
    """The same columns with and without errors; a time is a time."""
    frame = pd.read_json(run(messages).out_path, lines=True)
    columns = "line text_message response error model answered_at usage settings"
    assert " ".join(frame.columns) == columns
    assert frame["line"].tolist() == list(range(1, len(messages) + 1))
    assert frame["text_message"].tolist() == messages
    assert frame["answered_at"].dt.year.min() > 2025
    good = frame[frame["error"].isna()]
    answers = pd.json_normalize(good["response"].tolist())
    assert list(answers.columns) == ["score", "explanation"]
    assert answers["score"].between(-1, 1).all()


def test_settings_are_a_text_in_pandas(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They begin with a letter: pandas makes numbers of 12345678 and of 1234e567."""
    for n in range(10):
        monkeypatch.setattr(async_template, "INSTRUCTIONS", f"Variant {n}")
        rows = run(["a"], "--restart").rows
        assert re.fullmatch(r"[a-z][0-9a-z]{7,}", rows[0]["settings"])
