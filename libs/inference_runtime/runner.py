"""The runner contract: what a runtime implements to be hosted by an engine.

A `Runtime` is found by name through the entry point group `inference_runtime.runtimes`. It makes, for one deployment, a `Codec`
(text <-> tokens, in the engine's stable tier: no device, no torch) and a runner. A local runtime makes a `StepRunner`, which one
worker thread drives step by step; any other runtime makes a `ModelRunner`, which streams chunks by itself. `stepped.py` wraps a
StepRunner and its Codec into a ModelRunner, so there is one contract to call: `execute(request) -> chunks`.
"""

from __future__ import annotations

import enum
import importlib.metadata
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from inference_runtime.errors import RuntimeNotInstalled, Unsupported
from inference_runtime.generation import FinishReason, GenerationRequest, Message, SamplingParams, TokenChunk, TokenLogprob

__all__ = [
    "ENTRY_POINT_GROUP",
    "Capabilities",
    "Codec",
    "Isolation",
    "LoadProgress",
    "ModelRunner",
    "RateLimits",
    "RebuildCause",
    "RunnerConfig",
    "RunnerInfo",
    "Runtime",
    "StepOutput",
    "StepRequest",
    "StepRunner",
    "TransportKind",
    "installed_runtimes",
    "load_runtime",
]

ENTRY_POINT_GROUP = "inference_runtime.runtimes"


class TransportKind(enum.Enum):
    """Where a runner computes (M03)."""

    LOCAL_GPU = "local_gpu"
    LOCAL_CPU = "local_cpu"
    REMOTE_NETWORK = "remote_network"


class Isolation(enum.Enum):
    """What the restartable tier of a runner is: a thread of the engine, or a child process of its own."""

    THREAD = "thread"
    PROCESS = "process"


class RebuildCause(enum.IntEnum):
    """Why a context or session is replaced (M02). Values are those of the wire enum."""

    CONTEXT_POISONED = 1
    REMOTE_AUTH_FAILURE = 2
    CONFIG_CHANGE = 3
    MANUAL = 4


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a runner can do. The engine refuses, by name, whatever is False here; nothing is ignored silently."""

    chat: bool = True
    completion: bool = True
    logprobs: bool = False
    seed: bool = False
    resume: bool = False
    #: Choices of one request that it draws apart, by their number. 1 where it cannot.
    max_choices: int = 1
    deterministic: bool = False
    penalties: bool = False
    logit_bias: bool = False
    min_p: bool = False


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What a loaded runner is."""

    runtime: str
    model: str
    transport: TransportKind
    isolation: Isolation
    capabilities: Capabilities
    max_context_tokens: int
    #: Sequences that one step may hold; the engine admits no more at once.
    max_batch: int
    provider: str = ""


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Limits that the place behind a runner imposes, per minute. None means none known."""

    requests: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    concurrent_requests: int | None = None


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far loading is: bytes done of bytes in all (0 when unknown), and what is being done."""

    done_bytes: int
    total_bytes: int
    phase: str


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """What a runtime is given to make a codec and a runner for one replica.

    Args:
        model: Model name as in the deployment: path, id, registered name.
        options: `runtime_config` of the deployment. A runtime refuses keys it does not know with BadRequest (param set).
        accelerators: Device indexes this replica may use. Empty means the CPU.
        max_context_tokens: Limit set by the deployment, 0 for the model's own.
        max_batch: Requests that may run at once.
    """

    model: str
    options: Mapping[str, object] = field(default_factory=dict)
    accelerators: tuple[int, ...] = ()
    max_context_tokens: int = 0
    max_batch: int = 32


class Codec(Protocol):
    """Text <-> tokens for one model. Pure: the same input gives the same output, in any process. Thread-safe. No device."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; ids are 0 … vocab_size - 1."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text. They have no text of their own in an answer."""
        ...

    @property
    def max_token_bytes(self) -> int:
        """Bytes of text that one token of a prompt may stand for, at most; 0 when there is no such bound.

        A prompt that cannot fit into the context is refused by its size, before the work of tokenising it.
        """
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation, ready for the model's next turn. Raises BadRequest or Unsupported."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, with the model's begin-of-text token where it has one.

        Called in a thread for long prompts: release the interpreter's lock while working, or the whole engine waits.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a generated token stands for; b"" for special tokens.

        The concatenation over an output is its UTF-8 text, so text can be assembled token by token without loss.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One sequence for a StepRunner.

    Args:
        sequence_id: Number chosen by the engine, unique for the life of the context.
        prompt_token_ids: The prompt, tokenised.
        sampling: How to draw. `max_tokens` is > 0 and fits the context; `stop` strings are the engine's business.
        choice: Which choice of the request this is (part of the random key).
        generated_prefix: Tokens already generated elsewhere: output, not prompt.
        cache_salt: Prefix caches share blocks only between equal salts.
    """

    sequence_id: int
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    choice: int = 0
    generated_prefix: Sequence[int] = ()
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step made for one sequence.

    `token_ids` are new tokens in order (an end-of-text token is included when it was drawn). With `finish_reason` set the
    runner has dropped the sequence. `error` ends this sequence alone. `cached_tokens` counts prompt tokens found in a cache
    and is set on a sequence's first output.
    """

    sequence_id: int
    token_ids: Sequence[int]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    error: Exception | None = None


