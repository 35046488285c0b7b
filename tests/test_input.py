"""INPUT in every shape, the options, exit statuses, and the result in pandas."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import Run
from server import Server

import async_template

LEAD = async_template.PROMPT.split("{text_message}")[0]
BOM = b"\xef\xbb\xbf"

Runner = Callable[..., Run]
Spawn = Callable[..., "subprocess.Popen[str]"]


def asked(server: Server) -> list[str]:
    """The messages of all requests so far."""
    return [request.text.removeprefix(LEAD) for request in server.requests]


def lines(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Line and message of each row."""
    return [(row["line"], row["text_message"]) for row in rows]


def usd(rows: list[dict[str, Any]]) -> float:
    """What the rows cost at 0.40 and 1.60 USD per million tokens."""
    asked = sum(row["usage"]["input_tokens"] for row in rows)
    said = sum(row["usage"]["output_tokens"] for row in rows)
    return float(asked * 0.4 + said * 1.6) / 1e6


def write(path: Path, content: bytes) -> Path:
    """The path, with this content."""
    path.write_bytes(content)
    return path


def reasons(err: str) -> list[str]:
    """The lines printed, but for the command to go on."""
    printed = [line for line in err.splitlines() if line.strip()]
    return [line for line in printed if not re.search(r"\bpython\S* ", line)]


# --- Texts --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\nb\n", [(1, "a"), (2, "b")]),
        (b"a\nb", [(1, "a"), (2, "b")]),
        (b"a\r\nb\r\n", [(1, "a"), (2, "b")]),
        (BOM + b"a\nb\n", [(1, "a"), (2, "b")]),
        (BOM + b"\r\n\r\na\r\n \t\r\nb", [(3, "a"), (5, "b")]),
        (b"\n\n\na\n\n", [(4, "a")]),
        ("a\u2028b\u2029c\x85d\ne".encode(), [(1, "a\u2028b\u2029c\x85d"), (2, "e")]),
        (b"a\x0bb\x0cc\x1cd\ne", [(1, "a\x0bb\x0cc\x1cd"), (2, "e")]),
        ("☃\n👩‍👩‍👧\nعربى\n".encode(), [(1, "☃"), (2, "👩‍👩‍👧"), (3, "عربى")]),
        (b'"q" {x} {text_message} \\n', [(1, '"q" {x} {text_message} \\n')]),
        (b"a\na\na", [(1, "a"), (2, "a"), (3, "a")]),
    ],
)
def test_txt(
    server: Server,
    run: Runner,
    tmp_path: Path,
    content: bytes,
    expected: list[tuple[int, str]],
) -> None:
    """A message a line; blank ones are skipped, `line` stays the real one."""
    result = run(write(tmp_path / "in.txt", content))
    assert (result.code, lines(result.rows)) == (0, expected)
    assert sorted(asked(server)) == sorted(text for _, text in expected)


# --- Tables -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"id,text\n1,a\n2,b\n", [(2, "a", "1"), (3, "b", "2")]),
        (b"text,id\r\na,1\r\nb,2", [(2, "a", "1"), (3, "b", "2")]),
        (BOM + b"text,id\na,1\n", [(2, "a", "1")]),
        (b'id,text\n1,"a, ""b"""\n2,c\n', [(2, 'a, "b"', "1"), (3, "c", "2")]),
        (b'id,text\n1,"a\nb"\n2,c\n', [(2, "a\nb", "1"), (4, "c", "2")]),
        (b'id,text\n"1\n1",a\n\n2,b\n', [(2, "a", "1\n1"), (5, "b", "2")]),
        (b'id,text\n1,\n2," "\n3,c\n', [(4, "c", "3")]),
        ("id,text\né,a\u2028b\n".encode(), [(2, "a\u2028b", "é")]),
    ],
)
def test_csv(
    server: Server,
    run: Runner,
    tmp_path: Path,
    content: bytes,
    expected: list[tuple[int, str, str]],
) -> None:
    """Quotes, commas, newlines within a field; the other column travels along."""
    result = run(write(tmp_path / "in.csv", content))
    assert result.code == 0
    found = [
        (*pair, row["fields"]) for pair, row in zip(lines(result.rows), result.rows)
    ]
    assert found == [(line, text, {"id": id}) for line, text, id in expected]


