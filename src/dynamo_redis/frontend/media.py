"""Image, audio and video parts of a chat: they go to the engine as they came, beside the chat's tokens. Pure.

The chat template gets a placeholder for each part, never its content. The frontend never fetches a URL.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dynamo_redis.frontend.http.errors import invalid

if TYPE_CHECKING:
    from dynamo_redis.frontend.openai import ChatBody

MODALITY_OF: Final[Mapping[str, str]] = {
    "image_url": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "video",
}
"""The modality of each type of part beside text."""

_JSON: Final = json.JSONEncoder(separators=(",", ":"))
"""In ASCII: beside one emoji Python would hold a whole image in four bytes a character."""

PART_ROLES: Final = ("user", "tool")
"""The roles of messages that may have such parts."""


@dataclass(frozen=True, slots=True)
class Media:
    """The parts of a chat beside text, and the chat for an engine that reads them."""

    places: Mapping[str, str]
    """See `RequestBody.media_places`."""
    digest: str
    """The digest of all parts in their order: chats with the same tokens and other images differ in it."""
    chat: Mapping[str, bytes | memoryview]
    """See `GenerateRequest.chat`."""

    @property
    def size_bytes(self) -> int:
        """The size of the chat."""
        return sum(map(len, self.chat.values()))

    def check(self, modalities: frozenset[str], model_name: str, choice_count: int, limit_bytes: int) -> None:
        """Raise ApiError for a part that a model with these modalities cannot read, or for too many answers.

        Each answer is a request of its own, with the whole chat: together they may have `limit_bytes`.
        """
        for modality, place in self.places.items():
            if modality not in modalities:
                raise invalid(
                    f"Invalid value for '{place}': the model `{model_name}` takes no {modality} parts.",
                    place,
                    "unsupported_content",
                )
        if choice_count > 1 and self.size_bytes * choice_count > limit_bytes:
            raise invalid(
                f"Invalid value for 'n': {choice_count} chats with such parts have over {limit_bytes} bytes.",
                "n",
                "invalid_value",
            )


def media_of(body: ChatBody, places: Mapping[str, str]) -> Media:
    """Return the parts of a chat beside text, which stand at `places`."""
    digest = hashlib.sha256()
    for message in body.messages:
        for part in parts_of(message):
            if part["type"] in MODALITY_OF:
                for piece in _JSON.iterencode(part):
                    digest.update(piece.encode())
    fields = {name: _JSON.encode(value).encode() for name, value in _chat(body).items()}
    return Media(places, digest.hexdigest()[:32], fields)


def _chat(body: ChatBody) -> dict[str, Any]:
    """Return the fields of a body that an engine needs to make the prompt."""
    chat: dict[str, Any] = {"messages": body.messages}
    if body.tools and body.tool_choice != "none":
        chat["tools"] = body.tools
    if body.documents:
        chat["documents"] = body.documents
    if body.add_generation_prompt is False:
        chat["add_generation_prompt"] = False
    if body.continue_final_message:
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.add_special_tokens:
        chat["add_special_tokens"] = True
    if variables := body.template_variables():
        chat["chat_template_kwargs"] = variables
    return chat


def with_placeholders(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for a chat template, with placeholders (`{"type": "image"}`) in place of images."""
    return [
        {**message, "content": [_placeholder(part) for part in parts]}
        if (parts := parts_of(message))
        else dict(message)
        for message in messages
    ]


def parts_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a message's content; none of a text."""
    content = message.get("content")
    return content if isinstance(content, list) else []


def _placeholder(part: dict[str, Any]) -> dict[str, Any]:
    modality = MODALITY_OF.get(part["type"])
    return part if modality is None else {"type": modality}
