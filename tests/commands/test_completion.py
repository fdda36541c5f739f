"""`layerwise completion`: what the tab key offers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from layerwise.commands import layerwise as group
from layerwise.commands import main


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_for_each_shell(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["completion", shell])
    out, err = capfd.readouterr()
    assert (stopped.value.code, err) == (0, "")
    assert f"_LAYERWISE_COMPLETE={shell}_complete" in out


@pytest.mark.parametrize(
    ("before", "typed", "offered"),
    [
        ([], "ru", {"run"}),
        ([], "ta", set()),  # for batch jobs, not for people
        (["cache"], "ve", {"verify"}),
        (["run"], "--gpu", {"--gpu-mem"}),
        (["completion"], "b", {"bash"}),
    ],
)
def test_commands_and_options_are_completed(before: list[str], typed: str, offered: set[str]) -> None:
    completion = BashComplete(group, {}, "layerwise", "_LAYERWISE_COMPLETE")
    assert {item.value for item in completion.get_completions(before, typed)} == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_itself_completes_with_the_script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "bash"])
    (tmp_path / "completion.bash").write_text(capfd.readouterr().out)
    (tmp_path / "layerwise").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m layerwise "$@"\n')
    (tmp_path / "layerwise").chmod(0o755)
    typed = "\n".join(
        [
            f". {tmp_path}/completion.bash",
            "COMP_WORDS=(layerwise ru) COMP_CWORD=1",
            "_layerwise_completion layerwise",
            'echo "${COMPREPLY[@]}"',
        ]
    )
    package = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(package)}
    done = subprocess.run(["bash", "--norc", "-c", typed], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "run", done.stderr
