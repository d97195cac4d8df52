"""A version as one file: whatever is changed in it is named, and what arrives decides as it did where it was proven."""

import base64
import io
import json
import stat
import tarfile

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy.archive import app
from tasks.archive import (
    ENVELOPE,
    STATEMENT,
    InvalidArchive,
    make_keys,
    open_archive,
    signing_key,
    trusted_key,
    write_archive,
)

ABOUT = {"model": "lids", "version": 4, "networks": ["lids_onnx_32"]}


@pytest.fixture
def keys(tmp_path):
    signing, trusted = make_keys(tmp_path / "keys")
    return signing_key(signing), trusted_key(trusted)


@pytest.fixture
def members(tmp_path):
    (tmp_path / "model.onnx").write_bytes(bytes(range(256)) * 9000)
    (tmp_path / "card.json").write_text('{"threshold": 0.4}')
    return {"sealed/lids_onnx_32/model.onnx": tmp_path / "model.onnx", "run/model/model.json": tmp_path / "card.json"}


@pytest.fixture
def archive(tmp_path, members, keys):
    write_archive(tmp_path / "lids.tar", members, ABOUT, keys[0])
    return tmp_path / "lids.tar"


def rewritten(path, change):
    """The archive with its members changed by `change(dict of name -> bytes)`, as somebody on the way would."""
    with tarfile.open(path) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    change(content)
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_what_was_packed_is_unpacked_and_the_signature_says_by_whom(tmp_path, archive, members, keys):
    found = open_archive(archive, keys[1])
    assert found.about == ABOUT and found.signed_by is not None and found.digests.keys() == members.keys()
    found.unpack(tmp_path / "out")
    for name, file in members.items():
        assert (tmp_path / "out" / name).read_bytes() == file.read_bytes()


def test_the_same_content_makes_the_same_bytes(tmp_path, archive, members, keys):
    members["run/model/model.json"].touch()
    write_archive(tmp_path / "again.tar", members, ABOUT, keys[0])
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()


ONNX = "sealed/lids_onnx_32/model.onnx"


def edit_statement(content):
    body = json.loads(content[STATEMENT])
    body["predicate"]["version"] = 5
    content[STATEMENT] = json.dumps(body).encode()


def edit_both(content):
    """A forger without the key: the network, its digest in the statement, and the envelope's payload, all consistent."""
    import hashlib

    content[ONNX] = b"another network"
    body = json.loads(content[STATEMENT])
    for each in body["subject"]:
        if each["name"] == ONNX:
            each["digest"]["sha256"] = hashlib.sha256(content[ONNX]).hexdigest()
    content[STATEMENT] = json.dumps(body).encode()
    envelope = json.loads(content[ENVELOPE])
    envelope["payload"] = base64.b64encode(content[STATEMENT]).decode()
    content[ENVELOPE] = json.dumps(envelope).encode()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update({ONNX: c[ONNX][:-1] + b"x"}), rf"{ONNX} was changed: sha256 \w{{12}}, stated \w{{12}}"),
        (lambda c: c.pop(ONNX), rf"{ONNX} is missing"),
        (lambda c: c.update({"sealed/extra": b"x"}), "sealed/extra was added"),
        (lambda c: c.update({"../outside": b"x"}), r"'../outside' is no plain member"),
        (lambda c: c.pop(STATEMENT), "holds no statement.json"),
        (lambda c: c.update({STATEMENT: b"{"}), "statement.json is damaged"),
        (edit_statement, "statement.json was changed after it was signed"),
        (edit_both, "is not signed with the trusted key"),
        (lambda c: c.pop(ENVELOPE), "is not signed, and a signature is demanded"),
        (lambda c: c.update({ENVELOPE: b"[]"}), "statement.dsse.json is damaged"),
    ],
)
def test_whatever_was_changed_on_the_way_is_named(archive, keys, change, named):
    with pytest.raises(InvalidArchive, match=named):
        open_archive(rewritten(archive, change), keys[1])


