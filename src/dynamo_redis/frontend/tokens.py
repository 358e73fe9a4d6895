"""Text to token ids and back: the tokenizer, incremental detokenizers, and the search for stop strings.

Pure, without waiting or I/O; only `Tokenizer.from_files` reads a file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as HuggingFaceTokenizer

from dynamo_redis.errors import InvalidRequest, ModelError
from dynamo_redis.frontend.fast_encoding import FastEncoder
from dynamo_redis.frontend.literal_encoding import LiteralEncoder

REPLACEMENT = "�"

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")

_RESERVED_COUNT = 1 << 16
"""Ids beyond the vocabulary that are token ids without a text: models have more of them than the tokenizer
names, to fill up their matrices."""

_MAX_WINDOW_TOKENS = 32
"""Tokens after which the sliding-window detokenizer stops waiting for the rest of a character."""


_INLINE_BYTES = 1024
_FAST_INLINE_BYTES = 32 * 1024

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"

_LLAMA_3 = _ENDINGS + _LETTERS + r"\p{N}{1,3}" + _SIGNS + _SPACES
_QWEN_3 = _ENDINGS + _LETTERS + r"\p{N}" + _SIGNS + _SPACES
_GPT_OSS = (
    f"{_START}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_START}{_UPPER}+{_LOWER}*{_ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
)

_KNOWN_EXPRESSIONS = frozenset((_LLAMA_3, _QWEN_3, _GPT_OSS))
"""Expressions of pre-tokenizers, of many models each, that take a time in proportion to the text."""


class Tokenizer:
    """A model's tokenizer, from its `tokenizer.json`. May be used from several threads."""

    def __init__(self, content: bytes, *, origin: str = "tokenizer.json") -> None:
        """Load the content of a `tokenizer.json`. Raises ModelError if it is not one.

        Blocks (11 MiB: about 0.5 s), and holds the GIL for most of that time.
        """
        try:
            self._tokenizer = HuggingFaceTokenizer.from_buffer(content)
            decoder = self._tokenizer.decoder
            decoder = json.loads(decoder.__getstate__()) if decoder is not None else None
        except Exception as exc:  # the library raises bare Exception
            raise ModelError(f"{origin} is not a tokenizer: {exc}") from exc
        # A file may enable these settings of the training; they would truncate or pad prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        special = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocabulary_size: int = max(self._tokenizer.get_vocab_size(), 1 + max(added, default=-1))
        self._end_id = self.vocabulary_size + _RESERVED_COUNT
        self._special = {token_id: added[token_id].content for token_id in special}
        self._is_byte_level = is_byte_level(decoder)
        self._texts: dict[frozenset[str], TokenTexts] = {}
        self._added_tokens = [token.content for token in added.values()]
        self.special_names = [added[token_id].content for token_id in sorted(special)]
        """The names of the special tokens."""
        parts = filter(None, (self._tokenizer.normalizer, self._tokenizer.pre_tokenizer))
        expressions = {each for part in parts for each in _expressions(json.loads(part.__getstate__()))}
        self.has_expressions = not expressions <= _KNOWN_EXPRESSIONS
        """True if the file has regular expressions of its own: their cost depends on the text and can be
        high."""
        self._fast: FastEncoder | None = None

    @classmethod
    def from_files(cls, directory: Path) -> Tokenizer:
        """Read `tokenizer.json` of a model directory. Blocks. Raises ModelError."""
        path = directory / "tokenizer.json"
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
        return cls(content, origin=str(path))

    def accelerate(self, content: bytes) -> None:
        """Encode by `fastokens` from now on. `content` is that of the `tokenizer.json`.

        Blocks for some seconds, with pauses of the GIL. Raises ModelError if it does not support the file, or
        gives other tokens for one of some thousand texts.
        """
        fast = FastEncoder(content)
        fast.check(self._encode, self._added_tokens)
        self._fast = fast

    @property
    def inline_bytes(self) -> int:
        """The largest text, in bytes, that is encoded within some milliseconds."""
        if self.has_expressions:
            return 0
        return _INLINE_BYTES if self._fast is None else _FAST_INLINE_BYTES

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text. Names of special tokens become these tokens, as in transformers.

        Releases the GIL; 2 µs a token, or 0.1 µs once it is accelerated. `add_special_tokens` adds the tokens
        of the file's post-processor (a BOS token, for some models); a rendered chat has them already. Raises
        ModelError if the library fails at the text.
        """
        if self._fast is not None:
            ids = self._fast.encode(text, add_special_tokens)
            if ids is not None:
                return ids
        return self._encode(text, add_special_tokens)

    def encode_masked(self, text: str, mask: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a masked text: the names of special tokens with a mask in them stay text.

        As `encode`, but never accelerated. Raises InvalidRequest, too.
        """
        with _panics_as_errors():
            ids = self._literal.encode(text, mask)
            if not add_special_tokens:
                return ids
            probe, around = self._encode("a", False), self._encode("a", True)
        position = next(i for i in range(len(around)) if around[i : i + len(probe)] == probe)
        return [*around[:position], *ids, *around[position + len(probe) :]]

    @cached_property
    def _literal(self) -> LiteralEncoder:
        return LiteralEncoder(self._tokenizer, self._tokenizer.get_added_tokens_decoder())

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with _panics_as_errors():
            encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of a whole sequence."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the text of one token, which need not be whole characters; of a special token, its name."""
        token = self._tokenizer.id_to_token(token_id) or ""
        if self._is_byte_level:
            text = self._texts_with(frozenset())[token_id] or token
            return text if isinstance(text, bytes) else text.encode()
        if found := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(found[1])
        return token.replace("\u2581", " ").encode()

    def shown_bytes(self, shown: frozenset[str]) -> Callable[[int], bytes]:
        """Return the function that returns the text of one token as a detokenizer with these special tokens
        shows it."""
        if self._is_byte_level:
            texts = self._texts_with(shown)
            return lambda token_id: text if isinstance(text := texts[token_id], bytes) else text.encode()
        hidden = self._hidden(shown)
        return lambda token_id: b"" if token_id in hidden else self.token_bytes(token_id)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its exact name, or None."""
        return self._tokenizer.token_to_id(token)

    def detokenizer(self, shown: frozenset[str] = frozenset()) -> Detokenizer:
        """Return a new detokenizer for one answer. Special tokens have no text, except for the `shown`."""
        if self._is_byte_level:
            return ByteLevelDetokenizer(self._texts_with(shown))
        hidden = self._hidden(shown)
        if len(hidden) == len(self._special):
            return WindowDetokenizer(self.decode, self._end_id)

        def decode(token_ids: Sequence[int]) -> str:
            return self.decode([each for each in token_ids if each not in hidden], skip_special_tokens=False)

        return WindowDetokenizer(decode, self._end_id)

    def _texts_with(self, shown: frozenset[str]) -> TokenTexts:
        texts = self._texts.get(shown)
        if texts is None:
            texts = TokenTexts(self._tokenizer.id_to_token, self._hidden(shown), self._end_id)
            self._texts[shown] = texts
        return texts

    def _hidden(self, shown: frozenset[str]) -> frozenset[int]:
        return frozenset(token_id for token_id, name in self._special.items() if name not in shown)


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit, InvalidRequest):
        raise
    except BaseException as exc:  # noqa: BLE001 - a panic of the library is not an Exception
        raise ModelError(f"the tokenizer fails at this text: {str(exc).splitlines()[0]}") from None


def _expressions(state: Any) -> Iterator[str]:
    """Yield the regular expressions in a part of a `tokenizer.json`."""
    if isinstance(state, dict):
        for name, value in state.items():
            if name == "Regex" and isinstance(value, str):
                yield value
            else:
                yield from _expressions(value)
    elif isinstance(state, list):
        for value in state:
            yield from _expressions(value)


# --------------------------------------------------------------------------- detokenizers


class Detokenizer(Protocol):
    """Turns the tokens of one answer into text, token by token.

    The joined pieces are the decoding of the whole sequence without special tokens. A piece never ends inside
    a character: its bytes are held until the rest arrives, or until `finish`.
    """

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete. Raises TypeError and OverflowError for values that are
        no token ids."""
        ...

    def finish(self) -> str:
        """Return the held bytes: an incomplete character becomes U+FFFD."""
        ...


