"""Unusable TLS settings are named at start, and changed files are reloaded."""

from __future__ import annotations

import logging
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect, ConfigError
from dynamo_redis.planes.address import parse_address
from dynamo_redis.planes.pem import Side
from dynamo_redis.planes.reloaded import LOOK_S
from dynamo_redis.planes.tcp.tls import TlsContext, dial_options, make_tls
from tests.certificates import Authority, Identity


class HeldClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.wall_s = 1_790_000_000.0

    def monotonic(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return self.wall_s

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def shown_by(context: ssl.SSLContext, authority: Authority) -> bytes:
    """Return the certificate that a server's context shows, in DER."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cafile=authority.path)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1")
    theirs = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, theirs, ours):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    found = ours.getpeercert(binary_form=True)
    assert found is not None
    return found


def der(identity: Identity) -> bytes:
    return ssl.PEM_cert_to_DER_cert(identity.cert.read_text())


# --------------------------------------------------------------------------- settings that do not fit


def unset(*names: str) -> Callable[[dict[str, Any], Path], None]:
    def change(settings: dict[str, Any], _: Path) -> None:
        for name in names:
            settings.pop(name)

    return change


def point(name: str, content: bytes | None) -> Callable[[dict[str, Any], Path], None]:
    def change(settings: dict[str, Any], directory: Path) -> None:
        settings[name] = directory / "other.pem"
        if content is not None:
            settings[name].write_bytes(content)

    return change


def foreign_key(settings: dict[str, Any], directory: Path) -> None:
    settings["tcp_tls_key"] = Authority(directory, "other").issue().key


def encrypted_key(settings: dict[str, Any], directory: Path) -> None:
    plain, settings["tcp_tls_key"] = settings["tcp_tls_key"], directory / "encrypted.key"
    command = ["openssl", "pkey", "-aes128", "-passout", "pass:secret", "-in", plain, "-out"]
    subprocess.run([*command, settings["tcp_tls_key"]], check=True, capture_output=True)


def expired(settings: dict[str, Any], directory: Path) -> None:
    old = Authority(directory, "old").issue(is_expired=True)
    settings |= {"tcp_tls_cert": old.cert, "tcp_tls_key": old.key}


def a_directory(settings: dict[str, Any], directory: Path) -> None:
    settings["tcp_tls_cert"] = directory


def off(settings: dict[str, Any], _: Path) -> None:
    settings["tcp_tls"] = "off"


def bad_name(settings: dict[str, Any], _: Path) -> None:
    settings["tcp_tls_server_name"] = ".not..a.name"


@pytest.mark.parametrize(
    ("side", "mode", "change", "message"),
    [
        ("client", "on", unset("tcp_tls_ca"), "DYN_TCP_TLS=on: set DYN_TCP_TLS_CA"),
        ("server", "on", unset("tcp_tls_ca"), "DYN_TCP_TLS=on: set DYN_TCP_TLS_CA"),
        ("server", "on", unset("tcp_tls_cert"), "DYN_TCP_TLS_KEY is set and DYN_TCP_TLS_CERT is not"),
        ("client", "on", unset("tcp_tls_key"), "DYN_TCP_TLS_CERT is set and DYN_TCP_TLS_KEY is not"),
        ("server", "on", unset("tcp_tls_cert", "tcp_tls_key"), "on: a worker needs a certificate: set DYN_"),
        ("client", "mutual", unset("tcp_tls_cert", "tcp_tls_key"), "mutual: a caller needs a certificate"),
        (
            "server",
            "on",
            point("tcp_tls_cert", None),
            "DYN_TCP_TLS_CERT=.*other.pem: cannot be read: No such",
        ),
        ("server", "on", point("tcp_tls_key", None), "DYN_TCP_TLS_KEY=.*other.pem: cannot be read: No such"),
        ("client", "on", point("tcp_tls_ca", None), "DYN_TCP_TLS_CA=.*other.pem: cannot be read: No such"),
        ("server", "on", a_directory, "DYN_TCP_TLS_CERT=.*: is not a file"),
        ("server", "on", point("tcp_tls_cert", b"hello"), "DYN_TCP_TLS_CERT=.*: holds no certificate"),
        ("server", "on", point("tcp_tls_cert", b""), "DYN_TCP_TLS_CERT=.*: holds no certificate"),
        ("server", "on", point("tcp_tls_key", b"hello"), "DYN_TCP_TLS_KEY=.*: holds no private key"),
        ("client", "on", point("tcp_tls_ca", b"hello"), "DYN_TCP_TLS_CA=.*: holds no certificate"),
        ("server", "on", foreign_key, "DYN_TCP_TLS_KEY=.*: is not the key of the certificate"),
        ("server", "on", encrypted_key, "DYN_TCP_TLS_KEY=.*: is encrypted: write it without a passphrase"),
        ("server", "on", expired, "DYN_TCP_TLS_CERT=.*: cannot be used by a server: certificate has expired"),
        ("client", "on", expired, "DYN_TCP_TLS_CERT=.*: cannot be used by a client: certificate has expired"),
        ("server", "on", off, "DYN_TCP_TLS_CA is set and DYN_TCP_TLS is off: set DYN_TCP_TLS to on"),
        ("client", "on", bad_name, "DYN_TCP_TLS_SERVER_NAME='.not..a.name': is no host name"),
    ],
)
def test_unusable_tls_settings_are_named_at_start(
    side: Side,
    mode: str,
    change: Callable[[dict[str, Any], Path], None],
    message: str,
    authority: Authority,
    tmp_path: Path,
) -> None:
    chosen = authority.settings(authority.issue(), mode)
    change(chosen, tmp_path)
    with pytest.raises(ConfigError, match=message):
        make_tls(PlaneSettings.load(**chosen), side)


def test_authorities_that_have_all_expired(authority: Authority, tmp_path: Path) -> None:
    clock = HeldClock()
    settings = PlaneSettings.load(**authority.settings(authority.issue()))
    TlsContext(settings, "client", clock)
    clock.wall_s = 1e11
    with pytest.raises(ConfigError, match=r"DYN_TCP_TLS_CA=.*: every authority in it has expired"):
        TlsContext(settings, "client", clock)


def test_without_settings_there_is_no_tls() -> None:
    assert make_tls(PlaneSettings.load(), "server") is None
    assert make_tls(PlaneSettings.load(), "client") is None


def test_context_wants_tls_1_3_and_checks_certificates(authority: Authority) -> None:
    settings = PlaneSettings.load(**authority.settings(authority.issue(), "mutual"))
    server, client = (TlsContext(settings, side).current() for side in get_args(Side))
    for context in (server, client):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
    assert client.check_hostname


# --------------------------------------------------------------------------- who dials whom


@pytest.mark.parametrize(
    ("address", "mode", "has_certificate", "message"),
    [
        ("10.0.0.7:80+tls", None, False, "it speaks TLS, and this process does not: set DYN_TCP_TLS=on"),
        ("10.0.0.7:80+mtls", None, False, "it speaks TLS, and this process does not"),
        ("10.0.0.7:80", "on", False, "it does not speak TLS, and DYN_TCP_TLS is set here"),
        ("10.0.0.7:80+mtls", "on", False, "it asks callers for a certificate: set DYN_TCP_TLS_CERT"),
        ("10.0.0.7:80+mtls", "on", True, None),
        ("10.0.0.7:80+tls", "on", False, None),
        ("10.0.0.7:80+tls", "mutual", True, None),
        ("10.0.0.7:80", None, False, None),
    ],
)
def test_both_sides_must_be_set_alike(
    authority: Authority, address: str, mode: str | None, has_certificate: bool, message: str | None
) -> None:
    tls = None
    if mode is not None:
        identity = authority.issue() if has_certificate else None
        tls = make_tls(PlaneSettings.load(**authority.settings(identity, mode)), "client")
    if message is None:
        host, port, options = dial_options(address, tls)
        assert (host, port) == ("10.0.0.7", 80)
        assert options.get("server_hostname") == (None if tls is None else "10.0.0.7")
    else:
        with pytest.raises(CannotConnect, match=message):
            dial_options(address, tls)


def test_name_in_certificates_may_be_given(authority: Authority) -> None:
    settings = PlaneSettings.load(**authority.settings(), tcp_tls_server_name="worker.example")
    _, _, options = dial_options("[::1]:80+tls", make_tls(settings, "client"))
    assert options["server_hostname"] == "worker.example"


@pytest.mark.parametrize("address", ["10.0.0.7:80+tls", "[::1]:80+mtls"])
def test_release_that_knows_no_tls_refuses_the_address(address: str) -> None:
    """An earlier release takes `80+tls` for the port and fails: it never speaks in the clear to a TLS
    worker."""
    with pytest.raises(ValueError, match="the port is not one of"):
        parse_address(address)


def test_address_of_a_later_release(authority: Authority) -> None:
    with pytest.raises(ValueError, match="quic"):
        dial_options("10.0.0.7:80+quic", None)


# --------------------------------------------------------------------------- files that change


@pytest.fixture
def clock() -> HeldClock:
    return HeldClock()


def test_changed_certificate_is_taken_up(authority: Authority, clock: HeldClock) -> None:
    ours, next_one = authority.issue(), authority.issue()
    tls = TlsContext(PlaneSettings.load(**authority.settings(ours)), "server", clock)
    first, expected = tls.current(), der(next_one)
    next_one.move_to(ours)
    assert tls.current() is first, "files are looked at once in a while"
    clock.pass_(LOOK_S)
    assert shown_by(tls.current(), authority) == expected
    assert tls.current() is tls.current()


def test_kubernetes_secret_update_is_noticed(authority: Authority, clock: HeldClock, tmp_path: Path) -> None:
    """As Kubernetes does it: `tls.crt` → `..data/tls.crt`, `..data` → a directory of the moment."""
    for version in ("v1", "v2"):
        made = authority.issue()
        (tmp_path / version).mkdir()
        made.move_to(Identity(tmp_path / version / "tls.crt", tmp_path / version / "tls.key"))
    (tmp_path / "..data").symlink_to("v1")
    mounted = Identity(tmp_path / "tls.crt", tmp_path / "tls.key")
    mounted.cert.symlink_to("..data/tls.crt")
    mounted.key.symlink_to("..data/tls.key")
    tls = TlsContext(PlaneSettings.load(**authority.settings(mounted)), "server", clock)
    before = shown_by(tls.current(), authority)
    (tmp_path / "..data_new").symlink_to("v2")
    (tmp_path / "..data_new").replace(tmp_path / "..data")
    clock.pass_(LOOK_S)
    after = shown_by(tls.current(), authority)
    assert after == der(mounted)
    assert after != before


@pytest.mark.parametrize("damage", ["cut", "missing", "foreign key", "expired", "unreadable"])
def test_unusable_files_are_logged_once_and_not_used(
    authority: Authority,
    clock: HeldClock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    ours, next_one = authority.issue(), authority.issue()
    tls = TlsContext(PlaneSettings.load(**authority.settings(ours)), "server", clock)
    first, expected, secret_lines = tls.current(), der(next_one), ours.key.read_text().split()[4:-4]
    if damage == "cut":
        ours.cert.write_bytes(ours.cert.read_bytes()[:300])
    elif damage == "missing":
        ours.cert.unlink()
    elif damage == "foreign key":
        authority.issue().key.replace(ours.key)
    elif damage == "expired":
        authority.issue(is_expired=True).move_to(ours)
    else:
        ours.key.unlink()
        ours.key.mkdir()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            clock.pass_(LOOK_S)
            assert tls.current() is first
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.message.startswith("DYN_TCP_TLS_")
    assert "goes on with the certificates it had" in record.message
    assert not any(line in caplog.text for line in secret_lines)
    if damage == "unreadable":
        ours.key.rmdir()
    next_one.move_to(ours)
    clock.pass_(LOOK_S)
    assert shown_by(tls.current(), authority) == expected


def test_certificate_refused_for_the_time_is_tried_again(authority: Authority, clock: HeldClock) -> None:
    """A certificate of a machine whose clock is ahead becomes valid later, with the file unchanged."""
    tls = TlsContext(PlaneSettings.load(**authority.settings()), "client", clock)
    first = tls.current()
    replaced = Authority(authority.path.parent, "next")
    replaced.path.replace(authority.path)
    clock.wall_s = 1e11
    clock.pass_(LOOK_S)
    assert tls.current() is first
    clock.wall_s = 1_790_000_000.0
    clock.pass_(LOOK_S)
    assert tls.current() is not first
