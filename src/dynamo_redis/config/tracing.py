"""Settings of traces: the standard variables of OpenTelemetry, as far as they decide whether to export."""

from __future__ import annotations

from typing import Annotated, Final, Literal, cast

from pydantic import AfterValidator, SecretStr

from dynamo_redis.config.base import SettingsGroup, setting

Exporter = Literal["otlp", "console"]
_EXPORTERS: Final = ("otlp", "console", "none")


def _exporters(value: str) -> list[str]:
    return list(dict.fromkeys(each.strip() for each in value.split(",")))


def _check_exporters(value: str) -> str:
    names = _exporters(value)
    if not set(names) <= set(_EXPORTERS) or ("none" in names and len(names) > 1):
        raise ValueError("must be otlp, console, both with a comma between them, or none")
    return value


class TracingSettings(SettingsGroup):
    """Traces by OpenTelemetry: they are on when an exporter or an endpoint is set.

    The SDK itself reads the other `OTEL_…` variables: sampler, headers, batches, time-outs, attributes.
    """

    otel_traces_exporter: Annotated[str, AfterValidator(_check_exporters)] | None = setting(
        "OTEL_TRACES_EXPORTER",
        None,
        "Exporters of traces: `otlp`, `console`, or both with a comma between them; `none`. Unset: otlp, if "
        "an endpoint is set.",
    )
    otel_endpoint: SecretStr | None = setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT", None, "The collector, such as `http://localhost:4318`."
    )
    otel_traces_endpoint: SecretStr | None = setting(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        None,
        "The collector's whole address for traces, such as `http://localhost:4318/v1/traces`.",
    )
    otel_protocol: Literal["http/protobuf", "grpc"] = setting(
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "http/protobuf",
        "Protocol to the collector. grpc needs the package `opentelemetry-exporter-otlp-proto-grpc`.",
    )
    otel_traces_protocol: Literal["http/protobuf", "grpc"] | None = setting(
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", None, "The protocol for traces, if another is for the rest."
    )
    otel_service_name: str | None = setting(
        "OTEL_SERVICE_NAME",
        None,
        "Name of the process in traces. Unset: that of `OTEL_RESOURCE_ATTRIBUTES`, else `dynamo-frontend`, "
        "`dynamo-worker`, …",
    )
    otel_export_enabled: bool | None = setting(
        "OTEL_EXPORT_ENABLED",
        None,
        "Dynamo's switch. true: export to the collector of this machine if no endpoint is set; false: never.",
    )
    otel_sdk_disabled: bool = setting("OTEL_SDK_DISABLED", False, "Switch traces off.")

    @property
    def exporters(self) -> list[Exporter]:
        """The exporters to use; none: traces are off."""
        if self.otel_sdk_disabled or self.otel_export_enabled is False:
            return []
        if self.otel_traces_exporter is not None:
            names = _exporters(self.otel_traces_exporter)
            return [cast("Exporter", name) for name in names if name != "none"]
        is_on = self.otel_export_enabled or self.otel_endpoint or self.otel_traces_endpoint
        return ["otlp"] if is_on else []

    @property
    def protocol(self) -> Literal["http/protobuf", "grpc"]:
        """The protocol for traces."""
        return self.otel_traces_protocol or self.otel_protocol

    @property
    def traces_url(self) -> str | None:
        """The address for traces; None: the exporter's default, on this machine."""
        if self.otel_traces_endpoint is not None:
            return self.otel_traces_endpoint.get_secret_value()
        if self.otel_endpoint is None:
            return None
        url = self.otel_endpoint.get_secret_value()
        return url if self.protocol == "grpc" else f"{url.rstrip('/')}/v1/traces"
