"""Runtime "scripted": a model without a model. Its tokens follow from (seed, prompt, choice, index), for anyone to recompute.

For tests, benchmarks and rehearsals of failure: pace, length and faults are set in `runtime_config`, and a client can tell to
the token whether anything was lost, doubled, reordered or mixed up (`inference_runtime.testing.scripted`). It needs no packages.
"""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from hashlib import blake2b, sha256
from itertools import count
from struct import Struct, pack

from inference_runtime.errors import BadRequest, ContextPoisoned, ServerError, Unsupported
from inference_runtime.generation import MAX_CHOICES, FinishReason, Message, Role, TextPart
from inference_runtime.runner import (
    Capabilities,
    Isolation,
    LoadProgress,
    RunnerConfig,
    RunnerInfo,
    StepOutput,
    StepRequest,
    TransportKind,
)
from inference_runtime.runners.scripted_faults import StepFaults

__all__ = ["RUNTIME", "ScriptedCodec", "ScriptedOptions", "ScriptedRunner", "ScriptedRuntime", "scripted_tokens"]

NAME = "scripted"
#: Ids below this are bytes; from here on they are words.
FIRST_WORD = 256
VOCAB_SIZE = 4096
#: Length of an answer where neither the options nor the caller set one.
DEFAULT_TOKENS = 64
DEFAULT_CONTEXT_TOKENS = 32_768
#: Longest sleep while every sequence waits for its first token, so that an abort is seen soon.
MAX_IDLE_S = 0.005

_BLOCK = Struct("<32H")  # tokens that one 64-byte digest gives


def scripted_tokens(prompt_token_ids: Sequence[int], seed: int, choice: int, start: int = 0) -> Iterator[int]:
    """The endless output for a prompt, from index `start` on. Pure.

    Token i of a choice is word number `d[i % 32] % 3840`, where d is BLAKE2b-512 of (key, i // 32) read as 32 little-endian
    16-bit numbers, and key is SHA-256 of the prompt's ids (4 bytes each), the seed and the choice (8 bytes each), little-endian.
    """
    key = sha256(pack(f"<{len(prompt_token_ids)}I", *prompt_token_ids))
    key.update((seed % (1 << 64)).to_bytes(8, "little") + choice.to_bytes(8, "little"))
    digest, words = key.digest(), VOCAB_SIZE - FIRST_WORD
    skip = start % 32
    for block in count(start // 32):
        numbers = _BLOCK.unpack(blake2b(block.to_bytes(8, "little"), key=digest).digest())
        for number in numbers[skip:] if skip else numbers:
            yield FIRST_WORD + number % words
        skip = 0


@dataclass(frozen=True, slots=True)
class ScriptedOptions:
    """`runtime_config` of a scripted deployment. Step and token numbers count from 1 in each life of the runner.

    Args:
        pace_s: Duration of one step, seconds. All sequences step together.
        first_token_delay_s: From a sequence's admission to its first token, seconds.
        tokens: Natural length of an answer (finish reason STOP). 0: as long as the caller's max_tokens, or 64 without one.
        tokens_per_step: Tokens that one step gives each sequence.
        max_context_tokens: Prompt and output together.
        poison_at_step: Raise ContextPoisoned in this step. 0: never.
        poison_at_token: Raise ContextPoisoned instead of this token of all tokens. 0: never.
        sticky_at_token: From this token on, of all tokens, every call fails with `sticky_code` until the process ends, in every
            later life of this (model, options) too: what a device-side assert does to a process. 0: never.
        sticky_code: CUDA's code of that error. 710 is a device-side assert, 214 an uncorrectable error of the device's memory.
        poison_on: Raise ContextPoisoned in each step that would give tokens to a prompt with this text, in every life. "": never.
        poison_times: Lives that are poisoned, for each (model, options) in a process. 0: every life.
        fail_admit: Refuse every sequence whose number is a multiple of this with ServerError. 0: none, 1: all.
        hang_at_step: Stop making progress in this step. 0: never.
        hang_s: How long that lasts, seconds.
        oom_at_step: Run out of memory in this step. 0: never.
        oom_prompt_tokens: Run out of memory in each step that would give tokens to a prompt with more tokens than this. 0: never.
        faults_file: File in which somebody outside says which process hangs or is slow (scripted_faults.py). "": none.
        load_s: Time that loading takes, seconds.
        load_fails: Loading fails with BadRequest.
    """

    pace_s: float = 0.0
    first_token_delay_s: float = 0.0
    tokens: int = 0
    tokens_per_step: int = 1
    max_context_tokens: int = DEFAULT_CONTEXT_TOKENS
    poison_at_step: int = 0
    poison_at_token: int = 0
    sticky_at_token: int = 0
    sticky_code: int = 710
    poison_on: str = ""
    poison_times: int = 1
    fail_admit: int = 0
    hang_at_step: int = 0
    hang_s: float = 3600.0
    oom_at_step: int = 0
    oom_prompt_tokens: int = 0
    faults_file: str = ""
    load_s: float = 0.0
    load_fails: bool = False


def parse_options(options: Mapping[str, object]) -> ScriptedOptions:
    """Checked options. Raises BadRequest with `param` for an unknown key or a wrong value."""
    known = {f.name: f for f in fields(ScriptedOptions)}
    values: dict[str, int | float | bool | str] = {}
    for key, value in options.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}"
            raise BadRequest(f"runtime 'scripted' has no option {key!r}; {hint}", param=f"runtime_config.{key}")
        default = known[key].default
        assert default is not MISSING
        values[key] = _text(key, value) if isinstance(default, str) else _number(key, value, type(default))
    parsed = ScriptedOptions(**values)  # type: ignore[arg-type]
    if parsed.tokens_per_step < 1 or parsed.max_context_tokens < 2:
        key = "tokens_per_step" if parsed.tokens_per_step < 1 else "max_context_tokens"
        raise BadRequest(f"runtime 'scripted': {key} is too small", param=f"runtime_config.{key}")
    return parsed


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"runtime 'scripted': {key} is a text", param=f"runtime_config.{key}")
    return value


