"""Text to token ids and back: the tokenizer, incremental detokenizers, and the search for stop strings.

Pure: nothing here waits or does I/O, except that `Tokenizer.from_files` reads one file.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as HuggingFaceTokenizer

from dynamo_redis.errors import ModelError

REPLACEMENT = "�"

_MAX_WINDOW_TOKENS = 32
"""The sliding-window detokenizer gives up waiting for the rest of a character after so many tokens."""


class Tokenizer:
    """A model's tokenizer, from its `tokenizer.json`. Immutable; may be used from several threads."""

    def __init__(self, content: bytes, *, origin: str = "tokenizer.json") -> None:
        """`content` is that of a `tokenizer.json`. Raises ModelError if it is not one.

        Blocks (11 MiB: about 0.5 s), and holds the interpreter for most of that.
        """
        try:
            self._tokenizer = HuggingFaceTokenizer.from_buffer(content)
            decoder = self._tokenizer.decoder
            decoder = json.loads(decoder.__getstate__()) if decoder is not None else None
        except Exception as exc:  # the library raises bare Exception
            raise ModelError(f"{origin} is not a tokenizer: {exc}") from exc
        # A file may ask for these; they are training-time settings that would cut or fill prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        special = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocabulary_size: int = max(self._tokenizer.get_vocab_size(), 1 + max(added, default=-1))
        self._make_detokenizer = self._detokenizer_for(decoder, special)
        parts = filter(None, (self._tokenizer.normalizer, self._tokenizer.pre_tokenizer))
        self.has_expressions: bool = any(b'"Regex"' in bytes(part.__getstate__()) for part in parts)
        """Whether the file brings regular expressions, whose cost depends on the text, and can be much."""

    @classmethod
    def from_files(cls, directory: Path) -> Tokenizer:
        """Read `tokenizer.json` of a model directory. Blocks. Raises ModelError."""
        path = directory / "tokenizer.json"
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
        return cls(content, origin=str(path))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; names of special tokens in it become those tokens, as with transformers.

        Releases the GIL; about 2 µs a token. `add_special_tokens` adds what the file's post-processor
        adds (a BOS token, for some models); a rendered chat already has them. Raises ModelError for a text at
        which the library fails.
        """
        try:
            encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # noqa: BLE001 - the library panics, which is no Exception
            raise ModelError(f"the tokenizer fails at this text: {str(exc).splitlines()[0]}") from None
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact name."""
        return self._tokenizer.token_to_id(token)

    def detokenizer(self) -> Detokenizer:
        """A new detokenizer for one answer; special tokens have no text."""
        return self._make_detokenizer()

    def _detokenizer_for(self, decoder: Any, special: frozenset[int]) -> Callable[[], Detokenizer]:
        if is_byte_level(decoder):
            texts = TokenTexts(self._tokenizer.id_to_token, special)
            return lambda: ByteLevelDetokenizer(texts)
        decode = self.decode
        return lambda: WindowDetokenizer(decode)


# --------------------------------------------------------------------------- detokenizers


class Detokenizer(Protocol):
    """Turns the tokens of one answer into text, as they come.

    The pieces, joined, are the decoding of the whole sequence with special tokens skipped. A piece never
    ends inside a character: its bytes are held until the rest arrives, or `finish`.
    """

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        ...

    def finish(self) -> str:
        """What is still held: an incomplete character, as U+FFFD."""
        ...


def is_byte_level(decoder: Any) -> bool:
    """Whether a `tokenizer.json` decoder maps each token to bytes on its own, whatever its neighbours."""
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        decoders = decoder.get("decoders")
        return isinstance(decoders, list) and len(decoders) == 1 and is_byte_level(decoders[0])
    return decoder.get("type") == "ByteLevel"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map of visible characters to bytes, as byte-level tokenizers write their tokens.

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, for U+0100 onwards.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()


class TokenTexts(dict[int, "str | bytes"]):
    """Token id → its text, or its bytes if they are no whole characters. Filled as tokens are first seen.

    Bounded by the vocabulary and a fixed number of ids outside of it, which have no text.
    """

    def __init__(self, token_of: Callable[[int], str | None], special: frozenset[int]) -> None:
        super().__init__()
        self._token_of = token_of
        self._special = special

    def __missing__(self, token_id: int) -> str | bytes:
        text = self._text(token_id)
        if text != "" or token_id in self._special:
            self[token_id] = text
        return text

    def _text(self, token_id: int) -> str | bytes:
        if token_id in self._special:
            return ""
        try:
            token = self._token_of(token_id)
        except OverflowError:  # not an id at all: negative, or over 32 bits
            token = None
        if token is None:
            return ""
        try:
            raw = bytes([_BYTES[character] for character in token])
        except KeyError:  # an added token, written as plain text
            raw = token.encode()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw


