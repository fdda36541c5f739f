"""Damages every file of small runs in every way, and calls every command on each: none may believe it, or touch what is not
the run's.

    python tests/faults/hostile.py [--only TEXT] [--part I/N] [--short] [--list]

A case is a run (finished, killed in training, killed in caching, or an exported folder), one of its files, one damage and one
command. It must end with what the command makes of the whole run, bit by bit, or in one sentence and exit code 2. Beside the
run lie other runs, caches, links' targets and a module: nothing there may be changed, and the module not be imported. The
order of the cases is fixed. --only: those that have this text in their name. --part: the I-th of N equal parts. --list: names
alone. --short: some forty, for the suite. Faults are printed with their names; exit code 1 where there is one.
"""

import argparse
import copy
import os
import re
import shlex
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from damage import FOREIGN_CODE, Damage, damages_of_file, damages_of_folder
from forked_commands import Ended, call
from small_runs import Command, Makes, World, commands, commands_on_handed, make_world, makes, run_command

ROUNDS = 2

ALL = tuple(commands(ROUNDS))
CHANGING = ("run", "run --overwrite", "cache rm")

READERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("run/run.json", ALL),
    ("run/config.toml", ("run", "run --overwrite", "status", "probe", "report", "plan", "init")),
    ("run/encoder.safetensors", ("run", "load", "extract", "export")),
    ("run/stages/*/config.toml", ("run", "probe")),
    ("run/stages/*/weights.safetensors", ("run", "probe")),
    ("run/stages/*/checkpoint.safetensors", ("run", "run --overwrite")),
    ("run/stages/*/*.jsonl", ("run", "report")),
    ("run/probes/*", ("probe", "report", "export")),
    ("run/machine.json", ("run", "report")),
    ("run/log.txt", ("run", "run --overwrite")),
    ("run/report.html", ("report", "run --overwrite")),
    ("run/plots/*", ("report", "run --overwrite")),
    ("run/*lock", ("run", "status", "cache rm")),
    ("run/rounds/1/run.json", (*CHANGING, "status")),
    ("run/rounds/*", CHANGING),
    ("run/stages*", ("run", "run --overwrite", "probe")),
    ("run/probes", ("run --overwrite", "probe", "report")),
    ("run/plots", ("run --overwrite", "report")),
    ("cache/run/owner.json", CHANGING),
    ("cache/run/lock", CHANGING),
    ("cache/run/round-1*", CHANGING),
    ("cache/run/stage*", ("run", "probe", "cache ls", "cache verify", "cache export", "cache rm")),
    ("handed/*", tuple(commands_on_handed())),
    ("handed", ("load", "extract")),
    ("*", (*CHANGING, "cache ls")),
)
"""Which commands read or write a file: the first pattern that fits its name. Every damage meets one of the others, too."""

OF_RECORDS = ("wrong type", "wrong value", "huge number")
"""Kinds with hundreds of damages in one file: so many of them are tried, spread over all, each with one command in turn."""
MOST_OF_RECORDS = 80

READ_TO_GO_ON = (
    *("run/run.json", "run/stages/1/weights.safetensors", "run/stages/2/config.toml", "run/rounds/1/run.json"),
    *(
        "run/rounds/1/stages/3/checkpoint.safetensors",
        "run/rounds/1/stages/3/weights.safetensors",
        "cache/run/stage-1.h5",
    ),
)
"""What a run that was killed in training reads, and the finished one has as well: tried with `run` alone."""

EQUAL_FILES = re.compile(
    r"/stages/2|/plots/(?!losses\.svg)|stage-2\.h5$|\.png$|run/stages/3/(?!weights)|run/stages/3$|rounds/1/stages/[23]"
    r"|rounds/1/stages/1/|rounds/1/config"
)
"""Files of the finished run that others stand for."""


@dataclass(frozen=True, slots=True)
class Case:
    """One damage and one command."""

    state: str
    command: str
    file: str
    damage: Damage

    @property
    def name(self) -> str:
        detail = f": {self.damage.detail}" if self.damage.detail else ""
        return f"{self.command} | {self.state} {self.file} | {self.damage.kind}{detail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, options.part.split("/"))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="hostile-") as name:
        world = make_world(Path(name), SHORT_WORLD if options.short else makes(ROUNDS))
        outside = lay_out_what_is_not_the_runs(world)
        chosen = list((some_cases if options.short else cases)(world, outside))
        chosen = [case for case in chosen if options.only in case.name][part - 1 :: parts]
        if options.list:
            print(*(case.name for case in chosen), sep="\n")
            return
        found = try_cases(chosen, world)
    sys.exit(1 if any(outcome.startswith("FAULT") for outcome in found.values()) else 0)


