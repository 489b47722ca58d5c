"""The command line: `entropyprune run | calibrate | show | serve | eval | doctor | list`."""

from __future__ import annotations

import os
import sys

from entropyprune import __version__
from ep_core.errors import EntropyPruneError

try:
    import click

    from entropyprune.cli.calibrate import calibrate
    from entropyprune.cli.doctor import doctor
    from entropyprune.cli.eval import evaluate
    from entropyprune.cli.list import list_
    from entropyprune.cli.run import run
    from entropyprune.cli.serve import serve
    from entropyprune.cli.show import show
except ModuleNotFoundError as error:
    if error.name not in ("click", "rich", "PIL"):
        raise
    sys.exit(  # one line instead of a traceback for a bare installation
        f"entropyprune: error: the command line needs {error.name}; "
        "run pip install 'entropyprune[cli]'"
    )


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="entropyprune")
@click.pass_context
def cli(context: click.Context) -> None:
    """Prune redundant visual tokens inside vision-language models."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (run, calibrate, show, serve, evaluate, doctor, list_):
    cli.add_command(command)


def main() -> None:
    """Run the command line; every user error is one line on stderr and exit status 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # progress bars are for people
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        status = cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(130)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "entropyprune"
        _fail(f"{error.format_message()} See {path} --help.")
    except click.ClickException as error:
        _fail(error.format_message())
    except EntropyPruneError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(1)
    except OSError as error:
        _fail(str(error))
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    click.echo(f"entropyprune: error: {message}", err=True)
    sys.exit(2)
