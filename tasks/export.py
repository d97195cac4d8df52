"""How a trained network becomes the file that is served: its precision, what is measured for it, and what it was made from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.model_repository import NETWORK_FILE, REFERENCE_FILE

if TYPE_CHECKING:
    from tasks.inference import Accelerator
    from tasks.model import ImageNetwork
    from tasks.quantize import Calibration
    from tasks.registry import ModelCard, TrainedModel
    from tasks.sealed import SealedVersion

Precision = Literal["float32", "float16", "bfloat16", "int8"]
Engine = Literal["onnx", "tensorrt", "tensorrt_rtx"]


class Export(BaseModel):
    """In which form a candidate is served. The defaults are the network as it was trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Precision = Field(
        "float32",
        description="Of the backbone; normalisation, head and softmax stay float32. int8 is the fast one on processors, "
        "the two halves are for GPUs. Whatever is chosen must pass the same gates",
    )
    calibration_images: int = Field(
        256,
        ge=16,
        le=4096,
        description="Training photographs that int8 ranges are measured on, the same number of each label",
    )
    engine: Engine = Field(
        "onnx",
        description="What the version must come with: tensorrt, a plan that Triton serves, built on the machine that serves "
        "it; tensorrt_rtx, an engine for inspection PCs with an RTX card, sealed beside the ONNX network that Triton serves",
    )
    engine_required: bool = Field(
        True,
        description="Where the engine cannot be built, the candidate is a rehearsal: proven, and refused. Off: the ONNX "
        "network answers instead, and the table of gates says so",
    )
    max_batch_size: int = Field(8, ge=1, le=128, description="Largest batch that an engine takes")
    compute_capability: str = Field(
        "8.9",
        pattern=r"^\d+\.\d$",
        description="Of the cards a tensorrt_rtx engine is for; a tensorrt plan is for the card here",
    )
    hardware_compatible: bool = Field(False, description="A plan for every card from Ampere on; somewhat slower")
    version_compatible: bool = Field(False, description="A plan for later TensorRT versions too; somewhat slower")


@dataclass(frozen=True)
class Exported:
    """file: the network that is served. reference: the float32 network that it was made from, None where it is that one.
    passport: what belongs into the seal.
    """

    file: Path
    reference: Path | None = None
    passport: dict[str, str] = field(default_factory=dict)

    @property
    def beside(self) -> dict[str, Path]:
        """What is sealed beside the network: name -> file."""
        return {} if self.reference is None else {REFERENCE_FILE: self.reference}


def require_runnable(how: Export, accelerator: "Accelerator") -> None:
    """ValueError for a precision that this server's runtime cannot run."""
    if how.precision == "bfloat16" and accelerator == "onnxruntime":
        raise ValueError(
            "onnxruntime has no bfloat16 convolution for processors: choose float16, or the accelerator openvino"
        )


def export_network(
    network: "ImageNetwork", size: int, folder: Path, how: Export, calibrate: "Callable[[], Calibration]"
) -> Exported:
    """Writes the network into `folder` in the precision asked for. calibrate: called for the images that int8 needs."""
    from tasks.half_precision import to_half
    from tasks.onnx_export import export_onnx
    from tasks.quantize import quantize_int8

    full = folder / REFERENCE_FILE
    passport = {"float32_sha256": export_onnx(network, size, full)}
    if how.precision == "float32":
        return Exported(full.rename(folder / NETWORK_FILE))
    reduced = folder / NETWORK_FILE
    if how.precision == "int8":
        calibration = calibrate()
        quantize_int8(full, reduced, calibration)
        passport |= {"calibration_images": str(len(calibration.pixels)), "calibration_digest": calibration.digest}
    else:
        to_half(full, reduced, how.precision)
    return Exported(reduced, full, passport)


def sealed_version(
    candidate: "TrainedModel", card: "ModelCard", precision: str, passport: Mapping[str, str]
) -> "SealedVersion":
    """What the sealed directory will say about itself."""
    from importlib.metadata import version as installed

    from tasks.model_repository import network_name
    from tasks.sealed import SealedVersion

    return SealedVersion(
        model=candidate.name,
        version=candidate.version,
        network=network_name(candidate.name, card.image_size),
        rule=card.rule,
        preprocessing=card.preprocessing,
        image_size=card.image_size,
        dataset=card.dataset,
        dataset_version=card.dataset_version,
        dataset_digest=card.dataset_digest,
        run_id=candidate.run_id,
        commit=card.commit,
        precision=precision,
        passport={name: installed(name) for name in ("torch", "onnx", "onnxruntime", "openvino")} | dict(passport),
    )
