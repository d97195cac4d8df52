"""Photographs from elsewhere as folders of class folders, and a folder as a sealed batch on S3.

Nothing here is shipped with the project: the solar cells come with a package the user installs, the digits with scikit-learn.
"""

import csv
from importlib.util import find_spec
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Final

from tasks.batch import ANNOTATIONS, INCOMING, MARKER, batch_of
from tasks.importers import Found
from tasks.storage import Store, list_objects, write, write_many

SOLAR_CELLS_LICENCE: Final = (
    "elpv-dataset: CC BY-NC-SA 4.0 (non-commercial), https://creativecommons.org/licenses/by-nc-sa/4.0/"
)
SOLAR_CELLS_CITATION: Final = (
    "Deitsch, Christlein, Berger, Buerhop-Lutz, Maier, Gallwitz, Riess: Automatic classification of defective photovoltaic "
    "module cells in electroluminescence images. Solar Energy 185 (2019) 455-468"
)


def solar_cell_folders(destination: Path, limit: int | None = None, seed: int = 0) -> Path:
    """Links of the 2,624 electroluminescence photographs of `elpv-dataset`, in `functional/` and `defective/`.

    Defective as in the paper: a defect probability of at least 0.5. `limit`: that many, drawn with `seed`. Raises RuntimeError
    when the package is not installed.
    """
    if find_spec("elpv_dataset") is None:
        raise RuntimeError("the solar cells need the package elpv-dataset: install the extra `demo`")
    from importlib.resources import files

    data = Path(str(files("elpv_dataset") / "data"))
    with (data / "labels.csv").open(newline="") as table:
        cells = [(row[0], float(row[1])) for row in csv.reader(table, delimiter=" ", skipinitialspace=True) if row]
    if limit is not None:
        cells = sorted(Random(seed).sample(cells, limit))
    for name, probability in cells:
        link = destination / ("defective" if probability >= 0.5 else "functional") / Path(name).name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(data / name)
    return destination


def digit_folders(destination: Path, side: int = 32) -> Path:
    """scikit-learn's 1,797 scans of handwritten digits as grey PNGs of `side` pixels, in `0/` to `9/`.

    The scans have 8x8 pixels of 17 grey levels; enlarging repeats pixels and invents nothing.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    if side % 8:
        raise ValueError(f"side is {side}: use a multiple of 8, the side of the scans")
    scans = load_digits()
    for position, (scan, digit) in enumerate(zip(scans.images, scans.target, strict=True)):
        pixels = np.repeat(np.repeat(np.round(scan * 255 / 16).astype(np.uint8), side // 8, 0), side // 8, 1)
        path = destination / str(digit) / f"{position:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return destination


def upload_folder(store: Store, folder: Path, dataset: str, batch: str) -> str:
    """Uploads every file below `folder` as `incoming/<dataset>/<batch>/`; the prefix.

    What seals the batch goes last: `annotations.json` where the folder has one, else the marker. Uploading again completes what
    an earlier call began. Raises ValueError for an empty folder, and where the batch already holds files that the folder lacks.
    """
    prefix = f"{INCOMING}/{dataset}/{batch}/"
    batch_of(dataset, prefix)
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if not found:
        raise ValueError(f"{folder} holds no files: nothing to upload")
    keys = {prefix + path.relative_to(folder).as_posix() for path in found} | {prefix + MARKER}
    others = [each.key for each in list_objects(store, prefix) if each.key not in keys]
    if others:
        raise ValueError(
            f"{prefix} holds {len(others)} files that {folder} lacks, such as {others[0]}: choose another name for the batch"
        )
    seals = [folder / MARKER, *(path for path in found if path == folder / ANNOTATIONS)]
    write_many(store, ((prefix + path.relative_to(folder).as_posix(), path) for path in found if path not in seals))
    seal = seals[-1]
    write(store, prefix + seal.name, seal.read_bytes() if seal.exists() else b"")
    return prefix


def upload_set(store: Store, folder: Path, dataset: str, batch: str, found: Found) -> str:
    """Uploads what `tasks.importers.recognised` found in the folder, by way of a temporary folder where it is no batch yet."""
    if found.write is None:
        return upload_folder(store, folder, dataset, batch)
    batch_of(dataset, f"{INCOMING}/{dataset}/{batch}/")  # before minutes are spent on the conversion
    with TemporaryDirectory(prefix="tirewatch-upload-") as temporary:
        found.write(Path(temporary))
        return upload_folder(store, Path(temporary), dataset, batch)
