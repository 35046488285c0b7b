"""README.md is true: every block of it is run here as it stands.

After a change of the template's help: `python tests/test_readme.py` puts it in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from server import Server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "async_template.py").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WORD = re.compile(r"[^\s|]*\w[^\s|]*")
IDS = [2**60 + 1, 2**60 + 3]  # a float holds neither of them
posix = pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for a shell")
no_r = pytest.mark.skipif(not shutil.which("Rscript"), reason="R is not installed")


def blocks(language: str) -> list[str]:
    """The fenced blocks in one language."""
    return [text for name, text in BLOCK.findall(README) if name == language]


def execute(*command: str, folder: Path = ROOT, **env: str) -> str:
    """What a command prints, on both streams; it has to end well."""
    options: Any = {"cwd": folder, "env": os.environ | env, "encoding": "utf-8"}
    done = subprocess.run(command, capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    return str(done.stdout + done.stderr)


def show_help() -> str:
    """What --help prints in a narrow terminal."""
    return execute(sys.executable, "async_template.py", "--help", COLUMNS="80")


# --- The blocks for a shell, one after the other in one folder
class Followed(NamedTuple):
    folder: Path
    server: Server
    said: str


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    """To the letter, but for a virtual environment that is there."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("async_template.py", "messages.txt", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv").symlink_to(sys.prefix)
    start = "set -e; python3() { true; }; source() { true; }\n"
    env = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    shell = blocks("bash")[:-1]  # the last one runs the tests
    with Server() as server:
        env |= {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "..."}
        code = start + "".join(shell[:3])
        said = execute("bash", "-c", code, folder=folder, **env)
        edit(folder / "headlines.py")
        code = start + "".join(shell[3:])
        said += execute("bash", "-c", code, folder=folder, **env)
        yield Followed(folder, server, said)


def edit(path: Path) -> None:
    """Puts the block of edits in place of INSTRUCTIONS to EXAMPLE."""
    old = re.compile(r"^INSTRUCTIONS = .*?^EXAMPLE\b.*?\n\n", re.DOTALL | re.MULTILINE)
    before, after = old.split(path.read_text("utf-8"))
    path.write_text(f"{before}{blocks('python')[0]}\n{after}", encoding="utf-8")