class ByteLevelDetokenizer:
    """For tokenizers whose tokens are byte strings: one look-up a token, bytes only inside a character."""

    __slots__ = ("_decoder", "_inside", "_texts")

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside = False  # whether the decoder holds part of a character

    def feed(self, token_ids: Iterable[int]) -> str:
        """See `Detokenizer`."""
        texts = self._texts
        pieces = []
        for token_id in token_ids:
            text = texts[token_id]
            if self._inside or type(text) is bytes:
                text = self._decode(text)
            pieces.append(text)
        return pieces[0] if len(pieces) == 1 else "".join(pieces)  # type: ignore[arg-type, return-value]

    def finish(self) -> str:
        """See `Detokenizer`."""
        self._inside = False
        return self._decoder.decode(b"", True)

    def _decode(self, text: str | bytes) -> str:
        decoded = self._decoder.decode(text.encode() if isinstance(text, str) else text)
        self._inside = bool(self._decoder.getstate()[0])
        return decoded


class WindowDetokenizer:
    """For any other tokenizer: decodes a short window of the last tokens again and again.

    A token's text may depend on the one before it (a space, a byte of the same character), so the window
    begins one emission back, and its own beginning is cut off. Text that ends in U+FFFD may be the start of
    a character and is held, for at most 32 tokens. Where the tokenizer's decoder rewrites text that it gave
    out before (bytes that turn out not to be UTF-8), the pieces keep the first reading.
    """

    __slots__ = ("_decode", "_ids", "_read")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._read = 0  # tokens at the window's beginning whose text has been given out

    def feed(self, token_ids: Iterable[int]) -> str:
        """See `Detokenizer`."""
        return "".join(map(self._feed_one, token_ids))

    def finish(self) -> str:
        """See `Detokenizer`."""
        given = self._decode(self._ids[: self._read])
        rest = self._decode(self._ids)[len(given) :]
        self._ids, self._read = [], 0
        return rest

    def _feed_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        given = self._decode(self._ids[: self._read])
        text = self._decode(self._ids)
        full = len(self._ids) - self._read >= _MAX_WINDOW_TOKENS
        if len(text) <= len(given):
            if full:  # tokens without text, such as special ones, must not make the window grow
                self._ids.pop()
            return ""
        if text.endswith(REPLACEMENT) and not full:
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        return text[len(given) :]


# --------------------------------------------------------------------------- stop strings


class StopStrings:
    """Finds the first of a few stop strings in an answer that comes in pieces, whatever the cuts.

    The match that ends first counts; of those that end together, the longest. Text that may be the start
    of a stop string is held until that is decided.
    """

    __slots__ = ("_first", "_held", "_keeps_found", "_stops", "found")

    def __init__(self, stops: Iterable[str], *, keeps_found: bool = False) -> None:
        """None of `stops` may be empty. With `keeps_found` the one that is found is shown, too."""
        self._stops = tuple(stops)
        self._keeps_found = keeps_found
        self._first = frozenset(stop[0] for stop in self._stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the answer; nothing may be fed after it."""

    def feed(self, text: str) -> str:
        """What of the answer may be shown now; everything before the stop string once one is `found`."""
        if not self._held and self._first.isdisjoint(text):
            return text
        text = self._held + text
        match = self._match(text)
        if match is not None:
            start, self.found = match
            self._held = ""
            return text[: start + len(self.found) if self._keeps_found else start]
        length = self._undecided(text)
        self._held = text[len(text) - length :]
        return text[: len(text) - length]

    def finish(self) -> str:
        """The text still held, at the end of an answer without a stop string."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str) -> tuple[int, str] | None:
        matches = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start, stop) for start, stop in matches if start >= 0]
        if not ends:
            return None
        _, start, stop = min(ends)
        return start, stop

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that some stop string begins with."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            tail = text[len(text) - length :]
            if tail[0] in self._first and any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
