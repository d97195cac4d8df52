"""Messages from a queue into Prefect events: the bridge as a process between moto's server and a real Prefect server.

moto stands in for SQS, which nobody else serves here; it delivers what S3 notifies to queues, topics and EventBridge, and moves
messages to dead-letter queues. It leaves `versionId` and `sequencer` out; the bodies AWS documents are sent by hand.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer

from bridge.sqs import region_of
from deploy import services

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sqs import SQSClient

WITH_TOKEN = {"Authorization": "Bearer a-token-for-the-tests"}
ACCESS: dict[str, str] = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "eu-central-1"}

Sealed = Callable[..., list[dict[str, Any]]]
Start = Callable[..., Any]


@dataclass
class Aws:
    """moto's server; its state stays in this process while the server is away."""

    server: ThreadedMotoServer
    url: str

    def client(self, service: str) -> Any:
        return boto3.client(service, endpoint_url=self.url, **ACCESS)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def aws() -> Iterator[Aws]:
    port = services.free_ports(1)[0]
    running = Aws(ThreadedMotoServer("127.0.0.1", port, verbose=False), f"http://127.0.0.1:{port}")
    running.server.start()
    yield running
    running.server.stop()


@dataclass
class Queue:
    """A queue whose messages come back a second after they were received and not deleted."""

    sqs: "SQSClient"
    url: str

    @property
    def arn(self) -> str:
        found = self.sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=["QueueArn"])
        return found["Attributes"]["QueueArn"]

    def send(self, body: object) -> str:
        text = body if isinstance(body, str) else json.dumps(body)
        return self.sqs.send_message(QueueUrl=self.url, MessageBody=text)["MessageId"]

    def left(self) -> int:
        """Messages in it, received ones included."""
        names = ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible")
        found = self.sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=list(names))["Attributes"]
        return sum(int(found[name]) for name in names)


_numbers = count()


@pytest.fixture
def make_queue(aws: Aws) -> Callable[..., Queue]:
    sqs = aws.client("sqs")

    def made(dead_letters: Queue | None = None, name: str = "") -> Queue:
        attributes = {"VisibilityTimeout": "1"}
        if dead_letters:
            attributes["RedrivePolicy"] = json.dumps({"deadLetterTargetArn": dead_letters.arn, "maxReceiveCount": "2"})
        answer = sqs.create_queue(QueueName=name or f"queue-{next(_numbers)}", Attributes=attributes)
        return Queue(sqs, answer["QueueUrl"])

    return made


@pytest.fixture
def run(aws: Aws, tmp_path: Path, prefect_api: str, start_bridge: Start) -> Iterator[Callable[..., Any]]:
    """`run(queue_url, **settings)`: the bridge on this queue; always on the same state."""
    started = []

    def bridge(queue_url: str, api: str = prefect_api, endpoint: str = aws.url, **settings: object) -> Any:
        chosen = {
            "queue_url": queue_url,
            "sqs_endpoint_url": endpoint,
            "sqs_region": ACCESS["region_name"],
            "sqs_access_key_id": "test",
            "sqs_secret_access_key": "test",
            "sqs_wait_seconds": 1,
            "quiet_seconds": 3600,
            **settings,
        }
        started.append(start_bridge(tmp_path, api, **chosen))
        return started[-1]

    yield bridge
    for each in started:
        each.stop()


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], str]:
    return (tmp_path / "bridge.log").read_text


def eventually(condition: Callable[[], object], within: float = 20) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not true within {within} s"
        time.sleep(0.1)


def counter(running: Any, name: str) -> int:
    start = f"tirewatch_bridge_{name} "
    lines = httpx.get(f"{running.service.url}/metrics").text.splitlines()
    return sum(int(line.removeprefix(start)) for line in lines if line.startswith(start))


def health(running: Any) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{running.service.url}/health").json()
    return found


