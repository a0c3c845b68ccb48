import datetime

from google.api import annotations_pb2 as _annotations_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from inference_runtime.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterRequest(_message.Message):
    __slots__ = ("engine", "replicas")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    engine: _common_pb2.Engine
    replicas: _containers.RepeatedCompositeFieldContainer[_common_pb2.Replica]
    def __init__(self, engine: _Optional[_Union[_common_pb2.Engine, _Mapping]] = ..., replicas: _Optional[_Iterable[_Union[_common_pb2.Replica, _Mapping]]] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("valid_for",)
    VALID_FOR_FIELD_NUMBER: _ClassVar[int]
    valid_for: _duration_pb2.Duration
    def __init__(self, valid_for: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DeregisterRequest(_message.Message):
    __slots__ = ("engine_id",)
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    def __init__(self, engine_id: _Optional[str] = ...) -> None: ...

class DeregisterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportLoadRequest(_message.Message):
    __slots__ = ("engine_id", "loads")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    loads: _containers.RepeatedCompositeFieldContainer[_common_pb2.ReplicaLoad]
    def __init__(self, engine_id: _Optional[str] = ..., loads: _Optional[_Iterable[_Union[_common_pb2.ReplicaLoad, _Mapping]]] = ...) -> None: ...

class ReportLoadResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RouteRequest(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    def __init__(self, deployment: _Optional[str] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: _common_pb2.Replica
    def __init__(self, replica: _Optional[_Union[_common_pb2.Replica, _Mapping]] = ...) -> None: ...

class WatchRoutesRequest(_message.Message):
    __slots__ = ("gateway_id",)
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    def __init__(self, gateway_id: _Optional[str] = ...) -> None: ...

class DeploymentRoute(_message.Message):
    __slots__ = ("deployment", "replicas", "runtime", "generation", "first_chunk_timeout", "total_timeout", "disconnected_timeout", "next_chunk_timeout")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    DISCONNECTED_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    NEXT_CHUNK_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    replicas: _containers.RepeatedCompositeFieldContainer[_common_pb2.Replica]
    runtime: str
    generation: int
    first_chunk_timeout: _duration_pb2.Duration
    total_timeout: _duration_pb2.Duration
    disconnected_timeout: _duration_pb2.Duration
    next_chunk_timeout: _duration_pb2.Duration
    def __init__(self, deployment: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[_common_pb2.Replica, _Mapping]]] = ..., runtime: _Optional[str] = ..., generation: _Optional[int] = ..., first_chunk_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., total_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., disconnected_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., next_chunk_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WatchRoutesResponse(_message.Message):
    __slots__ = ("revision", "snapshot", "deployments", "removed", "loads", "fencing_token")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    revision: int
    snapshot: bool
    deployments: _containers.RepeatedCompositeFieldContainer[DeploymentRoute]
    removed: _containers.RepeatedScalarFieldContainer[str]
    loads: _containers.RepeatedCompositeFieldContainer[_common_pb2.ReplicaLoad]
    fencing_token: _common_pb2.FencingToken
    def __init__(self, revision: _Optional[int] = ..., snapshot: bool = ..., deployments: _Optional[_Iterable[_Union[DeploymentRoute, _Mapping]]] = ..., removed: _Optional[_Iterable[str]] = ..., loads: _Optional[_Iterable[_Union[_common_pb2.ReplicaLoad, _Mapping]]] = ..., fencing_token: _Optional[_Union[_common_pb2.FencingToken, _Mapping]] = ...) -> None: ...

class ListReplicasRequest(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    def __init__(self, deployment: _Optional[str] = ...) -> None: ...

class ListReplicasResponse(_message.Message):
    __slots__ = ("replicas", "loads")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[_common_pb2.Replica]
    loads: _containers.RepeatedCompositeFieldContainer[_common_pb2.ReplicaLoad]
    def __init__(self, replicas: _Optional[_Iterable[_Union[_common_pb2.Replica, _Mapping]]] = ..., loads: _Optional[_Iterable[_Union[_common_pb2.ReplicaLoad, _Mapping]]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("leading", "fencing_token", "store_refusal", "routes_frozen", "degraded", "engines", "silent_engines", "watchers", "revision")
    LEADING_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STORE_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FROZEN_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    SILENT_ENGINES_FIELD_NUMBER: _ClassVar[int]
    WATCHERS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    leading: bool
    fencing_token: _common_pb2.FencingToken
    store_refusal: str
    routes_frozen: bool
    degraded: _containers.RepeatedScalarFieldContainer[str]
    engines: int
    silent_engines: int
    watchers: int
    revision: int
    def __init__(self, leading: bool = ..., fencing_token: _Optional[_Union[_common_pb2.FencingToken, _Mapping]] = ..., store_refusal: _Optional[str] = ..., routes_frozen: bool = ..., degraded: _Optional[_Iterable[str]] = ..., engines: _Optional[int] = ..., silent_engines: _Optional[int] = ..., watchers: _Optional[int] = ..., revision: _Optional[int] = ...) -> None: ...
