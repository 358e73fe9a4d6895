"""Settings: the only reader of the environment.

Each group of settings is a frozen pydantic model. A value comes, in this order, from the arguments given
to `load` (the command line), the environment, a `.env` file in the working directory, the default. Sizes
and durations accept units (`32MiB`, `10s`, `500ms`). A wrong value is a `ConfigError` of one line that
names the setting.
"""

from __future__ import annotations

from dynamo_redis.config.base import PemFile, SettingsGroup, env_name, parse_duration, unit_of
from dynamo_redis.config.engines import (
    MockEngineSettings,
    ModelSettings,
    OpenAIEngineSettings,
    UnifiedBackendSettings,
)
from dynamo_redis.config.events import EventSettings
from dynamo_redis.config.origins import Origin, child_environment, origins
from dynamo_redis.config.plane import PlaneSettings
from dynamo_redis.config.router import RouterSettings
from dynamo_redis.config.runtime_files import (
    read_runtime_file,
    remove_runtime_file,
    running_deployments,
    runtime_directory,
    user_model_cache,
    write_runtime_file,
)
from dynamo_redis.config.services import FixtureSettings, FrontendSettings, RuntimeSettings
from dynamo_redis.config.store import RedisLogin, StoreSettings
from dynamo_redis.config.system import SystemSettings
from dynamo_redis.config.tracing import TracingSettings
from dynamo_redis.config.unknown import unknown_names

__all__ = [
    "GROUPS",
    "LOCK_TOKEN",
    "EventSettings",
    "FixtureSettings",
    "FrontendSettings",
    "MockEngineSettings",
    "ModelSettings",
    "OpenAIEngineSettings",
    "Origin",
    "PemFile",
    "PlaneSettings",
    "RedisLogin",
    "RouterSettings",
    "RuntimeSettings",
    "SettingsGroup",
    "StoreSettings",
    "SystemSettings",
    "TracingSettings",
    "UnifiedBackendSettings",
    "child_environment",
    "env_name",
    "origins",
    "parse_duration",
    "read_runtime_file",
    "remove_runtime_file",
    "running_deployments",
    "runtime_directory",
    "unit_of",
    "unknown_settings",
    "user_model_cache",
    "write_runtime_file",
]

GROUPS: tuple[type[SettingsGroup], ...] = (
    StoreSettings,
    PlaneSettings,
    EventSettings,
    RuntimeSettings,
    SystemSettings,
    TracingSettings,
    FrontendSettings,
    RouterSettings,
    ModelSettings,
    MockEngineSettings,
    OpenAIEngineSettings,
    UnifiedBackendSettings,
    FixtureSettings,
)
"""All groups, in the order in which `docs/settings.md` and `dynamo-redis settings` list them."""

LOCK_TOKEN = "DYN_LOCK_TOKEN"  # noqa: S105 - the name of a variable
"""Not a setting: the variable in which `dynamo-redis lock` gives its command the fencing token."""


def unknown_settings() -> dict[str, str]:
    """Return the `DYN_…` variables that are no settings, each with a sentence for the user.

    The sentence also suggests the setting that may be meant.

    Raises ConfigError if `.env` cannot be read.
    """
    known = {env_name(field) for group in GROUPS for field in group.model_fields.values()}
    return {
        name: f"{name} is not a setting and has no effect" + (f": is {meant} meant?" if meant else "")
        for name, meant in unknown_names(known | {LOCK_TOKEN}).items()
    }
