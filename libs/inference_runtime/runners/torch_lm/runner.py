"""The `StepRunner` of the torch runtime: schedule → run → post-process."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch

from inference_runtime.errors import BadRequest, ContextLengthExceeded, Internal
from inference_runtime.generation import MAX_CHOICES, TokenLogprob, TopLogprob
from inference_runtime.runner import (
    Capabilities,
    Codec,
    Isolation,
    LoadProgress,
    RunnerConfig,
    RunnerInfo,
    StepOutput,
    StepRequest,
    TransportKind,
)
from inference_runtime.runners.torch_lm.batch import make_batch
from inference_runtime.runners.torch_lm.blocks import BlockPool
from inference_runtime.runners.torch_lm.checkpoint import find_checkpoint
from inference_runtime.runners.torch_lm.config import ModelConfig, read_model_config
from inference_runtime.runners.torch_lm.kv_cache import KVCache
from inference_runtime.runners.torch_lm.linear import can_pack
from inference_runtime.runners.torch_lm.model import LlamaModel, load_model
from inference_runtime.runners.torch_lm.options import Options, parse_options
from inference_runtime.runners.torch_lm.sampler import draw_tokens, top_logprobs
from inference_runtime.runners.torch_lm.scheduler import Chunk, Scheduler
from inference_runtime.runners.torch_lm.sequence import Sequence as SequenceState
from inference_runtime.runners.torch_lm.sequence import make_sequence

__all__ = ["TorchRunner"]

#: Bound of the KV cache on the CPU where the deployment sets none; pages that are never used take no memory.
CPU_KV_BYTES = 1 << 30
#: Share of the memory left after the weights that the KV cache takes on a GPU; activations need the rest.
GPU_KV_SHARE = 0.85


class TorchRunner:
    """One model on the CPU or on one CUDA device, driven step by step from one thread."""

    def __init__(self, config: RunnerConfig) -> None:
        """Parse the options; nothing is loaded. Raises BadRequest."""
        self._config = config
        self._options: Options = parse_options(config.options)
        self._device = torch.device("cuda", config.accelerators[0]) if config.accelerators else torch.device("cpu")
        self._sequences: dict[int, SequenceState] = {}
        self._ended: list[StepOutput] = []  # sequences whose prefix was already complete
        self._codec: Codec | None = None
        self._model: LlamaModel | None = None

    def load(self, report: Callable[[LoadProgress], None]) -> RunnerInfo:
        """Read the checkpoint and lay out the KV cache.

        Raises:
            BadRequest: The checkpoint is missing or torn, or its tensors are not those of its config.json.
            Unsupported: The architecture is not Llama.
        """
        options = self._options
        self._checkpoint = find_checkpoint(self._config.model, options.revision)
        model_config = read_model_config(self._checkpoint)
        self._defaults = self._checkpoint.generation_defaults()
        self._dtype = _dtype(options.dtype, model_config, self._device)
        if self._device.type == "cpu":
            torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) - 1))
        wanted = min(model_config.context_tokens, self._config.max_context_tokens or model_config.context_tokens)
        packed = options.linear != "plain" and can_pack(self._dtype, self._device)
        if options.linear == "packed" and not packed:
            raise BadRequest(
                f"packed linear layers do not work with {self._dtype} on {self._device}", param="runtime_config.linear"
            )
        with torch.inference_mode():
            self._model = load_model(
                self._checkpoint,
                model_config,
                context_tokens=wanted,
                dtype=self._dtype,
                device=self._device,
                packed=packed,
                report=report,
            )
            blocks = self._kv_blocks(model_config, wanted)
            self._cache = KVCache(model_config, blocks, options.block_size, self._dtype, self._device)
        self._blocks = BlockPool(blocks)
        self._context_tokens = min(wanted, blocks * options.block_size)
        self._scheduler = Scheduler(self._blocks, options.block_size, self._config.max_batch, options.max_step_tokens)
        return self._info()

    def admit(self, request: StepRequest) -> None:
        """Take a sequence in.

        Raises:
            BadRequest: The prompt is empty or holds an id that is no token.
            ContextLengthExceeded: Prompt and prefix leave no room for a token.
        """
        assert request.sequence_id not in self._sequences, f"sequence {request.sequence_id} is admitted already"
        vocabulary = self._loaded.config.vocab_size
        sequence = make_sequence(request, self._defaults, self._context_tokens)
        if not request.prompt_token_ids:
            raise BadRequest("the prompt is empty", param="prompt")
        if not 0 <= min(sequence.tokens) <= max(sequence.tokens) < vocabulary:
            raise BadRequest(f"a token id of the prompt is outside 0 … {vocabulary - 1}", param="prompt")
        biased = (*sequence.drawing.logit_bias, *request.sampling.stop_token_ids)
        if biased and not 0 <= min(biased) <= max(biased) < vocabulary:
            raise BadRequest(f"logit_bias and stop_token_ids must name tokens 0 … {vocabulary - 1}", param="logit_bias")
        if request.generated_prefix and (reason := sequence.finish_reason()) is not None:
            self._ended.append(StepOutput(request.sequence_id, (), reason))
            return
        if len(sequence.tokens) >= self._context_tokens:
            raise ContextLengthExceeded(
                f"the prompt has {len(sequence.tokens)} tokens; this replica takes {self._context_tokens} with the answer",
                param="messages",
                tokens=str(len(sequence.tokens)),
                max_tokens=str(self._context_tokens),
            )
        self._sequences[request.sequence_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, sequence_id: int) -> None:
        """Drop a sequence and free its blocks. Unknown ones are ignored."""
        self._ended = [output for output in self._ended if output.sequence_id != sequence_id]
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Advance all sequences by one step. Errors of the device come out as they are: they concern the whole context."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return self._take_ended()
        batch, drawing = make_batch(chunks, self._cache, self._dtype, self._device)
        logits = self._loaded.forward(batch, self._cache)
        raw = logits.clone() if any(c.sequence.drawing.top_logprobs is not None for c in drawing) else logits
        tokens = draw_tokens(logits, [c.sequence for c in drawing])
        for chunk in chunks:
            chunk.sequence.computed = chunk.end
        drawn = [self._output(chunk, token, raw[row]) for row, (chunk, token) in enumerate(zip(drawing, tokens, strict=True))]
        return self._take_ended() + drawn

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._ended) or (self._model is not None and self._scheduler.has_work())

    def kv_use(self) -> float:
        """Share of the KV blocks in use, 0 to 1."""
        return self._blocks.use if self._model is not None else 0.0

    def probe(self) -> bool:
        """Whether the device still computes: a sticky error fails every call. May hang where the device does."""
        ones = torch.ones(4, device=self._device) + 1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return ones.sum().item() == 8

    def on_oom(self) -> None:
        """Give back what torch's allocator keeps for later."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let go of weights and cache. Idempotent."""
        self._sequences.clear()
        self._ended = []
        if self._model is not None:
            self._model = None
            del self._cache, self._scheduler
        if self._device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def _loaded(self) -> LlamaModel:
        assert self._model is not None, "the runner is not loaded"
        return self._model

    def _take_ended(self) -> list[StepOutput]:
        outputs, self._ended = self._ended, []
        return outputs

    def _output(self, chunk: Chunk, token: int | None, raw: torch.Tensor) -> StepOutput:
        """Post-process one drawn token; `raw` are its unadjusted logits [vocabulary]."""
        sequence = chunk.sequence
        if token is None:
            self._cache.erase(sequence.block_ids)
            self.abort(sequence.sequence_id)
            return StepOutput(sequence.sequence_id, (), error=Internal("the model's logits are not numbers"))
        logprobs = self._logprobs(sequence, token, raw)
        reason = sequence.append(token)
        if reason is not None:
            self.abort(sequence.sequence_id)
        return StepOutput(sequence.sequence_id, (token,), reason, logprobs)

    def _logprobs(self, sequence: SequenceState, token: int, raw: torch.Tensor) -> tuple[TokenLogprob, ...]:
        count = sequence.drawing.top_logprobs
        if count is None:
            return ()
        if self._codec is None:  # most replicas never need it
            from inference_runtime.runners.torch_lm.codec import make_codec

            self._codec = make_codec(self._checkpoint)
        to_bytes = self._codec.token_bytes
        own, others = top_logprobs(raw, token, count)
        return (TokenLogprob(token, to_bytes(token), own, tuple(TopLogprob(i, to_bytes(i), value) for i, value in others)),)

    def _kv_blocks(self, model_config: ModelConfig, context_tokens: int) -> int:
        """Blocks of the KV cache: as asked, else as many full contexts as the batch may need, within the device's memory."""
        options = self._options
        tokens = options.kv_cache_tokens
        if not tokens:
            token_bytes = model_config.kv_token_bytes(self._dtype.itemsize)
            room = CPU_KV_BYTES if self._device.type == "cpu" else int(torch.cuda.mem_get_info(self._device)[0] * GPU_KV_SHARE)
            tokens = min(self._config.max_batch * (context_tokens + options.block_size), room // token_bytes)
        return max(1, tokens // options.block_size)

    def _info(self) -> RunnerInfo:
        cpu = self._device.type == "cpu"
        return RunnerInfo(
            runtime="torch",
            model=self._config.model,
            transport=TransportKind.LOCAL_CPU if cpu else TransportKind.LOCAL_GPU,
            isolation=Isolation.THREAD if cpu else Isolation.PROCESS,
            capabilities=Capabilities(
                logprobs=True,
                seed=True,
                resume=True,
                max_choices=MAX_CHOICES,
                deterministic=self._dtype == torch.float32,
                penalties=True,
                logit_bias=True,
                min_p=True,
            ),
            max_context_tokens=self._context_tokens,
            max_batch=self._config.max_batch,
        )


def _dtype(wanted: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type to compute in. auto: float32 for a float32 checkpoint, bfloat16 for a 16-bit one where the device can."""
    if wanted == "float32" or (wanted == "auto" and config.dtype == "float32"):
        return torch.float32
    if wanted == "bfloat16" or device.type == "cuda" or can_pack(torch.bfloat16, device):
        return torch.bfloat16
    return torch.float32