def read_rows(path: Path) -> list[Any]:
    """The rows of an OUTPUT."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@posix
def test_commands(followed: Followed) -> None:
    """All messages are answered, the pilot first; the shards together have all."""
    for name in ("try.jsonl", "out.jsonl", "all.jsonl"):
        assert len(read_rows(followed.folder / name)) == 30
    assert "may take 0.000" in followed.said
    assert "Traceback" not in followed.said


@posix
def test_example(followed: Followed) -> None:
    """The first two rows are those that README shows; all six have an answer."""
    shown = [json.loads(line) for line in blocks("json")[0].splitlines()]
    made = read_rows(followed.folder / "try-topics.jsonl")[:2]
    for row in (*shown, *made):
        assert row.pop("answered_at")
    assert made == shown
    live = read_rows(followed.folder / "topics.jsonl")
    assert [row["response"]["topic"] for row in live] == ["economy"] * 6


@posix
def test_what_is_sent(followed: Followed) -> None:
    """Headline and lead, codes, descriptions and docstring; neither label nor id."""
    asked = [r.body for r in followed.server.requests if "Headline:" in r.text]
    assert len(asked) == 6
    for words in ("Flu season", "get a jab", '"other"', "illness, care", "most of it"):
        assert words in json.dumps(asked)
    assert "label" not in json.dumps(asked) and "186000" not in json.dumps(asked)
    assert "\n\nHeadline: Central bank cuts rates, again" in followed.said


@posix
@pytest.mark.filterwarnings("default")  # what Jupyter itself warns of
def test_notebook(followed: Followed) -> None:
    """The cell runs in a notebook, and shows the answers in the DataFrame."""
    nbformat = pytest.importorskip("nbformat")
    cell = nbformat.v4.new_code_cell(blocks("python")[1])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    resources = {"metadata": {"path": followed.folder}}
    client = pytest.importorskip("nbclient").NotebookClient
    client(notebook, timeout=50, resources=resources).execute()
    shown = cell["outputs"][-1]["data"]["text/plain"]
    assert shown.count("neither") == 6 and "Flu season" in shown


# --- The table
@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """A folder with topics.jsonl: long ids as numbers, and an error without an id."""
    row = json.loads(blocks("json")[0].splitlines()[0])
    error = json.loads(blocks("json")[1])
    rows = [row | {"fields": {}, "response": None, "error": error}]
    for number, label in zip(IDS, ["economy", ""]):
        rows.append(row | {"fields": {"id": number, "label": label}})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "topics.jsonl").write_text(text, encoding="utf-8")
    text = "id,headline\n" + "".join(f"{number},My headline\n" for number in IDS)
    (tmp_path / "headlines.csv").write_text(text, encoding="utf-8")
    return tmp_path


def test_pandas(topics: Path) -> None:
    """Counts, a figure, kappa and a table; no id is rounded, an error is no answer."""
    command = (sys.executable, "-c", blocks("python")[2])
    said = execute(*command, folder=topics, MPLBACKEND="agg")
    assert re.search(r"economy +2\n", said)
    assert ", 1 labels, 1 errors" in said
    assert (topics / "topics.png").stat().st_size > 1000
    table = (topics / "topics.csv").read_text("utf-8")
    assert re.findall("^[0-9]+", table, re.MULTILINE) == [str(number) for number in IDS]


@no_r
def test_r(topics: Path) -> None:
    """The same: no id is rounded, an error is no answer."""
    code = blocks("r")[0] + "writeLines(good$fields.id)\n"
    said = execute("Rscript", "-e", code, folder=topics)
    assert re.search(r"economy *\n *2", said)
    assert said.split()[-2:] == [str(number) for number in IDS]


# --- The other blocks
def test_number_of_blocks() -> None:
    """A new block needs a test here. Those in `text` are shown, not run."""
    found = Counter(language for language, _ in BLOCK.findall(README))
    shell = {"bash": 6, "powershell": 1, "text": 3}
    assert found == shell | {"json": 2, "python": 4, "r": 1}


def test_help() -> None:
    """The block under Options is `--help`, word for word."""
    assert blocks("text")[1] == show_help()


def test_windows() -> None:
    """PowerShell gets the commands of the shell."""
    commands = re.findall("Scripts.python (async.*)", blocks("powershell")[0])
    shell = re.sub(" +#.*", "", "".join(blocks("bash")[:2]))
    assert commands == re.findall("python (async.*)", shell)


def test_pool_is_that_of_the_code() -> None:
    """Each line of the pool is one of the template's."""
    lines = {line.strip() for line in SOURCE.splitlines()}
    assert {line.strip() for line in blocks("python")[3].splitlines()} <= lines


def test_error_types_are_those_of_the_code() -> None:
    """README names the ten types that a row can have."""
    text = README.split("`error.type` is one of")[1].split(". The same")[0]
    named = set(re.findall(r"`(\w+)`", text))
    assert len(named) == 10
    assert all(f'"{kind}"' in SOURCE for kind in named)


def test_readme_is_short() -> None:
    """At most 1,400 words outside of blocks, the first command within 80. A word has a
    letter or a digit, and stands between blanks or the bars of a table."""
    assert len(WORD.findall(BLOCK.sub("", README))) <= 1400
    assert len(WORD.findall(README.split("```bash")[0])) <= 80


# --- What belongs to it
def test_workflow() -> None:
    """The lower bounds have a run; lint and types have one; every job has an end. The
    section on tests has the command that `.ci/run` looks for there."""
    assert "-m pytest -q tests\n```" in README.split("## Tests")[1]
    workflow = (ROOT / ".github/workflows/tests.yml").read_text("utf-8")
    wanted = (ROOT / "requirements.txt").read_text("utf-8")
    for name, least in re.findall(r"(?m)^(\w+).*>=([\d.]+)", wanted):
        assert f"{name}=={least}" in workflow
    assert workflow.count("mypy") == workflow.count("ruff check") == 1
    assert workflow.count("timeout-minutes") == workflow.count("runs-on")


if __name__ == "__main__":
    text = README.replace(blocks("text")[1], show_help())
    (ROOT / "README.md").write_text(text, encoding="utf-8", newline="\n")
