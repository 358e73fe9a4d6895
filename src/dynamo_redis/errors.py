"""Every error this package raises, in one tree.

    DynamoRedisError
    ├── ConfigError                 a setting or an argument is wrong
    ├── StoreError                  the registry, a lock or the object store
    │   ├── StoreUnavailable        no answer from Redis in time, or it is no primary now   (retryable)
    │   ├── StoreRefused            Redis answers and refuses: password, permission, memory, too old
    │   ├── InvalidRecord           a value that was read cannot be used
    │   │   └── SchemaMismatch      an incompatible release wrote it
    │   ├── KeyExists               create-if-absent found the key
    │   ├── RevisionMismatch        compare-and-put found another revision
    │   ├── LeaseNotFound           the lease has ended
    │   ├── Compacted               the wanted revision is no longer in the change log
    │   ├── ObjectNotFound          no such object
    │   ├── ObjectChanged           the object was replaced or damaged while it was read (retryable)
    │   ├── StreamTrimmed           the wanted entries are no longer in the event stream
    │   ├── StreamLost              the event stream, or the reader's group in it, is gone
    │   ├── LockNotAcquired         another holder has the lock             (retryable)
    │   └── LockLost                the lock ended while it was held, or was not held at all
    ├── PlaneError                  a request on its way to a worker and back
    │   ├── CannotConnect           no process answers at its address             (retryable)
    │   ├── ConnectionLost          the connection broke under the request        (retryable)
    │   │   └── PeerSilent          the peer sends no sign of life any more       (retryable once)
    │   ├── AuthenticationFailed    a side could not prove the instance's secret  (retryable once)
    │   ├── Draining                the worker is shutting down                   (retryable)
    │   ├── Overloaded              the worker's queue or payload budget is full  (retryable)
    │   │   └── RateLimited         the engine's own rate limit is reached        (retryable)
    │   ├── NotAccepted             the worker did not take the request in time   (retryable)
    │   ├── EndpointNotFound        the worker does not serve that endpoint       (retryable)
    │   ├── InstanceRemoved         the instance left the registry                (retryable)
    │   ├── NoInstances             no instance can be chosen                     (retryable)
    │   ├── DeadlineExceeded        the request's deadline passed
    │   ├── RequestCancelled        the caller stopped or killed the request
    │   ├── PayloadTooLarge         a message is over the limit
    │   ├── PayloadBudgetExceeded   this process has no room for another large answer
    │   ├── InvalidRequest          the handler refused the request's content
    │   │   └── ContextLengthExceeded  prompt and answer do not fit the engine's context
    │   ├── HandlerFailed           the handler raised
    │   │   └── EngineFailed        the worker's engine answered with an error of its own (retryable)
    │   └── ProtocolViolation       the peer broke the protocol
    ├── ModelError                  a model's files or its card are missing or broken
    │   ├── TemplateError           the chat template refused the messages
    │   └── ModelCacheError         the files cannot be written now: a full disk (retryable)
    ├── BarrierError                a leader/worker barrier was aborted, misused or timed out
    └── PortUnavailable             no port of the wanted range could be reserved

Each class has a stable `code`, used on the wire and as a metric label. `retryable`: the same request may
succeed elsewhere or later. Whether to retry is the caller's policy.
"""

from __future__ import annotations

from typing import ClassVar, Final, Self

_SHOWN_CHARS: Final = 200
"""Longest part of a value from outside this package that a message repeats, in characters."""


class DynamoRedisError(Exception):
    """Base of every error of this package."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False


def _shortened(value: object) -> str:
    """Return a value as text for a message: on one line, of at most `_SHOWN_CHARS` characters."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a value nested too deep
        text = f"a {type(value).__name__} that cannot be printed"
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: _SHOWN_CHARS + 1])
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


class ConfigError(DynamoRedisError, ValueError):
    """A setting or argument is wrong. The message names it and its remedy."""

    code = "config"


# --------------------------------------------------------------------------- store


class StoreError(DynamoRedisError):
    """Base of the errors of the registry, the locks, the object store and the event streams.

    `answered`: Redis answered with an error. Then nothing was written, unless a script failed in its middle.
    `answer_code`: the code of that error as the server sent it, for example WRONGTYPE; "" without an answer.
    `refuses_writes`: the server takes no writes of any client at present, and will take them again.
    """

    code = "store"
    answered = False
    answer_code = ""
    refuses_writes = False


class StoreUnavailable(StoreError):
    """Redis did not answer in time, the connection broke, or the server does not serve now.

    A server does not serve while it is loading or busy, when it is a replica, or when it is a cluster node
    without these keys. After a write the outcome is unknown: the write may or may not have happened.
    """

    code = "store_unavailable"
    retryable = True


