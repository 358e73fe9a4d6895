"""Decoding of stored JSON records, with one error for every fault: InvalidRecord. Pure.

A value from another process may be anything: nested a thousand levels deep, a number past every limit, bytes
that are no text. These functions return JSON of the right types or raise InvalidRecord.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Final, Never, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from dynamo_redis.errors import InvalidRecord, SchemaMismatch


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a number of JSON")


_DECODE: Final = json.JSONDecoder(parse_constant=_refuse_constant).decode


def read_json(stored: bytes, what: str) -> Any:
    """Decode JSON in UTF-8. Raises InvalidRecord, which names the value by `what`."""
    try:
        return _DECODE(stored.decode())
    except UnicodeDecodeError as exc:
        raise InvalidRecord(what, "it is not text in UTF-8") from exc
    except RecursionError as exc:
        raise InvalidRecord(what, "its JSON is nested too deep") from exc
    except ValueError as exc:  # also an integer with more digits than Python reads
        raise InvalidRecord(what, f"it is not JSON: {exc}") from exc


def read_json_object(stored: bytes, what: str) -> dict[str, Any]:
    """Decode a JSON object. Raises InvalidRecord."""
    found = read_json(stored, what)
    if type(found) is not dict:
        raise InvalidRecord(what, f"it is a JSON {type(found).__name__}, not an object")
    return found


def check_version(found: object, supported: int, what: str) -> None:
    """Check a record's major version. Raises InvalidRecord if it is no number, SchemaMismatch for another
    one."""
    if type(found) is not int:
        raise InvalidRecord(what, f"its version is {found!r}, not a whole number")
    if found != supported:
        raise SchemaMismatch(what, found, supported)


def removal(key: str) -> str:
    """Return the sentence that tells how to remove a record of the registry."""
    return f"`dynamo-redis del {key}` removes it"


class StoredModel(BaseModel):
    """A record stored as JSON, of exact types. Fields of later minor versions are kept and ignored."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


class VersionedModel(StoredModel):
    """A record with a `version` of its own. A record of another version is refused."""

    WHAT: ClassVar[str]
    """The kind of record, as messages name it: "a model card"."""
    VERSION: ClassVar[int]

    version: int = 1

    def to_bytes(self) -> bytes:
        """Return the stored form."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, stored: bytes) -> Self:
        """Read a stored record. Raises InvalidRecord; SchemaMismatch for an unknown major version."""
        try:
            record = cls.model_validate_json(stored)
        except ValidationError as exc:
            fields = read_json_object(stored, cls.WHAT)
            check_version(fields.get("version", cls.VERSION), cls.VERSION, cls.WHAT)
            first = exc.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InvalidRecord(cls.WHAT, f"{place}: {first['msg']}" if place else first["msg"]) from exc
        check_version(record.version, cls.VERSION, cls.WHAT)
        return record
