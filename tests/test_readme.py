"""README.md is true: its commands, its help, its rows, its lines of Python."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server import Server

import async_template

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "async_template.py").read_text(encoding="utf-8")
posix = pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for a shell")


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks in one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run_python(code: str) -> dict[str, Any]:
    """The names that a block of Python leaves, run as in a notebook."""
    names: dict[str, Any] = {}
    flag = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compiled = compile(code, "README.md", "exec", flags=flag)
    found = eval(compiled, names)
    if inspect.iscoroutine(found):
        asyncio.run(found)
    return names


def test_help_is_the_output_of_help() -> None:
    """The block under Options is `--help`, word for word."""
    command = [sys.executable, str(ROOT / "async_template.py"), "--help"]
    env = os.environ | {"COLUMNS": "80"}
    shown = subprocess.run(command, capture_output=True, encoding="utf-8", env=env)
    assert shown.stdout in blocks("text")


@posix
def test_all_blocks_run_one_after_the_other(server: Server, tmp_path: Path) -> None:
    """In one shell, to the letter, but for a virtual environment that is there."""
    for name in ("async_template.py", "messages.txt", "requirements.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv").symlink_to(sys.prefix)
    script = ["set -e", "python3() { true; }  # makes the environment"]
    script += blocks("bash", README.split("## Tests")[0])
    if not Path(sys.prefix, "bin", "activate").exists():
        script = [line.replace("source .venv/bin/activate", "") for line in script]
    command = ["bash", "-c", "\n".join(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for name in ("try.jsonl", "out.jsonl", "all.jsonl"):
        assert len((tmp_path / name).read_text("utf-8").splitlines()) == 30
    assert "Traceback" not in done.stderr
    assert "the other 10 may take 0.000" in done.stderr  # the pilot: 20 of 30


def test_test_command_is_what_ci_runs() -> None:
    """`.ci/run` takes the command from the section on tests."""
    section = README.split("## Tests")[1]
    assert "-m pytest" in section.split("```")[1]
    assert "README.md" in (ROOT / ".ci/run").read_text("utf-8")


def test_sample_rows_have_the_documented_keys() -> None:
    """The rows shown fit the schema, and have the keys of a real row."""
    good, bad = map(json.loads, blocks("json")[0].splitlines())
    assert list(good) == list(bad)
    type(async_template.EXAMPLE).model_validate(good["response"])
    assert set(bad["error"]) == {"type", "message", "attempts"}


def test_error_types_are_those_of_the_code() -> None:
    """README names the ten types that a row can have."""
    text = README.split("`error.type` is one of")[1].split("`settings`")[0]
    named = set(re.findall(r"`(\w+)`", text))
    assert len(named) == 10
    assert all(f'"{kind}"' in SOURCE for kind in named)


def test_notebook_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows come back, and are kept in a file."""
    monkeypatch.chdir(tmp_path)
    rows = run_python(blocks("python")[0])["rows"]
    assert [row["response"]["score"] for row in rows] == [0.9, 0.9]
    assert Path("rows.jsonl").exists()


def test_pandas_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores as numbers, errors as gaps, and a table for others."""
    monkeypatch.chdir(tmp_path)
    Path("out.jsonl").write_text(blocks("json")[0], encoding="utf-8")
    lines = blocks("python")[1].splitlines()
    code = "\n".join(line for line in lines if ".hist(" not in line)
    table = run_python(code)["table"]
    assert list(table["response.score"].dropna()) == [0.9]
    assert list(table["error.type"].dropna()) == ["timeout"]
    assert Path("out.csv").exists()


def test_dependencies_are_stated_once() -> None:
    """The PEP 723 block and requirements.txt say the same."""
    stated = re.findall(r"^# dependencies = (\[.*\])$", SOURCE, re.MULTILINE)
    wanted = (ROOT / "requirements.txt").read_text("utf-8").split()
    assert json.loads(stated[0]) == wanted


def test_oldest_packages_are_tested() -> None:
    """The workflow has a run with the lower bounds of requirements.txt."""
    workflow = next((ROOT / ".github/workflows").glob("*.yml")).read_text("utf-8")
    wanted = (ROOT / "requirements.txt").read_text("utf-8")
    for name, least in re.findall(r"(?m)^(\w+).*>=([\d.]+)", wanted):
        assert f"{name}=={least}" in workflow


def test_readme_is_short() -> None:
    """At most 1,200 words, the first command within 80."""
    assert len(README.split()) <= 1200
    assert len(README.split("```bash")[0].split()) <= 80