SHORT_WORLD: Makes = {
    "finished": (run_command(ROUNDS), commands(ROUNDS)["probe"].action),
    "other": (run_command(ROUNDS, 1),),
}
"""What --short makes of the runs."""

SHORT: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("run/run.json", "FIFO", ("status", "run")),
    ("run/run.json", "nested", ("status",)),
    ("run/run.json", "foreign path: caches", ("cache rm", "run --overwrite")),
    ("run/run.json", "bit flipped", ("run",)),
    ("run/run.json", "wrong type", ("status", "probe")),
    ("run/run.json", "huge file", ("cache ls",)),
    ("run/run.json", "link", ("cache rm",)),
    ("run/config.toml", "foreign code", ("probe", "init")),
    ("run/config.toml", "exchanged", ("probe",)),
    ("run/config.toml", "nested", ("status",)),
    ("run/stages/1/weights.safetensors", "exchanged", ("run", "probe")),
    ("run/encoder.safetensors", "huge number", ("load", "extract")),
    ("run/encoder.safetensors", "exchanged", ("load",)),
    ("run/encoder.safetensors", "link", ("run", "export")),
    ("run/encoder.safetensors", "huge file", ("load",)),
    ("cache/run/stage-1.h5", "exchanged", ("cache verify", "cache export")),
    ("cache/run/stage-1.h5", "FIFO", ("cache ls", "run")),
    ("cache/run/stage-1.h5", "cut short", ("cache verify",)),
    ("cache/run/stage-1.h5", "directory", ("cache rm",)),
    ("cache/run/stage-1.h5", "huge number", ("cache ls",)),
    ("cache/run/owner.json", "link", ("run",)),
    ("run/rounds/1", "link", ("run --overwrite",)),
    ("run/rounds/1/run.json", "huge number", ("status",)),
    ("run/task.lock", "link", ("run",)),
    ("run/probes/speaker.json", "wrong type", ("export",)),
    (".", "notes", ("run --overwrite", "cache rm")),
    (".", "planted link", ("extract", "cache export", "export", "init", "probe")),
    ("handed/encoder.safetensors", "wrong value", ("load file",)),
    ("handed/config.toml", "FIFO", ("load",)),
)
"""File, how the damage is called and commands: what --short tries, the first damage that is called so."""


def lay_out_what_is_not_the_runs(world: World) -> Path:
    """A folder with a twin of the finished run, the target of links; a folder of caches that seems to be the run's own; and a
    module that leaves a mark when it is imported."""
    outside = world.base / "outside"
    shutil.copytree(world.states["finished"], outside / "twin")
    for (
        state
    ) in world.states.values():  # some have what the finished one has not: checkpoints, caches that are not sealed
        for path in state.rglob("*"):
            place = outside / "twin" / path.relative_to(state)
            if path.is_file() and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)
    shutil.copytree(world.states["finished"] / "cache" / "run", outside / "decoy")
    for stage in ("1", "2", "3"):
        shutil.copytree(world.states["finished"] / "run" / "stages" / stage, outside / "decoy" / "stages" / stage)
    module, _, function = FOREIGN_CODE.partition(":")
    (outside / "modules").mkdir()
    mark = outside / "mark"
    (outside / "modules" / f"{module}.py").write_text(
        f"open({str(mark)!r}, 'w').close()\ndef {function}(*a):\n    raise ValueError\n"
    )
    sys.path.append(str(outside / "modules"))
    return outside