def documented(key: str, etag: str = "e1") -> dict[str, Any]:
    """A message as AWS documents it for a versioned bucket (event version 2.1)."""
    return {
        "Records": [
            {
                "eventVersion": "2.1",
                "eventSource": "aws:s3",
                "awsRegion": "eu-central-1",
                "eventTime": "2026-11-21T07:00:00.123Z",
                "eventName": "ObjectCreated:Put",
                "userIdentity": {"principalId": "AWS:ABCDEFGHIJ"},
                "requestParameters": {"sourceIPAddress": "10.0.0.1"},
                "responseElements": {"x-amz-request-id": "C3D13FE58DE4C810", "x-amz-id-2": "FMyUVURIY8"},
                "s3": {
                    "s3SchemaVersion": "1.0",
                    "configurationId": "photographs",
                    "bucket": {
                        "name": "tirewatch",
                        "ownerIdentity": {"principalId": "A3NL"},
                        "arn": "arn:aws:s3:::tirewatch",
                    },
                    "object": {
                        "key": key,
                        "size": 1024,
                        "eTag": etag,
                        "versionId": "096fKKXTRTtl3on89fVO.nfljtsv6qko",
                        "sequencer": "0055AED6DCD90281E5",
                    },
                },
            }
        ]
    }


def marker(dataset: str) -> dict[str, Any]:
    return documented(f"incoming/{dataset}/b1/_SUCCESS")


def notify(aws: Aws, s3: "S3Client", bucket: str, queue: Queue, way: str) -> None:
    """Sends the bucket's created objects to the queue the given way."""
    events = ["s3:ObjectCreated:*"]
    configuration: dict[str, Any]
    if way == "queue":
        configuration = {"QueueConfigurations": [{"QueueArn": queue.arn, "Events": events}]}
    elif way == "eventbridge":
        configuration = {"EventBridgeConfiguration": {}}
        bus = aws.client("events")
        bus.put_rule(Name=bucket, EventPattern=json.dumps({"source": ["aws.s3"], "detail-type": ["Object Created"]}))
        bus.put_targets(Rule=bucket, Targets=[{"Id": "queue", "Arn": queue.arn}])
    else:
        sns = aws.client("sns")
        topic = sns.create_topic(Name=bucket)["TopicArn"]
        raw = {"RawMessageDelivery": "true"} if way == "sns raw" else {}
        sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=queue.arn, Attributes=raw)
        configuration = {"TopicConfigurations": [{"TopicArn": topic, "Events": events}]}
    s3.put_bucket_notification_configuration(Bucket=bucket, NotificationConfiguration=configuration)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["queue", "eventbridge", "sns", "sns raw"])
def test_photographs_put_into_a_bucket_become_one_event_whatever_way_they_are_notified(
    aws: Aws, make_queue: Callable[..., Queue], run: Start, sealed_events: Sealed, way: str
) -> None:
    name = way.replace(" ", "-")
    s3, queue = aws.client("s3"), make_queue()
    bucket, dataset = f"bucket-{name}", f"way-{name}"
    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": ACCESS["region_name"]})
    notify(aws, s3, bucket, queue, way)  # SQS and SNS get a test event by this
    for key in ("good/a b+ü.jpg", "cracked/b.jpg", "_SUCCESS"):
        s3.put_object(Bucket=bucket, Key=f"incoming/{dataset}/b1/{key}", Body=b"x")
    sent = queue.left()
    assert sent == (3 if way == "eventbridge" else 4)
    running = run(queue.url, bucket=bucket)
    [event] = sealed_events(dataset)
    assert event["payload"]["prefix"] == f"incoming/{dataset}/b1/"
    eventually(lambda: queue.left() == 0)
    eventually(lambda: counter(running, "sqs_deleted_total") == sent)
    assert counter(running, "sqs_poison_total") == 0
    assert counter(running, f'objects_total{{dataset="{dataset}"}}') == 3
    assert health(running)["queue"]["state"] == "ok"


def test_a_message_as_aws_documents_it_is_understood_and_its_repetition_seals_nothing(
    make_queue: Callable[..., Queue], run: Start, sealed_events: Sealed
) -> None:
    queue = make_queue()
    for _ in range(3):
        queue.send(marker("documented"))
    running = run(queue.url)
    eventually(lambda: counter(running, 'repeated_total{what="marker"}') == 2)
    eventually(lambda: queue.left() == 0)
    assert len(sealed_events("documented")) == 1


