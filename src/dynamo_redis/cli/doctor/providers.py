"""Managed services by their host names, and the ways in which each changes a server's settings. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Provider:
    """A managed service.

    `domains` are the ends of its host names. `settings` says where its settings are changed, for example "in
    the parameter group". `notifications` is the whole advice where turning on notifications differs.
    """

    name: str
    domains: tuple[str, ...]
    settings: str
    notifications: str = ""


PROVIDERS: Final = (
    Provider(
        "Amazon ElastiCache Serverless",
        (".serverless.*.cache.amazonaws.com",),
        "settings of serverless caches cannot be changed: take a cluster of nodes",
        "serverless caches have fixed settings",
    ),
    Provider(
        "Amazon ElastiCache", (".cache.amazonaws.com", ".cache.amazonaws.com.cn"), "in the parameter group"
    ),
    Provider(
        "Amazon MemoryDB",
        (".memorydb.*.amazonaws.com", ".memorydb.*.amazonaws.com.cn"),
        "in the parameter group",
    ),
    Provider(
        "Azure Managed Redis",
        (".redis.azure.net", ".redisenterprise.cache.azure.net"),
        "in the database's properties (portal, CLI or template)",
        "set notifyKeyspaceEvents to Kxe in the database's properties (a preview)",
    ),
    Provider(
        "Azure Cache for Redis",
        (".redis.cache.windows.net", ".redis.cache.chinacloudapi.cn"),
        "in Advanced settings (redis-configuration)",
    ),
    Provider(
        "Redis Cloud",
        (".redis-cloud.com", ".redislabs.com", ".rlrcp.com"),
        "in the database's configuration, or by CONFIG SET where it is allowed",
    ),
    Provider(
        "Upstash",
        (".upstash.io",),
        "in the console",
        "CONFIG SET notify-keyspace-events Kxe, the one setting that CONFIG SET takes there",
    ),
    Provider("Aiven", (".aivencloud.com",), "in the service's advanced configuration"),
)


def provider_of(host: str) -> Provider | None:
    """Return the service that a host name belongs to; None for another host."""
    name = host.lower().rstrip(".")
    for provider in PROVIDERS:
        for domain in provider.domains:
            middle, star, end = domain.partition("*")
            if name.endswith(end if star else domain) and (not star or middle in name):
                return provider
    return None
