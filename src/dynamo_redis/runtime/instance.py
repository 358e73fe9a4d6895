"""The record by which an instance of an endpoint is found."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from dynamo_redis.errors import SchemaMismatch
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.base import Target

RECORD_VERSION = 1


@dataclass(frozen=True, slots=True)
class Transport:
    """How an instance is reached: the plane's name, and its address with the endpoint's subject."""

    kind: str
    address: str


@dataclass(frozen=True, slots=True)
class Instance:
    """One process that serves one endpoint, as its registry record says.

    `transports` maps a plane's name to `address/subject`. `ready` is False while the process's event loop
    hangs. `secret` is what both sides of a connection prove; None where `DYN_PLANE_AUTH` is off. It is kept
    out of the repr. `started_at` is in seconds since the epoch, by the instance's own clock.
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
    def transport(self) -> Transport:
        """The first transport of the record."""
        kind, address = next(iter(self.transports.items()))
        return Transport(kind, address)

    def target(self, plane: str) -> Target | None:
        """Where to send requests on a plane; None if the instance does not offer it."""
        transport = self.transports.get(plane)
        if transport is None:
            return None
        address, _, subject = transport.partition("/")
        return Target(self.instance_id, address, subject, self.secret)

    def to_bytes(self, *, ready: bool | None = None) -> bytes:
        """The stored form, JSON; `ready` overrides the field."""
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

        Raises ValueError if it is not an instance record, SchemaMismatch for an unknown major version.
        """
        try:
            record = json.loads(stored)
            version = int(record.get("version", RECORD_VERSION))
            if version != RECORD_VERSION:
                raise SchemaMismatch(str(version), str(RECORD_VERSION))
            secret = record.get("secret")
            transports = record["transport"]
            if not transports or not all(isinstance(address, str) for address in transports.values()):
                raise ValueError("it names no transport")
            return cls(
                name=EndpointName(record["namespace"], record["component"], record["endpoint"]),
                instance_id=InstanceId(int(record["instance_id"])),
                transports=dict(transports),
                ready=bool(record.get("ready", True)),
                secret=bytes.fromhex(secret) if secret is not None else None,
                started_at=float(record.get("started_at", 0.0)),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as exc:
            raise ValueError(f"not an instance record: {exc}") from exc