def _number(key: str, value: object, kind: type) -> int | float | bool:
    param = f"runtime_config.{key}"
    if kind is bool:
        if not isinstance(value, bool):
            raise BadRequest(f"runtime 'scripted': {key} is true or false", param=param)
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise BadRequest(f"runtime 'scripted': {key} is a number, 0 or more", param=param)
    if kind is int and value != int(value):
        raise BadRequest(f"runtime 'scripted': {key} is a whole number", param=param)
    return int(value) if kind is int else float(value)


class ScriptedCodec:
    """Prompt: the UTF-8 bytes of the conversation. Output: words like " word17"."""

    vocab_size = VOCAB_SIZE
    eos_token_ids: frozenset[int] = frozenset()

    def __init__(self) -> None:
        words = (f" word{n}".encode() for n in range(VOCAB_SIZE - FIRST_WORD))
        self._bytes = [*(bytes([b]) for b in range(FIRST_WORD)), *words]

    @property
    def max_token_bytes(self) -> int:
        """A prompt has one token for each byte."""
        return 1

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """One line per message: role, name if any, text; then the assistant's turn. Raises Unsupported for media."""
        lines = []
        for message in messages:
            for part in message.content:
                if not isinstance(part, TextPart):
                    raise Unsupported(
                        f"runtime 'scripted' reads text only, not {part.kind}", feature=part.kind, runtime=NAME, param="messages"
                    )
            name = f" {message.name}" if message.name else ""
            lines.append(f"{message.role.name.lower()}{name}: {message.text}\n")
        return list(f"{''.join(lines)}{Role.ASSISTANT.name.lower()}:".encode())

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes."""
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        """The byte, or the word with a space before it."""
        return self._bytes[token_id]


class OutOfMemoryError(RuntimeError):
    """What a device allocator raises. Known to the decider by this name."""


class AcceleratorError(RuntimeError):
    """What a device library raises for a CUDA error. Known to the decider by its code."""

    def __init__(self, message: str, error_code: int) -> None:
        super().__init__(message)
        self.error_code = error_code


class _Lives:
    """What this process remembers of each (model, options) and a new context does not: poisoned lives, and a sticky error."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._stuck: set[str] = set()
        self._lock = threading.Lock()  # contexts of several replicas load in threads of their own

    def poison(self, config: RunnerConfig, times: int) -> bool:
        """Whether one more life may be poisoned; counts it if so."""
        key = _key(config)
        with self._lock:
            if times and self._counts.get(key, 0) >= times:
                return False
            self._counts[key] = self._counts.get(key, 0) + 1
            return True

    def stick(self, config: RunnerConfig) -> None:
        """From now on this process cannot compute."""
        with self._lock:
            self._stuck.add(_key(config))

    def stuck(self, config: RunnerConfig) -> bool:
        """Whether it can not."""
        with self._lock:
            return _key(config) in self._stuck


