"""ONNX -> engine, by one builder for `tensorrt` (a plan, built on the card that serves it) and `tensorrt_rtx` (ahead of time,
no card needed, for inspection PCs).

TensorRT 11 is strongly typed: precision is what the ONNX graph says (tasks/half_precision.py, tasks/quantize.py), and the
builder has no switch for it.
"""

import hashlib
import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from tasks.engine_passport import Builder, EnginePassport, EngineServer
from tasks.sealed import file_digest

if TYPE_CHECKING:
    import tensorrt

log = logging.getLogger(__name__)

WORKSPACE: Final = 1 << 30  # bytes of scratch memory a layer may ask for
TOLD_EVERY: Final = 2.0  # seconds between two progress lines
Tell = Callable[[str], None]
INSTALL: Final = {
    "tensorrt": "install the extra `gpu` (pip install 'tirewatch[gpu]') on the machine that serves",
    "tensorrt_rtx": "install the extra `rtx` (pip install 'tirewatch[rtx]')",
}


class NoEngine(RuntimeError):
    """The engine cannot be built here; the message says why and what to do."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    smallest, best, largest: the batch profile. compute_capability: of the cards it is for, ahead of time only (`tensorrt_rtx`);
    a plan is for the card here. timing_cache: a folder where measured tactics are kept, so that a second build is faster and
    chooses the same (`tensorrt` only: the other needs a card for it).
    """

    builder: Builder
    largest: int = 8
    best: int = 8
    smallest: int = 1
    compute_capability: str = "8.9"
    hardware_compatible: bool = False
    version_compatible: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.best <= self.largest:
            raise ValueError(
                f"the batch profile {self.smallest} <= {self.best} <= {self.largest} does not hold: it starts at 1"
            )


def build_engine(
    onnx: Path,
    engine: Path,
    options: EngineOptions,
    precision: str,
    calibration_digest: str | None = None,
    tell: Tell = log.info,
) -> EnginePassport:
    """Writes the engine of the network `onnx` and returns its passport. tell: gets a progress line every two seconds.

    Raises NoEngine when the library is missing, there is no card where one is needed, or TensorRT refuses the graph; every
    message of its parser and its log is in the error.
    """
    trt = library(options.builder)
    server = server_of("tensorrt") if options.builder == "tensorrt" else None
    told = announced(onnx, options, precision, calibration_digest)
    started = time.monotonic()
    complaints = _Complaints(trt)
    builder: tensorrt.Builder = trt.Builder(complaints.logger)
    network: tensorrt.INetworkDefinition = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    _parse(trt, network, onnx, complaints)
    config = _configured(trt, builder, network, options, precision)
    cache = _timing_cache(config, options, server)
    progress = _Progress(trt, f"{options.builder} {onnx.parent.name}/{onnx.name}", tell)
    config.progress_monitor = progress.monitor
    built: tensorrt.IHostMemory | None = builder.build_serialized_network(network, config)
    if built is None:
        raise NoEngine(f"{options.builder} {trt.__version__} could not build {onnx}: {complaints.said()}")
    data = bytes(built)
    engine.write_bytes(data)
    if cache is not None:
        _keep(cache, config)
    seconds = time.monotonic() - started
    tell(f"{options.builder}: {engine.name} of {len(data) / 1e6:.1f} MB built in {seconds:.1f} s")
    return replace(
        told,
        engine_sha256=hashlib.sha256(data).hexdigest(),
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        build_seconds=round(seconds, 3),
    )


def announced(
    onnx: Path, options: EngineOptions, precision: str, calibration_digest: str | None = None
) -> EnginePassport:
    """What the passport will say of an engine that `build_engine` makes here, before its bytes and its time are known. Raises
    NoEngine where the library or the card is missing.
    """
    server = server_of("tensorrt") if options.builder == "tensorrt" else None
    return EnginePassport(
        builder=options.builder,
        builder_version=library(options.builder).__version__,
        onnx_sha256=file_digest(onnx),
        engine_sha256="",
        precision=precision,
        compute_capability=server.compute_capability if server else options.compute_capability,
        device=server.device if server else "none",
        profile=(options.smallest, options.best, options.largest),
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        calibration_digest=calibration_digest,
        built_at="",
        build_seconds=0.0,
    )


