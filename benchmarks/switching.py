"""What benchmarks/swap.py switches, and where: the services, four versions of one small network, and one switch of champion.

A switch goes the way of the promote flow once the gates held: staged, kept on S3, announced, published, loaded, its golden
answers compared, routed, told to ledger, alias and event.
"""

import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from deploy import services
from deploy.running import Running, running
from tasks.courtesy import may_return_to
from tasks.model_repository import FrontDoor, install_front_door, network_name, stage_version
from tasks.routing import Route, promoted, read_routing, replace_routing
from tasks.sealed import SealedVersion
from tasks.serving import TritonAddress, load_model
from tasks.storage import Store, ensure_bucket
from tasks.transaction import PROMOTED, Place, complete, intend

if TYPE_CHECKING:
    from tasks.proof import Golden

SOURCE: Final = Path(__file__).parents[1]
MODEL, SIZE, VERSIONS = (
    "swapped",
    64,
    (1, 2, 3, 4),
)  # three stay on the server (old, new, previous): one comes, one goes
ROLL_BACK_EVERY: Final = 10
STEPS: Final = ("stage, keep", "announce", "publish, load, check", "route", "ledger, alias, event")
WHO: Final = "benchmarks.swap"


@dataclass(frozen=True)
class Bench:
    """What is switched, and where. server: its launcher's process id. networks, golden: by version; scores [version, image]:
    what each version says about each of the `images`.
    """

    place: Place
    address: TritonAddress
    server: int
    networks: Mapping[int, Path]
    golden: "Mapping[int, Golden]"
    scores: NDArray[np.float32]
    images: Path


@dataclass(frozen=True)
class Switch:
    """Monotonic seconds: began and ended bound all the work; at no other moment than between switching and switched could
    either version answer. parts: seconds by step.
    """

    old: int
    new: int
    began: float
    switching: float
    switched: float
    ended: float
    parts: Mapping[str, float]


@contextmanager
def stack(folder: Path) -> Iterator[Bench]:
    """S3, MLflow, Prefect and Triton, alone on free ports, with the first version in production."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    key, secret = "tirewatch", "tirewatch-benchmark"
    root = folder / "serving"
    root.mkdir()
    (root / "admin-key").write_text(secret)
    with ExitStack() as opened:

        def run(service: services.Service, timeout: float = 120) -> Running:
            return opened.enter_context(running(service, folder / f"{service.name}.log", timeout))

        ports = services.free_ports(16)
        store = Store(
            "tirewatch", run(services.seaweedfs(folder / "s3", ports[:11], key, secret)).service.url, key, secret
        )
        mlflow = run(services.mlflow(folder / "mlflow", ports[11])).service.url
        prefect = run(services.prefect(folder / "prefect", ports[12])).service.url
        http, grpc, metrics = ports[13:]
        python = SOURCE / ".venv-triton" / "bin" / "python"
        server = run(services.triton(SOURCE, python, root, (http, grpc, metrics), root / "admin-key"))
        opened.enter_context(temporary_settings({PREFECT_API_URL: f"{prefect}/api"}))
        _until(lambda: ensure_bucket(store))
        address = TritonAddress(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", secret)
        yield prepared(Place(root, store, mlflow, MODEL), address, server.process.pid, folder)


def _until(act: Callable[[], None], within: float = 20.0) -> None:
    """The S3 gateway answers a moment before the filer behind it does."""
    from botocore.exceptions import ClientError

    deadline = time.monotonic() + within
    while True:
        try:
            return act()
        except ClientError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def prepared(place: Place, address: TritonAddress, server: int, folder: Path) -> Bench:
    """The versions made and registered, and the first one promoted: a switch from nothing is none."""
    from mlflow import MlflowClient

    client = MlflowClient(place.tracking_uri, registry_uri=place.tracking_uri)
    client.create_registered_model(place.model)
    run = client.create_run(client.create_experiment(place.model))
    for _ in VERSIONS:
        client.create_model_version(place.model, f"{run.info.artifact_uri}/model", run.info.run_id)
    images, pixels = photographs(folder / "images")
    networks = {version: network_file(version, pixels, folder) for version in VERSIONS}
    golden, scores = known_answers(networks, pixels)
    bench = Bench(place, address, server, networks, golden, scores, images)
    promote(bench, VERSIONS[0])
    load_model(address, place.model)  # the door opens with the table in force
    return bench


def photographs(folder: Path, side: int = 200) -> tuple[Path, NDArray[np.uint8]]:
    """scikit-learn's two photographs in pieces of 200 pixels, as JPEG; and decoded as the server does it."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from tasks.images import CURRENT, decode

    folder.mkdir()
    encoded = []
    for photograph in load_sample_images().images:
        for top in range(0, photograph.shape[0] - side + 1, 75):
            for left in range(0, photograph.shape[1] - side + 1, 75):
                out = io.BytesIO()
                Image.fromarray(photograph[top : top + side, left : left + side]).save(out, "JPEG", quality=88)
                encoded.append(out.getvalue())
    for number, data in enumerate(encoded):
        (folder / f"{number:03}.jpg").write_bytes(data)
    return folder, np.stack([decode(data, SIZE, CURRENT) for data in encoded])


