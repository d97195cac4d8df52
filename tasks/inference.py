"""The one way an ONNX network runs on a CPU: in the server's backend, in evaluation and in offline scoring alike.

So served and offline decisions are the same by construction. numpy and the two runtimes only, because the serving
environment imports this module too; a runtime is imported when a network is opened with it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
from numpy.typing import NDArray

Accelerator = Literal["openvino", "onnxruntime"]
INPUT = "image"


class Network(Protocol):
    """An opened network. Not thread-safe: open one for each thread."""

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each output without the batch dimension; -1 where the graph leaves it open."""
        ...

    def __call__(
        self, images: NDArray[np.uint8], outputs: Sequence[str] = ("probabilities",)
    ) -> dict[str, NDArray[np.float32]]:
        """uint8 [N, H, W, 3] -> the named outputs, each float32 [N, ...]. Raises ValueError for images of another shape."""
        ...


def open_network(path: Path, accelerator: Accelerator = "openvino", threads: int = 1) -> Network:
    """Load the ONNX file for CPU inference in full float32, with that many threads."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no network at {path}")
    if accelerator == "openvino":
        return _OpenVinoNetwork(path, threads)
    if accelerator == "onnxruntime":
        return _OnnxRuntimeNetwork(path, threads)
    raise ValueError(f"accelerator {accelerator!r} is not one of {', '.join(get_args(Accelerator))}")


class _OpenVinoNetwork:
    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        options: dict[str, Any] = {
            # On CPUs with AMX or AVX512-BF16 the default is bf16: another precision needs gates of its own.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            # Pinned threads of several servers on one machine would all sit on the first cores.
            "ENABLE_CPU_PINNING": False,
        }
        self._compiled = openvino.Core().compile_model(str(path), "CPU", options)
        self._request = self._compiled.create_infer_request()
        self._expected = _fixed_shape(self._compiled.input(0).get_partial_shape())
        self._outputs = {name: port for port in self._compiled.outputs for name in port.get_names()}

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: _fixed_shape(port.get_partial_shape()) for name, port in self._outputs.items()}

    def __call__(
        self, images: NDArray[np.uint8], outputs: Sequence[str] = ("probabilities",)
    ) -> dict[str, NDArray[np.float32]]:
        _check_images(images, self._expected)
        _check_outputs(outputs, self._outputs)
        self._request.infer([images], share_inputs=True)
        # Copied: the request's own memory is overwritten by the next call.
        return {
            name: np.array(self._request.get_tensor(self._outputs[name]).data, dtype=np.float32) for name in outputs
        }


class _OnnxRuntimeNetwork:
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads starve the server beside them: half the speed at concurrency 8.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._expected = _open_dims(self._session.get_inputs()[0].shape)
        self._shapes = {output.name: _open_dims(output.shape) for output in self._session.get_outputs()}

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def __call__(
        self, images: NDArray[np.uint8], outputs: Sequence[str] = ("probabilities",)
    ) -> dict[str, NDArray[np.float32]]:
        _check_images(images, self._expected)
        _check_outputs(outputs, self._shapes)
        arrays = cast(list[NDArray[np.float32]], self._session.run(list(outputs), {INPUT: images}))
        return dict(zip(outputs, arrays, strict=True))


def _fixed_shape(shape: Any) -> tuple[int, ...]:
    return tuple(-1 if dim.is_dynamic else int(dim.get_length()) for dim in shape)[1:]


def _open_dims(shape: Sequence[int | str | None]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else -1 for dim in shape)[1:]


def _check_images(images: NDArray[np.uint8], expected: tuple[int, ...]) -> None:
    fits = images.ndim == len(expected) + 1 and all(
        want in (-1, have) for want, have in zip(expected, images.shape[1:], strict=True)
    )
    if images.dtype != np.uint8 or not fits or not len(images):
        raise ValueError(f"images are {images.dtype} {list(images.shape)}, the network takes uint8 [N>=1, {expected}]")


def _check_outputs(outputs: Sequence[str], known: dict[str, Any]) -> None:
    unknown = sorted(set(outputs) - set(known))
    if unknown:
        raise ValueError(f"outputs {unknown} are not among the network's {sorted(known)}")
