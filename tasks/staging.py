"""Directories under `staging/`, where versions are made: each belongs to a flow run or a process, and goes once that is gone.

A run that waits for a person has no process and comes back to what it staged, so whoever stages the same version meanwhile must
leave it alone.
"""

import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

_PROCESS: Final = "pid"
_OWNED = re.compile(r"(?P<owner>.+)-[0-9a-f]{8}(-delivered)?")


@dataclass(frozen=True)
class Owner:
    """Who stages a version: a flow run by its id, or this process. is_running: whether another run may still need what it
    staged; who cannot ask takes it that it may.
    """

    run: str | None = None
    is_running: Callable[[str], bool] = lambda run: True

    @property
    def name(self) -> str:
        return self.run or f"{_PROCESS}{os.getpid()}"

    def may_remove(self, other: str) -> bool:
        """Whether nobody needs any more what that owner staged: it is this one, which begins anew, or it is gone."""
        if other == self.name:
            return True
        process = other.removeprefix(_PROCESS)
        if process != other and process.isdigit():
            return not psutil.pid_exists(int(process))
        return not self.is_running(other)


THIS_PROCESS: Final = Owner()


def fresh_directory(root: Path, network: str, version: int, owner: Owner) -> Path:
    """A new, empty `staging/<network>-<version>-<owner>-<number>`. What owners that are gone left of this version goes."""
    prefix = f"{network}-{version}-"
    for left in (root / "staging").glob(f"{prefix}*"):
        found = _OWNED.fullmatch(left.name.removeprefix(prefix))
        if found is None or owner.may_remove(found["owner"]):
            shutil.rmtree(left, ignore_errors=True)
    directory = root / "staging" / f"{prefix}{owner.name}-{uuid.uuid4().hex[:8]}"
    directory.mkdir(parents=True)
    return directory