class StepRunner(Protocol):
    """A local model, driven step by step. All calls come from one thread, in turn. Not thread-safe and not async on purpose.

    An exception out of `step` concerns the whole context: the engine's decider looks at its class and at its `error_code`
    (ContextPoisoned and CUDA's sticky codes restart the context; anything else escalates). A fault of one sequence is
    reported in its StepOutput.

    Two more methods are optional, and looked for by name:

    `probe() -> bool`: whether the context still computes, found out by computing something small. Called after an exception, on a
    thread of its own, with a limit of two seconds: it may hang. Without it, what an unknown exception means can only be guessed.

    `on_oom() -> None`: give back memory that is held for later use. Called after a step that ran out of memory and left the
    context sound, in the thread of the steps, before anything is admitted again.
    """

    def load(self, report: Callable[[LoadProgress], None]) -> RunnerInfo:
        """Load the model. Called once, first. Raises BadRequest for a checkpoint that is missing or torn."""
        ...

    def admit(self, request: StepRequest) -> None:
        """Take a sequence in; its first tokens come with a later step. Raises a typed error that concerns it alone."""
        ...

    def abort(self, sequence_id: int) -> None:
        """Drop a sequence before the next step. Unknown and finished ones are ignored."""
        ...

    def step(self) -> Sequence[StepOutput]:
        """Advance all sequences by one step and return what came out. Blocks while the device works. [] when idle."""
        ...

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        ...

    def kv_use(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        ...

    def close(self) -> None:
        """Release the device. Idempotent; also called after a failed load or step."""
        ...


@runtime_checkable
class ModelRunner(Protocol):
    """One contract for every place a model can run (M01). All calls come from one event loop."""

    @property
    def info(self) -> RunnerInfo:
        """What it is. Valid after `load`."""
        ...

    async def load(self) -> None:
        """Make it ready. Raises a typed error that says what to change."""
        ...

    def execute(
        self, request: GenerationRequest, generated_prefix: Sequence[int] = (), choice: int = 0
    ) -> AsyncIterator[TokenChunk]:
        """Stream one choice of the answer. A request for n of them is n calls.

        The last chunk carries `finish_reason` and `usage`. On cancel (`aclose` of the iterator, or cancellation of the task
        that awaits it) generation stops within one step. With a prefix, the first chunk's index is its length. Draws are a
        function of (seed, `choice`, index); `choice` is below `max_choices`.
        """
        ...

    async def rebuild_session(self, cause: RebuildCause) -> None:
        """Replace context or session. What runs finishes on the old one where that still works."""
        ...

    def rate_limits(self) -> RateLimits:
        """Limits of the place behind it."""
        ...

    def estimate_cost(self, request: GenerationRequest) -> int:
        """Upper bound of the cost of a request in millionths of a US dollar. 0 where nothing is charged."""
        ...

    async def close(self) -> None:
        """Release everything. Idempotent."""
        ...


class Runtime(Protocol):
    """A kind of runner, by name: what an entry point refers to. Importing it must be cheap (no torch)."""

    @property
    def name(self) -> str:
        """Name used in deployments."""
        ...

    def check_installed(self) -> None:
        """Raise RuntimeNotInstalled, naming the extra, when packages are missing."""
        ...

    def validate(self, config: RunnerConfig) -> None:
        """Refuse a configuration that cannot work, without loading anything. Raises BadRequest with `param`."""
        ...

    def make_codec(self, config: RunnerConfig) -> Codec:
        """The codec, in the stable tier. May read files; called in a thread."""
        ...

    def make_runner(self, config: RunnerConfig) -> StepRunner:
        """The runner, inside a context. May import heavy packages; called in the context's worker thread."""
        ...


def installed_runtimes() -> list[str]:
    """Names of the runtimes whose packages are installed, sorted."""
    names = []
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            load_runtime(entry_point.name)
        except Unsupported:
            continue
        names.append(entry_point.name)
    return sorted(names)


def load_runtime(name: str) -> Runtime:
    """The runtime with this name, its packages checked.

    Raises:
        RuntimeNotInstalled: The entry point exists and its packages do not.
        Unsupported: Nothing registers this name.
    """
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=name)
    if not found:
        known = sorted({e.name for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)})
        raise Unsupported(f"no runtime is called {name!r}; installed are: {', '.join(known)}", feature="runtime", runtime=name)
    try:
        runtime: Runtime = next(iter(found)).load()
    except ImportError as err:
        raise RuntimeNotInstalled(f"runtime {name!r} cannot be imported: {err}", runtime=name) from err
    runtime.check_installed()
    return runtime