def test_csv_field(server: Server, run: Runner, tmp_path: Path) -> None:
    """--field names the column, all others are in `fields`."""
    table = write(tmp_path / "IN.CSV", b"id,tweet,lang\n7,hello,en\n")
    result = run(table, "--field", "tweet")
    assert result.code == 0
    assert result.rows[0]["text_message"] == "hello"
    assert result.rows[0]["fields"] == {"id": "7", "lang": "en"}


def test_a_wide_field(server: Server, run: Runner, tmp_path: Path) -> None:
    """A document of 300,000 characters is a message like any other."""
    table = write(tmp_path / "in.csv", b"text\n" + b"x" * 300_000 + b"\n")
    assert len(run(table).rows[0]["text_message"]) == 300_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b"}', [(1, "a", {}), (2, "b", {})]),
        (b'"a"\n\n"b"\n', [(1, "a", None), (3, "b", None)]),
        (BOM + b'{"text": "a", "n": 1}\r\n', [(1, "a", {"n": 1})]),
        (
            b'{"user": {"id": [1, null]}, "text": "a\\nb\\u00e9\\ud83d\\ude00"}',
            [(1, "a\nbé😀", {"user": {"id": [1, None]}})],
        ),
        (b'{"text": ""}\n{"text": " "}\n{"text": "c"}\n', [(3, "c", {})]),
        ('{"text": "a\u2028b"}\n'.encode(), [(1, "a\u2028b", {})]),
    ],
)
def test_jsonl(
    server: Server,
    run: Runner,
    tmp_path: Path,
    content: bytes,
    expected: list[tuple[int, str, dict[str, Any] | None]],
) -> None:
    """Objects, whose other fields travel along, or plain strings."""
    result = run(write(tmp_path / "in.jsonl", content))
    assert result.code == 0
    found = [
        (*pair, row.get("fields")) for pair, row in zip(lines(result.rows), result.rows)
    ]
    assert found == expected


@pytest.mark.parametrize("directive", ["[ok:ms=200,ok]", "[refusal]", "[refusal,ok]"])
def test_fields_stay_with_their_record(
    server: Server, run: Runner, tmp_path: Path, directive: str
) -> None:
    """Of two records with the same text, whichever is answered first or fails."""
    table = f'id,text\n1,"a {directive}"\n2,"a {directive}"\n3,c\n'.encode()
    for _ in range(2):
        result = run(write(tmp_path / "in.csv", table))
        found = [(row["line"], row["fields"]["id"]) for row in result.rows]
        assert found == [(2, "1"), (3, "2"), (4, "3")]


def test_fields_follow_input(server: Server, run: Runner, tmp_path: Path) -> None:
    """As `line` does: what INPUT says of a message now, and no request for it."""
    run(write(tmp_path / "in.csv", b"id,text\n1,a\n2,b\n"))
    result = run(write(tmp_path / "in.csv", b"id,text\n2,b\n1,a\n3,c\n"))
    found = [(row["line"], row["fields"]["id"]) for row in result.rows]
    assert found == [(2, "2"), (3, "1"), (4, "3")]
    assert server.total == 3


# --- Standard input -----------------------------------------------------------


def test_standard_input(server: Server, spawn: Spawn, tmp_path: Path) -> None:
    """As .txt; the same again asks nothing."""
    for _ in range(2):
        process = spawn("-", "out.jsonl")
        printed, err = process.communicate("one\n\nzwei é 😀\n", timeout=30)
        assert (process.returncode, printed) == (0, ""), err
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert lines(rows) == [(1, "one"), (3, "zwei é 😀")]
    assert server.total == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_empty_standard_input(server: Server, spawn: Spawn, tmp_path: Path) -> None:
    """Said, exit 2, nothing written."""
    process = spawn("-", "out.jsonl")
    err = process.communicate("\n", timeout=30)[1]
    assert (process.returncode, len(reasons(err))) == (2, 1)
    assert not list(tmp_path.iterdir())


