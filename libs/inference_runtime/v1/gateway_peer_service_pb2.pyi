import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from inference_runtime.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StreamFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STREAM_FORMAT_UNSPECIFIED: _ClassVar[StreamFormat]
    STREAM_FORMAT_CHAT: _ClassVar[StreamFormat]
    STREAM_FORMAT_COMPLETION: _ClassVar[StreamFormat]
STREAM_FORMAT_UNSPECIFIED: StreamFormat
STREAM_FORMAT_CHAT: StreamFormat
STREAM_FORMAT_COMPLETION: StreamFormat

class Gateway(_message.Message):
    __slots__ = ("id", "address", "hostname", "peer_key", "pid")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    PEER_KEY_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    hostname: str
    peer_key: str
    pid: int
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., hostname: _Optional[str] = ..., peer_key: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class StreamHeader(_message.Message):
    __slots__ = ("request", "format", "include_usage", "logprobs", "accepted_at", "age", "attachment")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_USAGE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_AT_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    ATTACHMENT_FIELD_NUMBER: _ClassVar[int]
    request: _generation_pb2.GenerationRequest
    format: StreamFormat
    include_usage: bool
    logprobs: bool
    accepted_at: _timestamp_pb2.Timestamp
    age: _duration_pb2.Duration
    attachment: int
    def __init__(self, request: _Optional[_Union[_generation_pb2.GenerationRequest, _Mapping]] = ..., format: _Optional[_Union[StreamFormat, str]] = ..., include_usage: bool = ..., logprobs: bool = ..., accepted_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., attachment: _Optional[int] = ...) -> None: ...

class StreamEnd(_message.Message):
    __slots__ = ("finish_reason", "usage", "settled_input_tokens", "settled_output_tokens")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    SETTLED_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SETTLED_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _generation_pb2.FinishReason
    usage: _generation_pb2.Usage
    settled_input_tokens: int
    settled_output_tokens: int
    def __init__(self, finish_reason: _Optional[_Union[_generation_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_generation_pb2.Usage, _Mapping]] = ..., settled_input_tokens: _Optional[int] = ..., settled_output_tokens: _Optional[int] = ...) -> None: ...

class StreamBegin(_message.Message):
    __slots__ = ("handle", "header")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    handle: int
    header: StreamHeader
    def __init__(self, handle: _Optional[int] = ..., header: _Optional[_Union[StreamHeader, _Mapping]] = ...) -> None: ...

class StreamProgress(_message.Message):
    __slots__ = ("handle", "offset", "token_ids", "revision", "end")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    handle: int
    offset: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    revision: str
    end: StreamEnd
    def __init__(self, handle: _Optional[int] = ..., offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., revision: _Optional[str] = ..., end: _Optional[_Union[StreamEnd, _Mapping]] = ...) -> None: ...

class ReplicateRequest(_message.Message):
    __slots__ = ("gateway_id", "begun", "progress", "dropped")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    begun: _containers.RepeatedCompositeFieldContainer[StreamBegin]
    progress: _containers.RepeatedCompositeFieldContainer[StreamProgress]
    dropped: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, gateway_id: _Optional[str] = ..., begun: _Optional[_Iterable[_Union[StreamBegin, _Mapping]]] = ..., progress: _Optional[_Iterable[_Union[StreamProgress, _Mapping]]] = ..., dropped: _Optional[_Iterable[int]] = ...) -> None: ...

class ReplicateResponse(_message.Message):
    __slots__ = ("refused",)
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    refused: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, refused: _Optional[_Iterable[int]] = ...) -> None: ...

class TakeStreamRequest(_message.Message):
    __slots__ = ("request_id", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class StreamRecord(_message.Message):
    __slots__ = ("header", "token_ids", "revision", "end")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    header: StreamHeader
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    revision: str
    end: StreamEnd
    def __init__(self, header: _Optional[_Union[StreamHeader, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., revision: _Optional[str] = ..., end: _Optional[_Union[StreamEnd, _Mapping]] = ...) -> None: ...

class TakeStreamResponse(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: StreamRecord
    def __init__(self, record: _Optional[_Union[StreamRecord, _Mapping]] = ...) -> None: ...
