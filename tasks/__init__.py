"""One concern a module: plain functions first, `@task` seams last."""

import sys
from importlib.util import find_spec


def _keep_the_server_folder_out_of_import_triton() -> None:
    """`triton` is PyTorch's kernel compiler. Where it is absent, `import triton` would find our folder `triton/` as a
    namespace package and break torch._dynamo (pytorch#130723): make that import fail cleanly instead.
    """
    if "triton" not in sys.modules:
        spec = find_spec("triton")
        if spec is not None and spec.origin is None:
            sys.modules["triton"] = None  # type: ignore[assignment]


_keep_the_server_folder_out_of_import_triton()