def cases(world: World, outside: Path) -> Iterator[Case]:
    """All of them, no two with the same content of a file."""
    turn = 0
    for state in world.states:
        if state in ("other", "empty"):
            continue
        known = tuple(commands_on_handed()) if state == "handed" else ALL
        seen: set[tuple[str, bytes]] = set()
        for file, damage in damages(world, state, outside):
            turn += 1
            if damage.content is not None:
                if (file, damage.content) in seen:
                    continue
                seen.add((file, damage.content))
            readers = next(names for pattern, names in READERS if fnmatch(file, pattern))
            others = [name for name in known if name not in readers]
            if state in ("training", "caching") and any(fnmatch(file, pattern) for pattern in READ_TO_GO_ON):
                chosen = ["run"]
            elif damage.kind in OF_RECORDS:
                chosen = [readers[turn % len(readers)]]
            else:
                chosen = [*readers, *others[turn % (len(others) or 1) :][:1]]
            for command in chosen:
                yield Case(state, command, file, damage)
        yield from planted(state, outside / "twin")


def damages(world: World, state: str, outside: Path) -> Iterator[tuple[str, Damage]]:
    """File, or folder, and what is done to it."""
    place = world.states[state]
    for path in sorted(place.rglob("*")):
        file = str(path.relative_to(place))
        if state in ("training", "caching"):
            if not is_damaged_in_stopped_run(path, world, state):
                continue
        elif EQUAL_FILES.search(file):
            continue
        every = list(damages_of(path, world, state, outside))
        records = [damage for damage in every if damage.kind in OF_RECORDS]
        records = records[:: max(round(len(records) / MOST_OF_RECORDS), 1)]
        yield from ((file, damage) for damage in every if damage.kind not in OF_RECORDS)
        yield from ((file, damage) for damage in records)


def damages_of(path: Path, world: World, state: str, outside: Path) -> Iterator[Damage]:
    """All that is done to a file, or to a folder, of a state."""
    file = str(path.relative_to(world.states[state]))
    twin = outside / "twin" / file
    if path.is_dir():
        is_named = file in ("run", "cache", "handed")  # by the command itself: a link there is the user's own
        return (
            each
            for each in damages_of_folder(twin)
            if not is_named or each.kind != "link" or each.detail == "to itself"
        )
    others = {name: other for name, other in exchanges(world, state, file).items() if other.exists()}
    return damages_of_file(path, others, twin, outside / "decoy")


def is_damaged_in_stopped_run(path: Path, world: World, state: str) -> bool:
    """Where the finished one lacks the file; of others, once, those that a run reads again that goes on."""
    file = str(path.relative_to(world.states[state]))
    if not path.is_file():
        return False
    if state == "training" and any(fnmatch(file, pattern) for pattern in READ_TO_GO_ON):
        return True
    return "run/rounds" not in file and not (world.states["finished"] / file).exists()


def exchanges(world: World, state: str, file: str) -> dict[str, Path]:
    """What a file may be exchanged with: another run's, stage's and round's, and one of another format."""
    place, name = world.states[state], Path(file).name
    other = re.sub(r"stages/1/|stage-1\.", lambda found: found[0].replace("1", "3"), file)
    if other == file:
        other = re.sub(r"stages/3/|stage-3\.", lambda found: found[0].replace("3", "1"), file)
    formats = {"safetensors": "run/encoder.safetensors", "h5": "cache/run/stage-1.h5", "json": "run/run.json"}
    finished = world.states["finished"]
    found = {
        "another seed's": world.states["other"] / file,
        "another stage's": place / other,
        "another round's": place / file.replace("run/stages", "run/rounds/1/stages"),
        "the run's": finished / "run" / name,
        "the finished run's": finished / file,
        "a stage's": finished / "run" / "stages" / "1" / name,
        **{f"of format {ending}": finished / each for ending, each in formats.items() if not name.endswith(ending)},
    }
    return {why: path for why, path in found.items() if path != place / file}


PLANTED: dict[str, tuple[str, ...]] = {
    "extract": ("features.npy", "features.npy.part", "features.index.npz", "features.index.npz.part"),
    "cache export": ("frames.npy", "frames.npy.part", "frames.index.npz", "frames.index.npz.part"),
    "export": ("handed",),
    "init": ("new.toml", "new.toml.tmp"),
    "report": ("run/report.html.tmp", "run/plots/losses.svg.tmp"),
    "probe": ("run/probes/speaker.json.tmp",),
    "run": (
        *(f"run/{name}.tmp" for name in ("run.json", "config.toml", "machine.json", "encoder.safetensors")),
        *(f"run/stages/2/{name}.tmp" for name in ("weights.safetensors", "checkpoint.safetensors")),
        *("run/stages/3/config.toml.tmp", "run/stages/3/metrics.jsonl", "run/stages/3/memory.jsonl"),
        *(f"cache/run/stage-2.h5{ending}" for ending in (".part", ".journal", ".copying")),
        *(
            "cache/run/stage-3.h5.part",
            "cache/run/stage-3.h5.journal",
            "cache/run/stage-3.h5",
            "cache/run/owner.json.tmp",
        ),
    ),
}
"""Where commands write, or might: a link that leads out of the run lies there."""


