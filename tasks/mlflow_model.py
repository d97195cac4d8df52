"""A registered version as an MLflow model: its signature, and how `mlflow.pyfunc.load_model("models:/tire/7")` opens it.

The signature is written, not inferred: MLflow would load the model and run it for that, which takes 14 s. The loader is this
module of the installed package, so no code lies in the registry.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.registry import CARD, WEIGHTS, ModelCard, built

if TYPE_CHECKING:
    from tasks.model import ImageNetwork

INPUT, OUTPUTS = "image", ("probabilities", "embedding")
_BATCH: Final = 64


def mlmodel(card: ModelCard, run_id: str, embedding: int) -> str:
    """The text of the file MLmodel for a network with an embedding of so many numbers."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    sizes = dict(zip(OUTPUTS, (len(card.rule.labels), embedding), strict=True))
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, card.image_size, card.image_size, 3), INPUT)]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, size), name) for name, size in sizes.items()]),
    )
    told = {
        "labels": list(card.rule.labels),
        "defect_labels": list(card.rule.defect_labels),
        "threshold": card.rule.threshold,
        "temperature": card.temperature,
        "preprocessing": card.preprocessing,
    }
    model = Model(artifact_path=str(Path(CARD).parent), run_id=run_id, signature=signature, metadata=told)
    model.add_flavor("python_function", loader_module=__name__, python_version=sys.version.split()[0])
    return str(model.to_yaml())


class _Opened:
    """What MLflow calls."""

    def __init__(self, network: "ImageNetwork") -> None:
        self.network = network

    def predict(self, inputs: Any, params: dict[str, Any] | None = None) -> dict[str, NDArray[np.float32]]:
        """{"image": uint8 [N, S, S, 3]} -> {"probabilities": [N, C], "embedding": [N, D]}, both float32."""
        import torch

        images = np.ascontiguousarray(inputs[INPUT])
        with torch.inference_mode():
            parts = [
                [part.numpy() for part in self.network(torch.from_numpy(images[start : start + _BATCH]))]
                for start in range(0, len(images), _BATCH)
            ]
        return {name: np.concatenate([part[place] for part in parts]) for place, name in enumerate(OUTPUTS)}


def _load_pyfunc(path: str) -> _Opened:
    """MLflow's door: `path` is the downloaded folder `model/` of the run."""
    from safetensors.torch import load

    folder = Path(path)
    card = ModelCard.from_json((folder / Path(CARD).name).read_text())
    return _Opened(built(card, load((folder / Path(WEIGHTS).name).read_bytes())))
