import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from inference_runtime.v1 import deployment_pb2 as _deployment_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NODE_ROLE_UNSPECIFIED: _ClassVar[NodeRole]
    NODE_ROLE_CONTROL: _ClassVar[NodeRole]
    NODE_ROLE_GPU: _ClassVar[NodeRole]
    NODE_ROLE_EGRESS: _ClassVar[NodeRole]
    NODE_ROLE_EDGE: _ClassVar[NodeRole]

class EngineState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_STATE_UNSPECIFIED: _ClassVar[EngineState]
    ENGINE_STATE_READY: _ClassVar[EngineState]
    ENGINE_STATE_DRAINING: _ClassVar[EngineState]

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_LOADING: _ClassVar[ReplicaState]
    REPLICA_STATE_SERVING: _ClassVar[ReplicaState]
    REPLICA_STATE_RESTARTING: _ClassVar[ReplicaState]
    REPLICA_STATE_DRAINING: _ClassVar[ReplicaState]
    REPLICA_STATE_FAILED: _ClassVar[ReplicaState]
    REPLICA_STATE_NOT_READY: _ClassVar[ReplicaState]
NODE_ROLE_UNSPECIFIED: NodeRole
NODE_ROLE_CONTROL: NodeRole
NODE_ROLE_GPU: NodeRole
NODE_ROLE_EGRESS: NodeRole
NODE_ROLE_EDGE: NodeRole
ENGINE_STATE_UNSPECIFIED: EngineState
ENGINE_STATE_READY: EngineState
ENGINE_STATE_DRAINING: EngineState
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_LOADING: ReplicaState
REPLICA_STATE_SERVING: ReplicaState
REPLICA_STATE_RESTARTING: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState
REPLICA_STATE_FAILED: ReplicaState
REPLICA_STATE_NOT_READY: ReplicaState

class FencingToken(_message.Message):
    __slots__ = ("role", "cluster_id", "revision")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    role: str
    cluster_id: int
    revision: int
    def __init__(self, role: _Optional[str] = ..., cluster_id: _Optional[int] = ..., revision: _Optional[int] = ...) -> None: ...

class Leader(_message.Message):
    __slots__ = ("role", "candidate_id", "address", "pid", "token")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    role: str
    candidate_id: str
    address: str
    pid: int
    token: FencingToken
    def __init__(self, role: _Optional[str] = ..., candidate_id: _Optional[str] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., token: _Optional[_Union[FencingToken, _Mapping]] = ...) -> None: ...

class Accelerator(_message.Message):
    __slots__ = ("index", "name", "memory_bytes", "unschedulable", "island")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNSCHEDULABLE_FIELD_NUMBER: _ClassVar[int]
    ISLAND_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    memory_bytes: int
    unschedulable: str
    island: int
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., unschedulable: _Optional[str] = ..., island: _Optional[int] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("hostname", "roles", "cpu_cores", "memory_bytes", "accelerators", "labels", "taints")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    CPU_CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATORS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TAINTS_FIELD_NUMBER: _ClassVar[int]
    hostname: str
    roles: _containers.RepeatedScalarFieldContainer[NodeRole]
    cpu_cores: int
    memory_bytes: int
    accelerators: _containers.RepeatedCompositeFieldContainer[Accelerator]
    labels: _containers.ScalarMap[str, str]
    taints: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, hostname: _Optional[str] = ..., roles: _Optional[_Iterable[_Union[NodeRole, str]]] = ..., cpu_cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., accelerators: _Optional[_Iterable[_Union[Accelerator, _Mapping]]] = ..., labels: _Optional[_Mapping[str, str]] = ..., taints: _Optional[_Iterable[str]] = ...) -> None: ...

class Engine(_message.Message):
    __slots__ = ("id", "boot_id", "address", "node", "runtimes", "state", "started_at", "pid")
    ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    RUNTIMES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    id: str
    boot_id: str
    address: str
    node: Node
    runtimes: _containers.RepeatedScalarFieldContainer[str]
    state: EngineState
    started_at: _timestamp_pb2.Timestamp
    pid: int
    def __init__(self, id: _Optional[str] = ..., boot_id: _Optional[str] = ..., address: _Optional[str] = ..., node: _Optional[_Union[Node, _Mapping]] = ..., runtimes: _Optional[_Iterable[str]] = ..., state: _Optional[_Union[EngineState, str]] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., pid: _Optional[int] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("chat", "completion", "logprobs", "seed", "resume", "max_choices", "deterministic", "penalties", "logit_bias", "min_p")
    CHAT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    MAX_CHOICES_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    PENALTIES_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    chat: bool
    completion: bool
    logprobs: bool
    seed: bool
    resume: bool
    max_choices: int
    deterministic: bool
    penalties: bool
    logit_bias: bool
    min_p: bool
    def __init__(self, chat: bool = ..., completion: bool = ..., logprobs: bool = ..., seed: bool = ..., resume: bool = ..., max_choices: _Optional[int] = ..., deterministic: bool = ..., penalties: bool = ..., logit_bias: bool = ..., min_p: bool = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("id", "deployment", "engine_id", "address", "generation", "revision", "state", "reason", "runtime", "capabilities", "max_context_tokens", "max_concurrent", "queue_capacity", "restarts")
    ID_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    deployment: str
    engine_id: str
    address: str
    generation: int
    revision: str
    state: ReplicaState
    reason: str
    runtime: str
    capabilities: Capabilities
    max_context_tokens: int
    max_concurrent: int
    queue_capacity: int
    restarts: int
    def __init__(self, id: _Optional[str] = ..., deployment: _Optional[str] = ..., engine_id: _Optional[str] = ..., address: _Optional[str] = ..., generation: _Optional[int] = ..., revision: _Optional[str] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., reason: _Optional[str] = ..., runtime: _Optional[str] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ..., max_context_tokens: _Optional[int] = ..., max_concurrent: _Optional[int] = ..., queue_capacity: _Optional[int] = ..., restarts: _Optional[int] = ...) -> None: ...

class ReplicaLoad(_message.Message):
    __slots__ = ("replica_id", "running", "queued", "pending_tokens", "kv_use")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PENDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USE_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    running: int
    queued: int
    pending_tokens: int
    kv_use: float
    def __init__(self, replica_id: _Optional[str] = ..., running: _Optional[int] = ..., queued: _Optional[int] = ..., pending_tokens: _Optional[int] = ..., kv_use: _Optional[float] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("replica_id", "engine_id", "deployment", "spec", "generation", "revision", "fencing_token", "accelerators")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ACCELERATORS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    engine_id: str
    deployment: str
    spec: _deployment_pb2.DeploymentSpec
    generation: int
    revision: str
    fencing_token: FencingToken
    accelerators: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, replica_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., deployment: _Optional[str] = ..., spec: _Optional[_Union[_deployment_pb2.DeploymentSpec, _Mapping]] = ..., generation: _Optional[int] = ..., revision: _Optional[str] = ..., fencing_token: _Optional[_Union[FencingToken, _Mapping]] = ..., accelerators: _Optional[_Iterable[int]] = ...) -> None: ...
