"""From one created object to one accepted event: first on disk, then posted to Prefect until it is accepted."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import httpx

from bridge.availability import Availability
from bridge.dead_letters import DeadLetters
from bridge.metrics import Metrics
from bridge.pending import Pending, PendingBatches, Seen
from bridge.publish import NotAccepted, post_event, prefect_client, was_stored
from bridge.s3_events import ObjectCreated
from bridge.sealing import Batch, Ignored, batch_of, is_marker
from bridge.settings import BridgeSettings
from bridge.sqs import Consumer
from bridge.state import open_state

logger: Final = logging.getLogger(__name__)

_LOOK_EVERY: Final = 0.5  # seconds between two looks at what silence made due
_FORGET_EVERY: Final = 3600.0


class Bridge:
    """What requests, the queue and the publishing loop share. Everything in it is used on one event loop."""

    def __init__(self, settings: BridgeSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self._database = open_state(settings.state)
        self.pending = PendingBatches(self._database)
        self.dead_letters = DeadLetters(self._database)
        self.client: httpx.AsyncClient = prefect_client(settings)
        self.prefect = Availability(f"Prefect at {settings.prefect_api_url}")
        self.queue = Consumer(settings, self.note, self.dead_letters, self.metrics) if settings.queue_url else None
        self._one_post = asyncio.Lock()
        self._posts: set[asyncio.Task[bool]] = set()
        self._woken = asyncio.Event()
        self._failed_at: dict[Batch, float] = {}
        self._publishing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """The publishing loop, and the queue's thread if there is a queue. Call it on the event loop."""
        self._publishing = asyncio.create_task(self.publish_due(), name="publishing")
        if self.queue is not None:
            self.queue.start()

    async def close(self) -> None:
        """What was not posted yet is on disk and posted by the next process."""
        if self.queue is not None:
            self.queue.stop()
        tasks = [*self._posts, *([self._publishing] if self._publishing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.aclose()
        self._database.close()

    def note(self, created: ObjectCreated) -> Pending | None:
        """Puts one created object on disk; the batch that is complete by it, if any, is posted soon in any case."""
        batch = batch_of(created, self.settings.bucket)
        if isinstance(batch, Ignored):
            self.metrics.count("ignored", batch.reason)
            logger.info("ignored %.100r in the bucket %.100r: %s", created.key, created.bucket, batch.reason)
            return None
        self.metrics.count("objects", batch.dataset)
        now = time.time()
        if not is_marker(created, batch):
            return self._noted(created, batch, self.pending.saw_object(batch, created.etag, now, created.written))
        before, is_bare = self.pending.waiting(batch), not self.pending.knows(batch)
        marker = created.etag or created.version_id or ""
        due = self._noted(created, batch, self.pending.saw_marker(batch, marker, now, created.written))
        if due is not None and before is not None and before.seal == due.seal:
            self.metrics.count("repeated", "marker")  # while it waits for Prefect
        elif due is not None and is_bare:
            self.metrics.count("bare_markers")
            logger.warning("%s is complete, but not one photograph of it has been told", batch.prefix)
        return due

    def _noted(self, created: ObjectCreated, batch: Batch, found: Pending | Seen) -> Pending | None:
        if isinstance(found, Pending):
            self._woken.set()
            return found
        if found is Seen.REPEATED:
            self.metrics.count("repeated", "marker" if is_marker(created, batch) else "object")
        elif found is Seen.LATE:
            self.metrics.count("late", batch.dataset)
            logger.info(
                "%.200r came after the marker of %s: it waits for the marker to be written again, or for the sweep",
                created.key,
                batch.prefix,
            )
        return None

    async def take(self, objects: Sequence[ObjectCreated]) -> bool:
        """For a sender who waits: True when nothing is left to be done, False when something waits on disk for Prefect."""
        due = {pending.batch: pending for created in objects if (pending := self.note(created))}
        posts = {asyncio.create_task(self.publish(each)) for each in due.values()}
        if not posts:
            return True
        self._posts |= posts
        for post in posts:
            post.add_done_callback(self._posts.discard)
        done, late = await asyncio.wait(posts, timeout=self.settings.answer_within)
        return not late and all(post.result() for post in done)

    async def publish(self, due: Pending) -> bool:
        """One attempt; True once Prefect has accepted the event, now or before."""
        async with self._one_post:
            if self.pending.was_accepted(due.batch, due.seal):
                return True
            if not self.prefect.may_try():
                return False
            try:
                await self._hand_over(due)
            except NotAccepted as error:
                self.metrics.count("publish_failures")
                self.prefect.failed(error)
                self._failed_at[due.batch] = time.time()
                return False
            except Exception:
                self._failed_at[due.batch] = time.time()  # the batches behind it come first in the next round
                raise
            self.prefect.answered()
            self.pending.published(due, time.time())
        self._failed_at.pop(due.batch, None)
        self.metrics.count("sealed", "marker" if due.marker is not None else "quiet")
        logger.info("sealed %s (%.100s)", due.batch.prefix, due.seal)
        return True

    async def _hand_over(self, due: Pending) -> None:
        if due.tried and await was_stored(self.client, self.settings.bucket, due):
            logger.info("the event of %s had arrived, only the answer had not", due.batch.prefix)
            return
        self.pending.trying(due)
        await post_event(self.client, self.settings.bucket, due)

    async def publish_due(self) -> None:
        """For ever: publishes what a marker or silence made due."""
        forgot_at = float("-inf")
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), _LOOK_EVERY)
            self._woken.clear()
            try:
                self.pending.settle()
                await self._publish_round()
                if time.monotonic() > forgot_at + _FORGET_EVERY:
                    self.pending.forget(time.time() - self.settings.keep_sealings_days * 86_400)
                    forgot_at = time.monotonic()
            except sqlite3.Error:  # a full disk: what is on it stays, and the next round finds it
                logger.exception("cannot work with %s", self.settings.state)
                await asyncio.sleep(5)
            except Exception:  # whatever it is, the batches that wait are on disk, and nobody else publishes them
                logger.exception("publishing failed; trying again in 5 s")
                await asyncio.sleep(5)

    async def _publish_round(self) -> None:
        """Everything that is due, until one fails; that one comes last in the next round and keeps nobody waiting."""
        due = self._overdue(time.time()) if self.prefect.may_try() else []
        for each in sorted(due, key=lambda pending: self._failed_at.get(pending.batch, 0.0)):
            if not await self.publish(each):
                return

    def _overdue(self, now: float) -> list[Pending]:
        return [each for each in self.pending.every() if each.is_due(now, self.settings.quiet_seconds)]

    def gauges(self) -> dict[str, float]:
        """What /metrics shows besides the counters."""
        now = time.time()
        waits = [now - each.due_at(self.settings.quiet_seconds) for each in self._overdue(now)]
        found = {
            "pending": float(len(self.pending.every())),
            "overdue_seconds": max([0.0, *waits]),
            "prefect_up": float(self.prefect.away_since is None),
            "dead_letters": float(self.dead_letters.count()),
        }
        if self.queue is not None:
            found["sqs_up"] = float(self.queue.availability.away_since is None)
            if self.queue.attributes.messages is not None:
                found["sqs_messages"] = float(self.queue.attributes.messages)
        return found

    @property
    def publishes(self) -> bool:
        """Whether the publishing loop runs. Once it has ended, only a restart of the process brings it back."""
        return self._publishing is not None and not self._publishing.done()

    def health(self) -> dict[str, object]:
        """For people and probes without a token: numbers and states, no addresses and no names."""
        away = self.prefect.away_since is not None
        if not self.publishes:
            return {"status": "stopped", "pending": len(self.pending.every())}
        found: dict[str, object] = {
            "pending": len(self.pending.every()),
            "prefect": self.prefect.state,
            "dead_letters": self.dead_letters.count(),
        }
        if self.queue is not None:
            away = away or self.queue.availability.away_since is not None
            found["queue"] = {
                "state": self.queue.availability.state,
                "messages": self.queue.attributes.messages,
                "redrive_policy": self.queue.attributes.has_redrive,
            }
        return {"status": "degraded" if away else "ok", **found}
