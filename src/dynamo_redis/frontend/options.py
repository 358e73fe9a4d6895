"""The options that chat and text completions share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag

from dynamo_redis.frontend import parameters
from dynamo_redis.frontend.guided import FORM_FIELDS, guided_decoding
from dynamo_redis.frontend.http.errors import ApiError, invalid
from dynamo_redis.frontend.parameters import Parameters, unsupported
from dynamo_redis.models.llm_protocol import SamplingOptions

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_BAD_WORDS = 1024
MAX_TOKEN_IDS = 8192
MAX_LOGPROBS = 20
MAX_SALT_CHARS = 256

_INT64 = {"ge": -(2**63), "le": 2**63 - 1}

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


def by_type(**tags: str) -> Callable[[object], str | None]:
    """Choose the member of a union by the type of the value: errors then concern this member only."""

    def tag(value: object) -> str | None:
        return tags.get(type(value).__name__)

    return tag


_FURTHER = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
"""Unknown fields are kept, so that they can be refused by name."""

TopK = Annotated[int, Field(ge=-1, le=2**31 - 1)]
RepetitionPenalty = Annotated[float, Field(gt=0)]
ThinkingBudget = Annotated[int, Field(ge=-1, le=2**31 - 1)]


Weight = Annotated[float, Field(ge=0)]


EXTRA_FIELDS = ("worker_id", "timing", "stop_reason")
"""The fields of `nvext` in an answer that a request can ask for."""


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = _FURTHER
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = None


class RouterOverride(BaseModel):
    """`nvext.router_config_override`: the router's weights for one request."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
    overlap_score_credit: Weight | None = None
    overlap_score_weight: Weight | None = None
    prefill_load_scale: Weight | None = None
    router_temperature: Weight | None = None


class Extensions(BaseModel):
    """`nvext`, Dynamo's extensions."""

    model_config = _FURTHER
    backend_instance_id: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    router_config_override: RouterOverride | None = None
    extra_fields: Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    greed_sampling: bool | None = None
    max_thinking_tokens: ThinkingBudget | None = None
    top_k: TopK | None = None
    repetition_penalty: RepetitionPenalty | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: Any = None


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[
    Annotated[StopString, Tag("<text>")]
    | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")],
    Discriminator(
        by_type(str="<text>", list="<list>"),
        custom_error_type="stop_type",
        custom_error_message="Input should be a string or a list of at most 4 strings",
    ),
]


_SAMPLING = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
)


class CheckedBody(BaseModel):
    """The body of a request, of which no parameter is dropped silently. Null is the same as absent."""

    model_config = _FURTHER
    further_parameters: ClassVar[Parameters]

    def refuse_unsupported(self) -> None:
        """Raise ApiError for a parameter that cannot be served, or that is unknown."""
        if self.model_extra:
            self.further_parameters.check(self.model_extra, type(self).model_fields)


class RequestBody(CheckedBody, ABC):
    """The body of a request that has a prompt."""

    tag: ClassVar[bytes]
    """One byte that names the class to the process that parses large bodies."""

    @abstractmethod
    def options(self) -> CompletionOptions:
        """Return what is asked for, as the body of a chat or a text completion. Raises ApiError."""

    def media_places(self) -> dict[str, str]:
        """Return the path in the body of the first part of each modality beside text (`image`); empty if the
        places in the body are those in its options."""
        return {}

    def notes(self) -> bytes:
        """Return what the form of the answer needs of the body, besides its options."""
        return b""


