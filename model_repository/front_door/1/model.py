"""The front door of a public model: decode, route, ask the routed version, decide, say where the answer comes from.

The file is installed under the public name (`tire`); everything it knows about versions it reads from the serving root:
`routing/<model>.json` says which version answers, that version's `version.json` how to decode for it and how to decide.
"""

import json
import time
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import triton_python_backend_utils as pb_utils

from monitoring.capture import CaptureRecord, Spool
from tasks.decision import decide, score
from tasks.images import UnreadableImage, decode, self_check
from tasks.routing import Route, RoutingTable, read_routing, routing_file
from tasks.sealed import SealedVersion, read_sealed

PARAMETERS = ("request_id", "tire_id", "line", "probe")  # probe: a request of ours, not of production


class Refused(Exception):
    """This request gets no answer. `code`: name of the `pb_utils.TritonError` status the client sees; a name, because the
    server completes `pb_utils` only after it has imported this file.
    """

    def __init__(self, message, code="INVALID_ARG"):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Door:
    """One version as it stands behind the door. answers: ready-made BYTES tensors content, one a label."""

    route: Route
    version: SealedVersion
    lineage: np.ndarray
    answers: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Doors:
    """The routing table in force, with the versions it routes to."""

    table: RoutingTable
    champion: Door
    challenger: Door | None

    def door_for(self, key: str, line: str, now: float) -> Door:
        """The champion, or the challenger for its lines and its share of keys; the same key always gets the same one.

        now: Unix seconds. Whoever lets a challenger in renews its time; when nobody does, the champion has everything again.
        """
        table = self.table
        if self.challenger is None or (table.until is not None and now >= table.until):
            return self.champion
        if line in table.lines or zlib.crc32(key.encode()) < table.share * 2**32:
            return self.challenger
        return self.champion


@dataclass
class Job:
    """One request on its way through."""

    request: object
    request_id: str = ""
    parameters: dict = field(default_factory=dict)
    image: object = None  # encoded bytes, or pixels
    pixels: np.ndarray | None = None
    door: Door | None = None
    captured: bool = False
    answered: bool = False
    response: object = None


