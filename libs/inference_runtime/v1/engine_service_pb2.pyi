import datetime

from google.api import annotations_pb2 as _annotations_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.rpc import status_pb2 as _status_pb2
from inference_runtime.v1 import common_pb2 as _common_pb2
from inference_runtime.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RebuildCause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REBUILD_CAUSE_UNSPECIFIED: _ClassVar[RebuildCause]
    REBUILD_CAUSE_CONTEXT_POISONED: _ClassVar[RebuildCause]
    REBUILD_CAUSE_REMOTE_AUTH_FAILURE: _ClassVar[RebuildCause]
    REBUILD_CAUSE_CONFIG_CHANGE: _ClassVar[RebuildCause]
    REBUILD_CAUSE_MANUAL: _ClassVar[RebuildCause]
REBUILD_CAUSE_UNSPECIFIED: RebuildCause
REBUILD_CAUSE_CONTEXT_POISONED: RebuildCause
REBUILD_CAUSE_REMOTE_AUTH_FAILURE: RebuildCause
REBUILD_CAUSE_CONFIG_CHANGE: RebuildCause
REBUILD_CAUSE_MANUAL: RebuildCause

class TokenPrefix(_message.Message):
    __slots__ = ("choice", "token_ids")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    choice: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, choice: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Submission(_message.Message):
    __slots__ = ("stream_id", "epoch", "request", "replica_id", "revision", "generated_prefix", "time_left", "credits", "coalesce_tokens", "traceparent", "idempotency_key", "fencing_token", "choice", "context_deaths")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    GENERATED_PREFIX_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    COALESCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_DEATHS_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    epoch: int
    request: _generation_pb2.GenerationRequest
    replica_id: str
    revision: str
    generated_prefix: _containers.RepeatedCompositeFieldContainer[TokenPrefix]
    time_left: _duration_pb2.Duration
    credits: int
    coalesce_tokens: int
    traceparent: str
    idempotency_key: str
    fencing_token: _common_pb2.FencingToken
    choice: int
    context_deaths: int
    def __init__(self, stream_id: _Optional[int] = ..., epoch: _Optional[int] = ..., request: _Optional[_Union[_generation_pb2.GenerationRequest, _Mapping]] = ..., replica_id: _Optional[str] = ..., revision: _Optional[str] = ..., generated_prefix: _Optional[_Iterable[_Union[TokenPrefix, _Mapping]]] = ..., time_left: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., credits: _Optional[int] = ..., coalesce_tokens: _Optional[int] = ..., traceparent: _Optional[str] = ..., idempotency_key: _Optional[str] = ..., fencing_token: _Optional[_Union[_common_pb2.FencingToken, _Mapping]] = ..., choice: _Optional[int] = ..., context_deaths: _Optional[int] = ...) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("submission",)
    SUBMISSION_FIELD_NUMBER: _ClassVar[int]
    submission: Submission
    def __init__(self, submission: _Optional[_Union[Submission, _Mapping]] = ...) -> None: ...

class ExecuteResponse(_message.Message):
    __slots__ = ("epoch", "choice", "index", "token_ids", "text", "detail", "context_generation")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_GENERATION_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    choice: int
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    detail: ChunkDetail
    context_generation: int
    def __init__(self, epoch: _Optional[int] = ..., choice: _Optional[int] = ..., index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., detail: _Optional[_Union[ChunkDetail, _Mapping]] = ..., context_generation: _Optional[int] = ...) -> None: ...

class ChunkDetail(_message.Message):
    __slots__ = ("row", "finish_reason", "usage", "logprobs", "tool_calls", "reasoning", "error", "stop_sequence")
    ROW_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    REASONING_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STOP_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    row: int
    finish_reason: _generation_pb2.FinishReason
    usage: _generation_pb2.Usage
    logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TokenLogprob]
    tool_calls: _containers.RepeatedCompositeFieldContainer[_generation_pb2.ToolCallDelta]
    reasoning: str
    error: _status_pb2.Status
    stop_sequence: str
    def __init__(self, row: _Optional[int] = ..., finish_reason: _Optional[_Union[_generation_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_generation_pb2.Usage, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[_generation_pb2.TokenLogprob, _Mapping]]] = ..., tool_calls: _Optional[_Iterable[_Union[_generation_pb2.ToolCallDelta, _Mapping]]] = ..., reasoning: _Optional[str] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., stop_sequence: _Optional[str] = ...) -> None: ...

