"""torchrun for one training on this machine: `python -m tasks.torchrun <parent> <processes> <folder>`."""

import json
import os
import signal
import sys
from pathlib import Path


def main() -> None:
    from tasks.rank import end_with_parent

    parent, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    end_with_parent(parent, signal.SIGTERM)
    run(processes, folder)


def run(processes: int, folder: Path) -> None:
    """As many ranks as asked for, all ended when one dies; which one did is written down."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    line = ["--nnodes=1", f"--nproc-per-node={processes}", "--max-restarts=0", "--monitor-interval=0.1"]
    line += ["--rdzv-backend=c10d", f"--rdzv-endpoint={folder / 'rendezvous'}", "--rdzv-conf=store_type=file"]
    line += ["--module", "tasks.rank", str(os.getpid()), str(folder)]
    try:
        torchrun(parse_args(line))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        told = {"rank": rank, "code": failure.exitcode, "message": failure.message}
        (folder / "failure.json").write_text(json.dumps(told))
        sys.exit(1)


if __name__ == "__main__":
    main()