class Routing:
    """Reads the routing table when its file has changed: one `stat` a batch, and a whole table or the former one."""

    def __init__(self, root: Path, model: str) -> None:
        self._root, self._model = root, model
        self._path = routing_file(root, model)
        self._stamp = self._complained = None
        self._doors: Doors | None = None

    def current(self) -> Doors:
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            try:
                self._doors = self._open(read_routing(self._root, self._model))
                self._stamp = stamp
            except (ValueError, RuntimeError, OSError) as error:
                self._refuse_table(stamp, error)
        if self._doors is None:
            message = f"no version of {self._model} is in production yet: run the promote flow"
            raise Refused(message, "UNAVAILABLE")
        return self._doors

    def _open(self, table: RoutingTable | None) -> Doors | None:
        if table is None:
            return None
        doors = Doors(
            table,
            self._door(table.champion, "champion"),
            self._door(table.challenger, "challenger") if table.has_canary else None,
        )
        pb_utils.Logger.log_info(f"{self._model}: {doors.table}")
        return doors

    def _door(self, route: Route, routed: str) -> Door:
        directory = self._root / "model_repository" / route.network / str(route.version)
        # Every byte when the door opens; a switch brings a version that was verified when it was published and loaded, and
        # must not hold up requests for the time that reading a network takes.
        version = read_sealed(directory, verify_files=self._doors is None)
        self_check(version.preprocessing)
        return Door(
            route,
            version,
            _text(json.dumps(version.lineage() | {"routed": routed})),
            tuple(_text(label) for label in version.rule.labels),
        )

    def _refuse_table(self, stamp: object, error: Exception) -> None:
        """Go on with the former table, and say so once; without a former one there is nothing to answer with."""
        if stamp != self._complained:
            pb_utils.Logger.log_error(f"{self._model}: the new routing is refused, the former one stays: {error}")
            self._complained = stamp
        if self._doors is None:
            raise Refused(f"{self._model} cannot be served: {error}", "UNAVAILABLE")


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        cv2.setNumThreads(1)  # one instance a core already
        parameters = json.loads(args["model_config"])["parameters"]
        root = Path(args["model_repository"]).resolve().parents[1]
        self._model = args["model_name"]
        self._routing = Routing(root, self._model)
        self._spool = Spool(
            root / "spool" / self._model,
            share=float(parameters["capture_share"]["string_value"]),
            max_bytes=int(parameters["spool_bytes"]["string_value"]),
        )
        try:
            self._routing.current()  # now, and not while the first request waits
        except Refused as refusal:
            pb_utils.Logger.log_info(str(refusal))

    def execute(self, requests: list) -> list:
        began = time.perf_counter()
        jobs = [Job(request) for request in requests]
        try:
            doors = self._routing.current()
        except Refused as refusal:
            return [_refused(refusal) for _ in jobs]
        for job in jobs:
            try:
                self._admit(job, doors)
            except Refused as refusal:
                job.response = _refused(refusal)
            except Exception as error:  # noqa: BLE001  (an exception out of execute would fail the neighbours too)
                pb_utils.Logger.log_error(f"{self._model}: unexpected {type(error).__name__}: {error}")
                job.response = _refused(Refused(f"unexpected {type(error).__name__}: {error}", "INTERNAL"))
        for door in {id(job.door): job.door for job in jobs if job.response is None}.values():
            self._answer(
                door, [job for job in jobs if job.response is None and job.door is door], doors.champion, began
            )
        return [job.response for job in jobs]

    def finalize(self) -> None:
        self._spool.close()

    def _admit(self, job: Job, doors: Doors) -> None:
        """Read the request, choose its version and decode for it. Raises Refused."""
        if job.request.is_cancelled():
            raise Refused("the request was cancelled", "CANCELLED")
        job.parameters = _parameters(job.request)
        job.request_id = str(job.parameters.get("request_id") or job.request.request_id() or uuid.uuid4().hex)
        probe, line = bool(job.parameters.get("probe")), str(job.parameters.get("line", ""))
        key = str(job.parameters.get("tire_id") or job.request_id)
        job.door = doors.champion if probe else doors.door_for(key, line, time.time())
        try:
            job.image, job.pixels = _pixels(job.request, job.door.version)
        except Refused:
            if job.door is doors.champion:
                raise
            job.door = doors.champion  # pixels of its size: a challenger of another one must not refuse them
            job.image, job.pixels = _pixels(job.request, job.door.version)
        is_challenged = job.door is not doors.champion  # what a challenger answers is looked at, all of it
        job.captured = not probe and self._spool.wants_one(always=is_challenged)

    def _answer(self, door: Door, jobs: list, champion: Door, began: float) -> None:
        """Each job gets its own response. Where a challenger has none, the champion answers, and the failure is captured."""
        failed = self._ask_for(door, jobs, began)
        if door is champion:
            for job, refusal in failed:
                job.response = _refused(refusal)
            return
        for job, _ in failed:
            try:
                job.image, job.pixels = _pixels(job.request, champion.version)
            except Refused as unreadable:
                job.response = _refused(unreadable)
        left = [(job, refusal) for job, refusal in failed if job.response is None]
        if left:
            self._answer(champion, [job for job, _ in left], champion, began)
        for job, refusal in left:
            if job.answered and job.captured:
                self._capture(job, door, began, error=str(refusal))

    def _ask_for(self, door: Door, jobs: list, began: float) -> list:
        """One call of the version for all jobs; those it has no answer for, each with its reason. When the call fails, each
        is asked for alone: one image that a network cannot bear must not cost its neighbours their answers.
        """
        try:
            outputs = _ask(door.route, np.stack([job.pixels for job in jobs]), any(job.captured for job in jobs))
        except Refused as refusal:
            if len(jobs) == 1:
                return [(jobs[0], refusal)]
            return [failure for job in jobs for failure in self._ask_for(door, [job], began)]
        failed = []
        probabilities = outputs["probabilities"]
        scores, labels = score(probabilities, door.version.rule), decide(probabilities, door.version.rule)
        for row, job in enumerate(jobs):
            # NaN compares as "below the threshold": a defect would escape.
            if not np.isfinite(probabilities[row]).all():
                message = f"{door.route.network} version {door.route.version} gave no number for this image"
                failed.append((job, Refused(message, "INTERNAL")))
                continue
            job.response = _response(job, door, probabilities[row], scores[row], labels[row])
            job.answered = True
            if job.captured:
                self._capture(
                    job,
                    door,
                    began,
                    label=door.version.rule.labels[labels[row]],
                    score=float(scores[row]),
                    probabilities=probabilities[row].copy(),
                    embedding=outputs["embedding"][row].copy(),
                )
        return failed

    def _capture(self, job: Job, door: Door, began: float, **answer) -> None:
        """The request and its answer; without one, the reason (`error`)."""
        nothing = np.empty(0, np.float32)
        self._spool.offer(
            CaptureRecord(
                **{"label": "", "score": 0.0, "probabilities": nothing, "embedding": nothing} | answer,
                request_id=job.request_id,
                captured_at=time.time(),
                model=self._model,
                version=door.version.version,
                image=job.image,
                tire_id=str(job.parameters.get("tire_id", "")),
                line=str(job.parameters.get("line", "")),
                dropped=self._spool.dropped,
                milliseconds=(time.perf_counter() - began) * 1000,
            )
        )


