"""A Python-based backend named `onnxruntime`: it serves what the official container serves with the C++ backend of that name.

The same `config.pbtxt` means the same here: `parameters intra_op_thread_count`, and `optimization.execution_accelerators`
with the CPU accelerator `openvino`. The network runs through `tasks.inference`, as it does in evaluation.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from tasks.courtesy import come_back
from tasks.inference import open_network
from tasks.sealed import read_sealed

OUTPUTS = ("probabilities", "embedding")


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config: object) -> object:
        """Add the outputs, which the C++ backend would read from the graph of each version."""
        given = {output["name"] for output in config.as_dict()["output"]}
        for name in OUTPUTS:
            if name not in given:
                config.add_output({"name": name, "data_type": "TYPE_FP32", "dims": [-1]})
        return config

    def initialize(self, args: dict) -> None:
        config = json.loads(args["model_config"])
        directory = Path(args["model_repository"]) / args["model_version"]
        sealed = read_sealed(directory)  # every byte as it was sealed, or the load fails and the former version stays
        path = directory / (config.get("default_model_filename") or "model.onnx")
        self._network = open_network(path, _accelerator(config), _threads(config))
        self._size = sealed.image_size
        for batch in range(1, int(config["max_batch_size"]) + 1):  # each batch size is compiled at its first use
            self._network(np.zeros((batch, self._size, self._size, 3), dtype=np.uint8))
        come_back()  # launch.py had this process begin at a low priority

    def execute(self, requests: list) -> list:
        images = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        wanted = [list(request.requested_output_names()) for request in requests]
        try:
            outputs = self._network(_stacked(images), sorted({name for names in wanted for name in names}))
        except (ValueError, RuntimeError):
            # One request of the batch is to blame: each gets its own answer or its own error.
            return [self._alone(image, names) for image, names in zip(images, wanted, strict=True)]
        bounds = np.cumsum([0, *(len(image) for image in images)])
        return [
            _response({name: outputs[name][start:stop] for name in names})
            for names, start, stop in zip(wanted, bounds[:-1], bounds[1:], strict=True)
        ]

    def _alone(self, images: np.ndarray, names: list) -> object:
        try:
            return _response(self._network(images, names))
        except (ValueError, RuntimeError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))


def _stacked(images: list) -> np.ndarray:
    return images[0] if len(images) == 1 else np.concatenate(images)


def _response(outputs: dict) -> object:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])


def _accelerator(config: dict) -> str:
    accelerators = config.get("optimization", {}).get("execution_accelerators", {}).get("cpu_execution_accelerator", [])
    return "openvino" if any(entry["name"] == "openvino" for entry in accelerators) else "onnxruntime"


def _threads(config: dict) -> int:
    return int(config.get("parameters", {}).get("intra_op_thread_count", {}).get("string_value", 1))
