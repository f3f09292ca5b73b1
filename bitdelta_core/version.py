"""The version of the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    """A checkout that is only on the path, as on a machine where nothing can be installed, has no metadata."""
    try:
        return version("bitdelta")
    except PackageNotFoundError:
        return "0+checkout"


VERSION = _installed()
