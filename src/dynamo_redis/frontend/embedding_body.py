"""The body of `POST /v1/embeddings`, and what it asks for.

Source: OpenAI's API reference; vLLM's and SGLang's servers for the fields that it lacks.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag

from dynamo_redis.frontend import parameters
from dynamo_redis.frontend.http.errors import invalid
from dynamo_redis.frontend.openai import TextBody, TokenIds, prompt_tag
from dynamo_redis.frontend.options import RequestBody

MAX_INPUTS: Final = 2048
"""Most inputs of one request, as at OpenAI."""

MAX_DIMENSIONS: Final = 65536

Text = Annotated[str, Field(min_length=1)]
Input = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(max_length=MAX_INPUTS, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(max_length=MAX_INPUTS, fail_fast=True), Tag("<id lists>")],
    Discriminator(
        prompt_tag,
        custom_error_type="input_type",
        custom_error_message=(
            "Input should be a text, a list of texts, a list of token ids, or a list of lists of them, "
            "and not empty"
        ),
    ),
]
EncodingFormat = Literal["float", "base64"]
Dimensions = Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)]

INPUT_NAMES: Final = {"prompt": "input"}
"""Fields of a text completion → their names in this API, for errors."""


class EmbeddingOptions(TextBody):
    """An `EmbeddingBody` as a text completion: its inputs are the prompts. Nothing is generated."""

    encoding_format: EncodingFormat = "float"
    dimensions: Dimensions | None = None


class EmbeddingBody(RequestBody):
    """`POST /v1/embeddings`."""

    tag = b"e"
    further_parameters = parameters.EMBEDDINGS

    model: str
    input: Input
    encoding_format: EncodingFormat | None = None
    dimensions: Dimensions | None = None
    add_special_tokens: bool | None = None

    def options(self) -> EmbeddingOptions:
        """See `RequestBody`."""
        return EmbeddingOptions.model_construct(
            model=self.model,
            prompt=self.input,
            encoding_format=self.encoding_format or "float",
            dimensions=self.dimensions,
            add_special_tokens=self.add_special_tokens,
        )


def check_dimensions(options: EmbeddingOptions, model: str, *, matryoshka: bool | None) -> None:
    """Raise ApiError for `dimensions` if the model's vectors cannot be shortened."""
    if options.dimensions is not None and matryoshka is False:
        raise invalid(
            f"Unsupported parameter: 'dimensions': embeddings of the model `{model}` cannot be shortened.",
            "dimensions",
            "unsupported_parameter",
        )


def embedding_input(prompts: list[Any]) -> list[str | list[int]]:
    """Return the inputs as they came, for workers that take text."""

    def plain(prompt: Any) -> str | list[int]:
        if isinstance(prompt, (bytearray, memoryview)):  # a text, from the process that parses large bodies
            return bytes(prompt).decode()
        return prompt if isinstance(prompt, str) else list(prompt)

    return list(map(plain, prompts))
