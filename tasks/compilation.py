"""torch.compile where the machine can: without a compiler the training runs as it is, and says so."""

import copy
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


def compiled(network: nn.Module, some_images: Callable[[], Tensor], wanted: bool) -> nn.Module:
    """The network compiled, tried on a copy (forward and backward) so that nothing of it moves; as it is, with a warning that
    names the reason, where that fails: torch needs a C++ compiler (on a GPU also the package triton) at run time.
    """
    if not wanted:
        return network
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    images = some_images()
    try:
        with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
            torch.compile(copy.deepcopy(network).train())(images).sum().backward()
    except (TorchDynamoException, InvalidCxxCompiler, CppCompileError) as error:
        log.warning("not compiled, the training runs as it is: %s", str(error).strip().splitlines()[0])
        return network
    found: nn.Module = torch.compile(network)  # type: ignore[assignment]
    return found
