"""Fixtures of serving: MLflow, a live Triton, and the networks and pictures that go through them. Loaded by conftest.py."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deploy import services
from deploy.running import Running, start
from tasks.storage import Store

if TYPE_CHECKING:
    from flows.settings import Settings
    from tasks.decision import DecisionRule
    from tasks.model import ImageNetwork
    from tasks.sealed import SealedVersion
    from tasks.serving import TritonAddress

SOURCE = Path(__file__).parents[1]
TRITON_PYTHON = SOURCE / ".venv-triton" / "bin" / "python"


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server."""
    import mlflow

    directory = tmp_path_factory.mktemp("mlflow")
    running = start(services.mlflow(directory, services.free_ports(1)[0]), directory / "mlflow.log", 120)
    mlflow.set_tracking_uri(running.service.url)
    yield running.service.url
    running.stop()


@pytest.fixture(scope="session")
def triton_python() -> Path:
    """Python of the serving environment."""
    return TRITON_PYTHON


@dataclass
class Serving:
    """A live Triton server, its serving root, and the ports it listens on (http, grpc, metrics)."""

    root: Path
    address: "TritonAddress"
    ports: tuple[int, int, int]
    running: Running

    @property
    def log(self) -> str:
        return (self.root / "server.log").read_text(errors="replace")


