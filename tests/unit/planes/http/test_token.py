"""Bearer tokens of the http plane."""

from __future__ import annotations

import pytest

from dynamo_redis.errors import AuthenticationFailed
from dynamo_redis.planes.http.token import _sign, check_token, make_proof, make_token

SECRET, INSTANCE, NOW = b"secret", 0x694D98147D54BFDE, 1_000_000.0


def test_a_token_is_valid_until_it_expires() -> None:
    token = make_token(SECRET, INSTANCE, NOW + 10)
    check_token(token, SECRET, INSTANCE, NOW)
    check_token(token, SECRET, INSTANCE, NOW + 9.9)
    with pytest.raises(AuthenticationFailed, match="expired"):
        check_token(token, SECRET, INSTANCE, NOW + 10)


@pytest.mark.parametrize(
    ("secret", "instance"), [(b"another", INSTANCE), (SECRET, INSTANCE + 1)], ids=["secret", "instance"]
)
def test_a_token_of_another_instance_is_refused(secret: bytes, instance: int) -> None:
    with pytest.raises(AuthenticationFailed):
        check_token(make_token(SECRET, INSTANCE, NOW + 10), secret, instance, NOW)


def test_no_part_of_a_token_can_be_changed() -> None:
    token = make_token(SECRET, INSTANCE, NOW + 10)
    for place in range(len(token)):
        changed = token[:place] + ("0" if token[place] != "0" else "1") + token[place + 1 :]
        with pytest.raises(AuthenticationFailed):
            check_token(changed, SECRET, INSTANCE, NOW)
    for other in ("", ".", "....", "v1..x.y", "é", token + "0", token.replace(".", "")):
        with pytest.raises(AuthenticationFailed):
            check_token(other, SECRET, INSTANCE, NOW)


@pytest.mark.parametrize("head", ["", "v1.7", "v1.7.1.2", "v2.7.9", "v1.7.", "v1.7.-1", "v1.7." + "9" * 5000])
def test_signed_text_of_another_form_is_refused(head: str) -> None:
    with pytest.raises(AuthenticationFailed, match="form"):
        check_token(f"{head}.{_sign(SECRET, head)}", SECRET, 7, NOW)


def test_a_proof_shows_the_secret_for_one_nonce() -> None:
    assert make_proof(None, INSTANCE, "nonce") == ""
    proof = make_proof(SECRET, INSTANCE, "nonce")
    assert proof != make_proof(SECRET, INSTANCE, "other")
    assert proof != make_proof(b"other", INSTANCE, "nonce")
    assert make_token(SECRET, INSTANCE, NOW).rpartition(".")[2] != proof
