"""`layerwise completion`: commands and options on the tab key."""

import click
from click.shell_completion import get_completion_class


@click.command(short_help="Print a script that completes commands and options in your shell.")
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
    click.echo(complete(context.find_root().command, {}, "layerwise", "_LAYERWISE_COMPLETE").source())
