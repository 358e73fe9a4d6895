"""The registry record of an instance of an endpoint."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from dynamo_redis.decoding import check_version, read_json_object, removal
from dynamo_redis.errors import InvalidRecord
from dynamo_redis.names import EndpointName, InstanceId, check_instance_id
from dynamo_redis.planes.base import Target
from dynamo_redis.store.base import Record

RECORD_VERSION = 1
_TRANSPORTS = {"nats": "nats_tcp"}
"""Names of planes in the record, where Dynamo has another one."""

_WHAT = "an instance record"


@dataclass(frozen=True, slots=True)
class Transport:
    """An address of an instance: the plane's name (`kind`), and `address/subject`."""

    kind: str
    address: str


@dataclass(frozen=True, slots=True)
class Instance:
    """One process that serves one endpoint, as described by its registry record.

    `transports` maps a plane's name to `address/subject`. `ready` is False while the process's event loop
    hangs. `secret` authenticates both sides of a connection; it is None where `DYN_PLANE_AUTH` is off, and
    never in the repr. `started_at` is in seconds since the epoch, by the instance's own clock.
    """

    name: EndpointName
    instance_id: InstanceId
    transports: dict[str, str]
    ready: bool = True
    secret: bytes | None = field(default=None, repr=False)
    started_at: float = 0.0

    def __str__(self) -> str:
        return f"{self.namespace}/{self.component}/{self.endpoint}/{self.instance_id}"

    @property
    def namespace(self) -> str:
        """The namespace's name."""
        return self.name.namespace

    @property
    def component(self) -> str:
        """The component's name."""
        return self.name.component

    @property
    def endpoint(self) -> str:
        """The endpoint's name."""
        return self.name.endpoint

    @property
    def planes(self) -> str:
        """The planes that it serves: `tcp`, or `nats, tcp`."""
        return ", ".join(self.addresses)

    @property
    def addresses(self) -> dict[str, str]:
        """The planes by the names of `DYN_REQUEST_PLANE`, and where each is reached."""
        planes = {transport: plane for plane, transport in _TRANSPORTS.items()}
        return {
            planes.get(transport, transport): address.partition("/")[0]
            for transport, address in self.transports.items()
        }

    @property
    def device_type(self) -> str | None:
        """Always None: the record has no device type. Kept for users of `dynamo.runtime`."""
        return None

    @property
    def transport(self) -> Transport:
        """The first transport of the record."""
        kind, address = next(iter(self.transports.items()))
        return Transport(kind, address)

    def target(self, plane: str) -> Target | None:
        """Return the target of requests on a plane; None if the instance does not offer that plane."""
        transport = self.transports.get(transport_name(plane))
        if transport is None:
            return None
        address, _, subject = transport.partition("/")
        return Target(self.instance_id, address, subject, self.secret)

    def to_bytes(self, *, ready: bool | None = None) -> bytes:
        """Return the record as JSON; `ready` replaces the field of that name."""
        record: dict[str, Any] = {
            "type": "Endpoint",
            "namespace": self.namespace,
            "component": self.component,
            "endpoint": self.endpoint,
            "instance_id": self.instance_id,
            "transport": self.transports,
            "version": RECORD_VERSION,
            "ready": self.ready if ready is None else ready,
            "started_at": self.started_at,
        }
        if self.secret is not None:
            record["secret"] = self.secret.hex()
        return json.dumps(record, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, stored: bytes) -> Instance:
        """Read a stored record; unknown fields are ignored.

        Raises InvalidRecord if it is not an instance record, SchemaMismatch for an unknown major version.
        """
        record = read_json_object(stored, _WHAT)
        check_version(record.get("version", RECORD_VERSION), RECORD_VERSION, _WHAT)
        ready, started_at = record.get("ready", True), record.get("started_at", 0.0)
        try:
            if type(ready) is not bool:
                raise TypeError(f"its ready is {ready!r}, neither true nor false")
            if type(started_at) not in (int, float) or not math.isfinite(started_at):
                raise TypeError("its started_at is not a time")
            name = EndpointName(record["namespace"], record["component"], record["endpoint"])
            instance_id = check_instance_id(record["instance_id"])
            transports = record["transport"]
            if type(transports) is not dict or not transports:
                raise ValueError("it names no transport")
            for plane, address in transports.items():
                if type(address) is not str:
                    raise TypeError(f"its transport {plane!r} is no address")
            return cls(
                name=name,
                instance_id=instance_id,
                transports=transports,
                ready=ready,
                secret=_secret(record.get("secret")),
                started_at=float(started_at),
            )
        except KeyError as exc:
            raise InvalidRecord(_WHAT, f"it has no {exc}") from exc
        except (TypeError, ValueError, OverflowError) as exc:
            raise InvalidRecord(_WHAT, exc) from exc

    @classmethod
    def from_record(cls, record: Record) -> Instance:
        """Read a record of the registry. Raises InvalidRecord, with the key and the command that removes it.

        A record whose names or id differ from its key's is refused: a delete of the key would not remove that
        instance.
        """
        try:
            instance = cls.from_bytes(record.value)
            own_key = instance.name.instance_key(instance.instance_id)
        except InvalidRecord as exc:
            raise exc.at(record.key, removal(record.key)) from None
        except ValueError as exc:  # a name that cannot be encoded
            raise InvalidRecord(_WHAT, exc, key=record.key, remedy=removal(record.key)) from exc
        if own_key != record.key:
            reason = f"it is the record of {own_key}"
            raise InvalidRecord(_WHAT, reason, key=record.key, remedy=removal(record.key))
        return instance


def transport_name(plane: str) -> str:
    """Return the name of a plane in the `transport` of a record."""
    return _TRANSPORTS.get(plane, plane)


def _secret(found: Any) -> bytes | None:
    if found is not None and type(found) is not str:
        raise TypeError("its secret is no text")  # the message does not show it
    try:
        return None if found is None else bytes.fromhex(found)
    except ValueError:
        raise ValueError("its secret is not hexadecimal") from None
