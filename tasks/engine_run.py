"""How a TensorRT plan runs in process, for the rung of the ladder below the server. It needs the card that it was built for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.engine_passport import Builder
from tasks.onnx_export import INPUT
from tasks.tensorrt_engine import NoEngine, library

if TYPE_CHECKING:
    import tensorrt


class OpenedEngine:
    """An engine on the first card; torch holds its buffers. Batches larger than its profile are run in parts."""

    def __init__(self, path: Path, builder: Builder, largest: int) -> None:
        trt = library(builder)
        runtime: tensorrt.Runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise NoEngine(f"{path} cannot be opened by {builder} {trt.__version__} on this card: build it here")
        self._runtime, self._engine, self._largest = runtime, engine, largest
        self._context: tensorrt.IExecutionContext = engine.create_execution_context()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [N, H, W, 3] -> probabilities float32 [N, C]."""
        starts = range(0, len(images), self._largest)
        return np.concatenate([self._run(images[start : start + self._largest]) for start in starts])

    def _run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        given = torch.from_numpy(np.ascontiguousarray(images)).cuda()
        self._context.set_input_shape(INPUT, tuple(given.shape))
        self._context.set_tensor_address(INPUT, given.data_ptr())
        outputs: dict[str, Any] = {}
        for number in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(number)
            if name != INPUT:
                dims = self._context.get_tensor_shape(name)
                outputs[name] = torch.empty(
                    [dims[axis] for axis in range(len(dims))], dtype=torch.float32, device="cuda"
                )
                self._context.set_tensor_address(name, outputs[name].data_ptr())
        stream = torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise NoEngine(f"the engine failed on a batch of {len(images)}")
        stream.synchronize()
        probabilities: NDArray[np.float32] = outputs["probabilities"].cpu().numpy()
        return probabilities
