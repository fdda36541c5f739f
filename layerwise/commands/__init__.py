"""The command line: options in, library calls, text out. Errors become one sentence and an exit code here."""

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import click
from click.shell_completion import get_completion_class

from layerwise.commands.before_run import doctor, init, plan, recipes
from layerwise.commands.cache import cache
from layerwise.commands.encoder import export, extract
from layerwise.commands.evaluate import compare, probe
from layerwise.commands.run import run, task
from layerwise.commands.status import report, status
from layerwise.errors import ConfigError, Interrupted, LayerwiseError, ReaderGone, ToldElsewhere
from layerwise.report.printing import answer_exactly, remark
from layerwise.screen import abridged, refuse_loss, standard_streams_may_fail
from layerwise.stop import too_late_to_stop
from layerwise.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="layerwise")
def layerwise() -> None:
    """Train deep networks that do not fit on the GPU, one gradient-isolated module at a time."""


@layerwise.command(short_help="Print a script that completes commands and options in your shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands and options of layerwise on the tab key.

    \b
    bash  layerwise completion bash > ~/.layerwise-completion.bash
          echo '. ~/.layerwise-completion.bash' >> ~/.bashrc
    zsh   layerwise completion zsh > ~/.layerwise-completion.zsh
          echo '. ~/.layerwise-completion.zsh' >> ~/.zshrc    (behind compinit)
    fish  layerwise completion fish > ~/.config/fish/completions/layerwise.fish

    Bash must be 4.4 or newer.
    """
    complete = get_completion_class(shell)
    assert complete is not None  # click knows all three
    answer_exactly(complete(context.find_root().command, {}, "layerwise", "_LAYERWISE_COMPLETE").source())


for command in (doctor, recipes, init, plan, run, task, status, probe, compare, report, extract, export, cache):
    layerwise.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 done, 2 the request cannot be met, 75 stopped and resumable, 1 a defect of ours.

    141, as of other programs: whoever read what it was to print has gone.
    """
    if arguments is None:
        _start_again_in_utf8()
    # What decoders have to say about a file is none of the user's business: a file that they cannot read is named.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with standard_streams_may_fail() as out:
        try:
            exit_code = _exit_code(arguments)
        except KeyboardInterrupt:  # another one, while what became of the first was being said
            exit_code = Interrupted.exit_code
        if arguments is None:  # and it is the whole process that ends
            too_late_to_stop()
        if exit_code in (0, Interrupted.exit_code) and out.lost and out.lost.errno not in (errno.EPIPE, errno.EBADF):
            _say(f"The standard output could not be written ({out.lost.strerror}); all else is as it would be.")
        if joining := sys.modules.get("layerwise.engines.torchrun"):  # imports torch, which most commands do without
            joining.leave(exit_code)
    sys.exit(exit_code)


def _start_again_in_utf8() -> None:
    """In place of this process, where the locale would have UTF-8 names of files read in another encoding, as other names.

    The terminal still gets its own encoding; a command that names files in that one is left in it.
    """
    in_that_one = any(_undecoded(os.fsencode(word).decode(errors="surrogateescape")) for word in sys.argv)
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1" and not in_that_one:
        screen = {"PYTHONIOENCODING": sys.stdout.encoding} if sys.stdout else {}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**screen, **os.environ, "PYTHONUTF8": "1"})


def _undecoded(argument: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in argument)


def _exit_code(arguments: Sequence[str] | None) -> int:
    try:
        if wrong := next(filter(_undecoded, sys.argv[1:] if arguments is None else arguments), None):
            raise ConfigError(f"{wrong} is not UTF-8, as names must be here; rename it, or give a link that is.")
        # Without standalone mode click raises its errors, and returns the code of --help and --version.
        code = layerwise.main(arguments, prog_name="layerwise", standalone_mode=False)
        if code is not None:
            refuse_loss(sys.stdout)
        return code or 0
    except (ToldElsewhere, ReaderGone) as error:
        return error.exit_code
    except LayerwiseError as error:
        _say(str(error))
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        message = error.format_message()
        _say(message if message.endswith((".", "?", ")")) else f"{message}.")
        return 2
    except (click.Abort, KeyboardInterrupt):
        _say("Stopped by Ctrl-C before anything had to be saved; start the same command again.")
        return Interrupted.exit_code
    except SystemExit as left:  # click leaves so behind completions
        return left.code if isinstance(left.code, int) else int(bool(left.code))
    except OSError as error:
        _say(
            f"{error.filename or 'The system'}: {error.strerror or error}; mend that and start the same command again."
        )
        return LayerwiseError.exit_code
    except Exception:
        for line in traceback.format_exc().splitlines():
            remark(line)
        _say("This is a defect of layerwise, not of your request; please report it with the lines above.")
        return 1


def _say(sentence: str) -> None:
    # click lists what it would take below each other.
    remark(abridged(f"layerwise: {' '.join(map(str.strip, sentence.splitlines()))}"))
