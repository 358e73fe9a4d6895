"""The body of `POST /tokenize`."""

from __future__ import annotations

from typing import Any

from dynamo_redis.frontend.http.errors import invalid
from dynamo_redis.frontend.openai import ChatBody, Messages, TextBody, Tools
from dynamo_redis.frontend.options import CompletionOptions, RequestBody
from dynamo_redis.frontend.parameters import Parameters, Refusal


class TokenizeBody(RequestBody):
    """A text as `prompt`, or a chat as `messages`."""

    tag = b"k"
    further_parameters = Parameters(
        refused={
            "chat_template": Refusal("the model's own template is used"),
            "mm_processor_kwargs": Refusal("only texts are counted", ({},)),
        }
    )

    model: str
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    def options(self) -> CompletionOptions:
        """See `RequestBody`."""
        if (self.prompt is None) == (self.messages is None):
            raise invalid("Send either 'prompt' or 'messages'.", "prompt", "missing_required_parameter")
        if self.prompt is not None:
            return TextBody.model_construct(
                model=self.model, prompt=self.prompt, add_special_tokens=self.add_special_tokens
            )
        assert self.messages is not None
        chat = ChatBody.model_construct(
            model=self.model,
            messages=self.messages,
            tools=self.tools,
            add_special_tokens=self.add_special_tokens,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        chat.refuse_unsupported()
        return chat

    def notes(self) -> bytes:
        """See `RequestBody`: not empty if the tokens' texts are wanted."""
        return b"strs" if self.return_token_strs else b""