def network_file(version: int, pixels: NDArray[np.uint8], folder: Path) -> Path:
    """A network of its own for each version, its head centred on the photographs so that both classes occur."""
    import torch

    from tasks.model import build_model, image_network
    from tasks.onnx_export import export_onnx

    torch.manual_seed(version)
    network = image_network("cnn", build_model("cnn", 2, pretrained=False)).eval()
    with torch.no_grad():
        _, embedding = network(torch.from_numpy(pixels))
        head = network.classifier.head
        head.weight *= 4 / (head.weight @ (embedding - embedding.mean(0)).T).std()
        head.bias.copy_(-(head.weight @ embedding.mean(0)))
    path = folder / f"network-{version}.onnx"
    export_onnx(network, SIZE, path)
    return path


def known_answers(
    networks: Mapping[int, Path], pixels: NDArray[np.uint8]
) -> "tuple[dict[int, Golden], NDArray[np.float32]]":
    """The golden images of each version, and the score [version, image] of every version for every photograph."""
    from tasks.decision import decide, score
    from tasks.inference import open_network
    from tasks.parity import golden_indices
    from tasks.proof import Golden

    golden: dict[int, Golden] = {}
    scores = np.full((max(networks) + 1, len(pixels)), np.nan, dtype=np.float32)
    for version, path in networks.items():
        rule = described(version).rule
        probabilities = open_network(path)(pixels)["probabilities"]
        labels = [rule.labels[index] for index in decide(probabilities, rule)]
        chosen = golden_indices(probabilities, labels, rule, 16)
        golden[version] = Golden(pixels[chosen], probabilities[chosen])
        scores[version] = score(probabilities, rule)
    return golden, scores


def described(version: int, model: str = MODEL) -> SealedVersion:
    from tasks.decision import DecisionRule
    from tasks.images import CURRENT

    rule = DecisionRule(("good", "worn"), ("worn",), 0.5)
    network = network_name(model, SIZE)
    return SealedVersion(
        model,
        version,
        network,
        rule,
        CURRENT,
        SIZE,
        model,
        1,
        f"sha256:{version:064x}",
        f"run-{version}",
        "commit",
        "float32",
    )


def promote(bench: Bench, version: int) -> Switch:
    """What flows/promote.py does once the gates held."""
    from tasks.swap import bring_up
    from tasks.version_store import upload_version

    place, moments = bench.place, [time.monotonic()]
    sealed = described(version, place.model)
    staged = stage_version(place.root, bench.networks[version], sealed)
    upload_version(place.store, staged, bench.golden[version])
    moments.append(time.monotonic())
    intention = intend(place, PROMOTED, version, WHO, "it is its turn", {})
    moments.append(time.monotonic())
    install_front_door(place.root, place.model, FrontDoor(capture_share=0.0))
    load_model(bench.address, place.model)
    bring_up(place.root, bench.address, staged, bench.golden[version], "openvino")
    table = read_routing(place.root, place.model)
    after = replace(promoted(table, place.model, Route(sealed.network, version)), revision=intention.revision)
    moments.append(time.monotonic())
    written = replace_routing(place.root, after)
    moments.append(time.monotonic())
    complete(place, intention, written)
    moments.append(time.monotonic())
    parts = {step: later - sooner for step, (sooner, later) in zip(STEPS, pairwise(moments), strict=True)}
    former = table.champion.version if table else 0
    return Switch(former, version, moments[0], moments[3], moments[4], moments[5], parts)


def roll_back(bench: Bench) -> Switch:
    """The former version answers again; the table is replaced somewhere within the call."""
    from tasks import rollback

    place, began = bench.place, time.monotonic()
    done = rollback.roll_back(
        place.root, bench.address, place.store, place.tracking_uri, place.model, WHO, "it is its turn"
    )
    ended = time.monotonic()
    return Switch(done.withdrawn or 0, done.version, began, began, ended, ended, {"rollback": ended - began})


def switch(bench: Bench, number: int) -> Switch:
    """The switch of that number, counted from 1: to the next version in turn, or back."""
    table = read_routing(bench.place.root, bench.place.model)
    assert table is not None
    with _giving_way():
        if number % ROLL_BACK_EVERY == 0 and table.previous:
            return roll_back(bench)
        return promote(bench, table.champion.version % len(VERSIONS) + 1)


@contextmanager
def _giving_way() -> Iterator[None]:
    """This thread at the priority of a flow run of the stack, whose workers give way to the server."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    if not may_return_to(before):
        yield
        return
    os.setpriority(os.PRIO_PROCESS, 0, before + services.GIVES_WAY)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)
