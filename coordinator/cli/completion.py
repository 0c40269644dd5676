"""``drover completion bash|zsh|fish``"""

import click
from click.shell_completion import get_completion_class

from coordinator import cli


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print shell completion.

    \b
    bash:  eval "$(drover completion bash)"       in ~/.bashrc
    zsh:   eval "$(drover completion zsh)"        in ~/.zshrc
    fish:  drover completion fish | source        in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli.main, {}, "drover", "_DROVER_COMPLETE").source())
