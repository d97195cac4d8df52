"""A network that is being brought up steps aside for those that answer: its imports and its compilation take whole cores for a
second or two, on which requests would wait.

triton/launch.py has the process of a network begin at a low priority, before its interpreter starts; the backend comes back
when the network is compiled. Standard library only.
"""

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Final

# Niceness of a network that is being brought up: a tenth of a core where all of them are busy, so late rather than never.
ASIDE: Final = 10
_CAP_SYS_NICE: Final = 23  # bit of linux/capability.h


def come_back() -> None:
    """The priority of the process that started this one, for every thread."""
    before = os.getpriority(os.PRIO_PROCESS, os.getppid())
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, int(thread.name), before)


def may_return_to(nice: int) -> bool:
    """Whether this process may raise its priority to that: by capability, or by its limit (`ulimit -e`). An ordinary account
    may lower it but not raise it again, and would serve with the low one for ever.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no Linux
        return False
    held = next((line for line in status.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    if int(held.split()[1], 16) >> _CAP_SYS_NICE & 1:
        return True
    return 20 - resource.getrlimit(resource.RLIMIT_NICE)[0] <= nice
