"""Reads the bucket's notifications from an SQS queue: receive, act, and only then delete.

A message is deleted when its effect is on the bridge's disk (bridge/pending.py); until then the queue keeps it and hands it
out again. A message that nobody understands stays in the queue, whose redrive policy moves it to a dead-letter queue; where the
queue has no such policy, it moves to the table of bridge/dead_letters.py after a number of receives. So it never blocks
the others and is never lost.

boto3 blocks, so one thread of its own talks to the queue; what a message means is decided on the event loop, like a request.
"""

import asyncio
import json
import logging
import re
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bridge.availability import Availability
from bridge.dead_letters import MOST, DeadLetters
from bridge.metrics import Metrics
from bridge.s3_events import ObjectCreated, UnknownBody, read
from bridge.settings import BridgeSettings

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

logger: Final = logging.getLogger(__name__)

_MOST_MESSAGES: Final = 10  # of one request; SQS gives no more
_LOOK_EVERY: Final = 60.0  # seconds between two looks at the queue's attributes
_REMEMBERED: Final = 10_000  # ids of messages that were named in the log
_DENIED: Final = ("AccessDenied", "AccessDeniedException")


class QueueError(RuntimeError):
    """The queue did not do what it was asked; trying again later is safe."""


@dataclass(frozen=True)
class Message:
    """receipt: what deletes it. receives: how often the queue has handed it out, this time included."""

    id: str
    receipt: str
    body: str
    receives: int


@dataclass(frozen=True)
class QueueAttributes:
    """has_redrive: whether the queue moves what nobody deletes; None where it may not be asked. messages: waiting in it."""

    has_redrive: bool | None = None
    messages: int | None = None


class Queue:
    """One queue through boto3; blocks. Every method raises QueueError."""

    def __init__(self, settings: BridgeSettings) -> None:
        assert settings.queue_url is not None
        self.url: Final = settings.queue_url
        self._settings = settings
        self._client: SQSClient | None = None

    def receive(self) -> list[Message]:
        """Up to ten messages; waits for the first as long as the settings say."""
        with _queue_errors(self.url):
            answer = self._connected().receive_message(
                QueueUrl=self.url,
                MaxNumberOfMessages=_MOST_MESSAGES,
                WaitTimeSeconds=self._settings.sqs_wait_seconds,
                MessageSystemAttributeNames=["ApproximateReceiveCount"],
            )
        return [
            Message(
                each["MessageId"],
                each["ReceiptHandle"],
                each["Body"],
                int(each.get("Attributes", {}).get("ApproximateReceiveCount", 1)),
            )
            for each in answer.get("Messages", [])
        ]

    def delete(self, messages: Sequence[Message]) -> int:
        """How many were deleted; what could not be comes back and is recognised then."""
        if not messages:
            return 0
        with _queue_errors(self.url):
            answer = self._connected().delete_message_batch(
                QueueUrl=self.url,
                Entries=[{"Id": str(n), "ReceiptHandle": each.receipt} for n, each in enumerate(messages)],
            )
        for failed in answer.get("Failed", []):
            logger.warning("message %s was not deleted: %s", messages[int(failed["Id"])].id, failed.get("Code"))
        return len(answer.get("Successful", []))

    def attributes(self) -> QueueAttributes:
        from botocore.exceptions import ClientError

        with _queue_errors(self.url):
            try:
                found = (
                    self._connected()
                    .get_queue_attributes(QueueUrl=self.url, AttributeNames=["All"])
                    .get("Attributes", {})
                )
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in _DENIED:
                    return QueueAttributes()
                raise
        policy = json.loads(found.get("RedrivePolicy") or "{}")
        return QueueAttributes("deadLetterTargetArn" in policy, int(found.get("ApproximateNumberOfMessages", 0)))

    def _connected(self) -> "SQSClient":
        if self._client is None:
            import boto3
            from botocore.config import Config

            chosen, secret = self._settings, self._settings.sqs_secret_access_key
            self._client = boto3.session.Session().client(
                "sqs",
                endpoint_url=chosen.sqs_endpoint_url,
                region_name=chosen.sqs_region or region_of(self.url),
                aws_access_key_id=chosen.sqs_access_key_id,
                aws_secret_access_key=secret.get_secret_value() if secret else None,
                # One attempt: the pauses between attempts are ours, so that an outage is seen and told at once.
                config=Config(
                    connect_timeout=5, read_timeout=chosen.sqs_wait_seconds + 10, retries={"total_max_attempts": 1}
                ),
            )
        return self._client


