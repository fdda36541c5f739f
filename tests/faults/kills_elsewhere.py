"""Kills every command but `run` at random moments, starts it again, and compares the end with that of an undisturbed one.

    python tests/faults/kills_elsewhere.py [--kills 200] [--seed 0] [--only COMMAND]

The kills are shared out among probe, extract, export in each format, report, cache export, cache rm and compare, and spread
over the time that each takes. The same command must then make the same files and figures, peaks on the device included, and
leave nothing over. A command that ended before its kill does not count. See many_kills.py for runs.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import torch
from forked_commands import Ended, begin, call, end, layerwise
from small_runs import OPTIONS, Command, World, commands, export_made, make_world, makes, regular, toml

ROUNDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    moments, faults = random.Random(options.seed), 0
    known = killed_commands()
    chosen = {name: command for name, command in known.items() if options.only in name}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="kills-") as name:
        world = make_world(Path(name), {"finished": makes(ROUNDS)["finished"]})
        print(f"{'command':<20} {'kills':>6} {'right':>6} {'ended before':>13}  seconds")
        for number, (name, command) in enumerate(chosen.items()):
            share = options.kills * (number + 1) // len(chosen) - options.kills * number // len(chosen)
            faults += kill_often(name, command, share, moments, world)
    sys.exit(1 if faults else 0)


def killed_commands() -> dict[str, Command]:
    """Those that write something, on a finished run. Their results hold the peaks, too."""
    known = commands(ROUNDS)
    features = {
        "probe": Command(known["probe"].action, probe_with_peak),
        "extract": Command(known["extract"].action, array_and_peak(known["extract"].made)),
        "extract h5": Command(
            layerwise("extract", "run", "data", "-o", "features.h5"), array_and_peak(hdf5_made("features.h5"))
        ),
        "cache export h5": Command(
            layerwise("cache", "export", "run", "--stage", "1", "-o", "frames.h5"), hdf5_made("frames.h5")
        ),
    }
    formats = ("safetensors", "pt2", *(["onnx"] if find_spec("onnxruntime") and find_spec("onnxscript") else []))
    exports = {
        f"export {format}": Command(layerwise("export", "run", "--format", format, "-o", "handed"), export_made)
        for format in formats
    }
    options = {**OPTIONS, "training.max_epochs": 1, "out": "compared", "cache.keep": "needed"}
    compare = layerwise(
        *("compare", "--label", "speaker", "--seeds", "1", "--methods", "greedy-infomax,cpc,untrained"),
        *(word for key, value in options.items() for word in ("--set", f"{key}={toml(value)}")),
    )
    others = {name: known[name] for name in ("report", "cache export", "cache rm")}
    return features | exports | others | {"compare": Command(compare, comparison_made)}


def probe_with_peak(place: Path, ended: Ended) -> Any:
    return json.loads(ended.out), json.loads(regular(place / "run" / "probes" / "speaker.json").read_text())


def array_and_peak(array: Callable[[Path, Ended], Any]) -> Callable[[Path, Ended], Any]:
    def made(place: Path, ended: Ended) -> Any:
        return array(place, ended), ended.out.rpartition("device peak")[2]

    return made


def hdf5_made(name: str) -> Callable[[Path, Ended], Any]:
    """Of the file: its arrays."""

    def made(place: Path, ended: Ended) -> Any:
        with h5py.File(regular(place / name)) as file:
            return {key: file[key][()].tobytes() for key in ("features", "ids", "offsets")}

    return made


def comparison_made(place: Path, ended: Ended) -> Any:
    """What is kept and what is shown, without the seconds."""

    def timeless(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: timeless(value) for key, value in tree.items() if key not in ("seconds", "digest")}
        return [timeless(value) for value in tree] if isinstance(tree, list) else tree

    return timeless(json.loads(regular(place / "compared" / "compare.json").read_text()))


def kill_often(name: str, command: Command, kills: int, moments: random.Random, world: World) -> int:
    """Number of faults. Prints each, and a line in the end."""
    place = world.enter("finished")
    call(command.action, place, world.streams)  # imports what the next need not
    place = world.enter("finished")
    started = time.monotonic()
    undisturbed = call(command.action, place, world.streams)
    seconds = time.monotonic() - started
    assert undisturbed.code == 0, undisturbed
    expected, names = command.made(place, undisturbed), names_in(place)
    counts = Counter[str]()
    while counts["killed"] < kills:
        moment = moments.uniform(0, seconds)
        place = world.enter("finished")
        child = begin(command.action, place, world.streams)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        if end(child, world.streams).code == 0:
            counts["ended"] += 1
            continue
        counts["killed"] += 1
        again = call(command.action, place, world.streams)
        if fault := fault_of(command, place, again, expected, names):
            said = (again.err or again.out).strip()[-300:]
            print(f"FAULT: {name}, killed after {moment:.3f} s of {seconds:.3f}: {fault}\n    {said}", flush=True)
            counts["faults"] += 1
    right = counts["killed"] - counts["faults"]
    print(f"{name:<20} {counts['killed']:>6} {right:>6} {counts['ended']:>13}  {seconds:.2f}", flush=True)
    return counts["faults"]


def fault_of(command: Command, place: Path, again: Ended, expected: Any, names: set[str]) -> str:
    """What is wrong after the second start; empty where nothing is."""
    whole_before = again.code == 2 and "exists" in again.err  # killed behind its last step: then the result is there
    if again.code != 0 and not whole_before:
        return f"the same command ends with {again.code}"
    if left := names_in(place) ^ names:
        return f"left over or missing: {', '.join(sorted(left)[:3])}"
    if whole_before:
        return ""
    return "" if command.made(place, again) == expected else "another result"


def names_in(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if "data" not in path.relative_to(place).parts}


if __name__ == "__main__":
    main()