def planted(state: str, twin: Path) -> Iterator[Case]:
    """A user's own notes everywhere; and links where commands write."""

    def notes(place: Path) -> None:
        for folder in [path for path in place.rglob("*") if path.is_dir() and not path.is_symlink()]:
            (folder / "notes.txt").write_text("mine")

    known = commands_on_handed() if state == "handed" else ALL
    for command in known:
        yield Case(state, command, ".", Damage("notes", "in every folder", notes))
        for name in PLANTED.get(command, ()) if state in ("training", "caching") or command != "run" else ():
            for said, target in (("a file", twin / "run" / "log.txt"), ("nothing", twin / "absent")):
                link = partial(plant, name, target)
                yield Case(state, command, ".", Damage("planted link", f"{name} to {said}", link))
    for name in PLANTED["run"] if state == "finished" else ():
        link = partial(plant, name, twin / "run" / "log.txt")
        yield Case(state, "run --overwrite", ".", Damage("planted link", f"{name} to a file", link))


def plant(name: str, target: Path, place: Path) -> None:
    link = place / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def some_cases(world: World, outside: Path) -> Iterator[Case]:
    """Those of SHORT."""
    for file, kind, names in SHORT:
        state = "handed" if file.startswith("handed") else "finished"
        if file == ".":
            every = [case for case in planted(state, outside / "twin") if case.damage.kind == kind]
            yield from (next(case for case in every if case.command == name) for name in names)
        else:
            every = damages_of(world.states[state] / file, world, state, outside)
            damage = next(each for each in every if f"{each.kind}: {each.detail}".startswith(kind))
            yield from (Case(state, name, file, damage) for name in names)


def try_cases(chosen: list[Case], world: World) -> dict[str, str]:
    """Name of each case to its outcome. Prints faults as they come, and tables in the end."""
    found: dict[str, str] = {}
    reference = cache(partial(run_undisturbed, world))
    for case in chosen:
        outcome, said = try_case(case, world, reference)
        found[case.name] = outcome
        if outcome.startswith("FAULT"):
            print(f"{outcome}\n    {case.name}\n    {said}\n    again: --only {shlex.quote(case.name)}", flush=True)
    print_table("damage", [(case.damage.kind, found[case.name]) for case in chosen])
    print_table("command", [(case.command, found[case.name]) for case in chosen])
    faults = Counter(outcome.split(":")[1].strip() for outcome in found.values() if outcome.startswith("FAULT"))
    print(*(f"{count:5} {what}" for what, count in faults.most_common()), sep="\n")
    return found


@dataclass(frozen=True, slots=True)
class Reference:
    """How a command ends on a whole run."""

    code: int | None
    made: Any


def run_undisturbed(world: World, state: str, name: str) -> Reference:
    command, place = command_of(state, name), world.enter(state)
    ended = call(command.action, place, world.streams)
    assert ended.code in (0, 2), f"{name} on {state}: {ended}"
    return Reference(ended.code, command.made(place, ended) if ended.code == 0 else None)


def command_of(state: str, name: str) -> Command:
    return (commands_on_handed() if state == "handed" else commands(ROUNDS))[name]


