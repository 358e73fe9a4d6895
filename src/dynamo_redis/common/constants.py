"""Constants of workers, under the names of `dynamo.common.constants`. Pure."""

from enum import Enum


class DisaggregationMode(Enum):
    """The stage of a request that a worker handles. Only `AGGREGATED`, all stages, is served here."""

    AGGREGATED = "agg"
    PREFILL = "prefill"
    DECODE = "decode"
    ENCODE = "encode"
