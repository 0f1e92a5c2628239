"""A folder that is written to, and those below it: checked before anything in them is made or removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cache_format.errors import InputError, StorageError
from cache_format.storage.commit import TEMPORARY_SUFFIX, make_folder, remove_temporaries
from cache_format.storage.lock import LOCK_NAME
from cache_format.storage.paths import inside


def refuse_foreign(out: Path, kind: str, marker: str, own: Iterable[str], option: str = "") -> None:
    """Refuse to write into what is not ours: a file, or a folder that is neither empty nor begun by us.

    Args:
        out: a folder that may not be there yet.
        kind: of what is written, with its article, such as ``a cache``.
        marker: the file that tells that it was begun.
        own: what a process that was killed before it wrote the marker may leave.
        option: that named ``out``, for the message.

    Raises:
        InputError: it is a file, or has other names and no marker.
        StorageError: the operating system refused.
    """
    where = f"{option} {out}".lstrip()
    try:
        names = os.listdir(out)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise InputError(f"{where} is a file; name a new or empty folder") from None
    except OSError as error:
        raise StorageError(out, "list", error) from error
    known = {marker, LOCK_NAME, *own}
    strange = sorted(name for name in names if name not in known and not name.endswith(TEMPORARY_SUFFIX))
    # The marker is looked for after the names were read: another process may begin in between.
    if strange and not os.path.lexists(out / marker):
        raise InputError(f"{where} is not empty and not {kind} (it has {strange[0]!r}); name another folder")


def begin_folders(root: Path, names: Iterable[str]) -> None:
    """Make ``root`` and the folders ``names`` below it, and remove what killed processes left half-written there.

    Raises:
        CacheError: one of them leads out of ``root`` through a symbolic link; nothing was touched.
        StorageError: the operating system refused.
    """
    # All of them are looked at first: a link would lead both making and removing out of root.
    for path in (root, *[inside(root, name) for name in dict.fromkeys(names)]):
        make_folder(path)
        remove_temporaries(path)


def empty_but_for_lock(folder: Path) -> None:
    """Remove all that lies in ``folder`` but its lock, which whoever holds it gives back last; what resists stays."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_NAME:
            with suppress(OSError):
                path.unlink()
