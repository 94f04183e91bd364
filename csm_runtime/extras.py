"""Packages the command line needs and the library does not, asked for by name where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, extra: str = "cli") -> Any:
    """Import an optional package.

    Raises:
        ImportError: it is not there; says which extra brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'{package} cannot be imported ({error}); pip install "csm-kernels[{extra}]"') from error
