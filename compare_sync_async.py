"""Ask the same question about many messages in four ways: how fast, how many errors?

  python compare_sync_async.py --offline --n 200 > table.md   no key, no cost
  python compare_sync_async.py messages.txt --n 5             the real API; asks first

The question is that of async_template.py, which alone retries; the ways take turns.
Exit status: 0; 1 calls failed; 2 not started, one line says why; 130 interrupted.
"""

import argparse
import asyncio
import contextlib
import io
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import VERSION, AsyncOpenAI, OpenAI, OpenAIError
from tqdm import tqdm

import async_template as template

FAILURES = (OpenAIError, ValueError)  # ValueError: the answer does not fit SCHEMA


def question(text: str) -> dict[str, Any]:
    """What `responses.parse` is asked about one message."""
    asked = {"model": template.MODEL, "instructions": template.INSTRUCTIONS}
    asked["input"] = template.PROMPT.replace("{text_message}", text)
    options = {"text_format": template.SCHEMA, "temperature": template.TEMPERATURE}
    return asked | {name: value for name, value in options.items() if value is not None}


def ask(client: OpenAI, text: str) -> bool:
    """Asks about one message; whether that failed."""
    with contextlib.suppress(*FAILURES):
        return client.responses.parse(**question(text)).output_parsed is None
    return True


def loop(texts: list[str], concurrency: int) -> int:
    with OpenAI(max_retries=0) as client:  # the one slow way, so with a live bar
        return sum(ask(client, text) for text in tqdm(texts, leave=False, disable=None))


def threads(texts: list[str], concurrency: int) -> int:
    with OpenAI(max_retries=0) as client, ThreadPoolExecutor(concurrency) as pool:
        return sum(pool.map(lambda text: ask(client, text), texts))


def gather(texts: list[str], concurrency: int) -> int:
    async def ask_all() -> list[Any]:
        async with AsyncOpenAI(max_retries=0) as client:
            calls = (client.responses.parse(**question(text)) for text in texts)
            return [*await asyncio.gather(*calls, return_exceptions=True)]

    replies = asyncio.run(ask_all())  # a bug among them has no output_parsed: it shows
    return sum(isinstance(r, FAILURES) or r.output_parsed is None for r in replies)


def pool(texts: list[str], concurrency: int) -> int:
    with contextlib.redirect_stderr(io.StringIO()):  # hides its bar
        rows = asyncio.run(template.answer_all(texts, concurrency=concurrency))
    return sum(row["error"] is not None for row in rows)


WAYS = {"loop": loop, "threads": threads, "gather": gather, "async_template": pool}


def compare(texts: list[str], args: argparse.Namespace, load: Counter[str]) -> int:
    """Times all ways, with bars; prints the Markdown table; how many calls failed."""
    for way in WAYS.values():  # a warm-up: the first call loads half of the SDK
        way(texts[:1], args.concurrency)
    runs: dict[str, list[tuple[float, int, int]]] = {name: [] for name in WAYS}
    for name, way in [*WAYS.items()] * args.repeat:
        load["peak"], started = 0, time.perf_counter()
        errors, took = way(texts, args.concurrency), time.perf_counter() - started
        runs[name].append((took, errors, load["peak"]))
        bar = "#" * min(60, round(60 * took / runs["loop"][0][0]))
        print(f"{name:14} {took:7.2f} s {bar}", file=sys.stderr)
    at = f"latency {args.latency:g} s offline" if args.offline else template.MODEL
    print(time.strftime(f"%Y-%m-%d, Python {sys.version.split()[0]}, openai {VERSION}"))
    print(f"{at}, n {len(texts)}, concurrency {args.concurrency}, {args.repeat} runs\n")
    print("| | best | spread | rows/s | speedup | errors | in flight |\n|" + "---|" * 7)
    for name in runs:
        seconds, lost, peaks = zip(*runs[name], strict=True)
        best, ratio = min(seconds), min(runs["loop"])[0] / min(seconds)
        row = f"{best:.2f} s | {max(seconds) - best:.2f} s | {len(texts) / best:.1f}"
        print(f"| {name} | {row} | {ratio:.1f}x | {sum(lost)} | {max(peaks) or '?'} |")
    return sum(errors for name in runs for _, errors, _ in runs[name])


def confirm(texts: list[str], args: argparse.Namespace) -> None:
    """Says what asking the real API may cost, and asks. Raises StopRun."""
    if not os.environ.get("OPENAI_API_KEY", "").strip():
        raise template.StopRun("no key: set OPENAI_API_KEY, or try without: --offline")
    calls = len(WAYS) * (args.repeat * len(texts) + 1)
    prices, tokens = template.PRICES or (0, 0), 100 + max(map(len, texts)) / 2
    usd = calls * (prices[0] * tokens + prices[1] * 60) / 1e6  # 60 out; generous
    print(f"{calls} calls, some {round(usd, 3) or '?'} USD: go on?", file=sys.stderr)
    if not args.yes and sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise template.StopRun("not started; --yes skips the question")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    add, file = parser.add_argument, Path(__file__).with_name("messages.txt")
    add("input", metavar="INPUT", nargs="?", type=Path, default=file)
    add("--offline", action="store_true", help="the stand-in answers: no key, no cost")
    add("--yes", action="store_true", help="do not ask before calling the real API")
    add("--latency", metavar="S", type=float, default=0.5, help="seconds, offline")
    add("--repeat", metavar="N", type=int, default=3, help="runs of each, 3 or more")
    add("--concurrency", metavar="N", type=int, default=template.CONCURRENCY)
    add("--n", metavar="N", type=int, help="how many messages, in a cycle; default all")
    args, load = parser.parse_args(argv), Counter[str]()
    for name, least in (("latency", 0), ("repeat", 3), ("concurrency", 1), ("n", 1)):
        if (value := vars(args)[name]) is not None and not least <= value < 1e6:
            parser.error(f"argument --{name}: must be {least} or more, not {value}")
    try:
        found = template.read_messages(args.input, "text", (1, 1))
        rows = [row["text_message"] for row in found] or parser.exit(2, "empty INPUT\n")
        texts = [rows[i % len(rows)] for i in range(args.n or len(rows))]
        if args.offline:  # all clients ask the stand-in
            url = template.start_offline_server(args.latency, load)
            key = "offline"
            os.environ.update(OPENAI_BASE_URL=url, OPENAI_API_KEY=key, no_proxy="*")
        else:
            confirm(texts, args)
        return min(1, compare(texts, args, load))
    except (template.StopRun, OSError, KeyboardInterrupt) as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 2


if __name__ == "__main__":
    raise SystemExit(main())
