"""What each runner does with an answer that was broken off: continue it exactly, or refuse honestly. Found out by doing it.

    tools/resume_matrix.py            print the table
    tools/resume_matrix.py --write    write it to docs/resume-matrix.md

Every answer is generated whole, then continued from several of its tokens, all continuations side by side. "exact" means that
tokens, text, finish reason and usage are those of the whole answer at every cut, and log-probabilities to a ten-thousandth.
Anything else than exact or refused makes the program end with status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from inference_runtime.errors import Unsupported
from inference_runtime.generation import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    Message,
    Role,
    SamplingParams,
    TextPart,
    TokenChunk,
    TokenLogprob,
    Usage,
)
from inference_runtime.runner import RunnerConfig, Runtime, load_runtime
from inference_runtime.stepped import SteppedRunner
from inference_runtime.text import TextAssembler

__all__ = ["RUNNERS", "matrix"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "resume-matrix.md"
#: One that the demo model has no answer to by heart: sampled ones must differ, or they prove nothing.
PROMPT = "Count from 1 upwards."
TOKENS = 24
#: Cuts, as tokens that were there: nothing but the first, the middle, around a stop string, all but the last.
CUTS = (1, 2, 7, 12, 13, 17, 18, 19, 23)
#: An answer that ends before this proves little.
LEAST_TOKENS = 12
LOGPROB_TOLERANCE = 1e-4

#: Runners of the package: what they are called here, runtime, configuration.
RUNNERS: tuple[tuple[str, str, RunnerConfig], ...] = (
    ("scripted", "scripted", RunnerConfig("matrix", {"max_context_tokens": 4096}, max_batch=16)),
    ("torch, demo model, float32", "torch", RunnerConfig("demo", max_batch=16)),
)

GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=2.0, seed=7)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, or the rest of one."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish: FinishReason | None
    usage: Usage | None
    stop_sequence: str


class Subject:
    """One runner."""

    def __init__(self, runtime: Runtime, config: RunnerConfig) -> None:
        self.codec = runtime.make_codec(config)
        self.runner = SteppedRunner(self.codec, lambda: runtime.make_runner(config), config)
        self._count = 0

    async def answer(self, sampling: SamplingParams, prefix: Sequence[int] = (), choice: int = 0) -> Answer:
        """Generate a choice, from the start or behind a prefix. Raises Unsupported."""
        self._count += 1
        prompt = ChatPrompt((Message(Role.USER, (TextPart(PROMPT),)),))
        request = GenerationRequest(f"matrix-{self._count}", "matrix", prompt, sampling)
        chunks: list[TokenChunk] = []
        generator = self.runner.execute(request, prefix, choice)
        async with aclosing(cast(AsyncGenerator[TokenChunk, None], generator)):
            async for chunk in generator:
                chunks.append(chunk)
        last = chunks[-1]
        return Answer(
            tuple(t for c in chunks for t in c.token_ids),
            "".join(c.text for c in chunks),
            tuple(x for c in chunks for x in c.logprobs or ()),
            last.finish_reason,
            last.usage,
            last.stop_sequence,
        )

    def shown(self, sampling: SamplingParams, tokens: Sequence[int]) -> str:
        """What a client has been shown of these tokens when an answer breaks behind them."""
        return TextAssembler(self.codec, sampling.stop).feed_all(tokens)[0]


async def _settings(subject: Subject) -> dict[str, SamplingParams]:
    """The rows: what is asked for, by name. Stops are taken from the undisturbed answer, so that they come late."""
    plain, drawn = await subject.answer(GREEDY), await subject.answer(SEEDED)
    late, late_drawn = (subject.shown(GREEDY, a.token_ids[:20])[-9:] for a in (plain, drawn))
    late_second = subject.shown(GREEDY, (await subject.answer(SEEDED, choice=1)).token_ids[:20])[-9:]
    bias = {plain.token_ids[0]: -2.0, plain.token_ids[1]: 1.5}
    return {
        "greedy": GREEDY,
        "sampled with a seed": SEEDED,
        "sampled with a seed, top_p and top_k": replace(SEEDED, top_p=0.9, top_k=20),
        "sampled with a seed, min_p": replace(SEEDED, min_p=0.05),
        "stop string that ends the answer late": replace(GREEDY, stop=(late,)),
        "stop string, sampled with a seed": replace(SEEDED, stop=(late_drawn,)),
        "stop token": replace(GREEDY, stop_token_ids=(_last_new(plain.token_ids[:20]),)),
        "presence penalty": replace(GREEDY, presence_penalty=1.5),
        "frequency penalty": replace(GREEDY, frequency_penalty=1.5),
        "repetition penalty": replace(GREEDY, repetition_penalty=1.3),
        "penalties, sampled with a seed": replace(SEEDED, presence_penalty=0.8, frequency_penalty=0.8),
        "bias of single tokens": replace(GREEDY, logit_bias=bias),
        "log-probabilities": replace(GREEDY, top_logprobs=3),
        "min_tokens": replace(GREEDY, ignore_eos=False, min_tokens=20),
        "the model's own end": replace(GREEDY, ignore_eos=False, max_tokens=64),
        "n=2, sampled with a seed": replace(SEEDED, n=2),
        "n=2, stop string that ends the second, sampled with a seed": replace(SEEDED, n=2, stop=(late_second,)),
        "n=2, log-probabilities, sampled with a seed": replace(SEEDED, n=2, top_logprobs=3),
    }


def _last_new(token_ids: Sequence[int]) -> int:
    """The token that appears for the first time the latest."""
    return max(token_ids, key=token_ids.index)


async def _outcome(subject: Subject, sampling: SamplingParams) -> str:
    """One cell. Several choices are as many generations, each broken at every cut; gateways make one answer of them."""
    one = replace(sampling, n=1)
    try:
        wholes = [await subject.answer(one, choice=choice) for choice in range(sampling.n)]
        outcomes = [await _choice_outcome(subject, one, whole, choice) for choice, whole in enumerate(wholes)]
    except Unsupported as err:
        return f"refused ({err.metadata.get('feature', 'unnamed')})"
    if len({whole.token_ids for whole in wholes}) < sampling.n:
        return "ALIKE: its choices are the same answer"
    return next((outcome for outcome in outcomes if outcome != "exact"), "exact")


async def _choice_outcome(subject: Subject, sampling: SamplingParams, whole: Answer, choice: int) -> str:
    if len(whole.token_ids) < LEAST_TOKENS:
        return f"TOO SHORT to tell: {len(whole.token_ids)} tokens"
    cuts = [cut for cut in CUTS if cut < len(whole.token_ids)]
    rests = await asyncio.gather(*(subject.answer(sampling, whole.token_ids[:cut], choice) for cut in cuts))
    for cut, rest in zip(cuts, rests, strict=True):
        if not _continues(subject, sampling, whole, cut, rest):
            return f"DIFFERS from token {cut} on"
    return "exact"


def _continues(subject: Subject, sampling: SamplingParams, whole: Answer, cut: int, rest: Answer) -> bool:
    """Whether both parts together are the whole."""
    far = [abs(a.logprob - b.logprob) > LOGPROB_TOLERANCE for a, b in zip(whole.logprobs[cut:], rest.logprobs, strict=False)]
    return (
        whole.token_ids[:cut] + rest.token_ids == whole.token_ids
        and subject.shown(sampling, whole.token_ids[:cut]) + rest.text == whole.text
        and len(rest.logprobs) == len(whole.logprobs[cut:])
        and not any(far)
        and (rest.finish, rest.stop_sequence) == (whole.finish, whole.stop_sequence)
        and rest.usage is not None
        and whole.usage is not None
        and rest.usage.input_tokens == whole.usage.input_tokens
        and rest.usage.output_tokens == whole.usage.output_tokens
    )


async def _column(runtime: str, config: RunnerConfig) -> dict[str, str]:
    subject = Subject(load_runtime(runtime), config)
    await subject.runner.load()
    try:
        return {name: await _outcome(subject, sampling) for name, sampling in (await _settings(subject)).items()}
    finally:
        await subject.runner.close()


HEAD = """# What a resumed answer is

