"""Can this machine run the embedded server? One sentence for each thing that is missing. Any Python 3 can run it:

python3 triton/preflight.py
"""

import ctypes
import os
import platform
import sys
import sysconfig

PYTHONS = ((3, 11), (3, 12))
GLIBC = (2, 35)


def problems(python=sys.version_info[:2], glibc=None, machine=None, library=None):
    """Sentences, empty when all is well. The arguments are what is found here unless a test says otherwise."""
    found = []
    machine = machine or platform.machine()
    if machine != "x86_64" or sys.platform != "linux":
        found.append(
            "The embedded Triton server is a Linux x86-64 program; this is %s %s: use the container (triton/README.md)."
            % (sys.platform, machine)
        )
    if tuple(python) not in PYTHONS:
        found.append(
            "Python %d.%d cannot run the server's models, which need numpy < 2: install Python 3.11 or 3.12."
            % tuple(python)
        )
    glibc = glibc or _glibc()
    if glibc and glibc < GLIBC:
        found.append(
            "glibc %d.%d is older than 2.35, which the server needs: use Debian 12, Ubuntu 22.04 or newer, or the container."
            % glibc
        )
    library = shared_library() if library is None else library
    if not library:
        found.append(
            "The shared library of this Python is missing, which the server embeds: install libpython%d.%d "
            "(apt install libpython%d.%d), or a Python built with --enable-shared." % (tuple(python) * 2)
        )
    return found


def shared_library():
    """Path of libpythonX.Y.so of the running Python, or an empty string."""
    name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
    own = [sysconfig.get_config_var("LIBDIR"), os.path.join(sys.base_prefix, "lib")]
    for folder in [*own, "/usr/lib/x86_64-linux-gnu", "/usr/lib64"]:
        if folder and os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    try:
        ctypes.CDLL(name)
    except OSError:
        return ""
    return name


def _glibc():
    version = platform.libc_ver()[1]
    return tuple(int(part) for part in version.split(".")[:2]) if version else None


if __name__ == "__main__":
    sentences = problems()
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    sys.exit(1 if sentences else 0)