def _key(config: RunnerConfig) -> str:
    return f"{config.model} {sorted(config.options.items())!r}"


_lives = _Lives()


class _Sequence:
    """One sequence: where it stands and where it ends."""

    __slots__ = ("finish", "huge", "left", "poisonous", "ready_at", "stop_ids", "tokens")

    def __init__(self, request: StepRequest, options: ScriptedOptions, context_tokens: int, now: float) -> None:
        sampling, done = request.sampling, len(request.generated_prefix)
        length, self.finish = sampling.max_tokens, FinishReason.LENGTH
        natural = options.tokens
        if not natural and len(request.prompt_token_ids) + length >= context_tokens:
            natural = DEFAULT_TOKENS  # max_tokens is the context's end: the caller set none
        if natural and not sampling.ignore_eos and max(natural, sampling.min_tokens) <= length:
            length, self.finish = max(natural, sampling.min_tokens), FinishReason.STOP
        self.left = length - done
        self.tokens = scripted_tokens(request.prompt_token_ids, sampling.seed or 0, request.choice, done)
        self.ready_at = now + options.first_token_delay_s
        self.stop_ids = frozenset(sampling.stop_token_ids)
        self.huge = 0 < options.oom_prompt_tokens < len(request.prompt_token_ids)
        poison = options.poison_on.encode()
        self.poisonous = bool(poison) and poison in bytes(t for t in request.prompt_token_ids if t < FIRST_WORD)


