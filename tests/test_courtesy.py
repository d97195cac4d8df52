"""A process that steps aside comes back with every thread, and does not step aside where it could not come back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.courtesy import may_return_to

BACK = """
import os, threading
from tasks.courtesy import come_back
def now(): return [os.getpriority(os.PRIO_PROCESS, int(each)) for each in os.listdir("/proc/self/task")]
started, stop = threading.Event(), threading.Event()
threading.Thread(target=lambda: (started.set(), stop.wait())).start()
started.wait()
aside = now()
come_back()
print(aside, now())
stop.set()
"""
ROOT = Path(__file__).parents[1]


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def test_every_thread_comes_back_to_the_priority_of_the_process_that_started_it():
    if not may_return_to(niceness()):
        pytest.skip("this account may not raise its priority again")
    command = ["nice", "-n", "7", sys.executable, "-c", BACK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[niceness() + 7] * 2} {[niceness()] * 2}"


def test_one_that_was_never_lowered_stays_where_it_is():
    done = subprocess.run([sys.executable, "-c", BACK], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[niceness()] * 2} {[niceness()] * 2}"


def test_an_account_without_the_right_is_recognised():
    """As in a container that has dropped the capability."""
    script = "import os; os.setuid(65534); print(*map(tasks.courtesy.may_return_to, (-20, 20)))"
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    asked = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tasks.courtesy; {script}"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
