"""Decode and infer in one process: the front door without its call of a network model. For `benchmarks.serving` only:
it cannot route, and every process would hold an engine of its own.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import triton_python_backend_utils as pb_utils

from tasks.decision import decide, score
from tasks.images import decode
from tasks.inference import open_network
from tasks.sealed import read_sealed


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        cv2.setNumThreads(1)
        directory = Path(json.loads(args["model_config"])["parameters"]["version_directory"]["string_value"])
        self._version = read_sealed(directory)
        self._lineage = _text(json.dumps(self._version.lineage()))
        self._network = open_network(directory / "model.onnx", "openvino", os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)
        size = self._version.image_size
        for batch in range(1, 9):
            self._network(np.zeros((batch, size, size, 3), dtype=np.uint8))

    def execute(self, requests: list) -> list:
        encoded = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy()[0].tobytes() for request in requests]
        pixels = np.stack([*(map if len(encoded) == 1 else self._pool.map)(self._decoded, encoded)])
        probabilities = self._network(pixels)["probabilities"]
        rule = self._version.rule
        scores, labels = score(probabilities, rule), decide(probabilities, rule)
        return [
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor("label", _text(rule.labels[labels[row]])),
                    pb_utils.Tensor("probabilities", probabilities[row][None]),
                    pb_utils.Tensor("score", scores[row].reshape(1, 1)),
                    pb_utils.Tensor("model_version", np.array([[self._version.version]], dtype=np.int64)),
                    pb_utils.Tensor("lineage", self._lineage),
                ]
            )
            for row in range(len(requests))
        ]

    def _decoded(self, image: bytes) -> np.ndarray:
        return decode(image, self._version.image_size, self._version.preprocessing)


def _text(text: str) -> np.ndarray:
    return np.array([[text.encode()]], dtype=np.object_)