def is_byte_level(decoder: Any) -> bool:
    """Return whether a `tokenizer.json` decoder maps each token to bytes without regard to other tokens."""
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        decoders = decoder.get("decoders")
        return isinstance(decoders, list) and len(decoders) == 1 and is_byte_level(decoders[0])
    return decoder.get("type") == "ByteLevel"


# GPT-2's map of visible characters to bytes, in which byte-level tokenizers write their tokens: a printable
# Latin-1 character is its own byte; the other 68 bytes, in order, are U+0100 and following.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTES = {chr(byte): byte for byte in _VISIBLE} | {chr(0x100 + i): byte for i, byte in enumerate(_HIDDEN)}


class TokenTexts(dict[int, "str | bytes"]):
    """Token id → its text, or its bytes if they are not whole characters. Filled when a token is first seen.

    Bounded by the vocabulary and a fixed number of ids outside of it, which have no text. Other ids raise
    OverflowError.
    """

    def __init__(
        self, token_of: Callable[[int], str | None], special: frozenset[int], end_id: int = 1 << 32
    ) -> None:
        super().__init__()
        self._end_id = end_id
        self._token_of = token_of
        self._special = special

    def __missing__(self, token_id: int) -> str | bytes:
        if token_id in self._special:
            self[token_id] = ""
            return ""
        if not 0 <= token_id < self._end_id:
            raise OverflowError("no token id of the model")
        token = self._token_of(token_id)
        if not token:
            return ""
        try:
            raw = bytes([_BYTES[character] for character in token])
        except KeyError:  # an added token, written as plain text
            raw = token.encode()
        text: str | bytes = raw
        with suppress(UnicodeDecodeError):
            text = raw.decode()
        self[token_id] = text
        return text