class StoreRefused(StoreError):
    """Redis answers but refuses until an operator acts: password, permission, memory, disk, old version."""

    code = "store_refused"


class InvalidRecord(StoreError, ValueError):
    """One value that was read cannot be used: it is damaged, contradictory, or of another kind.

    Every decoder of this package raises this and no other error. It concerns that value alone: a task that
    reads many values leaves it out, logs it, and goes on. `what` names the kind of value, for example "an
    instance record". `key` is its place, or "" where it has none. `remedy` says how to repair it, or is "".
    """

    code = "invalid_record"

    def __init__(self, what: str, reason: object, *, key: str = "", remedy: str = "") -> None:
        self.what = what
        self.reason = _shortened(reason)
        self.key = key
        self.remedy = remedy
        super().__init__()

    def __str__(self) -> str:
        subject = f"{self.key} is not {self.what}" if self.key else f"not {self.what}"
        return f"{subject}: {self.reason}{f' ({self.remedy})' if self.remedy else ''}"

    def at(self, key: str, remedy: str = "") -> Self:
        """Add the place of the value, and a remedy, unless they are known already; return this error."""
        self.key = self.key or key
        self.remedy = self.remedy or remedy
        return self


class SchemaMismatch(InvalidRecord):
    """A value, or the whole registry, has a schema version that this release does not read.

    `what` names it. `found` and `supported` are versions.
    """

    code = "schema_mismatch"

    def __init__(
        self, what: str, found: object, supported: object, *, key: str = "", remedy: str = ""
    ) -> None:
        self.found = _shortened(found)
        self.supported = str(supported)
        super().__init__(
            what,
            f"it has schema version {self.found}, this release reads {self.supported}",
            key=key,
            remedy=remedy or "upgrade the older side",
        )

    def __str__(self) -> str:
        place = f" at {self.key}" if self.key else ""
        return (
            f"{self.what}{place} has schema version {self.found}, this release reads {self.supported}: "
            f"{self.remedy}"
        )


class KeyExists(StoreError):
    """Create-if-absent found the key."""

    code = "key_exists"

    def __init__(self, key: str) -> None:
        super().__init__(f"key exists: {key}")
        self.key = key


class RevisionMismatch(StoreError):
    """The key's `mod_revision` is not the expected one; `found` is None if the key is absent."""

    code = "revision_mismatch"

    def __init__(self, key: str, expected: str | None, found: str | None) -> None:
        super().__init__(f"key {key}: expected revision {expected or 'none'}, found {found or 'none'}")
        self.key = key
        self.expected = expected
        self.found = found


class LeaseNotFound(StoreError):
    """The lease has ended: expired, revoked, or lost with the registry's data."""

    code = "lease_not_found"


class Compacted(StoreError):
    """The change log no longer holds the wanted revision; take a snapshot and continue from there."""

    code = "compacted"

    def __init__(self, revision: str) -> None:
        super().__init__(f"revision {revision} is no longer in the change log")
        self.revision = revision


class ObjectNotFound(StoreError):
    """There is no object of that bucket and name."""

    code = "object_not_found"

    def __init__(self, url: str) -> None:
        super().__init__(f"no such object: {url}")
        self.url = url


class ObjectChanged(StoreError):
    """The object was replaced, removed or damaged while it was read. Read it again from the start."""

    code = "object_changed"
    retryable = True

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"object {url} changed while it was read: {reason}")
        self.url = url
        self.reason = reason


class StreamTrimmed(StoreError):
    """Entries after a position of an event stream have been trimmed: the reader must start again."""

    code = "stream_trimmed"


class StreamLost(StoreError):
    """The event stream, or the reader's group in it, was deleted: the reader must start again."""

    code = "stream_lost"


class LockNotAcquired(StoreError):
    """Another holder kept the lock for as long as the caller waits. `holder` describes it."""

    code = "lock_not_acquired"
    retryable = True

    def __init__(self, name: str, holder: str) -> None:
        super().__init__(f"lock {name} is held by {holder}")
        self.name = name
        self.holder = holder


class LockLost(StoreError):
    """The caller does not hold the lock, or no longer. The write that raised it did not happen and never
    will."""

    code = "lock_lost"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"lock {name} is lost: {reason}")
        self.name = name
        self.reason = reason


# --------------------------------------------------------------------------- request plane


class PlaneError(DynamoRedisError):
    """Base of the errors with which a request can end. Sent on the wire as (`code`, message)."""

    code = "plane"


class CannotConnect(PlaneError):
    """No process answers at the instance's address, or the TLS settings do not allow a connection to it."""

    code = "cannot_connect"
    retryable = True


class ConnectionLost(PlaneError):
    """The connection broke while the request was under way."""

    code = "connection_lost"
    retryable = True