def try_case(case: Case, world: World, reference: Callable[[str, str], Reference]) -> tuple[str, str]:
    """`right`, `refused`, or FAULT and what it is; and what the command said."""
    command, place = command_of(case.state, case.command), world.enter(case.state)
    case.damage.do(place / case.file)
    own = {path: path.read_bytes() for path in place.rglob("notes.txt")}
    before, files = around(world), files_of(place)
    ended = call(command.action, place, world.streams)
    said = " / ".join(line for line in (ended.err or ended.out).splitlines()[-3:])[:400]
    after = around(world)
    if (world.base / "outside" / "mark").exists():
        (world.base / "outside" / "mark").unlink()
        return "FAULT: foreign code was called", said
    if changed := sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)):
        restore(world)
        return f"FAULT: changed what is not the run's: {max(changed, key=len)}", said
    if gone := [path for path in own if not path.exists() or path.read_bytes() != own[path]]:
        return f"FAULT: deleted a user's own file: {gone[0].relative_to(place)}", said
    new = {entry.name for entry in place.iterdir()} - {"data", "run", "cache", "handed", *command.outputs}
    if case.file == ".":
        new -= {Path(case.damage.detail.partition(" to ")[0]).name}
    if new:
        return f"FAULT: left over: {sorted(new)[0]}", said
    if not command.writes and (touched := [path for path, at in files.items() if files_of(place).get(path) != at]):
        return f"FAULT: changed the run, which it should read: {touched[0].relative_to(place)}", said
    if fault := fault_of_end(ended):
        return f"FAULT: {fault}", said
    if ended.code == 2:
        return "refused", said
    try:
        made = command.made(place, ended)
    except Exception as error:
        return f"FAULT: what it made cannot be read: {error!r}", said
    untouched = files_of(place).get(place / case.file) == files.get(place / case.file)
    expected = reference(case.state, case.command)
    if expected.code != 0 and not is_lenient(case):
        return "FAULT: succeeded where a whole run is refused", said
    wrong = "" if is_lenient(case) else difference(case, made, expected.made, untouched)
    return (f"FAULT: wrong result: {wrong}", said) if wrong else ("right", said)


def fault_of_end(ended: Ended) -> str:
    """Empty where the command has ended as it should."""
    if ended.code is None:
        return "hangs"
    if ended.code < 0:
        return f"ended by signal {-ended.code}"
    if "Traceback" in ended.err + ended.out:
        lines = (ended.err + ended.out).splitlines()
        raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
        return f"traceback: {(raised or ['of an unknown error'])[-1][:120]}"
    if ended.code not in (0, 2):
        return f"exit code {ended.code}"
    lines = [line for line in ended.err.splitlines() if line.strip()]
    sentences = [line for line in lines if line.startswith("layerwise: ")]
    if ended.code == 2 and sentences != lines[-1:]:
        return f"not one sentence in the end: {len(sentences)} in {len(lines)} lines"
    if any(len(line) > 2000 for line in lines):
        return f"a sentence of {max(map(len, lines))} letters"
    if odd := re.search(r"[\x00-\x08\x0b-\x1f\x7f\x9b]", ended.err + ended.out):
        return f"control characters reach the terminal: {odd[0]!r}"
    return ""


def is_lenient(case: Case) -> bool:
    """Where success is right, whatever the result: a configuration that is itself what the command is given; a probe that
    was never made, or was removed."""
    given = case.command in ("plan", "init") and case.file in ("run/config.toml", "handed/config.toml")
    without_it = case.damage.kind == "missing" or case.damage.detail in ("dangling", "to itself")
    probes = case.command in ("report", "export") and case.file.startswith("run/probes")
    # It takes a file, and a folder that is no run, too.
    named = case.command == "cache ls" and (case.file == "run" or (case.file == "run/run.json" and without_it))
    unknown = case.command == "report" and case.file == "run/machine.json" and without_it  # so the page says
    deleted = case.command == "status" and (  # as a user may
        case.file == "run/rounds" or (case.file == "run/rounds/1/run.json" and without_it)
    )
    return given or named or unknown or deleted or (probes and (without_it or case.file == "run/probes"))


