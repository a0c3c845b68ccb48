"""The supervisor starts, watches, replaces and gives up (R05, trap 12)."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from inference_runtime.errors import BadRequest, ContextPoisoned
from inference_runtime.supervision import GaveUp, RestartPolicy, Supervisor


class FakeChild:
    """A child whose life the test decides."""

    def __init__(self, start_fault: Exception | None = None) -> None:
        self.start_fault = start_fault
        self.death: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.closed = False

    async def start(self) -> None:
        if self.start_fault is not None:
            raise self.start_fault

    async def died(self) -> Exception:
        return await asyncio.shield(self.death)

    async def close(self) -> None:
        self.closed = True


class Story:
    """A supervisor and what happened to it."""

    def __init__(self, *start_faults: Exception | None, backoff_s: tuple[float, ...] = ()) -> None:
        self.children: list[FakeChild] = []
        self.down: list[str] = []
        self.ready: list[int] = []
        self._changed = asyncio.Event()
        self.now_s = 0.0
        self._start_faults = list(start_faults)
        self.supervisor = Supervisor(
            self._spawn,
            policy=RestartPolicy(backoff_s=backoff_s, jitter=0.0),
            on_ready=self._note_ready,
            on_down=lambda err: self.down.append(str(err)),
            now_s=lambda: self.now_s,
        )

    def _spawn(self, generation: int) -> FakeChild:
        fault = self._start_faults.pop(0) if self._start_faults else None
        self.children.append(FakeChild(fault))
        return self.children[-1]

    def _note_ready(self, child: FakeChild, generation: int) -> None:
        self.ready.append(generation)
        self._changed.set()

    async def until_ready(self, generation: int) -> FakeChild:
        async with asyncio.timeout(5):
            while generation not in self.ready:
                self._changed.clear()
                await self._changed.wait()
        return self.children[generation - 1]


@contextlib.asynccontextmanager
async def running(story: Story):  # type: ignore[no-untyped-def]
    """The supervisor's task, cancelled at the end."""
    task = asyncio.ensure_future(story.supervisor.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_trap_12_a_poisoned_child_is_replaced_more_than_once() -> None:
    """Each life has a generation of its own, the old child is closed, and restarts are counted."""
    story = Story()
    async with running(story):
        for generation in (1, 2, 3):
            child = await story.until_ready(generation)
            child.death.set_result(ContextPoisoned(f"death {generation}"))
        await story.until_ready(4)
        assert story.down == ["death 1", "death 2", "death 3"]
        assert [c.closed for c in story.children] == [True, True, True, False]
        assert (story.supervisor.generation, story.supervisor.restarts) == (4, 3)
    assert story.children[-1].closed


async def test_trap_12_the_fourth_death_in_a_minute_ends_it() -> None:
    """The reason tells how often and why."""
    story = Story()
    async with running(story) as task:
        for generation in (1, 2, 3, 4):
            (await story.until_ready(generation)).death.set_result(ContextPoisoned("poisoned"))
        with pytest.raises(GaveUp, match="more than 3 times within 60 s; the last cause: poisoned"):
            await asyncio.wait_for(task, 5)
    assert all(c.closed for c in story.children)


async def test_deaths_that_are_far_apart_do_not_end_it() -> None:
    """The clock is the one that was injected; each life works for a minute."""
    story = Story()
    async with running(story):
        for generation in range(1, 8):
            child = await story.until_ready(generation)
            story.now_s += 60.0
            child.death.set_result(ContextPoisoned("poisoned"))
        await story.until_ready(8)


async def test_a_child_that_cannot_start_for_a_reason_that_stays_is_not_tried_again() -> None:
    """A missing checkpoint will be missing again."""
    story = Story(BadRequest("there is no such checkpoint"))
    async with running(story) as task:
        with pytest.raises(GaveUp, match="no such checkpoint"):
            await asyncio.wait_for(task, 5)
    assert len(story.children) == 1


async def test_a_child_that_is_poisoned_at_its_start_is_tried_again() -> None:
    """Loading can poison a context too."""
    story = Story(ContextPoisoned("at start"), None)
    async with running(story):
        await story.until_ready(2)


async def test_a_replacement_that_was_asked_for_does_not_count_as_a_fault() -> None:
    """A person may rebuild as often as they like."""
    story = Story()
    async with running(story):
        for generation in range(1, 8):
            await story.until_ready(generation)
            story.supervisor.restart(RuntimeError("by hand"))
        await story.until_ready(8)
        assert story.supervisor.restarts == 7


async def test_three_short_lives_far_apart_end_it() -> None:
    """Slow to load, quick to die: the window alone would never notice."""
    story = Story()
    async with running(story) as task:
        for generation in (1, 2, 3):
            child = await story.until_ready(generation)
            story.now_s += 31.0
            child.death.set_result(ContextPoisoned("poisoned"))
        with pytest.raises(GaveUp, match="3 lives in a row worked for less than 60 s; the last cause: poisoned"):
            await asyncio.wait_for(task, 5)


async def test_an_unknown_fault_is_forgiven_once() -> None:
    """Escalation: one new child, and the next time nobody hopes any more."""
    story = Story()
    async with running(story) as task:
        (await story.until_ready(1)).death.set_result(ZeroDivisionError("a bug"))
        (await story.until_ready(2)).death.set_result(ZeroDivisionError("a bug"))
        with pytest.raises(GaveUp, match="ZeroDivisionError: a bug"):
            await asyncio.wait_for(task, 5)
    assert len(story.children) == 2


async def test_after_a_reset_it_runs_again() -> None:
    """What was counted is forgotten; generations go on."""
    story = Story()
    async with running(story) as task:
        for generation in (1, 2, 3, 4):
            (await story.until_ready(generation)).death.set_result(ContextPoisoned("poisoned"))
        with pytest.raises(GaveUp):
            await asyncio.wait_for(task, 5)
    story.supervisor.reset()
    async with running(story):
        for generation in (5, 6, 7):
            (await story.until_ready(generation)).death.set_result(ContextPoisoned("poisoned"))
        await story.until_ready(8)


async def test_restarts_in_a_row_are_paused() -> None:
    """The first is at once, the second is not."""
    story = Story(backoff_s=(0.0, 0.05))
    loop = asyncio.get_running_loop()
    async with running(story):
        begin = loop.time()
        (await story.until_ready(1)).death.set_result(ContextPoisoned("poisoned"))
        second = await story.until_ready(2)
        at_once = loop.time() - begin
        second.death.set_result(ContextPoisoned("poisoned"))
        await story.until_ready(3)
    assert at_once < 0.05 <= loop.time() - begin
