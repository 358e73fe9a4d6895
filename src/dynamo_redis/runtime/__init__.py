"""The names that workers and clients import, as in `dynamo.runtime`."""

from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames.flow import RequestMessages as PyAsyncRequestStream
from dynamo_redis.runtime.annotated import Annotated
from dynamo_redis.runtime.call import Call
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.endpoint import Component, Endpoint, Namespace
from dynamo_redis.runtime.handlers import dynamo_endpoint
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.runtime import DistributedRuntime, Settings
from dynamo_redis.runtime.serving import ServedEndpoint
from dynamo_redis.runtime.unary import UnaryClient, serve_unary_endpoint
from dynamo_redis.runtime.worker import dynamo_worker

__all__ = [
    "Annotated",
    "Call",
    "Client",
    "Component",
    "Context",
    "DistributedRuntime",
    "Endpoint",
    "Instance",
    "Namespace",
    "PyAsyncRequestStream",
    "ServedEndpoint",
    "Settings",
    "UnaryClient",
    "dynamo_endpoint",
    "dynamo_worker",
    "serve_unary_endpoint",
]