def test_a_message_nobody_understands_goes_to_the_dead_letter_queue_and_blocks_nobody(
    make_queue: Callable[..., Queue], run: Start, sealed_events: Sealed, log: Callable[[], str]
) -> None:
    dead = make_queue()
    queue = make_queue(dead_letters=dead)
    poison = [queue.send(body) for body in ("not json", '{"Records": 5}', {"hello": "world"})]
    queue.send(marker("behind-poison"))
    running = run(queue.url, poison_receives=1)
    assert len(sealed_events("behind-poison")) == 1
    eventually(lambda: dead.left() == 3 and queue.left() == 0)
    bodies = {each["Body"] for each in dead.sqs.receive_message(QueueUrl=dead.url, MaxNumberOfMessages=10)["Messages"]}
    assert bodies == {"not json", '{"Records": 5}', '{"hello": "world"}'}
    assert counter(running, "sqs_poison_total") == 3
    assert counter(running, "sqs_deleted_total") == 1
    assert counter(running, "dead_letters") == 0
    assert health(running)["queue"]["redrive_policy"] is True
    for message_id in poison:
        assert log().count(message_id) == 1, "named once, however often it was received"
    assert "redrive policy" not in log()


def test_without_a_dead_letter_queue_a_poison_message_is_kept_here_and_listed(
    make_queue: Callable[..., Queue], run: Start, sealed_events: Sealed, log: Callable[[], str]
) -> None:
    queue = make_queue()
    message_id = queue.send("poison ☠")
    queue.send(marker("beside-poison"))
    first = run(queue.url, poison_receives=2)
    eventually(lambda: "has no redrive policy" in log() and "set-queue-attributes" in log())
    assert len(sealed_events("beside-poison")) == 1
    eventually(lambda: queue.left() == 0)
    first.process.kill()
    first.process.wait()
    second = run(queue.url)
    url = f"{second.service.url}/dead-letters"
    listed = httpx.get(url, headers=WITH_TOKEN).json()
    [kept] = listed["messages"]
    assert listed["count"] == counter(second, "dead_letters") == health(second)["dead_letters"] == 1
    assert (kept["message_id"], kept["body"], kept["receives"]) == (message_id, "poison ☠", 2)
    assert "no JSON" in kept["reason"] and kept["queue"] == queue.url
    assert httpx.get(url, params={"after": kept["id"]}, headers=WITH_TOKEN).json()["messages"] == []
    assert httpx.get(url).status_code == 401
    assert httpx.delete(f"{url}/{kept['id']}", headers=WITH_TOKEN).status_code == 204
    assert httpx.delete(f"{url}/{kept['id']}", headers=WITH_TOKEN).status_code == 404
    assert httpx.get(url, headers=WITH_TOKEN).json() == {"count": 0, "messages": []}


@pytest.mark.parametrize("action", ["ReceiveMessage", "DeleteMessageBatch"])
def test_a_bridge_killed_around_a_message_loses_and_repeats_nothing(
    aws: Aws,
    make_queue: Callable[..., Queue],
    run: Start,
    sealed_events: Sealed,
    gateway: Callable[[str], Any],
    action: str,
) -> None:
    """SIGKILL after the queue has handed the message out and before the bridge saw it, or before the queue heard of the
    deletion.
    """
    dataset = f"killed-{action.lower()}"
    queue, between, killed = make_queue(), gateway(aws.url), []

    def kill(path: str, headers: Any) -> bool:
        if not headers.get("X-Amz-Target", "").endswith(action) or (action == "ReceiveMessage" and not handed_out()):
            return True
        os.kill(running.process.pid, signal.SIGKILL)
        killed.append(action)
        return False

    def handed_out() -> bool:
        found = queue.sqs.get_queue_attributes(
            QueueUrl=queue.url, AttributeNames=["ApproximateNumberOfMessagesNotVisible"]
        )
        return found["Attributes"]["ApproximateNumberOfMessagesNotVisible"] == "1"

    running = run(queue.url, endpoint=between.url)
    if action == "ReceiveMessage":
        between.after = kill
    else:
        between.before = kill
    queue.send(marker(dataset))
    assert running.process.wait(20) == -signal.SIGKILL
    assert killed == [action]
    assert queue.left() == 1
    again = run(queue.url)
    eventually(lambda: queue.left() == 0)
    assert len(sealed_events(dataset)) == 1
    assert counter(again, 'repeated_total{what="marker"}') == (action == "DeleteMessageBatch")
    time.sleep(1)
    assert len(sealed_events(dataset)) == 1