An answer that breaks in the middle goes on elsewhere, behind its last token. This table tells, for each runner of the package,
whether the continued answer is the one that nobody disturbed. It is found out by doing it: each answer is generated whole and
continued from {cuts} of its tokens, all continuations at once.

- **exact**: tokens, text, finish reason and usage are those of the undisturbed answer at every cut; log-probabilities differ by
  less than {tolerance:g}. With n=2 that is said of each choice, and that they are two answers and not one.
- **refused**: the runner does not offer it, broken or not, and says so by name. Nothing is ignored silently.

Written by `tools/resume_matrix.py --write`; a test holds this file against what the runners do.
"""


async def matrix() -> str:
    """The page."""
    columns = {title: await _column(runtime, config) for title, runtime, config in RUNNERS}
    rows = list(next(iter(columns.values())))
    lines = [f"| asked for | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {row} | {' | '.join(column[row] for column in columns.values())} |" for row in rows]
    return HEAD.format(cuts=len(CUTS), tolerance=LOGPROB_TOLERANCE) + "\n" + "\n".join(lines) + "\n"


def main() -> int:
    """Print the page or write it."""
    parser = argparse.ArgumentParser(description="What each runner does with an answer that was broken off.")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    page = asyncio.run(matrix())
    if arguments.write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")
    return 1 if any(word in page for word in ("DIFFERS", "TOO SHORT", "ALIKE")) else 0


if __name__ == "__main__":
    sys.exit(main())