# --- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.txt", b"good\nb\xe9d\n", "line 2"),
        ("in.txt", "good\nbad\n".encode("utf-16"), "line 1"),
        ("in.txt", b"good\n\xed\xa0\x80\n", "line 2"),
        ("in.txt", b"", "in.txt"),
        ("in.txt", BOM + b"\n \t\r\n\n", "in.txt"),
        ("in.csv", b"", "in.csv"),
        ("in.csv", b"id,text\n", "in.csv"),
        ("in.csv", b"id,tweet,lang\n1,hello,en\n", "lang"),
        ("in.csv", b"id;text\n1;hello\n", "--field"),
        ("in.csv", b"id,text\n1,a\n2,b,c\n", "line 3"),
        ("in.csv", b"id,text\n1,a\n2\n", "line 3"),
        ("in.csv", b'id,text\n1,a\n2,"b\n3,c\n', "line 3"),
        ("in.csv", b"id,text\n1,a\n2,b\xe9\n", "line 3"),
        ("in.csv", b'id,text\n1,"a\nb"\n2,b\xe9\n', "line 4"),
        ("in.jsonl", b'{"text": "a"}\n{"tweet": "b", "id": 1}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"tweet": "b", "id": 1}\n', "tweet"),
        ("in.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n["b"]\n', "line 2"),
        ("in.jsonl", b'"a"\n17\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b", "x": NaN}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b", "x": -Infinity}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b", "x": "\\udc00"}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b"} {"text": "c"}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b\xe9"}\n', "line 2"),
        ("in.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", "line 2"),
        ("in.xlsx", b"PK\x03\x04", ".csv"),
        ("in.xlsx", b"PK\x03\x04", ".jsonl"),
        ("in.xlsx", b"PK\x03\x04", ".txt"),
        ("in.json", b'[{"text": "a"}]', ".jsonl"),
    ],
)
def test_a_bad_input_is_named(
    server: Server, run: Runner, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    """Exit 2 and one line with file and line, before anything is sent or written."""
    source = write(tmp_path / name, content)
    result = run(source)
    assert (result.code, server.total) == (2, 0)
    assert len(reasons(result.err)) == 1
    assert name in result.err
    assert re.search(rf"{re.escape(said)}\b", result.err), result.err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert source.read_bytes() == content


def test_a_bad_input_leaves_output_alone(
    server: Server, run: Runner, tmp_path: Path
) -> None:
    """What was there before stays as it was."""
    run(["a", "b"])
    before = (tmp_path / "out.jsonl").read_bytes()
    result = run(write(tmp_path / "in.txt", b"a\nb\nc\n\xe9\n"))
    assert (result.code, server.total) == (2, 2)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def same(folder: Path) -> tuple[Path, Path]:
    """One path for both."""
    return folder / "in.txt", folder / "in.txt"


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
    (folder / "out").mkdir()
    return folder / "in.txt", folder / "out"


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
    """Exit 2 and one line, before anything is sent; nothing written or lost."""
    write(tmp_path / "in.txt", b"precious\n")
    source, out = paths(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code = async_template.main([str(source), str(out), *options])
    said = reasons(capsys.readouterr().err)
    assert (code, server.total, len(said)) == (2, 0, 1)
    assert source.name in said[0] or out.name in said[0]
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "in.txt").read_bytes() == b"precious\n"


# --- Options ------------------------------------------------------------------


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
def test_bad_options(server: Server, run: Runner, options: str) -> None:
    """The usage and what is wrong with which option; nothing sent or written."""
    name, *value = options.split(" ")
    result = run(["a"], *([f"{name}={value[0]}"] if value else [name]))
    assert (result.code, server.total) == (2, 0)
    assert name in result.err.splitlines()[-1]
    assert not result.out_path.exists()


def test_exit_statuses(server: Server, run: Runner) -> None:
    """0 when all is answered, 1 with an error row, 2 when stopped."""
    assert run(["a"]).code == 0
    assert run(["a", "b [refusal]"]).code == 1
    assert run(["a", "b [refusal]"]).code == 1
    assert run(["a"]).code == 0
    assert run(["a", "b [401]"]).code == 2


def test_shards_are_input(
    server: Server, spawn: Spawn, run: Runner, tmp_path: Path
) -> None:
    """Four processes at once, each with its OUTPUT: joined they are exactly INPUT."""
    messages = [f"m{n % 15}" if n % 5 else "" for n in range(42)]
    text = "\n".join(messages)
    write(tmp_path / "in.txt", text.encode())
    shards = [
        spawn("in.txt", f"out{k}.jsonl", "--shard", f"{k}/4") for k in range(1, 5)
    ]
    assert [process.wait(timeout=30) for process in shards] == [0] * 4
    outs = [tmp_path / f"out{k}.jsonl" for k in range(1, 5)]
    joined = "".join(path.read_text(encoding="utf-8") for path in outs)
    rows = [json.loads(line) for line in joined.splitlines()]
    expected = [(n, message) for n, message in enumerate(messages, 1) if message]
    assert sorted(lines(rows)) == expected
    assert server.total == len(expected)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_shard_is_every_nth_message(server: Server, run: Runner, k: int) -> None:
    """Blank lines are not counted."""
    result = run(["a", "", "b", "c", "", "d", "e"], "--shard", f"{k}/3")
    expected = [(1, "a"), (3, "b"), (4, "c"), (6, "d"), (7, "e")]
    assert lines(result.rows) == expected[k - 1 :: 3]


# --- The pilot and the cap ----------------------------------------------------


def test_the_full_run_keeps_the_pilot(server: Server, run: Runner) -> None:
    """--limit asks the first N messages; what follows asks only the others."""
    messages = [f"m{n}" for n in range(10)]
    pilot = run(messages, "--limit", "3")
    assert pilot.code == 0
    assert lines(pilot.rows) == [(1, "m0"), (2, "m1"), (3, "m2")]
    assert (run(messages, "--limit", "3").code, server.total) == (0, 3)
    assert len(run(messages, "--limit", "99").rows) == 10
    assert (run(messages).code, server.total) == (0, 10)


def test_the_pilot_counts_messages_not_new_ones(server: Server, run: Runner) -> None:
    """The first N of INPUT, some of which may be answered already."""
    run(["b"])
    result = run(["a", "b", "c", "d"], "--limit", "3")
    assert [row["text_message"] for row in result.rows] == ["a", "b", "c"]


def test_the_pilot_estimates_the_rest(server: Server, run: Runner) -> None:
    """Tokens, minutes, and a range of USD that what it then costs is in."""
    messages = [f"m{n:03}" for n in range(500)]
    err = run(messages, "--limit", "20").err
    estimate = re.search(r"(?s)\btokens\b.* (\S+) to (\S+) USD.* min", err)
    assert estimate and "without --limit" in err, err
    rows = run(messages).rows
    low, high = map(float, estimate.groups())
    assert low <= usd(rows) and usd(rows[20:]) <= high < 2 * usd(rows)


def test_no_prices_no_usd(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a model costs nothing, or nobody knows, no cost is shown or estimated."""
    monkeypatch.setattr(async_template, "PRICES", None)
    err = run(["a", "b", "c"], "--limit", "2").err
    assert re.search(r"(?s)\btokens\b.* min", err)
    assert "USD" not in err and "$" not in err


def test_max_cost_is_never_passed(server: Server, run: Runner) -> None:
    """Exit 2 below the cap, yet not far below; the same without a cap goes on."""
    messages = [f"m{n:03}" for n in range(150)]
    stopped = run(messages, "--max-cost", "0.005")
    usage = [row["usage"] for row in stopped.rows]
    paid = sum(
        used["input_tokens"] * 0.4 + used["output_tokens"] * 1.6 for used in usage
    )
    assert stopped.code == 2
    assert 0.0025 < paid / 1e6 <= 0.005
    assert len(stopped.rows) == server.total
    assert "--max-cost" in reasons(stopped.err)[-1]
    assert (run(messages).code, server.total) == (0, 150)


def test_max_cost_needs_prices(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cap that cannot be kept is refused, not silently ignored."""
    monkeypatch.setattr(async_template, "PRICES", None)
    result = run(["a"], "--max-cost", "1")
    assert (result.code, server.total) == (2, 0)
    assert "PRICES" in result.err


# --- pandas -------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [["a", "b"], ["a", "b [refusal]"], ["a", "b [nousage]", "c [incomplete]"]],
    ids=["no errors", "errors", "no usage"],
)
def test_pandas(server: Server, run: Runner, messages: list[str]) -> None:
    """The same columns with and without errors; two lines make the answers columns."""
    frame = pd.read_json(run(messages).out_path, lines=True)
    columns = "line text_message response error model usage settings"
    assert " ".join(frame.columns) == columns
    assert frame["line"].tolist() == list(range(1, len(messages) + 1))
    assert frame["text_message"].tolist() == messages
    good = frame[frame["error"].isna()]
    answers = pd.json_normalize(good["response"].tolist())
    assert list(answers.columns) == ["score", "explanation"]
    assert answers["score"].between(-1, 1).all()


def test_the_settings_are_a_text_in_pandas(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the hash is: pandas makes numbers of 12345678 and of 1234e567."""
    for n in range(60):
        monkeypatch.setattr(async_template, "INSTRUCTIONS", f"Variant {n}")
        result = run(["a"], "--restart")
        frame = pd.read_json(result.out_path, lines=True)
        assert frame["settings"].tolist() == [result.rows[0]["settings"]]
