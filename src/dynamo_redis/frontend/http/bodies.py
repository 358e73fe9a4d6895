"""A parsed body: its options and the source of its prompts; and its encoding between the processes.

The process that parses runs only this package's code, no template of a tenant: its pickles can be trusted.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from struct import Struct
from typing import Any, Final, TypeAlias

from dynamo_redis.frontend.anthropic_body import CountBody, MessagesBody
from dynamo_redis.frontend.embedding_body import EmbeddingBody, EmbeddingOptions
from dynamo_redis.frontend.http.errors import ApiError, invalid
from dynamo_redis.frontend.media import Media, media_of, with_placeholders
from dynamo_redis.frontend.openai import ChatBody, TextBody, read_body
from dynamo_redis.frontend.options import CompletionOptions, RequestBody
from dynamo_redis.frontend.responses_body import ResponsesBody
from dynamo_redis.frontend.tokenize_body import TokenizeBody
from dynamo_redis.frontend.tool_choice import typed_function
from dynamo_redis.templates.protocol import MaskedText, render_job

MOST_OPTIONS_BYTES: Final = 256 << 10
"""Most bytes of all fields except those of the prompt, for a body that was parsed by the process."""

_KINDS: Final[dict[bytes, type[RequestBody]]] = {
    kind.tag: kind
    for kind in (
        ChatBody,
        TextBody,
        MessagesBody,
        CountBody,
        ResponsesBody,
        TokenizeBody,
        EmbeddingBody,
    )
}

_HEAD: Final = Struct("<I")

Text = str | bytearray | memoryview
"""A prompt's text; a large one is bytes in UTF-8."""

Prompt: TypeAlias = "Text | MaskedText | list[int] | array[int]"
"""A prompt, as text or as token ids."""

Source: TypeAlias = "bytes | bytearray | list[Prompt]"
"""The source of a body's prompts: a conversation to render, or the prompts."""


@dataclass(frozen=True, slots=True)
class Body:
    """A parsed body. `options` lacks messages, tools and prompts if the body was large."""

    options: CompletionOptions
    source: Source
    notes: bytes = b""
    """See `RequestBody.notes`."""
    media: Media | None = None
    """The parts of a chat beside text."""

    @property
    def choice_count(self) -> int:
        """The number of answers that it asks for. All inputs of embeddings are one request to a worker."""
        if isinstance(self.options, EmbeddingOptions):
            return 1
        return (len(self.source) if isinstance(self.source, list) else 1) * (self.options.n or 1)


def source_of(body: CompletionOptions) -> Source:
    """Return the source of the body's prompts: a conversation to render, or the prompts."""
    if not isinstance(body, ChatBody):
        assert isinstance(body, TextBody)
        return list(body.prompts)
    return render_job(
        with_placeholders(body.messages),
        # With `none` the model shall not call tools: the template gets no tools.
        tools=None if body.tool_choice == "none" or not body.tools else [dict(tool) for tool in body.tools],
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=body.template_variables(),
    )


def media_in(options: CompletionOptions, places: Mapping[str, str]) -> Media | None:
    """Return the parts of a body beside text; None without any. `places`: see `RequestBody.media_places`."""
    if not isinstance(options, ChatBody):
        return None
    places = places or options.media_places()
    return media_of(options, places) if places else None


# --------------------------------------------------------------------------- between the processes


def pack(job: bytearray) -> bytes:
    """Parse a body in the process, and encode the result for `unpack`."""
    kind = _KINDS[bytes(job[:1])]
    del job[:1]
    try:
        body = read_body(kind, job)
        job.clear()
        options, notes, places = body.options(), body.notes(), body.media_places()
        del body
        source, media = source_of(options), media_in(options, places)
        options = options.model_copy(update=_WITHOUT_SOURCE[type(options)] | _typed_tools(options))
        parts: list[tuple[str, bytes | memoryview]] = [("notes", notes)]
        if media is not None:
            parts += media.chat.items()
            media = replace(media, chat=dict.fromkeys(media.chat, b""))
        parts += [_packed(part) for part in (source if isinstance(source, list) else [source])]
        del source, notes
        head = pickle.dumps((options, media, [(form, len(part)) for form, part in parts]))
        if len(head) > MOST_OPTIONS_BYTES:
            raise invalid(
                f"All fields but messages, prompt and documents are over {MOST_OPTIONS_BYTES} bytes. Of "
                "tools, names and types count, and whole schemas if 'tool_choice' demands a call.",
                code="body_too_complex",
            )
    except ApiError as exc:
        head, parts = pickle.dumps(vars(exc)), []
    return b"".join((_HEAD.pack(len(head)), head, *(part for _, part in parts)))


_WITHOUT_SOURCE: Final[dict[type[CompletionOptions], dict[str, Any]]] = {
    ChatBody: {"messages": [], "tools": None, "documents": None, "chat_template_kwargs": None},
    TextBody: {"prompt": ""},
    EmbeddingOptions: {"prompt": ""},
}


def _typed_tools(options: CompletionOptions) -> dict[str, Any]:
    """Return the tools without all that the parser of the answer does not need."""
    if not isinstance(options, ChatBody) or not options.tools:
        return {}
    return {"tools": [{"function": typed_function(tool["function"])} for tool in options.tools]}


def _packed(part: Prompt | bytes) -> tuple[str, bytes]:
    """Encode one source. In a function of its own: no variable of `pack` may keep the part, which can be most
    of the body."""
    if isinstance(part, str):
        return "text", part.encode()
    if isinstance(part, list):
        return "ids", array("I", part).tobytes()
    assert isinstance(part, bytes)
    return "conversation", part


def unpack(answer: bytearray) -> Body:
    """Return the body that `pack` parsed. Raises the ApiError that it raised."""
    end = _HEAD.size + _HEAD.unpack_from(answer)[0]
    head = pickle.loads(memoryview(answer)[_HEAD.size : end])  # noqa: S301 - see the module's docstring
    del answer[:end]
    if isinstance(head, dict):
        raise ApiError(**head)
    options, media, [(_, notes_size), *parts] = head
    notes = bytes(answer[:notes_size])
    del answer[:notes_size]
    if media is not None:
        *fields, (_, source_size) = parts
        return Body(options, answer[-source_size:], notes, _with_chat(media, memoryview(answer), fields))
    if parts and parts[0][0] == "conversation":
        return Body(options, answer, notes)
    prompts: list[Prompt] = []
    view = memoryview(answer)
    for form, size in parts:
        if form == "text":
            prompts.append(view[:size])
        else:
            prompts.append(ids := array("I"))
            ids.frombytes(view[:size])
        view = view[size:]
    return Body(options, prompts, notes)


def _with_chat(media: Media, view: memoryview, fields: Sequence[tuple[str, int]]) -> Media:
    """Return the media with the fields of its chat, which stand at the beginning of the view."""
    chat = {}
    for name, size in fields:
        chat[name], view = view[:size], view[size:]
    return replace(media, chat=chat)
