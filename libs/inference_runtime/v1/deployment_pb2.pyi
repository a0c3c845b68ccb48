import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CapacityPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAPACITY_POLICY_UNSPECIFIED: _ClassVar[CapacityPolicy]
    CAPACITY_POLICY_QUEUE: _ClassVar[CapacityPolicy]
    CAPACITY_POLICY_REJECT: _ClassVar[CapacityPolicy]

class Isolation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ISOLATION_UNSPECIFIED: _ClassVar[Isolation]
    ISOLATION_THREAD: _ClassVar[Isolation]
    ISOLATION_PROCESS: _ClassVar[Isolation]

class DeploymentState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEPLOYMENT_STATE_UNSPECIFIED: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_PENDING: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_LOADING: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_SERVING: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_DEGRADED: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_DRAINING: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_FAILED: _ClassVar[DeploymentState]
CAPACITY_POLICY_UNSPECIFIED: CapacityPolicy
CAPACITY_POLICY_QUEUE: CapacityPolicy
CAPACITY_POLICY_REJECT: CapacityPolicy
ISOLATION_UNSPECIFIED: Isolation
ISOLATION_THREAD: Isolation
ISOLATION_PROCESS: Isolation
DEPLOYMENT_STATE_UNSPECIFIED: DeploymentState
DEPLOYMENT_STATE_PENDING: DeploymentState
DEPLOYMENT_STATE_LOADING: DeploymentState
DEPLOYMENT_STATE_SERVING: DeploymentState
DEPLOYMENT_STATE_DEGRADED: DeploymentState
DEPLOYMENT_STATE_DRAINING: DeploymentState
DEPLOYMENT_STATE_FAILED: DeploymentState

class Serving(_message.Message):
    __slots__ = ("max_concurrent", "queue_capacity", "on_capacity_exhausted", "max_context_tokens")
    MAX_CONCURRENT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    ON_CAPACITY_EXHAUSTED_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_concurrent: int
    queue_capacity: int
    on_capacity_exhausted: CapacityPolicy
    max_context_tokens: int
    def __init__(self, max_concurrent: _Optional[int] = ..., queue_capacity: _Optional[int] = ..., on_capacity_exhausted: _Optional[_Union[CapacityPolicy, str]] = ..., max_context_tokens: _Optional[int] = ...) -> None: ...

class Timeouts(_message.Message):
    __slots__ = ("first_chunk", "total", "disconnected", "next_chunk")
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    DISCONNECTED_FIELD_NUMBER: _ClassVar[int]
    NEXT_CHUNK_FIELD_NUMBER: _ClassVar[int]
    first_chunk: _duration_pb2.Duration
    total: _duration_pb2.Duration
    disconnected: _duration_pb2.Duration
    next_chunk: _duration_pb2.Duration
    def __init__(self, first_chunk: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., total: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., disconnected: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., next_chunk: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DeploymentSpec(_message.Message):
    __slots__ = ("name", "model", "runtime", "replicas", "runtime_config", "serving", "timeouts", "accelerators", "node_labels", "isolation", "memory_bytes", "tolerations", "spread_over")
    class NodeLabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_CONFIG_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUTS_FIELD_NUMBER: _ClassVar[int]
    ACCELERATORS_FIELD_NUMBER: _ClassVar[int]
    NODE_LABELS_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOLERATIONS_FIELD_NUMBER: _ClassVar[int]
    SPREAD_OVER_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    runtime: str
    replicas: int
    runtime_config: _struct_pb2.Struct
    serving: Serving
    timeouts: Timeouts
    accelerators: int
    node_labels: _containers.ScalarMap[str, str]
    isolation: Isolation
    memory_bytes: int
    tolerations: _containers.RepeatedScalarFieldContainer[str]
    spread_over: str
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., runtime: _Optional[str] = ..., replicas: _Optional[int] = ..., runtime_config: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., serving: _Optional[_Union[Serving, _Mapping]] = ..., timeouts: _Optional[_Union[Timeouts, _Mapping]] = ..., accelerators: _Optional[int] = ..., node_labels: _Optional[_Mapping[str, str]] = ..., isolation: _Optional[_Union[Isolation, str]] = ..., memory_bytes: _Optional[int] = ..., tolerations: _Optional[_Iterable[str]] = ..., spread_over: _Optional[str] = ...) -> None: ...

class DeploymentStatus(_message.Message):
    __slots__ = ("state", "reason", "observed_generation", "ready_replicas", "changed_at")
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    READY_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    CHANGED_AT_FIELD_NUMBER: _ClassVar[int]
    state: DeploymentState
    reason: str
    observed_generation: int
    ready_replicas: int
    changed_at: _timestamp_pb2.Timestamp
    def __init__(self, state: _Optional[_Union[DeploymentState, str]] = ..., reason: _Optional[str] = ..., observed_generation: _Optional[int] = ..., ready_replicas: _Optional[int] = ..., changed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Deployment(_message.Message):
    __slots__ = ("spec", "generation", "status", "created_at", "runtime", "revision", "deleting")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DELETING_FIELD_NUMBER: _ClassVar[int]
    spec: DeploymentSpec
    generation: int
    status: DeploymentStatus
    created_at: _timestamp_pb2.Timestamp
    runtime: str
    revision: str
    deleting: bool
    def __init__(self, spec: _Optional[_Union[DeploymentSpec, _Mapping]] = ..., generation: _Optional[int] = ..., status: _Optional[_Union[DeploymentStatus, _Mapping]] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., runtime: _Optional[str] = ..., revision: _Optional[str] = ..., deleting: bool = ...) -> None: ...