def library(builder: Builder) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`: their interfaces are the same but for compute capabilities. Raises NoEngine."""
    try:
        return importlib.import_module(builder)
    except (ImportError, OSError, RuntimeError) as error:
        raise NoEngine(f"{builder} cannot be loaded here ({error}): {INSTALL[builder]}") from error


def server_of(builder: Builder) -> EngineServer:
    """What this machine runs engines with: library version and the first card. Raises NoEngine where there is none."""
    import torch

    version = library(builder).__version__
    if not torch.cuda.is_available():
        raise NoEngine(f"{builder} {version} is installed, but this machine has no CUDA card that its driver shows")
    major, minor = torch.cuda.get_device_capability(0)
    return EngineServer(builder, version, f"{major}.{minor}", torch.cuda.get_device_name(0))


def _parse(trt: Any, network: "tensorrt.INetworkDefinition", onnx: Path, complaints: "_Complaints") -> None:
    from tasks.tensorrt_graph import for_tensorrt

    parser: tensorrt.OnnxParser = trt.OnnxParser(network, complaints.logger)
    if not parser.parse(for_tensorrt(onnx)):
        errors = [str(parser.get_error(number)) for number in range(parser.num_errors)]
        raise NoEngine(f"TensorRT's parser refuses {onnx}: {'; '.join(errors) or complaints.said()}")


def _configured(
    trt: Any,
    builder: "tensorrt.Builder",
    network: "tensorrt.INetworkDefinition",
    options: EngineOptions,
    precision: str,
) -> "tensorrt.IBuilderConfig":
    config: tensorrt.IBuilderConfig = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    image: tensorrt.ITensor = network.get_input(0)
    sides = [image.shape[axis] for axis in range(1, len(image.shape))]
    profile: tensorrt.IOptimizationProfile = builder.create_optimization_profile()
    smallest, best, largest = (trt.Dims([n, *sides]) for n in (options.smallest, options.best, options.largest))
    profile.set_shape(image.name, smallest, best, largest)
    config.add_optimization_profile(profile)
    if precision == "float32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and 10 bits of mantissa are another precision
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.builder == "tensorrt_rtx":
        _aim(trt, config, options.compute_capability)
    elif options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return config


def _aim(trt: Any, config: Any, compute_capability: str) -> None:
    """Ahead of time: for cards of this compute capability, whatever is in this machine."""
    name = f"SM{compute_capability.replace('.', '')}"
    known = trt.ComputeCapability.__members__
    if name not in known:
        told = ", ".join(each.removeprefix("SM") for each in known if each.startswith("SM"))
        raise NoEngine(
            f"tensorrt_rtx {trt.__version__} builds for compute capabilities {told} (89 is 8.9), not {compute_capability}"
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[name], 0)


def _timing_cache(
    config: "tensorrt.IBuilderConfig", options: EngineOptions, server: EngineServer | None
) -> Path | None:
    """The cache's file, by library version and card, with what it holds put into the config."""
    if options.timing_cache is None or server is None:
        return None
    options.timing_cache.mkdir(parents=True, exist_ok=True)
    path = (
        options.timing_cache / f"tensorrt-{server.version}-sm{server.compute_capability}-{_plain(server.device)}.cache"
    )
    cache: tensorrt.ITimingCache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return path


def _keep(path: Path, config: "tensorrt.IBuilderConfig") -> None:
    """Replaced in one step: another build may read it at this moment."""
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(bytes(config.get_timing_cache().serialize()))
    unfinished.replace(path)


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


class _Complaints:
    """TensorRT's logger: warnings go to our log, errors are kept for the exception too."""

    def __init__(self, trt: Any) -> None:
        errors: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]  # the library is known at run time only
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                    errors.append(message)
                elif severity == trt.ILogger.WARNING:
                    log.debug("%s: %s", trt.__name__, message)

        self.logger, self._errors = Logger(), errors

    def said(self) -> str:
        return "; ".join(self._errors) or "it said nothing"


class _Progress:
    """TensorRT's progress monitor. A build of minutes without a word looks like a crash (roboflow/inference#2703)."""

    def __init__(self, trt: Any, what: str, tell: Tell) -> None:
        phases: dict[str, tuple[int, int]] = {}
        lock, told = Lock(), [time.monotonic()]

        def report() -> None:
            if time.monotonic() - told[0] >= TOLD_EVERY:
                told[0] = time.monotonic()
                tell(f"{what}: " + ", ".join(f"{name} {done} of {steps}" for name, (done, steps) in phases.items()))

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                with lock:  # called from the builder's own threads
                    phases[phase] = (0, steps)
                    report()

            def step_complete(self, phase: str, step: int) -> bool:
                with lock:
                    phases[phase] = (step + 1, phases.get(phase, (0, step + 1))[1])
                    report()
                return True

            def phase_finish(self, phase: str) -> None:
                with lock:
                    phases.pop(phase, None)

        self.monitor = Monitor()
