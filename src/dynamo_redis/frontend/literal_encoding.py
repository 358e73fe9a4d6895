"""Encoding of prompts in which a client's text has the names of special tokens: they stay text.

`templates/masking.py` says which names are a client's: a mask stands in them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as HuggingFaceTokenizer

from dynamo_redis.errors import InvalidRequest
from dynamo_redis.templates.masking import names_pattern


class LiteralEncoder:
    """A second tokenizer over the same model, whose special tokens have names that no client knows.

    In a prompt, the names that the template wrote are replaced by the secret ones. Then the masks are taken
    out, and the whole text is encoded at once: all around the names stays as in any other prompt. It shares
    the vocabulary with the first tokenizer, and can be used from several threads.
    """

    def __init__(self, tokenizer: Any, added: Mapping[int, AddedToken]) -> None:
        """Make it from a tokenizer and its added tokens: some milliseconds."""
        nonce = secrets.token_hex(16)
        self._names = {
            token.content: f"<{nonce}.{token_id}>" for token_id, token in added.items() if token.special
        }
        self._pattern = names_pattern(self._names)
        self._tokenizer = HuggingFaceTokenizer(tokenizer.model)
        self._tokenizer.normalizer = tokenizer.normalizer
        self._tokenizer.pre_tokenizer = tokenizer.pre_tokenizer
        self._ids: dict[int, int] = {}
        for token_id, token in sorted(added.items()):
            name = self._names.get(token.content, token.content)
            copy = AddedToken(
                name,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.special,
            )
            (self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens)([copy])
            own_id = self._tokenizer.token_to_id(name)
            assert own_id is not None
            self._ids[own_id] = token_id
        self._forbidden = frozenset(
            token_id  # all but the token for unknown characters
            for token_id, token in added.items()
            if token.special and "unk" not in token.content.lower()
        )
        # An id of this tokenizer's own that the model's vocabulary has, too, would have two meanings.
        self._is_usable = all(
            own == token_id or own in added or tokenizer.id_to_token(own) is None
            for own, token_id in self._ids.items()
        )

    def encode(self, text: str, mask: str) -> list[int]:
        """Return the token ids of a masked text. Raises InvalidRequest if the vocabulary has no other tokens
        for a name, even with a space in it."""
        if self._pattern is not None:
            text = self._pattern.sub(lambda found: self._names[found[0]], text)
        for replacement in ("", " "):
            [encoding] = self._tokenizer.encode_batch_fast(
                [text.replace(mask, replacement)], add_special_tokens=False
            )
            # Some models (Unigram) have special tokens in their vocabulary, and find them in any text.
            found = (token_id for token_id in encoding.ids if token_id not in self._ids)
            if self._is_usable and self._forbidden.isdisjoint(found):
                return [self._ids.get(token_id, token_id) for token_id in encoding.ids]
        raise InvalidRequest("the name of a special token in a message cannot be written as text")
