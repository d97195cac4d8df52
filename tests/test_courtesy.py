"""A process that steps aside comes back with every thread, and does not step aside where it could not come back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import courtesy
from tasks.courtesy import come_back, may_return_to, step_aside

ASIDE = """
import os, threading
from tasks.courtesy import come_back, step_aside
def now(): return [os.getpriority(os.PRIO_PROCESS, int(each)) for each in os.listdir("/proc/self/task")]
start = now()[0]
before = step_aside(start + 7)
started, stop = threading.Event(), threading.Event()
threading.Thread(target=lambda: (started.set(), stop.wait())).start()
started.wait()
aside = now()
come_back(before)
print(start, before, aside, now())
stop.set()
"""


def test_every_thread_comes_back():
    if not may_return_to(os.getpriority(os.PRIO_PROCESS, 0)):
        pytest.skip("this account may not raise its priority again")
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", ASIDE], cwd=root, capture_output=True, text=True, check=True)
    start = os.getpriority(os.PRIO_PROCESS, 0)
    assert done.stdout.strip() == f"{start} {start} {[start + 7] * 2} {[start] * 2}"


def test_where_it_could_not_come_back_nothing_is_done(monkeypatch):
    monkeypatch.setattr(courtesy, "may_return_to", lambda nice: False)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert step_aside(19) is None and os.getpriority(os.PRIO_PROCESS, 0) == before
    come_back(None)


def test_an_account_without_the_right_is_recognised():
    """As in a container that has dropped the capability."""
    script = "import os; os.setuid(65534); print(*map(tasks.courtesy.may_return_to, (-20, 20)))"
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    root = Path(__file__).parents[1]
    asked = f"import sys; sys.path.insert(0, {str(root)!r}); import tasks.courtesy; {script}"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_one_that_is_lower_already_stays_where_it_is():
    assert step_aside(os.getpriority(os.PRIO_PROCESS, 0)) is None