def test_any_single_changed_byte_of_the_content_is_found(archive, keys):
    data = bytearray(archive.read_bytes())
    for place in np.random.default_rng(0).integers(0, len(data) - 10240, 40).tolist():
        damaged = bytearray(data)
        damaged[place] ^= 0x40
        archive.write_bytes(damaged)
        try:
            found = open_archive(archive, keys[1])
        except InvalidArchive:
            continue
        archive.write_bytes(data)  # a byte of a header that means nothing: the content is what was signed all the same
        assert found.digests == open_archive(archive, keys[1]).digests


def test_another_plants_key_is_not_the_trusted_one(tmp_path, archive):
    _, other = make_keys(tmp_path / "other")
    with pytest.raises(InvalidArchive, match="is not signed with the trusted key"):
        open_archive(archive, trusted_key(other))


def test_a_truncated_file_and_a_foreign_one_are_named(tmp_path, archive, keys):
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(InvalidArchive, match=r"lids\.tar"):
        open_archive(archive, keys[1])
    (tmp_path / "foreign.tar").write_text("no archive")
    with pytest.raises(InvalidArchive, match="cannot be read as an archive"):
        open_archive(tmp_path / "foreign.tar", None)


def test_the_signing_key_is_for_its_owner_and_is_never_replaced(tmp_path):
    signing, trusted = make_keys(tmp_path)
    assert stat.S_IMODE(signing.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        make_keys(tmp_path)
    with pytest.raises(ValueError, match=r"(?i)key"):
        signing_key(trusted)


def test_a_link_in_an_archive_is_refused(archive, keys):
    with tarfile.open(archive, "a") as tar:
        link = tarfile.TarInfo("sealed/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InvalidArchive, match="'sealed/link' is no plain member"):
        open_archive(archive, keys[1])


def test_verify_says_what_an_archive_holds_and_asks_whom_to_trust(tmp_path, archive):
    run = CliRunner().invoke
    trusted = tmp_path / "keys" / "trusted.pem"
    told = run(app, ["verify", str(archive), "--trusted", str(trusted)])
    assert told.exit_code == 0 and "lids v4 (lids_onnx_32), 2 members whole, signed by " in told.output
    assert run(app, ["verify", str(archive)]).exit_code == 2
    rewritten(archive, edit_statement)
    told = run(app, ["verify", str(archive), "--trusted", str(trusted)])
    assert told.exit_code == 1 and "was changed after it was signed" in told.output


# --- from one plant to another ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(store, mlflow_uri, prints, register_prints, tmp_path_factory):
    """The plant that trains: `postcards` version 3 is registered and published there, in INT8; 1 and 2 were others."""
    from tasks.export import Export, export_network
    from tasks.images import CURRENT
    from tasks.model_repository import publish_version, stage_version
    from tasks.quantize import Calibration
    from tasks.sealed import SealedVersion
    from tasks.version_transfer import Plant

    model, card = register_prints("postcards", versions=3)
    assert model.version == 3
    root, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("export")
    calibration = Calibration(prints.pixels["train"][:64])
    made = export_network(prints.network, 16, folder, Export(precision="int8"), lambda: calibration)
    sealed = SealedVersion(
        *("postcards", 3, "postcards_onnx_16", prints.rule, CURRENT, 16, "postcards", 1, card.dataset_digest),
        *(model.run_id, "commit", "int8", made.passport),
    )
    publish_version(root, stage_version(root, made.file, sealed, made.beside))
    return Plant(root, store, mlflow_uri, "openvino")


@pytest.fixture(scope="module")
def carried(home, tmp_path_factory):
    """The archive and the key that vouches for it."""
    from tasks.version_transfer import export_version

    folder = tmp_path_factory.mktemp("carried")
    signing, trusted = make_keys(folder)
    export_version(home, "postcards", 3, folder / "postcards.tar", signing_key(signing))
    return folder / "postcards.tar", trusted_key(trusted)


def test_a_version_takes_its_networks_its_card_its_evidence_and_golden_photographs_along(carried):
    found = open_archive(*carried)
    names = found.digests.keys()
    assert {f"sealed/postcards_onnx_16/{name}" for name in ("model.onnx", "float32.onnx", "version.json")} <= names
    assert {"run/model/model.json", "run/model/weights.safetensors", "run/reference/outputs.npz"} <= names
    assert {"ledger.json", "registration.json", "golden.json", "golden/000"} <= names
    assert (found.about["version"], found.about["precision"], found.about["rehearsal"]) == (3, "int8", None)


def test_a_version_that_is_not_published_is_named_with_those_that_are(home, tmp_path):
    from tasks.version_transfer import export_version

    with pytest.raises(LookupError, match=r"postcards v9 is not published .*'postcards_onnx_16': \[3\]"):
        export_version(home, "postcards", 9, tmp_path / "x.tar")


@pytest.mark.slow
def test_a_version_arrives_at_a_plant_with_its_number_its_card_and_its_decisions(home, carried, tmp_path):
    from dataclasses import replace

    from deploy import services
    from deploy.running import start
    from tasks.model_repository import published_versions, version_directory
    from tasks.registry import load_card, load_network
    from tasks.routing import read_routing
    from tasks.sealed import read_sealed
    from tasks.version_transfer import import_version

    server = start(services.mlflow(tmp_path, services.free_ports(1)[0]), tmp_path / "mlflow.log", 120)
    try:
        plant = replace(home, root=tmp_path / "plant", tracking_uri=server.service.url)
        done = import_version(plant, *carried)
        assert (done.version, done.networks, done.rung.flips) == (3, ("postcards_onnx_16",), 0)
        there, here = (version_directory(root, "postcards_onnx_16", 3) for root in (home.root, plant.root))
        assert read_sealed(here) == read_sealed(there)
        assert load_card(plant.tracking_uri, "postcards", 3)[1] == load_card(home.tracking_uri, "postcards", 3)[1]
        assert (
            load_network(plant.tracking_uri, "postcards", 3).temperature
            == load_network(home.tracking_uri, "postcards", 3).temperature
        )
        assert read_routing(plant.root, "postcards") is None, "nobody is routed to it"
        assert import_version(plant, *carried) == done, "twice is harmless"
        assert published_versions(plant.root, "postcards_onnx_16") == [3]
        assert list((plant.root / "staging").iterdir()) == []
        with pytest.raises(LookupError, match="registered: \\[3\\]"):
            load_card(plant.tracking_uri, "postcards", 1)
    finally:
        server.stop()


def test_a_version_that_decides_otherwise_on_the_machine_it_came_to_is_refused(home, carried, tmp_path, keys):
    """Its golden answers were written down by another network."""
    from dataclasses import replace

    from tasks.version_transfer import import_version

    path, trusted = carried
    found = open_archive(path, trusted)
    found.unpack(tmp_path / "out")
    golden = tmp_path / "out" / "golden.json"
    told = json.loads(golden.read_text())
    told["probabilities"] = [row[::-1] for row in told["probabilities"]]
    golden.write_text(json.dumps(told))
    write_archive(tmp_path / "other.tar", {name: tmp_path / "out" / name for name in found.digests}, found.about, None)
    plant = replace(home, root=tmp_path / "plant")
    with pytest.raises(InvalidArchive, match="golden decisions flip"):
        import_version(plant, tmp_path / "other.tar", None)
    assert not (plant.root / "model_repository").exists(), "nothing of it was published"


def test_a_number_that_holds_another_version_here_is_never_reused(home, carried, tmp_path):
    from dataclasses import replace

    from tasks.registry import client_of
    from tasks.version_transfer import import_version

    path, trusted = carried
    found = open_archive(path, trusted)
    found.unpack(tmp_path / "out")
    registration = tmp_path / "out" / "registration.json"
    registration.write_text(json.dumps(json.loads(registration.read_text()) | {"run_id": "of another plant"}))
    write_archive(tmp_path / "other.tar", {name: tmp_path / "out" / name for name in found.digests}, found.about, None)
    with pytest.raises(FileExistsError, match="postcards v3 is another version here"):
        import_version(replace(home, root=tmp_path / "plant"), tmp_path / "other.tar", None)
    assert len(client_of(home.tracking_uri).search_model_versions("name = 'postcards'")) == 3