class PeerSilent(ConnectionLost):
    """The peer sent no sign of life for too long: its host or the network to it is gone, or its process
    hangs.

    A request that was sent to it is retried on one more instance only: the request may be the cause."""

    code = "peer_silent"


class AuthenticationFailed(PlaneError):
    """One side could not prove that it knows the instance's secret.

    The usual cause is an old registry record: refresh it and try once more.
    """

    code = "authentication_failed"
    retryable = True


class Draining(PlaneError):
    """The worker is shutting down and takes no new work."""

    code = "draining"
    retryable = True


class Overloaded(PlaneError):
    """The worker's in-flight and queue limits are reached, or a process holds as many bytes of large
    payloads as its limit allows. `retry_after_s` is the worker's hint, or None."""

    code = "overloaded"
    retryable = True

    def __init__(
        self, message: str = "the worker is at its limit", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """The engine behind the worker refused the request because of its rate limit (HTTP 429)."""

    code = "rate_limited"


class NotAccepted(PlaneError):
    """The worker did not admit the request within `DYN_TCP_REQUEST_TIMEOUT`."""

    code = "not_accepted"
    retryable = True


class EndpointNotFound(PlaneError):
    """The worker does not serve the addressed endpoint."""

    code = "endpoint_not_found"
    retryable = True


class InstanceRemoved(PlaneError):
    """The instance left the registry while the request was pending on it."""

    code = "instance_removed"
    retryable = True


class NoInstances(PlaneError):
    """No instance of the endpoint is known, or all known instances have been tried."""

    code = "no_instances"
    retryable = True


class DeadlineExceeded(PlaneError):
    """The request's deadline passed."""

    code = "deadline_exceeded"


class RequestCancelled(PlaneError):
    """The caller stopped or killed the request."""

    code = "cancelled"


class PayloadTooLarge(PlaneError):
    """A message is over the limit of `limit_bytes`; `size_bytes` is its size, or None if unknown."""

    code = "payload_too_large"

    def __init__(
        self, message: str | None = None, *, size_bytes: int | None = None, limit_bytes: int | None = None
    ) -> None:
        subject = "message" if size_bytes is None else f"message of {size_bytes} bytes"
        super().__init__(
            message
            or f"{subject} is over the limit of {limit_bytes} "
            "(DYN_TCP_MAX_MESSAGE_SIZE; on the nats plane 16 MiB at most)"
        )
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class PayloadBudgetExceeded(PlaneError):
    """A large answer does not fit beside the large answers that this process has not read yet
    (`DYN_TCP_MAX_PAYLOAD_BYTES_IN_FLIGHT`). Not retryable: another worker's answer would not fit either."""

    code = "payload_budget_exceeded"


class InvalidRequest(PlaneError, ValueError):
    """The handler refused the request's content. Raise it in a handler; its message names the fault.

    It is a ValueError, as callers of `dynamo.runtime` expect of an exception in a handler.
    """

    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the context of the engine that refused them."""

    code = "context_length_exceeded"


class HandlerFailed(PlaneError, ValueError):
    """The handler raised; the message carries the exception's type and text, never a traceback.

    It is a ValueError, as callers of `dynamo.runtime` expect of an exception in a handler.
    """

    code = "handler_failed"


class EngineFailed(HandlerFailed):
    """The worker works, but its engine failed or refused a request that another worker may serve.

    Raise it in a handler to have the request retried elsewhere."""

    code = "engine_failed"
    retryable = True


class ProtocolViolation(PlaneError):
    """The peer sent a message that the protocol does not allow."""

    code = "protocol_violation"


# --------------------------------------------------------------------------- the rest


class ModelError(DynamoRedisError):
    """A model's files or its card are missing or broken."""

    code = "model"


class TemplateError(ModelError):
    """The chat template refused the messages; the message is the template's own."""

    code = "template"


class ModelCacheError(ModelError):
    """The directory for model files cannot be written or read now: a full disk, a missing permission.

    It works again as soon as the cause is removed.
    """

    code = "model_cache"
    retryable = True


class BarrierError(DynamoRedisError):
    """A leader/worker barrier was aborted, misused or timed out."""

    code = "barrier"


class PortUnavailable(DynamoRedisError):
    """No port, or no run of consecutive ports, of the wanted range could be reserved."""

    code = "port_unavailable"


def _concrete(base: type[PlaneError]) -> dict[str, type[PlaneError]]:
    found = {base.code: base}
    for child in base.__subclasses__():
        found |= _concrete(child)
    return found


_PLANE_ERRORS = _concrete(PlaneError)


def plane_error(code: str, message: str) -> PlaneError:
    """Return the error that a peer reported as (`code`, `message`). The message of an unknown code names
    it."""
    error = _PLANE_ERRORS.get(code)
    return error(message) if error else PlaneError(f"{code}: {message}")