def test_a_message_is_deleted_once_it_is_on_disk_although_prefect_is_away(
    make_queue: Callable[..., Queue], run: Start, sealed_events: Sealed, prefect_api: str
) -> None:
    queue = make_queue()
    first = run(queue.url, api=f"http://127.0.0.1:{services.free_ports(1)[0]}/api")
    queue.send(marker("prefect-away"))
    eventually(lambda: queue.left() == 0)
    assert health(first)["pending"] == 1
    first.process.kill()
    first.process.wait()
    run(queue.url)
    assert len(sealed_events("prefect-away")) == 1


@pytest.mark.slow
def test_a_queue_that_goes_away_is_told_once_and_read_again_when_it_is_back(
    aws: Aws, make_queue: Callable[..., Queue], run: Start, sealed_events: Sealed, log: Callable[[], str]
) -> None:
    queue = make_queue()
    running = run(queue.url)
    eventually(lambda: health(running)["queue"]["messages"] is not None)
    aws.server.stop()
    eventually(lambda: health(running)["queue"]["state"] == "away")
    eventually(lambda: counter(running, "sqs_receive_errors_total") >= 3)
    assert health(running)["status"] == "degraded"
    assert httpx.get(f"{running.service.url}/health").status_code == 200, "a restart of the bridge would not help"
    aws.server = ThreadedMotoServer("127.0.0.1", int(aws.url.rsplit(":", 1)[1]), verbose=False)
    aws.server.start()
    queue.send(marker("queue-back"))
    assert len(sealed_events("queue-back", within=40)) == 1
    assert health(running)["status"] == "ok"
    assert log().count("does not answer") == log().count("answers again") == 1


def test_a_queue_that_does_not_exist_yet_is_named_with_what_to_look_at(
    make_queue: Callable[..., Queue], run: Start, sealed_events: Sealed, log: Callable[[], str]
) -> None:
    known = make_queue().url
    name = f"later-{next(_numbers)}"
    running = run(known.rsplit("/", 1)[0] + "/" + name)
    eventually(lambda: health(running)["queue"]["state"] == "away")
    assert "TIREWATCH_BRIDGE_QUEUE_URL" in log() and "sqs:ReceiveMessage" in log()
    make_queue(name=name).send(marker("queue-later"))
    assert len(sealed_events("queue-later", within=40)) == 1


def test_the_bridge_ends_at_once_while_it_waits_for_messages(make_queue: Callable[..., Queue], run: Start) -> None:
    running = run(make_queue().url, sqs_wait_seconds=20)
    time.sleep(1)
    started = time.monotonic()
    running.process.terminate()
    assert running.process.wait(10) in (0, -signal.SIGTERM)
    assert time.monotonic() - started < 8


@pytest.mark.parametrize(
    ("url", "region"),
    [
        ("https://sqs.eu-west-1.amazonaws.com/123456789012/photographs", "eu-west-1"),
        ("https://eu-west-1.queue.amazonaws.com/123456789012/photographs", "eu-west-1"),
        ("https://sqs.cn-north-1.amazonaws.com.cn/123456789012/photographs", "cn-north-1"),
        ("http://127.0.0.1:5000/123456789012/photographs", None),
    ],
)
def test_the_region_is_read_from_the_url_of_the_queue(url: str, region: str | None) -> None:
    assert region_of(url) == region
