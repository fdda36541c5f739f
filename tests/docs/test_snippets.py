"""Every command and every piece of Python in the README and in docs/ works.

What is run and what is only parsed, and how small: see snippets.py. The blocks of a page run one after another, in a folder of
the page's own with recordings and pictures.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from snippets import PAGES, SMALL, Snippet, small, snippets

import layerwise
from layerwise import config as configuration
from layerwise import objectives
from layerwise.commands import layerwise as group
from layerwise.commands import main
from layerwise.data import open as demo
from layerwise.doctor import examine, host, torch_checks

TAKEN_FOR_GRANTED = {
    "docs/cache-and-disk.md": ["run", "--data", "speech:recordings"],
    "docs/encoder.md": ["run"],
    "docs/reference-command-line.md": ["run"],
}
"""The command that a page expects its reader to have typed before."""

FOREIGN = {"--gres", "--requeue", "--open-mode", "--signal", "--account", "--nproc-per-node", "--max-restarts"}
FOREIGN |= {"--standalone", "--nthreads", "--memory-limit", "--resources"}
"""Options of sbatch, torchrun and dask that pages speak of."""

FOREIGN_COMMANDS = ("python ", "tensorboard ", "scancel ", "scontrol ", "sbatch ")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the pages call recordings, new_recordings and pictures."""
    rng = np.random.default_rng(0)
    for name in (f"recordings/{speaker}/{number}.wav" for speaker in ("ada", "bob", "eve") for number in range(5)):
        write_recording(tmp_path / name, rng)
    for name in ("new_recordings/1.wav", "new_recordings/2.wav"):
        write_recording(tmp_path / name, rng)
    for name in (f"pictures/{kind}/{number}.png" for kind in ("cats", "dogs") for number in range(6)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of another page
    return tmp_path


def write_recording(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * rng.standard_normal(8000), 16_000)


@pytest.fixture
def small_everything(half_resnet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of four speakers and half a ResNet-18; small options in Python too; objectives that a page registers are forgotten
    after it; doctor writes little to the disk, and asks the torch of this process."""
    monkeypatch.setattr(host, "WRITTEN", 10**6)
    monkeypatch.setattr(examine, "ask_torch", ask_torch_here)
    few = partial(demo.synthesise_corpus, speakers=4, utterances=6, seconds=1.0)
    monkeypatch.setattr(demo, "synthesise_corpus", few)
    monkeypatch.setattr(objectives, "_BUILD", dict(objectives._BUILD))
    resolve = layerwise.resolve
    monkeypatch.setattr(
        layerwise,
        "resolve",
        lambda recipe=None, config_file=None, overrides=None: resolve(
            recipe, config_file, {**(overrides or {}), **SMALL}
        ),
    )


def ask_torch_here() -> torch_checks.TorchReport:
    """What another process would say (tests/doctor starts one)."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        torch_checks.describe()
    return torch_checks._report(said.getvalue(), "")


@pytest.mark.parametrize("page", [page for page in PAGES if any(not each.parsed_only for each in snippets(page))])
def test_what_a_page_shows_works(page: str, folder: Path, small_everything: None, capfd: pytest.CaptureFixture) -> None:
    if page in TAKEN_FOR_GRANTED:
        run_command(TAKEN_FOR_GRANTED[page], page, capfd)
    names: dict[str, object] = {}
    for snippet in snippets(page):
        if snippet.parsed_only:
            continue
        if snippet.language == "python":
            if named := re.match(r"# (\w+\.py)\n", snippet.text):
                Path(named[1]).write_text(snippet.text)
            exec(compile(snippet.text, str(snippet), "exec"), names)
        for command in snippet.commands:
            run_command(command, str(snippet), capfd)


def run_command(command: list[str], where: str, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(small(command))
    err = capfd.readouterr().err
    assert not stopped.value.code, f"{where}: layerwise {' '.join(command)}\n{err}"


ALL = [snippet for page in PAGES for snippet in snippets(page)]


@pytest.mark.parametrize("snippet", [each for each in ALL if each.parsed_only], ids=str)
def test_what_is_only_parsed_is_taken(snippet: Snippet, monkeypatch: pytest.MonkeyPatch) -> None:
    if snippet.language == "python":
        compile(snippet.text, str(snippet), "exec")
    for command in snippet.commands:
        parse(command, monkeypatch)


class Resolved(Exception):
    """The options of a command have become a configuration; nothing is done with it."""


def parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises what the command line would, for options that it does not know and values that it does not take."""
    resolve: Callable[..., object] = configuration.resolve

    def resolve_and_stop(*given: object) -> None:
        resolve(*given)
        raise Resolved

    with monkeypatch.context() as patched:
        patched.setattr(configuration, "resolve", resolve_and_stop)
        context, command = None, group
        while hasattr(command, "commands"):
            name, *arguments = arguments
            command = command.commands[name]
        context = command.make_context("layerwise", list(arguments))
        if any(parameter.name == "assignments" for parameter in command.params):
            with pytest.raises(Resolved):
                command.invoke(context)


@pytest.mark.parametrize(
    "wrong", [["run", "--no-such-option"], ["run", "--set", "net.widht=8"], ["cache", "rm", "--stage", "S", "runs/x"]]
)
def test_an_option_that_does_not_exist_would_be_found(wrong: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match=r"No such option|There is no option|not a valid integer"):
        parse(wrong, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_options_that_the_text_names_exist(page: str) -> None:
    """In the sentences too: every flag, and every key behind --set."""
    content = (Path(__file__).resolve().parents[2] / page).read_text()
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", content, flags=re.DOTALL | re.MULTILINE))
    spans = [span for span in spans if not span.startswith(FOREIGN_COMMANDS)]
    flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", span)}
    assert flags - known_flags() - FOREIGN == set()
    sections = "data|net|objective|training|memory|cache|engine"
    keys = {key for span in spans for key in re.findall(rf"\b(?:{sections})\.[a-z_]+", span)}
    known = {option.key for option in configuration.options()}
    assert {key for key in keys - known if not key.endswith((".md", ".py", ".svg", ".h", "._"))} == set()


def known_flags() -> set[str]:
    commands = [*group.commands.values(), *group.commands["cache"].commands.values(), group]
    return {flag for command in commands for parameter in command.params for flag in parameter.opts} | {"--help"}


def test_pages_have_snippets_of_every_kind() -> None:
    assert sum(each.language == "python" for each in ALL) >= 3
    assert sum(len(each.commands) for each in ALL if not each.parsed_only) >= 15
    assert any(each.parsed_only for each in ALL)