class ScriptedRunner:
    """The StepRunner. 256 sequences cost well under a millisecond a step."""

    def __init__(self, config: RunnerConfig) -> None:
        self._config = config
        self._options = parse_options(config.options)
        self._context_tokens = config.max_context_tokens or self._options.max_context_tokens
        self._sequences: dict[int, _Sequence] = {}
        self._steps = self._admitted = self._tokens = 0
        self._next_step_at = 0.0
        self._told = StepFaults(self._options.faults_file) if self._options.faults_file else None

    def load(self, report: Callable[[LoadProgress], None]) -> RunnerInfo:
        """Take `load_s`, then work or fail as the options say."""
        self._check_stuck()
        report(LoadProgress(0, 0, "reading the script"))
        time.sleep(self._options.load_s)
        if self._options.load_fails:
            raise BadRequest(f"scripted model {self._config.model!r} is told to fail at load (load_fails)", param="model")
        return RunnerInfo(
            runtime=NAME,
            model=self._config.model,
            transport=TransportKind.LOCAL_CPU,
            isolation=Isolation.THREAD,
            capabilities=Capabilities(seed=True, resume=True, max_choices=MAX_CHOICES, deterministic=True),
            max_context_tokens=self._context_tokens,
            max_batch=self._config.max_batch,
        )

    def admit(self, request: StepRequest) -> None:
        """Take a sequence in."""
        self._check_stuck()
        self._admitted += 1
        if self._options.fail_admit and self._admitted % self._options.fail_admit == 0:
            raise ServerError("the scripted runner is told to refuse this sequence (fail_admit)")
        if not self._sequences:
            self._next_step_at = time.monotonic()
        self._sequences[request.sequence_id] = _Sequence(request, self._options, self._context_tokens, time.monotonic())

    def abort(self, sequence_id: int) -> None:
        """Drop a sequence."""
        self._sequences.pop(sequence_id, None)

    def has_work(self) -> bool:
        """Whether there is a sequence."""
        return bool(self._sequences)

    def kv_use(self) -> float:
        """Share of the batch in use."""
        return min(1.0, len(self._sequences) / self._config.max_batch)

    def step(self) -> Sequence[StepOutput]:
        """Wait for the pace, then give each sequence its next tokens."""
        now = self._pass_time()
        self._steps += 1
        self._fault(now)
        outputs = []
        per_step = self._options.tokens_per_step
        done = []
        for sequence_id, sequence in self._sequences.items():
            if sequence.ready_at > now:
                continue
            stream, size = sequence.tokens, min(per_step, sequence.left)
            tokens = (next(stream),) if size == 1 else tuple(next(stream) for _ in range(size))
            finish = None
            if sequence.stop_ids and not sequence.stop_ids.isdisjoint(tokens):
                tokens = tokens[: 1 + next(i for i, t in enumerate(tokens) if t in sequence.stop_ids)]
                finish = FinishReason.STOP
            sequence.left -= len(tokens)
            if finish is None and sequence.left <= 0:
                finish = sequence.finish
            if finish is not None:
                done.append(sequence_id)
            outputs.append(StepOutput(sequence_id, tokens, finish))
            self._tokens += len(tokens)
        for sequence_id in done:
            del self._sequences[sequence_id]
        return outputs

    def probe(self) -> bool:
        """Whether this process can still compute."""
        return not _lives.stuck(self._config)

    def close(self) -> None:
        """Forget the sequences."""
        self._sequences.clear()

    def _pass_time(self) -> float:
        """Sleep until this step is over, and return the time. A step that is late by less than one keeps the rhythm."""
        pace_s = self._options.pace_s * (self._told.factor() if self._told is not None else 1.0)
        now = time.monotonic()
        self._next_step_at = max(self._next_step_at + pace_s, now)
        if self._options.first_token_delay_s and not self._options.pace_s:
            first = min(s.ready_at for s in self._sequences.values())
            self._next_step_at = max(now, min(first, now + MAX_IDLE_S))
        if self._next_step_at > now:
            time.sleep(self._next_step_at - now)
            now = time.monotonic()
        return now

    def _check_stuck(self) -> None:
        if self._options.sticky_at_token and _lives.stuck(self._config):
            raise AcceleratorError("the scripted device asserted (sticky_at_token)", self._options.sticky_code)

    def _fault(self, now: float) -> None:
        """Fail here, if the options say so."""
        o = self._options
        step, upcoming = o.tokens_per_step, 0
        if o.poison_at_token or o.sticky_at_token:
            upcoming = sum(min(step, s.left) for s in self._sequences.values() if s.ready_at <= now)
        if self._tokens < o.sticky_at_token <= self._tokens + upcoming:
            _lives.stick(self._config)
        self._check_stuck()
        token_due = self._tokens < o.poison_at_token <= self._tokens + upcoming
        if (token_due or self._steps == o.poison_at_step) and _lives.poison(self._config, o.poison_times):
            raise ContextPoisoned("the scripted context is poisoned (poison_at_step, poison_at_token)")
        if o.poison_on and any(s.poisonous and s.ready_at <= now for s in self._sequences.values()):
            raise ContextPoisoned("the scripted context is poisoned by a prompt (poison_on)")
        if o.oom_prompt_tokens and any(s.huge and s.ready_at <= now for s in self._sequences.values()):
            raise OutOfMemoryError("the scripted device is out of memory by a prompt (oom_prompt_tokens)")
        if self._steps == o.oom_at_step:
            raise OutOfMemoryError("the scripted device is out of memory (oom_at_step)")
        if self._steps == o.hang_at_step:
            time.sleep(o.hang_s)


class ScriptedRuntime:
    """The entry point."""

    name = NAME

    def check_installed(self) -> None:
        """Nothing is needed."""

    def validate(self, config: RunnerConfig) -> None:
        """Refuse unknown options and wrong values. Raises BadRequest."""
        parse_options(config.options)

    def make_codec(self, config: RunnerConfig) -> ScriptedCodec:
        """The codec."""
        return ScriptedCodec()

    def make_runner(self, config: RunnerConfig) -> ScriptedRunner:
        """The runner."""
        return ScriptedRunner(config)


RUNTIME = ScriptedRuntime()
