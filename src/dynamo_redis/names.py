"""The names of things: namespaces, components, endpoints, instances, and their registry keys.

An endpoint is named `namespace.component.endpoint`. An instance is one process that serves it; its id is a
random 63-bit integer, written as lowercase hexadecimal in keys and as a number in JSON. Key segments are
percent-encoded, so that no name can escape its place in the path.

Layout of the keys (relative to the registry's prefix):

    v1/instances/<namespace>/<component>/<endpoint>/<instance id>
    v1/mdc/<namespace>/<component>/<endpoint>/<instance id>[/<lora>]     model deployment cards
    v1/kv_routers/<namespace>/<component>/<router id>
    v1/frontends/<instance id>
    v1/busy_thresholds/<model>
    v1/ports/<host>/<port>
    v1/barrier/<id>/…
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any, NewType
from urllib.parse import quote, unquote

from dynamo_redis.errors import ConfigError

InstanceId = NewType("InstanceId", int)

INSTANCES = "v1/instances/"
MODEL_CARDS = "v1/mdc/"
KV_ROUTERS = "v1/kv_routers/"
FRONTENDS = "v1/frontends/"
BUSY_THRESHOLDS = "v1/busy_thresholds/"
PORTS = "v1/ports/"
BARRIERS = "v1/barrier/"

_SAFE = "-_.~:@+[]"
_SLUG = re.compile(r"[^a-z0-9_-]+")
_INSTANCE_ID = re.compile(r"0|[1-9a-f][0-9a-f]{0,15}")
_INSTANCE_ID_END = 1 << 63


def new_instance_id() -> InstanceId:
    """Return a random id of 63 bits: a positive int64 in every language and JSON parser."""
    return InstanceId(secrets.randbits(63) | 1)


def format_instance_id(instance_id: int) -> str:
    """`7587888160958627806` → `"694d98147d54bfde"`."""
    return f"{instance_id:x}"


def parse_instance_id(text: str) -> InstanceId:
    """Read the text that `format_instance_id` writes. Raises ValueError for any other text."""
    if not _INSTANCE_ID.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is not an instance id")
    return check_instance_id(int(text, 16))


def check_instance_id(value: object) -> InstanceId:
    """Return a JSON value if it is an instance id. Raises ValueError."""
    if type(value) is not int or not 0 <= value < _INSTANCE_ID_END:
        raise ValueError("an instance id is a whole number of 63 bits")
    return InstanceId(value)


_ID_FIELDS = frozenset({"instance_id", "lease", "worker_id"})
_ID_LISTS = frozenset({"instance_ids"})


def with_hex_ids(value: Any) -> Any:
    """Return a JSON value in which each id has a copy in hexadecimal, named `<field>_hex`.

    Readers whose numbers are floats (JavaScript, jq before 1.7) silently change integers over 2**53, and ids
    have 63 bits. A field `value` holds bytes that users stored: it is not changed.
    """
    if isinstance(value, list):
        return [with_hex_ids(part) for part in value]
    if not isinstance(value, dict):
        return value
    shown: dict[Any, Any] = {}
    for name, part in value.items():
        shown[name] = part if name == "value" else with_hex_ids(part)
        if name in _ID_FIELDS and type(part) is int:
            shown[f"{name}_hex"] = format_instance_id(part)
        elif name in _ID_LISTS and isinstance(part, list):
            shown[f"{name}_hex"] = [format_instance_id(one) for one in part]
    return shown


def encode_segment(name: str) -> str:
    """Return a name as one path segment of a key, percent-encoded."""
    return quote(name, safe=_SAFE)


def decode_segment(segment: str) -> str:
    """Return the name that `encode_segment` wrote."""
    return unquote(segment)


def slug(name: str) -> str:
    """Return a model's display name as an identifier: `Qwen/Qwen3-0.6B` → `qwen_qwen3-0_6b`."""
    return _SLUG.sub("_", name.lower())


@dataclass(frozen=True, slots=True)
class EndpointName:
    """`namespace.component.endpoint`; the three parts are non-empty and hold no dot or slash."""

    namespace: str
    component: str
    endpoint: str

    def __post_init__(self) -> None:
        for part in (self.namespace, self.component, self.endpoint):
            if type(part) is not str or not part or "." in part or "/" in part:
                raise ConfigError(
                    f"{self.namespace!r}, {self.component!r}, {self.endpoint!r} do not name an endpoint: "
                    "each part must be non-empty and free of '.' and '/'"
                )

    @classmethod
    def parse(cls, text: str) -> EndpointName:
        """Read `namespace.component.endpoint`, or the same with a `dyn://` in front. Raises ConfigError."""
        parts = text.removeprefix("dyn://").split(".")
        if len(parts) != 3:
            raise ConfigError(
                f"{text!r} does not name an endpoint: write namespace.component.endpoint, "
                "for example dynamo.backend.generate"
            )
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component}.{self.endpoint}"

    @property
    def path(self) -> str:
        """Key path of the three parts, percent-encoded: `dynamo/backend/generate`."""
        return "/".join(map(encode_segment, (self.namespace, self.component, self.endpoint)))

    @property
    def instances_prefix(self) -> str:
        """Registry prefix of this endpoint's instances."""
        return f"{INSTANCES}{self.path}/"

    def instance_key(self, instance_id: int) -> str:
        """Return the registry key of one instance's record."""
        return self.instances_prefix + format_instance_id(instance_id)

    def subject(self, instance_id: int) -> str:
        """Return the name of this endpoint of one instance on the request plane:
        `<id>/dynamo/backend/generate`."""
        return f"{format_instance_id(instance_id)}/{self.path}"

    def model_card_key(self, instance_id: int, lora: str | None = None) -> str:
        """Return the registry key of a model card. The card of a LoRA adapter is below that of its base
        model."""
        key = f"{MODEL_CARDS}{self.path}/{format_instance_id(instance_id)}"
        return key if lora is None else f"{key}/{encode_segment(lora)}"


def kv_routers_prefix(namespace: str, component: str) -> str:
    """Return the registry prefix of the routers that choose among a component's workers."""
    return f"{KV_ROUTERS}{encode_segment(namespace)}/{encode_segment(component)}/"


def kv_router_key(namespace: str, component: str, router_id: str) -> str:
    """Return the registry key of one router."""
    return kv_routers_prefix(namespace, component) + encode_segment(router_id)


def frontend_key(instance_id: InstanceId) -> str:
    """Return the registry key of one frontend."""
    return FRONTENDS + format_instance_id(instance_id)


def busy_threshold_key(model: str) -> str:
    """Return the registry key of a model's busy thresholds."""
    return BUSY_THRESHOLDS + encode_segment(model)


def port_key(host: str, port: int) -> str:
    """Return the registry key that reserves a port of a host."""
    return f"{PORTS}{encode_segment(host)}/{port}"


def barrier_prefix(barrier_id: str) -> str:
    """Return the registry prefix of one leader/worker barrier."""
    return f"{BARRIERS}{encode_segment(barrier_id)}/"