def difference(case: Case, made: Any, expected: Any, untouched: bool) -> str:
    """What of the result is wrong; empty where nothing is.

    untouched: the command has left the damaged file as it was.
    """
    if case.command == "report" and isinstance(made, tuple):
        logs = case.file.endswith((".jsonl", "log.txt")) or case.damage.kind in ("missing", "emptied", "link")
        made, expected = (made[:1], expected[:1]) if logs else (made, expected)
        if "Missing, and so not drawn:" in made[0]:
            made, expected = without_figures(made[0]), without_figures(expected[0])
    if case.command in ("report", "status") and case.file.startswith("cache"):
        made, expected = without_caches(made), without_caches(expected)  # which are not there, or not the run's
    if case.command == "cache verify":
        return verified(case, made, expected)
    if case.command == "cache rm":
        stays = case.file in made and case.damage.kind != "directory"  # a folder is not the run's
        return ", ".join(set(made) - {case.file}) or (f"{case.file} is still there" if stays else "")
    if isinstance(made, dict) and isinstance(expected, dict):
        wrong = [key for key in sorted(made.keys() | expected.keys()) if made.get(key) != expected.get(key)]
        if case.command == "cache ls":
            entry = made.get(case.file)
            if entry is None or entry["state"] != "sealed":
                wrong = [key for key in wrong if key != case.file]
            if case.file.startswith("cache") and not case.file.endswith(".h5"):
                wrong = [key for key in wrong if key in made and made[key]["state"] == "sealed"]
        if case.command == "run" and untouched:
            wrong = [key for key in wrong if key != case.file]
        return ", ".join(wrong[:3])
    return "" if made == expected else "it differs"


def without_figures(page: str) -> str:
    """A report without its drawings, their headings, and the line that says which are missing."""
    page = re.sub(r'<p class="sub">Missing, and so not drawn:.*?</p>\s*', "", page)
    return re.sub(r"<figure>.*?</figure>\s*", "", page, flags=re.DOTALL)


def without_caches(made: Any) -> Any:
    """The page of a report, or what status says, without a word on the caches."""
    if isinstance(made, tuple):
        return re.sub(r"<figure>\s*<h\d>Activation caches</h\d>.*?</figure>\s*", "", made[0], flags=re.DOTALL)
    made = copy.deepcopy(made)
    stages = [*made["stages"], *(stage for each in made.get("rounds", ()) for stage in each["stages"])]
    for stage in stages:
        stage["cache"] = None
    return made


def verified(case: Case, made: str, expected: str) -> str:
    """A cache that is damaged must not be called whole, and others be called so."""
    lines, damaged = made.splitlines(), f"{case.file}: whole"
    if case.file.endswith(".h5") and case.damage.kind != "link" and any(line.endswith(damaged) for line in lines):
        return "a damaged cache is called whole"
    missing = [line for line in expected.splitlines() if case.file not in line and line not in lines]
    is_folder = case.file.startswith("cache") and "." not in case.file
    return f"not said: {missing[0]}" if missing and not is_folder else ""


def around(world: World) -> dict[str, tuple[int, ...] | str]:
    """Everything beside the arena, with inode, size and times: whatever is written, renamed or created shows."""
    return tree_of(world.base, {world.arena, world.streams})


def tree_of(folder: Path, without: set[Path]) -> dict[str, tuple[int, ...] | str]:
    found: dict[str, tuple[int, ...] | str] = {}
    waiting = [folder]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            path = Path(entry.path)
            if path in without:
                continue
            found[str(path.relative_to(folder))] = signature(entry.stat(follow_symlinks=False))
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
    return found


def signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def files_of(place: Path) -> dict[Path, tuple[int, ...]]:
    """Plain files of the run and its caches, locks left out."""
    statuses = {path: path.lstat() for folder in ("run", "cache") for path in (place / folder).rglob("*")}
    return {
        path: (status.st_size, status.st_mtime_ns)
        for path, status in statuses.items()
        if stat.S_ISREG(status.st_mode) and not path.name.endswith("lock")
    }


def restore(world: World) -> None:
    """Lays everything out anew that a command has changed beside the run."""
    outside = world.base / "outside"
    shutil.rmtree(outside)
    lay_out_what_is_not_the_runs(world)
    sys.path.pop()


def print_table(title: str, outcomes: list[tuple[str, str]]) -> None:
    counts = Counter((row, "FAULT" if outcome.startswith("FAULT") else outcome) for row, outcome in outcomes)
    columns = ("right", "refused", "FAULT")
    print(f"\n{title:<18} {'right bits':>10} {'refused':>10} {'FAULT':>10}")
    for row in dict.fromkeys(row for row, _ in outcomes):
        print(f"{row:<18}" + "".join(f" {counts[row, column]:>10}" for column in columns))
    print(
        f"{'in all':<18}" + "".join(f" {sum(counts[row, c] for row in {r for r, _ in outcomes}):>10}" for c in columns)
    )


if __name__ == "__main__":
    main()