class CompletionOptions(RequestBody):
    """The fields that both kinds of completion share."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    nvext: Extensions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    best_of: int | None = None
    seed: Annotated[int, Field(**_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: RepetitionPenalty | None = None
    thinking_token_budget: ThinkingBudget | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Bias] | None = None
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS, fail_fast=True)] | None
    ) = None
    bad_words: Annotated[list[StopString], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    add_special_tokens: bool | None = None

    _sampling: SamplingOptions = PrivateAttr(default_factory=SamplingOptions)

    _fits_tokens: bool = PrivateAttr(default=False)

    def options(self) -> CompletionOptions:
        """See `RequestBody`."""
        return self

    def refuse_unsupported(self) -> None:
        """See `CheckedBody`."""
        super().refuse_unsupported()
        if self.min_tokens and self.wanted_tokens is not None and self.min_tokens > self.wanted_tokens:
            raise invalid(
                f"'min_tokens' is over the {self.wanted_tokens} tokens of the answer.", "min_tokens"
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "it must be equal to 'n'")
        if self.stream_options is not None:
            if not self.stream:
                raise invalid(
                    "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                    "stream_options",
                )
            parameters.STREAM_OPTIONS.check(
                self.stream_options.model_extra, StreamOptions.model_fields, "stream_options."
            )
        if self.nvext is not None:
            parameters.NVEXT.check(self.nvext.model_extra, Extensions.model_fields, "nvext.")
            self._check_extra_fields()
        self._sampling = self._read_sampling()
        self.thinking_budget()
        _ = self.ignores_eos  # like these, it raises if two parameters differ

    def _check_extra_fields(self) -> None:
        for name in self.extra_fields:
            if name not in EXTRA_FIELDS:
                raise unsupported(
                    "nvext.extra_fields", f"there are {', '.join(EXTRA_FIELDS)}, and no {name[:64]!r}"
                )
        if self.extra_fields and (self.n or 1) > 1:
            raise unsupported("nvext.extra_fields", "they are those of one choice")

    def sampling_options(self) -> SamplingOptions:
        """Return the sampling options of the worker's request, without the seed: each choice has its own."""
        return self._sampling

    def routing(self) -> dict[str, Any]:
        """Return the keys of the worker's request that concern routers and schedulers."""
        found: dict[str, Any] = {"cache_salt": self.cache_salt, "priority": self.priority}
        if self.nvext is not None:
            found["backend_instance_id"] = self.nvext.backend_instance_id
            if (override := self.nvext.router_config_override) is not None:
                found["router_config_override"] = override.model_dump(exclude_none=True)
        return {name: value for name, value in found.items() if value not in (None, {})}

    def _read_sampling(self) -> SamplingOptions:
        """Read `sampling_options`. Raises ApiError if two parameters with one meaning differ."""
        given = self.model_fields_set  # few, in most bodies
        options = {name: getattr(self, name) for name in _SAMPLING if name in given}
        options["top_k"] = self._once("top_k", "nvext.top_k")
        options["repetition_penalty"] = self._once("repetition_penalty", "nvext.repetition_penalty")
        if self.nvext and self.nvext.greed_sampling:
            if self.temperature:
                raise twice("temperature", "nvext.greed_sampling")
            options["temperature"] = 0.0
        options["include_stop_str_in_output"] = self.keeps_stops or None
        if not FORM_FIELDS.isdisjoint(given):
            options["guided_decoding"] = guided_decoding(self)
        return cast(
            "SamplingOptions",
            {name: value for name, value in options.items() if value is not None and value not in ({}, [])},
        )

    def thinking_budget(self) -> int | None:
        """Return the most tokens of thinking; None if it has no limit of its own."""
        budget: int | None = self._once("thinking_token_budget", "nvext.max_thinking_tokens")
        return None if budget == -1 else budget

    def _once(self, name: str, other: str) -> Any:
        """Return a parameter that has two names. Raises ApiError if both are given and differ."""
        value = getattr(self, name)
        holder, _, field = other.rpartition(".")
        if holder and self.nvext is None:
            return value
        second = getattr(self.nvext if holder else self, field)
        if value is not None and second is not None and value != second:
            raise twice(name, other)
        return second if value is None else value

    @property
    def extra_fields(self) -> list[str]:
        """The names of `nvext.extra_fields`."""
        return [] if self.nvext is None else self.nvext.extra_fields or []

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens to generate; None: as many as the context allows."""
        return self.max_tokens

    def fit_tokens(self) -> None:
        """Take the most tokens to generate for a wish: as many as the context leaves are enough."""
        self._fits_tokens = True

    @property
    def fits_tokens(self) -> bool:
        """True if fewer tokens than `wanted_tokens` are enough."""
        return self._fits_tokens

    @property
    def keeps_stops(self) -> bool:
        """True if the answer includes the stop string that ended it."""
        return bool(self._once("include_stop_str_in_output", "no_stop_trim"))

    @property
    def ignores_eos(self) -> bool:
        """True if generation continues after an end-of-sequence token."""
        return bool(self._once("ignore_eos", "nvext.ignore_eos"))

    @property
    def wanted_logprobs(self) -> int | None:
        """The number of likeliest tokens whose log probabilities are wanted beside that of each token; None:
        no log probabilities."""
        return None

    @property
    def echoes(self) -> bool:
        """True if the answer begins with the prompt."""
        return False

    @property
    def counts_continuously(self) -> bool:
        """True if each chunk of a stream counts the tokens so far."""
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)

    @property
    def includes_usage(self) -> bool:
        """True if a stream ends with a chunk that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


def twice(name: str, other: str) -> ApiError:
    """Make the 400 for two parameters with one meaning and different values."""
    return invalid(f"'{name}' and '{other}' have one meaning but different values: give one of them.", other)
