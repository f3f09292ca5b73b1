"""The `bitdelta` command. Each command imports what it needs when it runs, so that `--help` stays fast."""

from __future__ import annotations

import sys

import typer

from deployments.commands import delta, repository, serving

app = typer.Typer(
    name="bitdelta",
    help="Serve hundreds of full fine-tunes of one base model as small deltas.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for group in (delta, repository, serving):
    group.register(app)


def main() -> None:
    """Run the command; a foreseen error is one line on stderr and exit code 1, never a traceback."""
    from bitdelta_core.errors import BitDeltaError
    from storage.errors import StorageError

    try:
        app()
    except (BitDeltaError, StorageError) as error:
        print(f"bitdelta: {_located(error)}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a path that may not be looked at
        print(f"bitdelta: {error.filename or 'input and output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


def _located(error: Exception) -> str:
    """The message, with the delta that it is about in front unless it says so itself."""
    delta = getattr(error, "delta", None)
    return f"{delta}: {error}" if delta and delta not in str(error) else str(error)


if __name__ == "__main__":
    main()
