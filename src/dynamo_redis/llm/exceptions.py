"""The errors of a request under the names of `dynamo.llm.exceptions`: each is an error of this package.

So `except DynamoException` also catches what this package raises, and an engine that raises
`InvalidArgument` has the frontend answer 400. Which name stands for which error, and what its raiser gets:
docs/dynamo-llm-names.md.
"""

from dynamo_redis.errors import (
    CannotConnect,
    ConnectionLost,
    EngineFailed,
    HandlerFailed,
    InvalidRequest,
    NoInstances,
    NotAccepted,
    Overloaded,
    PlaneError,
    RequestCancelled,
)

DynamoException = PlaneError
Unknown = HandlerFailed
InvalidArgument = InvalidRequest
Cancelled = RequestCancelled
EngineShutdown = EngineFailed
Disconnected = ConnectionLost
StreamIncomplete = ConnectionLost
ConnectionTimeout = NotAccepted
WorkerUnavailable = NoInstances
RouterQueueLimitExceeded = Overloaded

__all__ = [
    "Cancelled",
    "CannotConnect",
    "ConnectionTimeout",
    "Disconnected",
    "DynamoException",
    "EngineShutdown",
    "InvalidArgument",
    "RouterQueueLimitExceeded",
    "StreamIncomplete",
    "Unknown",
    "WorkerUnavailable",
]
