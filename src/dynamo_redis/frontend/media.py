"""Image, audio and video parts of a chat: they go to the engine as they came, beside the chat's tokens. Pure.

The chat template gets a placeholder for each part, never its content. The frontend never fetches a URL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.templates.protocol import to_json

if TYPE_CHECKING:
    from dynamo_redis.frontend.openai import ChatBody

MODALITY_OF: Final[Mapping[str, str]] = {
    "image_url": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "video",
}
"""The modality of each type of part beside text."""

PART_ROLES: Final = ("user", "tool")
"""The roles of messages that may have such parts."""


@dataclass(frozen=True, slots=True)
class Media:
    """The parts of a chat beside text, and the chat for an engine that reads them."""

    places: dict[str, str]
    """The path in the body of the first part of each modality."""
    digest: str
    """The digest of all parts in their order: chats with the same tokens and other images differ in it."""
    chat: dict[str, bytes]
    """See `GenerateRequest.chat`."""

    def check(self, modalities: frozenset[str], model_name: str) -> None:
        """Raise ApiError, which names the first part that a model with these modalities cannot read."""
        for modality, place in self.places.items():
            if modality not in modalities:
                raise ApiError(
                    400,
                    f"Invalid value for '{place}': the model `{model_name}` takes no {modality} parts.",
                    param=place,
                    code="unsupported_content",
                )


def media_of(body: ChatBody) -> Media | None:
    """Return the parts of a chat beside text; None without any."""
    places: dict[str, str] = {}
    digest = hashlib.sha256()
    for number, message in enumerate(body.messages):
        for index, part in enumerate(_parts(message)):
            if part["type"] in MODALITY_OF:
                modality = MODALITY_OF[part["type"]]
                places.setdefault(modality, f"messages[{number}].content[{index}].type")
                content = to_json(part)
                digest.update(len(content).to_bytes(8, "little") + content)
    if not places:
        return None
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
    return Media(places, digest.hexdigest()[:32], {name: to_json(value) for name, value in chat.items()})


def with_placeholders(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for a chat template, with placeholders (`{"type": "image"}`) in place of images."""
    return [
        {**message, "content": [_placeholder(part) for part in parts]}
        if (parts := _parts(message))
        else dict(message)
        for message in messages
    ]


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _placeholder(part: dict[str, Any]) -> dict[str, Any]:
    modality = MODALITY_OF.get(part["type"])
    return part if modality is None else {"type": modality}
