"""Measures on an NVIDIA GPU what layerwise promises of it, and says of each promise whether it is kept.

    make gpu-check        or        python benchmarks/gpu_check.py [--minutes 8] [--json FILE] [--only NAME ...]

Ends within --minutes on any card of 4 GB or more; what was not reached is reported as not run. Needs what layerwise needs,
3 GB of disk in --work, and no network. Exit code: 0 where all promises are kept, 1 where one is broken, 3 where none is
broken but some could not be measured, 2 where there is no CUDA device.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checks import GRACE, Outcome, apart
from gpu_promises import CHECKS, SIZES, Bench

WORDS = {"passed": "PASS", "failed": "FAIL", "not run": "NOT RUN"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [check.name for check in CHECKS]
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--json", type=Path, help="writes all figures there")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of: {', '.join(names)}")
    parser.add_argument(
        "--size", choices=SIZES, default="paper", help="small: a try in seconds, whose figures say nothing"
    )
    parser.add_argument("--work", help="a folder on a disk with room; default: where temporary files go")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device, so there is nothing to check.", file=sys.stderr)
        return 2
    started = time.time()
    checks = [check for check in CHECKS if not options.only or check.name in options.only]
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        outcomes = apart(checks, partial(Bench, options.size, folder), started + 60 * options.minutes - GRACE)
        return report(outcomes, options.size, options.json, started)


def report(outcomes: Iterable[Outcome], size: str, path: Path | None, started: float) -> int:
    """Prints each as it comes, and writes what is known so far. Gives the exit code."""
    known: list[Outcome] = []
    for outcome in outcomes:
        known.append(outcome)
        why = f": {outcome.why}" if outcome.why else ""
        print(f"{WORDS[outcome.status]:7} {outcome.name} ({outcome.seconds:.0f} s): {outcome.promise}{why}")
        print(f"{table(outcome.rows)}\n", flush=True)
        if outcome.traceback:
            print(outcome.traceback, file=sys.stderr, flush=True)
        if path:
            tree = {
                "size": size,
                "seconds": round(time.time() - started, 1),
                "checks": [each.as_json() for each in known],
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(tree, indent=1) + "\n")
    counts = {word: sum(each.status == word for each in known) for word in WORDS}
    print(f"{', '.join(f'{count} {word}' for word, count in counts.items())}, in {time.time() - started:.0f} s")
    if size != "paper":
        print("The sizes are small: the figures say nothing of the card.")
    return 1 if counts["failed"] else 3 if counts["not run"] else 0


def table(rows: list[dict[str, Any]]) -> str:
    """One table of Markdown for rows of the same columns; a single row is a list of its figures."""
    lines: list[str] = []
    columns: list[str] = []
    if len(rows) == 1:
        return "\n".join(f"- {name.replace('_', ' ')}: {shown(value)}" for name, value in rows[0].items())
    for row in rows:
        if list(row) != columns:
            columns = list(row)
            lines += [
                "",
                f"| {' | '.join(name.replace('_', ' ') for name in columns)} |",
                f"|{' --- |' * len(columns)}",
            ]
        lines.append(f"| {' | '.join(shown(value) for value in row.values())} |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A figure; what belongs to no promise is left open."""
    words = {None: "", True: "yes", False: "NO"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