def start_triton(root: Path, timeout: float = 90) -> Serving:
    """Triton over this root, ready: known bytes came back and everything routed is loaded."""
    from tasks.serving import TritonAddress

    root.mkdir(parents=True, exist_ok=True)
    key = root / "admin-key"
    key.write_text("key-of-the-tests")
    http, grpc, metrics = services.free_ports(3)
    service = services.triton(SOURCE, TRITON_PYTHON, root, (http, grpc, metrics), key)
    running = start(service, root / "server.log", timeout)
    address = TritonAddress(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", "key-of-the-tests")
    return Serving(root, address, (http, grpc, metrics), running)


@pytest.fixture(scope="session")
def serve() -> Callable[..., Serving]:
    """`serve(root)`: a Triton server of the test's own; the test stops it."""
    return start_triton


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A real Triton server with nothing in production; each test uses a model name of its own."""
    serving = start_triton(tmp_path_factory.mktemp("triton"))
    yield serving
    serving.running.stop()


@pytest.fixture(scope="session")
def stack_settings(store: Store, mlflow_uri: str, prefect_server: None, triton: Serving) -> "Settings":
    """What a flow of the stack that these fixtures are would read from its environment; nothing is captured."""
    from pydantic import SecretStr

    from flows.settings import Settings

    return Settings(
        s3_bucket=store.bucket,
        s3_endpoint_url=store.endpoint_url,
        s3_access_key_id=store.access_key_id,
        s3_secret_access_key=SecretStr(store.secret_access_key or ""),
        mlflow_tracking_uri=mlflow_uri,
        serving_root=triton.root,
        triton_http=triton.address.http,
        triton_grpc=triton.address.grpc,
        triton_admin_key=SecretStr(triton.address.admin_key or ""),
        triton_python=TRITON_PYTHON,
        capture_share=0.0,
    )


@pytest.fixture(scope="session")
def small_network(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`small_network(seed)`: a `cnn` for three classes at 32 px as ONNX, made once for every seed. Its weights are random,
    its head is centred on `photograph`s so that every class occurs.
    """
    import torch

    from tasks.model import build_model, image_network
    from tasks.onnx_export import export_onnx

    made: dict[int, Path] = {}

    def network(seed: int = 0) -> Path:
        if seed not in made:
            torch.manual_seed(seed)
            built = image_network("cnn", build_model("cnn", 3, pretrained=False)).eval()
            with torch.no_grad():
                coarse = torch.randint(0, 256, (128, 3, 8, 8)).float()
                smooth = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")  # what `photograph` draws
                _, embedding = built(smooth.permute(0, 2, 3, 1).to(torch.uint8))
                head = built.classifier.head
                head.weight *= 4 / (head.weight @ (embedding - embedding.mean(0)).T).std()
                head.bias.copy_(-(head.weight @ embedding.mean(0)))
            made[seed] = tmp_path_factory.mktemp("network") / f"{seed}.onnx"
            export_onnx(built, 32, made[seed])
        return made[seed]

    return network


@dataclass(frozen=True)
class Prints:
    """Pictures, and a network that was trained on them. encoded, pixels uint8 [N, 16, 16, 3], labels [N]: by split."""

    encoded: dict[str, list[bytes]]
    pixels: dict[str, Any]
    labels: dict[str, Any]
    rule: "DecisionRule"
    network: "ImageNetwork"


@pytest.fixture(scope="session")
def prints() -> Prints:
    """scikit-learn's scans of 1, 3 and 8, printed in red or blue ink and photographed in bad light: the class is ink and
    digit, so swapped colours are another class, and at 64 pixels with noise, so another resizing is another picture.
    """
    import cv2
    import numpy as np
    from sklearn.datasets import load_digits

    from tasks import training
    from tasks.decision import DecisionRule
    from tasks.images import CURRENT, decode
    from tasks.recipe import Augmentation, TrainConfig
    from tasks.samples import Samples

    scans, random = load_digits(), np.random.default_rng(7)
    chosen = np.flatnonzero(np.isin(scans.target, (1, 3, 8)))
    classes = tuple(f"{ink} {digit}" for ink in ("blue", "red") for digit in (1, 3, 8))
    encoded, names = [], []
    for number in chosen:
        ink = int(random.integers(2))
        scan = cv2.resize((scans.images[number] * 12).astype(np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)
        shade = np.array(((1.0, 0.5, 0.2), (0.2, 0.5, 1.0))[ink])  # as OpenCV writes: blue, green, red
        picture = 60 + 0.7 * scan[..., None] * shade + random.normal(0, 45, (64, 64, 3))
        encoded.append(cv2.imencode(".png", picture.clip(0, 255).astype(np.uint8))[1].tobytes())
        names.append(f"{('blue', 'red')[ink]} {scans.target[number]}")
    labels = np.array([classes.index(name) for name in names], dtype=np.int64)
    parts = {"train": slice(0, 320), "val": slice(320, 430), "test": slice(430, None)}
    pixels = {split: np.stack([decode(data, 16, CURRENT) for data in encoded[part]]) for split, part in parts.items()}
    sets = [
        Samples(pixels[split], labels[parts[split]], np.array([str(n) for n in range(len(pixels[split]))]))
        for split in ("train", "val")
    ]
    config = TrainConfig(
        architecture="cnn",
        pretrained=False,
        image_size=16,
        epochs=8,
        batch_size=32,
        learning_rate=5e-3,
        precision="float32",
        augmentation=Augmentation(flip_horizontal=False, brightness=0, contrast=0),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "processors", lambda: 1)  # a network this small is slower on several threads
        trained = training.train(*sets, classes, config)
    return Prints(
        {split: encoded[part] for split, part in parts.items()},
        pixels,
        {split: labels[part] for split, part in parts.items()},
        DecisionRule(classes),
        trained.network.cpu().eval(),
    )


@pytest.fixture(scope="session")
def register_prints(
    store: Store, mlflow_uri: str, prints: Prints, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """`register_prints(name, versions=1)`: the pictures as a dataset on S3, the network registered as so many versions of a
    model of that name; the last version and its card.
    """
    import uuid

    import numpy as np
    import pyarrow as pa

    from flows import ingest
    from tasks import dataset, registry, storage
    from tasks.images import CURRENT
    from tasks.model import normalisation
    from tasks.recipe import TrainConfig
    from tasks.tracking import open_run
    from tasks.training import predict

    def registered(name: str, versions: int = 1) -> Any:
        prefix = f"incoming/{name}/first/"
        files = {
            f"{prefix}{split}/{prints.rule.labels[label]}/{number}.png": data
            for split in ("train", "val", "test")
            for number, (data, label) in enumerate(zip(prints.encoded[split][:110], prints.labels[split], strict=False))
        }
        storage.write_many(store, files.items())
        found = ingest.find_batch.fn(store, name, prefix)
        with ingest.examine_photographs.fn(store, found, tmp_path_factory.mktemp("spool")) as examination:
            write = dataset.writer(store, found, examination)
            ingest.commit.fn(store, found, examination, ingest.IngestOptions(), write)
        version = dataset.open_version(store, name, 1)
        table = dataset.read_table(store, version, "val")
        place = {hashlib.sha256(data).hexdigest(): number for number, data in enumerate(prints.encoded["val"])}
        order = [place[digest] for digest in table["sha256"].to_pylist()]
        answers = predict(prints.network, prints.pixels["val"][order])
        labels = np.array([prints.labels["val"][n] for n in order])
        reference = registry.Reference(
            answers["embedding"],
            answers["probabilities"],
            labels,
            np.array(table["sha256"].to_pylist()),
            pa.table(table),
        )
        rule, (mean, std) = prints.rule, normalisation("cnn")
        card = registry.ModelCard("cnn", 16, CURRENT, mean, std, rule, name, 1, version.digest, "commit", 0)
        assert float(prints.network.temperature) == 1.0
        config = TrainConfig(architecture="cnn", pretrained=False, image_size=16)
        weights = prints.network.classifier.state_dict()
        for _ in range(versions):
            run_id = open_run(mlflow_uri, version, config, str(uuid.uuid4()), "http://prefect/run")
            model = registry.register(mlflow_uri, run_id, card, weights, reference, {})
        return model, card

    return registered


@pytest.fixture(scope="session")
def describe() -> Callable[..., "SealedVersion"]:
    """`describe(model, version, **changes)`: what a sealed version of a `small_network` says about itself."""
    from dataclasses import replace

    from tasks.decision import DecisionRule
    from tasks.images import CURRENT
    from tasks.model_repository import network_name
    from tasks.sealed import SealedVersion

    def described(model: str, version: int = 1, **changes: object) -> SealedVersion:
        rule = DecisionRule(("cut", "good", "worn"), ("cut", "worn"), 0.6)
        made = SealedVersion(
            *(model, version, network_name(model, 32), rule, CURRENT, 32, model, 10 + version),
            *(f"sha256:{version:064x}", f"run-{version}", "commit", "float32", {"torch": "2"}),
        )
        return replace(made, **changes)  # type: ignore[arg-type]

    return described


@pytest.fixture
def in_production(triton: Any, small_network: Any, describe: Any) -> Callable[..., None]:
    """`in_production(model, door)`: version 1 of the model, a `small_network`, answers behind a front door like this."""
    from tasks.model_repository import install_front_door, network_name, publish_version, stage_version
    from tasks.routing import Route, promoted, write_routing
    from tasks.serving import load_model

    def put(model: str, door: Any) -> None:
        publish_version(triton.root, stage_version(triton.root, small_network(1), describe(model, 1)))
        load_model(triton.address, network_name(model, 32), 1)
        write_routing(triton.root, promoted(None, model, Route(network_name(model, 32), 1)))
        install_front_door(triton.root, model, door)
        load_model(triton.address, model)

    return put