class ByteLevelDetokenizer:
    """Detokenizer for tokens that are byte strings: one look-up a token, bytes only inside a character."""

    __slots__ = ("_decoder", "_inside", "_texts")

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside = False  # true while the decoder holds part of a character

    def feed(self, token_ids: Sequence[int]) -> str:
        """See `Detokenizer`."""
        texts = self._texts
        if len(token_ids) == 1 and not self._inside:
            text = texts[token_ids[0]]
            if type(text) is str:
                return text
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
    """Detokenizer for any other tokenizer: decodes a short window of the last tokens again for each token.

    A token's text may depend on the token before (a space, a byte of the same character). So the window
    begins with the tokens of the last piece, and their text is cut off. Text that ends in U+FFFD may be the
    start of a character and is held, for at most 32 tokens. If the tokenizer's decoder later changes text
    that was returned before (bytes that turn out not to be UTF-8), the returned pieces stay as they are.
    """

    __slots__ = ("_decode", "_end_id", "_ids", "_read")

    def __init__(self, decode: Callable[[Sequence[int]], str], end_id: int = 1 << 32) -> None:
        self._decode = decode
        self._end_id = end_id
        self._ids: list[int] = []
        self._read = 0  # number of tokens at the window's beginning with text that was returned

    def feed(self, token_ids: Sequence[int]) -> str:
        """See `Detokenizer`."""
        return "".join(map(self._feed_one, token_ids))

    def finish(self) -> str:
        """See `Detokenizer`."""
        given = self._decode(self._ids[: self._read])
        rest = self._decode(self._ids)[len(given) :]
        self._ids, self._read = [], 0
        return rest

    def _feed_one(self, token_id: int) -> str:
        if not 0 <= token_id < self._end_id:
            raise OverflowError("no token id of the model")
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
    """Finds the first of a few stop strings in an answer that arrives in any pieces.

    The match that ends first counts; of matches with one end, the longest. Text that may be the start of a
    stop string is held until that is known.
    """

    __slots__ = ("_first", "_held", "_keeps_found", "_stops", "found")

    def __init__(self, stops: Iterable[str], *, keeps_found: bool = False) -> None:
        """Search for `stops`, none of them empty. With `keeps_found` the found one is part of the text."""
        self._stops = tuple(stops)
        self._keeps_found = keeps_found
        self._first = frozenset(stop[0] for stop in self._stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the answer, or None. Do not call `feed` after it is found."""

    def feed(self, text: str) -> str:
        """Return the text that can be shown now. Once a stop string is `found`, it is all text before it."""
        if not self._held and self._first.isdisjoint(text):
            return text
        text = self._held + text
        matches = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start, stop) for start, stop in matches if start >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[: start + len(self.found) if self._keeps_found else start]
        # Hold the longest end of the text that is the beginning of a stop string.
        for start in range(max(0, len(text) - max(map(len, self._stops)) + 1), len(text)):
            if text[start] in self._first and any(stop.startswith(text[start:]) for stop in self._stops):
                break
        else:
            start = len(text)
        self._held = text[start:]
        return text[:start]

    def finish(self) -> str:
        """Return the held text, at the end of an answer without a stop string."""
        held, self._held = self._held, ""
        return held
