"""Where this program keeps settings, caches and sessions. Knows names of folders, not what is in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from swaa_local.errors import SWAAError

_PROGRAM = "swaa-local"


class NoHome(SWAAError, OSError):
    """There is no home directory in which the folder could be."""


def config_dir() -> Path:
    """`$XDG_CONFIG_HOME/swaa-local`, or what the system has for settings. Raises `NoHome`; so do the others."""
    import platformdirs

    return _folder(platformdirs.user_config_path, "XDG_CONFIG_HOME")


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/swaa-local`, or what the system has for caches."""
    import platformdirs

    return _folder(platformdirs.user_cache_path, "XDG_CACHE_HOME")


def state_dir() -> Path:
    """`$XDG_STATE_HOME/swaa-local`, or what the system has for what programs remember."""
    import platformdirs

    return _folder(platformdirs.user_state_path, "XDG_STATE_HOME")


def _folder(find: Callable[[str], Path], variable: str) -> Path:
    try:
        return Path(find(_PROGRAM))
    except RuntimeError:
        raise NoHome(f"this user has no home directory; set HOME or {variable}") from None
