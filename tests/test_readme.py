"""What README.md says is true: its commands, its help, its rows, its edits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import async_template

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "async_template.py").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of README in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def python(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs this Python on `words`, in 80 columns."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"COLUMNS": "80"},
        check=True,
    )


def test_help_is_the_output_of_help() -> None:
    """The block under Options is `--help`, word for word."""
    assert python(ROOT / "async_template.py", "--help").stdout in blocks("text")


def test_main_command_runs(tmp_path: Path) -> None:
    """The last words of the first command, with a venv that is there already."""
    command = blocks("bash")[0].split("&&")[-1].split()
    assert command[0] == ".venv/bin/python"
    words = [ROOT / word if word.endswith(("py", "txt")) else word for word in command]
    python(*[tmp_path / w if w == "out.jsonl" else w for w in words[1:]])
    assert len((tmp_path / "out.jsonl").read_text("utf-8").splitlines()) == 30


def test_test_command_is_what_ci_runs() -> None:
    """`.ci/run` takes the command from the section on tests."""
    section = README.split("## Tests")[1]
    assert "-m pytest" in section.split("```")[1]
    assert "README.md" in (ROOT / ".ci/run").read_text("utf-8")


def test_sample_rows_have_the_documented_keys() -> None:
    """The rows shown fit the schema, and have the keys of a real row."""
    good, bad = map(json.loads, blocks("json")[0].splitlines())
    assert list(good) == list(bad)
    async_template.SCHEMA.model_validate(good["response"])
    assert set(bad["error"]) == {"type", "message", "attempts"}


def test_error_types_are_those_of_the_code() -> None:
    """Every type named in README is made somewhere, and none is left out."""
    text = README.split("`error.type` is one of")[1].split("`settings`")[0]
    named = set(re.findall(r"`(\w+)`", text))
    assert all(f'"{kind}"' in SOURCE for kind in named) and len(named) == 10


@pytest.mark.parametrize("code", blocks("python")[:1])
def test_pandas_lines_run(code: str, tmp_path: Path) -> None:
    """The lines that flatten `response` give a column of scores."""
    pytest.importorskip("pandas")
    (tmp_path / "out.jsonl").write_text(blocks("json")[0], encoding="utf-8")
    lines = code.replace("out.jsonl", (tmp_path / "out.jsonl").as_posix()).splitlines()
    names: dict[str, object] = {}
    exec("\n".join(line for line in lines if ".hist(" not in line), names)
    table = names["table"]
    assert list(table["score"].dropna()) == [0.9]  # type: ignore[index]


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
    """At most 1,000 words, the first command within 80."""
    assert len(README.split()) <= 1000
    assert len(README.split("```bash")[0].split()) <= 80
