"""Make the client or server of the request plane that the settings name."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from pydantic import ByteSize

from dynamo_redis.config import PlaneSettings, StoreSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.names import format_instance_id
from dynamo_redis.planes.base import RequestPlaneClient, RequestPlaneServer, Target
from dynamo_redis.planes.frames.client import FrameClient
from dynamo_redis.planes.frames.server import FrameServer, ServerCore
from dynamo_redis.planes.several import SeveralServers
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.planes.tunnel.carrier import TunnelCarrier
from dynamo_redis.planes.tunnel.link import Link
from dynamo_redis.planes.tunnel.server import TunnelServer
from dynamo_redis.store.keys import Inbox
from dynamo_redis.wire.tunnel import encode_part

_NO_HTTP = "DYN_REQUEST_PLANE=http needs h2 and granian: pip install 'dynamo-redis[planes]'"


def make_server(
    settings: PlaneSettings,
    *,
    secret: bytes | None,
    instance_id: int,
    store: StoreSettings | None = None,
    redis_url: str | None = None,
    loop_stall_s: float = 0.0,
) -> RequestPlaneServer:
    """Make the server of the planes that `DYN_REQUEST_PLANE` names. Raises ConfigError.

    Args:
        settings: the plane's settings.
        secret: the instance's secret, which callers must prove; None where `DYN_PLANE_AUTH` is off.
        instance_id: the instance that callers must ask for.
        store: the deployment's Redis, and the prefix of its names; None: as the environment says.
        redis_url: this process's Redis, if it has one. It decides the advertised address when the settings
            name none (loopback without a Redis, or for one on a unix socket).
        loop_stall_s: seconds that the event loop may hang before callers take the process for dead; 0: for
            ever.
    """
    core = ServerCore(settings)
    redis_host = first_host(redis_url) if redis_url else None
    servers: list[FrameServer] = []
    for plane in settings.planes:
        if plane == "tcp":
            servers.append(
                TcpServer(
                    settings,
                    secret=secret,
                    instance_id=instance_id,
                    core=core,
                    redis_host=redis_host,
                    loop_stall_s=loop_stall_s,
                )
            )
        elif plane == "http":
            try:
                from dynamo_redis.planes.http.server import HttpServer
            except ImportError as exc:
                raise ConfigError(_NO_HTTP) from exc
            servers.append(
                HttpServer(settings, secret=secret, instance_id=instance_id, core=core, redis_host=redis_host)
            )
        else:
            own, link = _through_broker(plane, settings, store, format_instance_id(instance_id), "requests")
            servers.append(TunnelServer(plane, link, own, secret=secret, instance_id=instance_id, core=core))
    return servers[0] if len(servers) == 1 else SeveralServers(servers)


def make_client(
    settings: PlaneSettings,
    *,
    store: StoreSettings | None = None,
    on_quiet: Callable[[Target], None] | None = None,
) -> RequestPlaneClient:
    """Make the client of the plane that `DYN_REQUEST_PLANE` names, the first of several. Raises ConfigError.

    `store` is the deployment's Redis; None: as the environment says. `on_quiet` is called on the event loop,
    with any target of the instance, when an instance with pending requests has given no sign of life for
    three quarters of `DYN_TCP_KEEPALIVE_S`. These requests continue: the instance may be slow. Code that
    chooses instances should prefer other ones, and probe this one.
    """
    plane = settings.planes[0]
    if plane == "tcp":
        return TcpClient(settings, on_quiet)
    if plane == "http":
        try:
            from dynamo_redis.planes.http.forward import HttpClient
        except ImportError as exc:
            raise ConfigError(_NO_HTTP) from exc
        return HttpClient(settings, on_quiet)
    settings, link = _through_broker(plane, settings, store, f"caller-{secrets.token_hex(12)}", "replies")
    return FrameClient(settings, TunnelCarrier(link), on_quiet)


def _through_broker(
    plane: str, settings: PlaneSettings, store: StoreSettings | None, name: str, reads: Inbox
) -> tuple[PlaneSettings, Link]:
    """Return the settings and the link of a plane with a broker. `name` is unique among the processes."""
    store = store or StoreSettings.load()
    if plane == "redis":
        from dynamo_redis.planes.redis.link import RedisLink

        url, timeout_s, login = store.require_url(), store.command_timeout_s, store.login()
        return settings, RedisLink(url, timeout_s, store.prefix, name, reads, login)
    try:
        from dynamo_redis.planes.nats.link import MAX_MESSAGE_BYTES, NatsLink
    except ImportError as exc:
        raise ConfigError("DYN_REQUEST_PLANE=nats needs nats-py: pip install 'dynamo-redis[planes]'") from exc
    limit_bytes = ByteSize(min(settings.max_message_bytes, MAX_MESSAGE_BYTES))
    settings = settings.model_copy(update={"max_message_bytes": limit_bytes})
    return settings, NatsLink(settings, f"{encode_part(store.prefix)}.plane.{name}", f"dynamo-redis {name}")


def first_host(redis_url: str) -> str | None:
    """Return the host in the URL of a Redis, or the first one of several sentinels or nodes; None for a unix
    socket."""
    hosts = urlsplit(redis_url).netloc.rpartition("@")[2]
    return urlsplit(f"//{hosts.partition(',')[0]}").hostname
