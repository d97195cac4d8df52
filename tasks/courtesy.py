"""A network that is being brought up steps aside for those that answer: its imports and its compilation take whole cores for a
second or two, on which requests would wait.

Standard library only, because the serving environment imports this module before anything heavy.
"""

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Final

NICE: Final = 10  # about a tenth of a core where all of them are busy: brought up late rather than never
_CAP_SYS_NICE: Final = 23  # bit of linux/capability.h


def step_aside(nice: int = NICE) -> int | None:
    """Lower the priority of this process, if it may be raised again: what to hand to `come_back`. None where nothing was
    done: an ordinary account may lower its priority but not raise it, and would serve with the low one.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    if before >= nice or not may_return_to(before):
        return None
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    return before


def come_back(before: int | None) -> None:
    """The priority from before, for every thread: those that were started meanwhile have inherited the low one."""
    if before is None:
        return
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, int(thread.name), before)


def may_return_to(nice: int) -> bool:
    """Whether this process may raise its priority to that: by capability, or by its limit (`ulimit -e`)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no Linux
        return False
    held = next((line for line in status.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    if int(held.split()[1], 16) >> _CAP_SYS_NICE & 1:
        return True
    return 20 - resource.getrlimit(resource.RLIMIT_NICE)[0] <= nice