def _parameters(request: object) -> dict:
    text = request.parameters()
    parameters = json.loads(text) if text and text != "{}" else {}
    unknown = sorted(set(parameters) - set(PARAMETERS))
    if unknown:
        raise Refused(f"unknown request parameter {unknown[0]!r}: this model takes {', '.join(PARAMETERS)}")
    return parameters


def _pixels(request: object, version: SealedVersion) -> tuple:
    """(what to capture, what the network sees) of the request's one input."""
    encoded = pb_utils.get_input_tensor_by_name(request, "image")
    decoded = pb_utils.get_input_tensor_by_name(request, "pixels")
    if (encoded is None) == (decoded is None):
        raise Refused("send either `image` (an encoded photograph) or `pixels` (decoded), one of them")
    given = (encoded or decoded).as_numpy()
    if given.shape[0] != 1:
        raise Refused(f"{given.shape[0]} images in one request: send one image a request, the server batches them")
    if decoded is not None:
        size = version.image_size
        if given.shape[1:] != (size, size, 3):
            raise Refused(
                f"pixels are {list(given.shape[1:])}, this model takes [{size}, {size}, 3]: use tasks.images.decode"
            )
        pixels = given[0].copy()
        return pixels, pixels
    image = given[0].tobytes()
    try:
        return image, decode(image, version.image_size, version.preprocessing)
    except UnreadableImage as unreadable:
        raise Refused(f"{unreadable.reason}: {unreadable}") from None


def _ask(route: Route, images: np.ndarray, with_embedding: bool) -> dict:
    """Call that version of the network model; always pinned, so "the newest" never decides anything."""
    names = ["probabilities", "embedding"] if with_embedding else ["probabilities"]
    call = pb_utils.InferenceRequest(
        model_name=route.network,
        model_version=route.version,
        requested_output_names=names,
        inputs=[pb_utils.Tensor("image", images)],
    )
    response = call.exec()
    if response.has_error():
        message = f"{route.network} version {route.version} did not answer: {response.error().message()}"
        raise Refused(message, "UNAVAILABLE")
    return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in names}


def _response(job: Job, door: Door, probabilities, job_score, label):
    values = {
        "label": door.answers[label],
        "probabilities": probabilities[None],
        "score": np.array([[job_score]], dtype=np.float32),
        "model_version": np.array([[door.version.version]], dtype=np.int64),
        "lineage": door.lineage,
    }
    wanted = set(job.request.requested_output_names())
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, value) for name, value in values.items() if name in wanted]
    )


def _refused(refusal: Refused):
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(str(refusal), getattr(pb_utils.TritonError, refusal.code))
    )


def _text(text: str) -> np.ndarray:
    return np.array([[text.encode()]], dtype=np.object_)


def _stamp(path: Path) -> tuple | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