class ChunkFrame(_message.Message):
    __slots__ = ("stream_ids", "indexes", "token_ids", "texts", "token_counts", "epochs", "choices", "details", "admitted_ids", "admitted_input_tokens")
    STREAM_IDS_FIELD_NUMBER: _ClassVar[int]
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_IDS_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    stream_ids: _containers.RepeatedScalarFieldContainer[int]
    indexes: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    epochs: _containers.RepeatedScalarFieldContainer[int]
    choices: _containers.RepeatedScalarFieldContainer[int]
    details: _containers.RepeatedCompositeFieldContainer[ChunkDetail]
    admitted_ids: _containers.RepeatedScalarFieldContainer[int]
    admitted_input_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stream_ids: _Optional[_Iterable[int]] = ..., indexes: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., texts: _Optional[_Iterable[str]] = ..., token_counts: _Optional[_Iterable[int]] = ..., epochs: _Optional[_Iterable[int]] = ..., choices: _Optional[_Iterable[int]] = ..., details: _Optional[_Iterable[_Union[ChunkDetail, _Mapping]]] = ..., admitted_ids: _Optional[_Iterable[int]] = ..., admitted_input_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class SessionHello(_message.Message):
    __slots__ = ("gateway_id", "protocol_version")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    protocol_version: int
    def __init__(self, gateway_id: _Optional[str] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class SessionWelcome(_message.Message):
    __slots__ = ("engine_id", "boot_id", "protocol_version", "answers_pings")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_PINGS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    boot_id: str
    protocol_version: int
    answers_pings: bool
    def __init__(self, engine_id: _Optional[str] = ..., boot_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., answers_pings: bool = ...) -> None: ...

class Cancellation(_message.Message):
    __slots__ = ("stream_id", "epoch")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    epoch: int
    def __init__(self, stream_id: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class CreditGrant(_message.Message):
    __slots__ = ("stream_id", "tokens")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    tokens: int
    def __init__(self, stream_id: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("hello", "submissions", "cancellations", "credits", "ping")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMISSIONS_FIELD_NUMBER: _ClassVar[int]
    CANCELLATIONS_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    hello: SessionHello
    submissions: _containers.RepeatedCompositeFieldContainer[Submission]
    cancellations: _containers.RepeatedCompositeFieldContainer[Cancellation]
    credits: _containers.RepeatedCompositeFieldContainer[CreditGrant]
    ping: int
    def __init__(self, hello: _Optional[_Union[SessionHello, _Mapping]] = ..., submissions: _Optional[_Iterable[_Union[Submission, _Mapping]]] = ..., cancellations: _Optional[_Iterable[_Union[Cancellation, _Mapping]]] = ..., credits: _Optional[_Iterable[_Union[CreditGrant, _Mapping]]] = ..., ping: _Optional[int] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("welcome", "frame", "draining", "pong", "accepting")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    ACCEPTING_FIELD_NUMBER: _ClassVar[int]
    welcome: SessionWelcome
    frame: ChunkFrame
    draining: bool
    pong: int
    accepting: bool
    def __init__(self, welcome: _Optional[_Union[SessionWelcome, _Mapping]] = ..., frame: _Optional[_Union[ChunkFrame, _Mapping]] = ..., draining: bool = ..., pong: _Optional[int] = ..., accepting: bool = ...) -> None: ...

class GetEngineRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetEngineResponse(_message.Message):
    __slots__ = ("engine", "replicas", "loads")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    engine: _common_pb2.Engine
    replicas: _containers.RepeatedCompositeFieldContainer[_common_pb2.Replica]
    loads: _containers.RepeatedCompositeFieldContainer[_common_pb2.ReplicaLoad]
    def __init__(self, engine: _Optional[_Union[_common_pb2.Engine, _Mapping]] = ..., replicas: _Optional[_Iterable[_Union[_common_pb2.Replica, _Mapping]]] = ..., loads: _Optional[_Iterable[_Union[_common_pb2.ReplicaLoad, _Mapping]]] = ...) -> None: ...

class RebuildReplicaRequest(_message.Message):
    __slots__ = ("replica_id", "cause")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    cause: RebuildCause
    def __init__(self, replica_id: _Optional[str] = ..., cause: _Optional[_Union[RebuildCause, str]] = ...) -> None: ...

class RebuildReplicaResponse(_message.Message):
    __slots__ = ("context_generation",)
    CONTEXT_GENERATION_FIELD_NUMBER: _ClassVar[int]
    context_generation: int
    def __init__(self, context_generation: _Optional[int] = ...) -> None: ...

class DrainEngineRequest(_message.Message):
    __slots__ = ("undo",)
    UNDO_FIELD_NUMBER: _ClassVar[int]
    undo: bool
    def __init__(self, undo: bool = ...) -> None: ...

class DrainEngineResponse(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: int
    def __init__(self, requests: _Optional[int] = ...) -> None: ...

class ResetReplicaRequest(_message.Message):
    __slots__ = ("replica_id",)
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    def __init__(self, replica_id: _Optional[str] = ...) -> None: ...

class ResetReplicaResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
