"""The screen is not the run: what cannot be shown, or is read no longer, changes nothing of what is trained."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from forked_python import ForkedPython
from safetensors.numpy import load_file

from layerwise.commands import main
from layerwise.report.printing import say
from layerwise.report.progress import LogFile
from layerwise.report.tables import table
from layerwise.screen import Screen, printable

TINY = [
    *("--set", "net.width=8", "--set", "net.context=0", "--set", "net.kernels=[10,8]", "--set", "net.strides=[5,4]"),
    *("--set", "net.paddings=[2,2]", "--set", "objective.steps=3", "--set", "objective.anchors=16", "--device", "cpu"),
    *("--set", "data.sample_rate=8000", "--set", "data.window=1600", "--max-epochs", "3", "--batch-size", "4"),
]
Start = Callable[..., subprocess.Popen]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def start(few_digits: Path) -> Start:
    """start(out, stdout=..., stderr=...): a run in a process of its own, with two stages."""

    def begin(out: str, **streams: Any) -> subprocess.Popen:
        command = [sys.executable, "-m", "layerwise", "run", "--data", f"fsdd:{few_digits}", *TINY, "--out", out]
        return ForkedPython(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **streams)

    return begin


@contextmanager
def full() -> Iterator[IO[str]]:
    """A stream on a disk without room."""
    with open("/dev/full", "w", encoding="utf-8") as stream:
        yield stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is left in it


@contextmanager
def unread() -> Iterator[IO[str]]:
    """A pipe whose reader has gone, as in `| head`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as stream:
        yield stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def bits(out: str) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(Path(out, "encoder.safetensors")).items()}


def test_a_run_whose_output_fails_trains_to_the_end(start: Start) -> None:
    assert start("seen", stdout=subprocess.DEVNULL).wait(60) == 0
    with full() as no_room, unread() as nobody:
        for name, streams in {
            "full": {"stdout": no_room, "stderr": subprocess.PIPE},
            "head": {"stdout": nobody, "stderr": no_room},
        }.items():
            process = start(name, **streams)
            said = (process.communicate(timeout=60)[1] or b"").decode()
            assert (process.returncode, bits(name) == bits("seen")) == (0, True), name
            assert ("No space left on device" in said) == (name == "full")


@pytest.mark.parametrize(("ignored", "code"), [(True, 0), (False, 75)])
def test_a_terminal_that_closes_ends_no_run_that_ignores_it_and_saves_another(
    start: Start, tmp_path: Path, ignored: bool, code: int
) -> None:
    master, slave = pty.openpty()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        process = start("run", stdin=slave, stdout=slave, stderr=slave)
    finally:
        signal.signal(signal.SIGHUP, before)
        os.close(slave)
    while b"stage" not in os.read(master, 1000):
        pass
    os.close(master)
    process.send_signal(signal.SIGHUP)  # which reaches only those whose terminal it is: here it is that of no one
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == code
    log = Path("run/log.txt").read_text(encoding="utf-8")
    assert ("Stopped by SIGHUP" in log, "stage 2: " in log) == (not ignored, ignored)


def test_what_only_prints_does_not_claim_success(
    small_run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["status", small_run, "--json"], ["status", small_run], ["recipes", "demo"], ["--help"]):
        with full() as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert exit_code(*arguments) == 2
        assert capfd.readouterr().err == "layerwise: The output cannot be written: No space left on device.\n"
        with unread() as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert exit_code(*arguments) == 141  # quietly, as a death by SIGPIPE
        assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", None)  # closed: >&-
    assert exit_code("status", small_run, "--json") == 2


def test_what_has_done_its_work_says_that_its_output_is_lost(
    few_digits: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with full() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_code("init", "--data", f"fsdd:{few_digits}") == 0
    assert "could not be written (No space left on device)" in capfd.readouterr().err
    assert Path("config.toml").exists()


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "cp1252", "koi8-r", "shift_jis", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(encoding: str) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding)
    print("é 日 \udce9", file=Screen(stream), flush=True)
    shown = {"ascii": "\\xe9 \\u65e5", "koi8-r": "\\xe9 \\u65e5", "shift_jis": "\\xe9 日", "utf-8": "é 日"}
    shown |= dict.fromkeys(("iso-8859-1", "cp1252"), "é \\u65e5")
    assert written.getvalue().decode(encoding) == f"{shown[encoding]} \\udce9\n"


def test_a_stream_that_is_given_up_holds_on_to_nothing() -> None:
    with full() as stream:
        screen = Screen(stream)
        print("lost", file=screen, flush=True)
        assert screen.lost is not None
        assert (screen.lost.errno, screen.lost.__traceback__) == (errno.ENOSPC, None)  # a traceback has all tensors


def test_a_log_without_room_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    (tmp_path / "log.txt").symlink_to("/dev/full")
    LogFile(tmp_path / "log.txt").write("lost")


HOSTILE = "a\x1b[31m\n\x9b\u202e\x7f[b]:smile:"
SHOWN = "a\\x1b[31m\\n\\x9b\\u202e\\x7f[b]:smile:"


def test_control_characters_are_shown_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert printable(HOSTILE) == SHOWN
    (tmp_path / "run.json").touch()
    LogFile(tmp_path / "log.txt").write(HOSTILE)
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith(f" {SHOWN}\n")
    say(HOSTILE, table([{"name": HOSTILE, "other": "x"}]))
    assert capfd.readouterr().out.splitlines()[::2] == [SHOWN, f"{SHOWN}  x    "]
    assert exit_code("status", HOSTILE.replace("\n", "")) == 2
    assert capfd.readouterr().err.startswith(
        f"layerwise: There is no run directory {SHOWN.replace(chr(92) + 'n', '')};"
    )


def test_names_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "layerwise", "status", "é"]
    done = subprocess.run(command, env={**os.environ, **locale}, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"layerwise: There is no run directory \\xe9;")  # one letter, that ASCII lacks


def test_a_name_that_is_no_text_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("run", "--out", "caf\udce9") == 2
    assert capfd.readouterr().err == (
        "layerwise: caf\\udce9 is not UTF-8, as names must be here; rename it, or give a link that is.\n"
    )


def test_a_value_of_a_hundred_thousand_letters_is_not_repeated_whole(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'cache.dtype = "{"x" * 100_000}"', encoding="utf-8")
    assert exit_code("plan", "--config", str(config)) == 2
    said = capfd.readouterr().err
    assert len(said) < 1100 and said.startswith("layerwise: ") and "letters left out" in said
    assert "--cache-dtype" in said and said.endswith("xxx'.\n")
