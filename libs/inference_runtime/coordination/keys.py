"""The one place that knows how keys are spelled. Identifiers are single path segments, so no key can be a prefix's neighbour."""

from __future__ import annotations

from inference_runtime.errors import BadRequest

__all__ = [
    "API_KEYS",
    "ASSIGNMENTS",
    "DEPLOYMENTS",
    "ELECTIONS",
    "ENGINES",
    "GATEWAYS",
    "LIMITS",
    "QUARANTINE",
    "REPLICAS",
    "ROOT",
    "STORE",
    "api_key",
    "assignment",
    "assignments_of",
    "deployment",
    "election",
    "election_prefix",
    "engine",
    "gateway",
    "quarantined",
    "replica",
    "replicas_of",
    "segments",
]

ROOT = "/inference_runtime/v1/"
ELECTIONS = ROOT + "elections/"
DEPLOYMENTS = ROOT + "deployments/"
ASSIGNMENTS = ROOT + "assignments/"
ENGINES = ROOT + "engines/"
GATEWAYS = ROOT + "gateways/"
REPLICAS = ROOT + "replicas/"
API_KEYS = ROOT + "keys/"
LIMITS = ROOT + "limits/"
QUARANTINE = ROOT + "quarantine/"
#: The store's own id, see `identity`. One key, no prefix.
STORE = ROOT + "store"


def election_prefix(role: str) -> str:
    """All candidates of a role."""
    return f"{ELECTIONS}{_segment('role', role)}/"


def election(role: str, candidate_id: str) -> str:
    """One candidate of a role; leased."""
    return election_prefix(role) + _segment("candidate id", candidate_id)


def deployment(name: str) -> str:
    """A deployment's specification and status. A name may hold slashes (`org/model`), and is always the whole rest of the key."""
    if not name:
        raise BadRequest("A deployment needs a name.", param="name")
    return DEPLOYMENTS + name


def assignments_of(engine_id: str) -> str:
    """All assignments of one engine."""
    return f"{ASSIGNMENTS}{_segment('engine id', engine_id)}/"


def assignment(engine_id: str, replica_id: str) -> str:
    """One replica that an engine is told to host."""
    return assignments_of(engine_id) + _segment("replica id", replica_id)


def engine(engine_id: str) -> str:
    """A registered engine; leased."""
    return ENGINES + _segment("engine id", engine_id)


def gateway(gateway_id: str) -> str:
    """A registered gateway worker; leased."""
    return GATEWAYS + _segment("gateway id", gateway_id)


def replicas_of(deployment_name: str) -> str:
    """All replicas of one deployment. Slashes of the name are escaped, so that one deployment's prefix never covers another's."""
    if not deployment_name:
        raise BadRequest("A deployment needs a name.", param="name")
    return f"{REPLICAS}{deployment_name.replace('%', '%25').replace('/', '%2F')}/"


def quarantined(fingerprint: str) -> str:
    """A request that killed contexts, by the digest of what a device sees of it; leased."""
    return QUARANTINE + _segment("fingerprint", fingerprint)


def replica(deployment_name: str, replica_id: str) -> str:
    """One registered replica of a deployment; leased."""
    return replicas_of(deployment_name) + _segment("replica id", replica_id)


def api_key(key_id: str) -> str:
    """An API key, hashed."""
    return API_KEYS + _segment("key id", key_id)


def segments(key: str, prefix: str) -> tuple[str, ...]:
    """What follows `prefix` in `key`, cut at slashes. Empty when the key does not lie under the prefix."""
    return tuple(key.removeprefix(prefix).split("/")) if key.startswith(prefix) and len(key) > len(prefix) else ()


def _segment(what: str, value: str) -> str:
    if not value or "/" in value:
        raise BadRequest(
            f"The {what} {value!r} must be non-empty and hold no slash: it is one segment of an etcd key.", param=what
        )
    return value
