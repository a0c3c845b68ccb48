import datetime

from google.api import annotations_pb2 as _annotations_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from inference_runtime.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UsageRecord(_message.Message):
    __slots__ = ("request_id", "attempt", "deployment", "replica_id", "usage", "finish_reason", "error_reason", "accepted_at", "time_to_first_token", "duration", "cost_micro_usd", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_REASON_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_AT_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    COST_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    deployment: str
    replica_id: str
    usage: _generation_pb2.Usage
    finish_reason: _generation_pb2.FinishReason
    error_reason: str
    accepted_at: _timestamp_pb2.Timestamp
    time_to_first_token: _duration_pb2.Duration
    duration: _duration_pb2.Duration
    cost_micro_usd: int
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., deployment: _Optional[str] = ..., replica_id: _Optional[str] = ..., usage: _Optional[_Union[_generation_pb2.Usage, _Mapping]] = ..., finish_reason: _Optional[_Union[_generation_pb2.FinishReason, str]] = ..., error_reason: _Optional[str] = ..., accepted_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., time_to_first_token: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., cost_micro_usd: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class UsageColumns(_message.Message):
    __slots__ = ("request_ids", "kinds", "kind_indexes", "input_tokens", "output_tokens", "reasoning_tokens", "cached_input_tokens", "accepted_at_ns", "time_to_first_token_s", "duration_s")
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    KIND_INDEXES_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASONING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_AT_NS_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    kinds: _containers.RepeatedCompositeFieldContainer[UsageRecord]
    kind_indexes: _containers.RepeatedScalarFieldContainer[int]
    input_tokens: _containers.RepeatedScalarFieldContainer[int]
    output_tokens: _containers.RepeatedScalarFieldContainer[int]
    reasoning_tokens: _containers.RepeatedScalarFieldContainer[int]
    cached_input_tokens: _containers.RepeatedScalarFieldContainer[int]
    accepted_at_ns: _containers.RepeatedScalarFieldContainer[int]
    time_to_first_token_s: _containers.RepeatedScalarFieldContainer[float]
    duration_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ..., kinds: _Optional[_Iterable[_Union[UsageRecord, _Mapping]]] = ..., kind_indexes: _Optional[_Iterable[int]] = ..., input_tokens: _Optional[_Iterable[int]] = ..., output_tokens: _Optional[_Iterable[int]] = ..., reasoning_tokens: _Optional[_Iterable[int]] = ..., cached_input_tokens: _Optional[_Iterable[int]] = ..., accepted_at_ns: _Optional[_Iterable[int]] = ..., time_to_first_token_s: _Optional[_Iterable[float]] = ..., duration_s: _Optional[_Iterable[float]] = ...) -> None: ...

class RecordUsageRequest(_message.Message):
    __slots__ = ("records", "columns")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[UsageRecord]
    columns: UsageColumns
    def __init__(self, records: _Optional[_Iterable[_Union[UsageRecord, _Mapping]]] = ..., columns: _Optional[_Union[UsageColumns, _Mapping]] = ...) -> None: ...

class RecordUsageResponse(_message.Message):
    __slots__ = ("accepted",)
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    def __init__(self, accepted: _Optional[int] = ...) -> None: ...

class GetSnapshotRequest(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    def __init__(self, deployment: _Optional[str] = ...) -> None: ...

class DeploymentUsage(_message.Message):
    __slots__ = ("deployment", "requests", "errors", "input_tokens", "output_tokens", "cost_micro_usd", "errors_by_reason", "cancelled")
    class ErrorsByReasonEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COST_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    ERRORS_BY_REASON_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    requests: int
    errors: int
    input_tokens: int
    output_tokens: int
    cost_micro_usd: int
    errors_by_reason: _containers.ScalarMap[str, int]
    cancelled: int
    def __init__(self, deployment: _Optional[str] = ..., requests: _Optional[int] = ..., errors: _Optional[int] = ..., input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., cost_micro_usd: _Optional[int] = ..., errors_by_reason: _Optional[_Mapping[str, int]] = ..., cancelled: _Optional[int] = ...) -> None: ...

class GetSnapshotResponse(_message.Message):
    __slots__ = ("deployments",)
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    deployments: _containers.RepeatedCompositeFieldContainer[DeploymentUsage]
    def __init__(self, deployments: _Optional[_Iterable[_Union[DeploymentUsage, _Mapping]]] = ...) -> None: ...