@contextmanager
def _queue_errors(url: str) -> Iterator[None]:
    """What botocore raises, as one error with what to look at."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, ValueError) as error:  # ValueError: an endpoint that is no URL
        raise QueueError(
            f"{error} ({url}; look at TIREWATCH_BRIDGE_QUEUE_URL, region and credentials; the bridge needs "
            f"sqs:ReceiveMessage, sqs:DeleteMessage and sqs:GetQueueAttributes)"
        ) from error


def region_of(queue_url: str) -> str | None:
    """`https://sqs.eu-west-1.amazonaws.com/...` -> `eu-west-1`; None for a URL that does not say."""
    found = re.match(r"https?://(?:sqs\.([a-z0-9-]+)|([a-z0-9-]+)\.queue)\.amazonaws\.com", queue_url)
    return (found[1] or found[2]) if found else None


class Consumer:
    """Moves messages from the queue to `take`, in a thread, until it is stopped.

    take: makes one created object durable. It and the tables are used on the event loop only.
    """

    def __init__(
        self,
        settings: BridgeSettings,
        take: Callable[[ObjectCreated], object],
        dead_letters: DeadLetters,
        metrics: Metrics,
    ) -> None:
        self.queue = Queue(settings)
        self.availability = Availability(f"the queue {self.queue.url}")
        self.attributes = QueueAttributes()
        self._poison_receives = settings.poison_receives
        self._take = take
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._named: OrderedDict[str, None] = OrderedDict()
        self._looked_at = float("-inf")
        self._told_of_redrive = False
        self._stopped = threading.Event()

    def start(self) -> None:
        """Call it on the event loop. The thread does not hold up the end of the process: what it had received and not
        deleted by then, the queue hands out again.
        """
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, args=(loop,), name="sqs", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def handle(self, messages: Sequence[Message]) -> list[Message]:
        """The messages that may be deleted: their effect is on disk. Raises sqlite3.Error when the disk does not take it."""
        return [] if self._stopped.is_set() else [each for each in messages if self._is_done(each)]

    def _is_done(self, message: Message) -> bool:
        try:
            for created in read(message.body):
                self._take(created)
        except UnknownBody as error:
            return self._set_aside(message, str(error))
        except sqlite3.Error:
            raise
        except Exception as error:  # a message must never be able to stop the messages behind it
            logger.exception("message %s cannot be handled", message.id)
            return self._set_aside(message, f"{type(error).__name__} {error}"[:300])
        return True

    def _set_aside(self, message: Message, reason: str) -> bool:
        """Counts and names a message that nobody understands; True once it is kept here and may leave the queue."""
        if message.id not in self._named:
            self._metrics.count("sqs_poison")
            logger.warning("message %s is left to the queue, nobody understands it: %s", message.id, reason)
            self._named[message.id] = None
            if len(self._named) > _REMEMBERED:
                self._named.popitem(last=False)
        if self.attributes.has_redrive or message.receives < self._poison_receives:
            return False
        if not self._dead_letters.keep(message.id, self.queue.url, reason, message.receives, message.body):
            logger.error(
                "message %s stays in the queue: %d dead letters are kept already, look at them", message.id, MOST
            )
            return False
        logger.error(
            "message %s was received %d times and is kept under GET /dead-letters now", message.id, message.receives
        )
        return True

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stopped.is_set():
            try:
                self._once(loop)
            except QueueError as error:
                self._metrics.count("sqs_receive_errors")
                self._stopped.wait(self.availability.failed(error))
            except Exception:
                if not self._stopped.is_set():
                    logger.exception("messages are left in the queue and received again")
                self._stopped.wait(5)

    def _once(self, loop: asyncio.AbstractEventLoop) -> None:
        if time.monotonic() > self._looked_at + _LOOK_EVERY:
            self._look()
        messages = self.queue.receive()
        self._metrics.count("sqs_received", by=len(messages))

        async def handled() -> list[Message]:
            return self.handle(messages)

        if messages:
            done = asyncio.run_coroutine_threadsafe(handled(), loop).result()
            self._metrics.count("sqs_deleted", by=self.queue.delete(done))
        self.availability.answered()

    def _look(self) -> None:
        self.attributes = self.queue.attributes()
        self._looked_at = time.monotonic()
        if self.attributes.has_redrive or self._told_of_redrive:
            return
        self._told_of_redrive = True
        why = "has no redrive policy" if self.attributes.has_redrive is False else "does not tell its redrive policy"
        logger.warning(
            "the queue %s %s: a message that nobody understands is kept by the bridge after %d receives (GET /dead-letters). "
            "Better: allow sqs:GetQueueAttributes, make a dead-letter queue and `aws sqs set-queue-attributes --queue-url ... "
            '--attributes \'{"RedrivePolicy": "{\\"deadLetterTargetArn\\": \\"...\\", \\"maxReceiveCount\\": \\"5\\"}"}\'`',
            self.queue.url,
            why,
            self._poison_receives,
        )
