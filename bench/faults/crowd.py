"""Crowds: more requests than the standing load, at a rate or by clients that do not wait, for cells of overload.

What they get is recorded and checked as everything else; what they are refused is theirs to say.
"""

from __future__ import annotations

import asyncio
import random
import time

from bench.faults.asking import Answer
from bench.faults.judge import percentile
from bench.faults.load import Load

__all__ = ["arrivals", "clients", "p99_s", "served", "took_s"]


async def clients(
    load: Load, count: int, lasting_s: float, *, model: str, tokens: int, kind: str, again_s: float
) -> list[Answer]:
    """So many clients, each asking again once it was answered, and `again_s` after it was refused. Returns what they got."""
    until = time.monotonic() + lasting_s
    answers: list[Answer] = []

    async def client(number: int) -> None:
        while time.monotonic() < until:
            answer = load.begin(number % load.gateways, tokens, kind=kind, model=model)
            answers.append(answer)
            await load.ask(answer)
            if answer.outcome != "ended":
                await asyncio.sleep(again_s)

    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(client(number))
    return answers


async def arrivals(
    load: Load, rate_per_s: float, lasting_s: float, *, model: str, tokens: int, kind: str, rng: random.Random
) -> list[Answer]:
    """Requests that come at a rate, whatever becomes of those before them, each once. Returns what they got."""
    begin = time.monotonic()
    answers: list[Answer] = []
    async with asyncio.TaskGroup() as tasks:
        due = 0.0
        while due < lasting_s:
            await asyncio.sleep(begin + due - time.monotonic())
            answer = load.begin(len(answers) % load.gateways, tokens, kind=kind, model=model)
            answers.append(answer)
            tasks.create_task(load.ask(answer))
            due += rng.expovariate(rate_per_s)
    return answers


def served(answers: list[Answer]) -> list[Answer]:
    """Those that were answered whole."""
    return [a for a in answers if a.outcome == "ended"]


def took_s(answers: list[Answer], share: float) -> float:
    """How long they took, from the question to the end: the percentile of this share, seconds."""
    return percentile([a.end - a.begin for a in answers], share)


def p99_s(answers: list[Answer]) -> float:
    """The 99th percentile of it."""
    return took_s(answers, 0.99)
