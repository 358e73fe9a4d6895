"""The URLs of Sentinels, and the errors for those that cannot be used."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from dynamo_redis.errors import ConfigError
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.redis.url import parse_server_url

SECRET = "Hunter2pass"


def test_sentinel_url_names_sentinels_and_master() -> None:
    url = parse_server_url(
        f"redis+sentinel://ann:{SECRET}@s1,S2:26380,[::1]:7,s1:26379/my.master_1"
        "?sentinel_password=a%23b&socket_keepalive=yes"
    )
    assert url.sentinels == (("s1", 26379), ("s2", 26380), ("::1", 7))
    assert url.master_name == "my.master_1"
    assert not url.is_tls
    server = url.options()
    assert (server["username"], server["password"], server["socket_keepalive"]) == ("ann", SECRET, True)
    sentinel = url.sentinel_options(("s2", 26380))
    assert (sentinel["host"], sentinel["port"], sentinel["password"]) == ("s2", 26380, "a#b")
    assert "username" not in sentinel
    assert sentinel["socket_keepalive"] is True
    assert SECRET not in repr(url)
    assert "a#b" not in repr(url)


def test_sentinel_url_of_tls_is_tls_for_both() -> None:
    url = parse_server_url("rediss+sentinel://s1,s2/m?ssl_cert_reqs=none")
    assert url.is_tls
    assert "SSL" in url.options()["connection_class"].__name__
    assert "SSL" in url.sentinel_options(url.sentinels[0])["connection_class"].__name__


@pytest.mark.parametrize("password", ["S3cr#et/9?@:%z, w", "p@ss,b", "a=b&c", "[x]"])
def test_sentinel_url_takes_encoded_passwords(password: str) -> None:
    encoded = quote(password, safe="")
    url = parse_server_url(f"redis+sentinel://u:{encoded}@s1,s2/m?sentinel_password={encoded}")
    assert url.options()["password"] == password
    assert url.sentinel_options(("s1", 1))["password"] == password


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis+sentinel://s1,s2", "/mymaster"),
        ("redis+sentinel://s1,s2/", "/mymaster"),
        ("redis+sentinel://s1/my/master", "letters, digits"),
        ("redis+sentinel://s1/my master", "letters, digits"),
        ("redis+sentinel://s1:port/m", "host:port is not understood"),
        ("redis+sentinel://s1,,s2/m", "host:port is not understood"),
        ("redis+sentinel://::1:26379/m", "[::1]:6379"),
        ("redis+sentinel:///m", "host:port is not understood"),
        ("redis+sentinel://s1/m?no_such_option=1", "there is no option 'no_such_option'"),
        ("redis+sentinel://s1/m?sentinel_username=ann", "sentinel_password"),
        ("redis+sentinel://s1/m?db=3", "only database 0"),
        ("redis+sentinel://s1/m?ssl_ca_certs=x", "there is no option 'ssl_ca_certs'"),
        ("rediss+sentinel://s1/m?ssl_ca_certs=/no/such/ca.pem", "there is no file /no/such/ca.pem"),
        ("redis://s1/0?sentinel_password=x", "there is no option 'sentinel_password'"),
        ("redis+sentinel://" + ",".join(f"s{n}" for n in range(16)) + "/m", "at most 15"),
    ],
)
def test_sentinel_url_that_cannot_be_used_says_why(url: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        RedisClient(url, timeout_s=1.0)
    assert says in str(error.value)


@pytest.mark.parametrize("rest", ["@s1,s2/m", "@s1:26379/m"])
@pytest.mark.parametrize(
    "password",
    ["Hunter#2", "57#Wc903z", "Hunter/2pass", "57/Wc903z", "Hunter?2pass", "57?x=Wc903z", "Hunt[er2"],
)
def test_sentinel_url_error_shows_no_password(password: str, rest: str) -> None:
    with pytest.raises(ConfigError) as error:
        RedisClient(f"redis+sentinel://u:{password}{rest}", timeout_s=1.0)
    for piece in ("Hunter", "Wc903z", "2pass", "57", "er2"):
        assert piece not in str(error.value)


# ---------------------------------------------------------------------- clusters


def test_cluster_url_names_some_nodes() -> None:
    url = parse_server_url(f"redis+cluster://ann:{SECRET}@n1,N2:6380,[::1]:7,n1:6379?socket_keepalive=yes")
    assert url.nodes == (("n1", 6379), ("n2", 6380), ("::1", 7))
    assert (url.sentinels, url.is_tls) == ((), False)
    options = url.options()
    assert (options["username"], options["password"], options["socket_keepalive"]) == ("ann", SECRET, True)
    assert SECRET not in repr(url)
    assert parse_server_url("rediss+cluster://n1/0?ssl_cert_reqs=none").is_tls


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis+cluster://n1,n2/mymaster", "there are only options"),
        ("redis+cluster://n1:port", "host:port is not understood"),
        ("redis+cluster://n1,,n2", "host:port is not understood"),
        ("redis+cluster://", "host:port is not understood"),
        (f"redis+cluster://ann:{SECRET}#@n1", "%23"),
        ("redis+cluster://n1?no_such_option=1", "there is no option 'no_such_option'"),
        ("redis://n1:1,n2:2", "redis+cluster://"),
    ],
)
def test_wrong_cluster_url_is_explained(url: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_server_url(url)
    assert says in str(error.value)
    assert SECRET not in str(error.value)
