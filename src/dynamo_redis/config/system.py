"""Settings of the health checks and metrics of a process."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dynamo_redis.config.base import Duration, SettingsGroup, setting


class SystemSettings(SettingsGroup):
    """Health checks and metrics of a process."""

    system_port: Annotated[int, Field(ge=-1, le=65535)] = setting(
        "DYN_SYSTEM_PORT",
        -1,
        "Port of /health, /live and /metrics, for everyone who reaches it; 0 takes a free one, -1: none.",
    )
    system_host: str = setting(
        "DYN_SYSTEM_HOST",
        "0.0.0.0",  # noqa: S104
        "Address on which that port listens.",
    )
    health_check_enabled: bool = setting(
        "DYN_HEALTH_CHECK_ENABLED",
        False,
        "Endpoints served with a `health_check_payload` get it as a request while they are idle. An instance "
        "that does not answer it is not chosen until it does.",
    )
    canary_wait_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_CANARY_WAIT_TIME", 10.0, "Time without requests after which that request is made.", unit="s"
    )
    health_check_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_HEALTH_CHECK_REQUEST_TIMEOUT",
        3.0,
        "Longest time to the first item of its answer.",
        unit="s",
    )
