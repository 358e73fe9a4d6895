"""The checks: each judges an examination and returns one finding. Pure."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Final

from dynamo_redis.cli.doctor.examination import Examination
from dynamo_redis.cli.doctor.finding import Finding, Level
from dynamo_redis.cli.doctor.need import CONNECTIONS, connections_needed
from dynamo_redis.cli.formats import human_duration, human_size
from dynamo_redis.cli.roles import ROLES
from dynamo_redis.store.keys import SCHEMA_MAJOR, SCHEMA_VERSION
from dynamo_redis.store.redis.client import MINIMUM_VERSION

Check = Callable[[Examination], Finding]

_SLOW_S: Final = 0.05
_CLOCK_S: Final = 2.0
_FULL: Final = 0.9
_NEARLY_FULL: Final = 0.75
_SHORT_IDLE_S: Final = 30
_SMALL_BUFFER_BYTES: Final = 32 << 20
_EXPIRES_SOON_S: Final = 21 * 86_400
_ENDS_SOON_S: Final = 86_400.0
_RENEWS_LATE_S: Final = 30.0
_FEWEST_SENTINELS: Final = 2
_BARS: Final = "▁▂▃▄▅▆▇█"
_PLOT_COLUMNS: Final = 24

NO_INFO: Final = "INFO is refused"


def set_in(seen: Examination, name: str, value: str) -> str:
    """Return how a setting of this server is changed."""
    if seen.provider is not None:
        return f"set {name} to {value} {seen.provider.settings}"
    return f"CONFIG SET {name} {value}, and the same in redis.conf"


def unseen(check: str, what: str, reason: str) -> Finding:
    return Finding(check, "unknown", f"cannot see {what}: {reason}")


def _number(mapping: dict[str, str], name: str) -> int | None:
    value = mapping.get(name, "")
    return int(value) if value.lstrip("-").isdigit() else None


# --------------------------------------------------------------------------- the server


def check_version(seen: Examination) -> Finding:
    """Check the version."""
    info = seen.info or {}
    where = f" ({seen.provider.name})" if seen.provider is not None else ""
    if not seen.version:
        return unseen("version", f"the version{where}", NO_INFO)
    version = info["redis_version"]
    product = f"Redis {version}"
    if "valkey_version" in info:
        product = f"Valkey {info['valkey_version']}, like Redis {version}"
    elif "dragonfly_version" in info:
        product = f"Dragonfly {info['dragonfly_version']}, like Redis {version}"
    data = {"version": version, "provider": seen.provider and seen.provider.name}
    if seen.version[:2] < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        fix = f"upgrade it to {wanted} or later, or to Valkey"
        return Finding("version", "fail", f"{product}{where} is too old", fix, data)
    return Finding("version", "pass", product + where, data=data)


def check_registry(seen: Examination) -> Finding:
    """Check the version of the registry under the prefix."""
    if seen.schema_error:
        if "not permit" in seen.schema_error:
            return unseen("registry", f"the registry {seen.prefix}", seen.schema_error)
        return Finding("registry", "fail", seen.schema_error, "see docs/redis-schema.md for the keys")
    if seen.schema is None:
        text = f"none under the prefix {seen.prefix} yet: the first process makes it"
        return Finding("registry", "pass", text, data={"schema": None})
    data = {"schema": seen.schema, "leases": seen.lease_count}
    if seen.schema.partition(".")[0] != SCHEMA_MAJOR:
        return Finding(
            "registry",
            "fail",
            f"{seen.prefix} has schema version {seen.schema}, this release reads {SCHEMA_VERSION}",
            "upgrade the older side, or choose another DYN_REDIS_PREFIX",
            data,
        )
    live = "" if seen.lease_count is None else f", {seen.lease_count} live processes"
    return Finding("registry", "pass", f"{seen.prefix}, schema version {seen.schema}{live}", data=data)


def check_sentinels(seen: Examination) -> Finding:
    """Check that the sentinels of the URL answer, and can agree on a failover."""
    views = seen.sentinels
    if not views:
        return Finding("sentinels", "pass", "none in the URL")
    silent = [view.address for view in views if view.error]
    doubts = [f"{view.address}: {view.doubt}" for view in views if view.doubt]
    data = {"sentinels": [view.address for view in views], "silent": silent}
    answering = f"{len(views) - len(silent)} of {len(views)} answer"
    if doubts:
        text = f"{answering}; no failover is possible ({doubts[0]})"
        return Finding("sentinels", "fail", text, "start the other sentinels, or lower the quorum", data)
    if silent:
        text = f"{answering}, without {', '.join(silent)}"
        return Finding("sentinels", "warn", text, "start them, or leave them out of DYN_REDIS_URL", data)
    if len(views) < _FEWEST_SENTINELS:
        text = f"{answering}: if it is cut off, no process finds a new primary"
        return Finding("sentinels", "warn", text, "name all sentinels in DYN_REDIS_URL", data)
    return Finding("sentinels", "pass", f"{answering}, and can agree on a failover", data=data)


def check_cluster(seen: Examination) -> Finding:
    """Check the state of a cluster, and that the URL names one."""
    if seen.info is None and seen.cluster is None:
        return unseen("cluster", "whether this is a cluster", NO_INFO)
    data: dict[str, object] = {"cluster": seen.is_cluster}
    if not seen.is_cluster:
        return Finding("cluster", "pass", "not a cluster", data=data)
    state = (seen.cluster or {}).get("cluster_state", "")
    size = (seen.cluster or {}).get("cluster_size", "?")
    if state not in ("", "ok"):
        text = f"a cluster of {size} primaries whose state is {state}: slots are not served"
        return Finding("cluster", "fail", text, "redis-cli --cluster check HOST:PORT", data)
    if "cluster" not in seen.url.partition("://")[0]:
        return Finding(
            "cluster",
            "fail",
            f"a cluster of {size} primaries, and the URL is that of one server",
            "write redis+cluster://HOST:PORT in DYN_REDIS_URL",
            data,
        )
    masters = [node for node in seen.nodes if not node.master and not node.is_failing]
    failing = [node.address for node in seen.nodes if node.is_failing]
    alone = [
        master.address
        for master in masters
        if not any(node.master == master.node_id and not node.is_failing for node in seen.nodes)
    ]
    data |= {"primaries": len(masters), "failing": failing, "without_replica": alone}
    text = f"a cluster of {size} primaries"
    if failing:
        text += f"; {', '.join(failing)} cannot be reached"
        return Finding("cluster", "warn", text, "start it, or take it out: CLUSTER FORGET", data)
    if alone:
        text += f"; {', '.join(alone)} without a replica: its keys are away while it is"
        return Finding("cluster", "warn", text, "give each primary a replica", data)
    return Finding("cluster", "pass", f"{text}, each with a replica" if seen.nodes else text, data=data)


# --------------------------------------------------------------------------- what processes do


def check_scripts(seen: Examination) -> Finding:
    """Check that scripts run, and write."""
    by_source, by_hash = seen.scripts, seen.script_hashes
    assert by_source is not None
    assert by_hash is not None
    if not by_source.works:
        if by_source.refused:
            text = "EVAL is refused: all roles but viewer need it"
            return Finding("scripts", "warn", text, "see `rights`", {"eval": False})
        return Finding("scripts", "fail", f"a script cannot write: {by_source.reason}", data={"eval": False})
    data = {"eval": True, "evalsha": by_hash.works}
    if not by_hash.works:
        text = "EVAL works, EVALSHA does not: each call sends the whole script"
        return Finding("scripts", "warn", text, "allow EVALSHA", data)
    return Finding("scripts", "pass", "EVAL and EVALSHA work", data=data)


def check_streams(seen: Examination) -> Finding:
    """Check that a blocking read of a stream ends with the next entry."""
    outcome = seen.blocking_read
    if outcome is None:
        return unseen("streams", "whether blocking reads work", "no script may write an entry")
    if outcome.works:
        took_ms = 1e3 * (seen.wakeup_s or 0.0)
        text = f"XREAD BLOCK hears of an entry within {took_ms:.1f} ms"
        return Finding("streams", "pass", text, data={"wakeup_ms": took_ms})
    fix = "connect without a proxy that does not support blocking commands"
    if outcome.refused:
        return Finding("streams", "warn", f"no blocking read: {outcome.reason}", "see `rights`")
    return Finding("streams", "fail", f"no blocking read: {outcome.reason}", fix)


def check_notifications(seen: Examination) -> Finding:
    """Check whether the end of a lease is announced. The product works without, at a cost."""
    cost = "an instance that died leaves the lists up to about half a second later"
    flags = seen.config.get("notify-keyspace-events")
    if flags is not None:
        on = "K" in flags and ("A" in flags or ("x" in flags and "e" in flags))
    elif seen.notifies is None:
        return unseen("notifications", "whether keyspace notifications are on", seen.config_refusal)
    else:
        on = seen.notifies
    data = {"on": on, "flags": flags}
    if on:
        return Finding("notifications", "pass", f"on ({flags or 'tried'})", data=data)
    if flags is not None and seen.provider is None:
        text = "off; the first process that may use CONFIG turns them on"
        fix = f"{set_in(seen, 'notify-keyspace-events', (flags or '') + 'Kxe')}; without them {cost}"
        return Finding("notifications", "pass", text, fix, data)
    advice = seen.provider.notifications if seen.provider is not None else ""
    fix = advice or set_in(seen, "notify-keyspace-events", "Kxe")
    return Finding("notifications", "warn", f"off: {cost}", fix, data)


def check_rights(seen: Examination) -> Finding:
    """Check which roles the user can have."""
    fitting = [role for role in ROLES if not seen.rights[role]]
    missing = {role: names for role, names in seen.rights.items() if names}
    data = {"user": seen.user, "roles": fitting, "missing": missing}
    if not missing:
        return Finding("rights", "pass", f"user {seen.user} can have each role", data=data)
    nearest = min(missing, key=lambda role: len(missing[role]))
    shown = ", ".join(missing[nearest][:3]) + (", …" if len(missing[nearest]) > 3 else "")
    lacks = f"as {nearest} it lacks {shown}"
    if fitting:
        text = f"user {seen.user} can be {', '.join(fitting)}; {lacks}"
        return Finding("rights", "pass", text, data=data)
    fix = f"dynamo-redis acl --role {nearest} --user {seen.user} prints the rules that it needs"
    return Finding("rights", "fail", f"user {seen.user} can have no role: {lacks}", fix, data)


# --------------------------------------------------------------------------- what can be lost


def check_memory(seen: Examination) -> Finding:
    """Check how full the memory is."""
    if seen.info is None or (used := _number(seen.info, "used_memory")) is None:
        return unseen("memory", "the memory", NO_INFO)
    limit = _number(seen.info, "maxmemory") or 0
    host = _number(seen.info, "total_system_memory") or 0
    data = {"used_bytes": used, "maxmemory_bytes": limit}
    if not limit:
        of = f", the host has {human_size(host)}" if host else ""
        return Finding("memory", "pass", f"{human_size(used)} used, no maxmemory{of}", data=data)
    share = used / limit
    text = f"{human_size(used)} of {human_size(limit)} used ({share:.0%})"
    level: Level = "fail" if share >= _FULL else "warn" if share >= _NEARLY_FULL else "pass"
    fix = "" if level == "pass" else "raise maxmemory; docs/redis-schema.md says what grows with what"
    return Finding("memory", level, text, fix, data)


def check_eviction(seen: Examination) -> Finding:
    """Check which keys the server drops when its memory is full, and whether it has dropped some."""
    info = seen.info or {}
    policy = info.get("maxmemory_policy") or seen.config.get("maxmemory-policy")
    if policy is None:
        return unseen("eviction", "maxmemory-policy", seen.config_refusal or NO_INFO)
    evicted, expired = _number(info, "evicted_keys") or 0, _number(info, "expired_keys") or 0
    data = {"policy": policy, "evicted_keys": evicted, "expired_keys": expired}
    so_far = f"; {evicted} keys dropped so far" if evicted else ""
    fix = set_in(seen, "maxmemory-policy", "noeviction")
    if policy == "noeviction":
        return Finding("eviction", "pass", f"noeviction{so_far}", data=data)
    if policy.startswith("volatile"):
        what = "keys with a TTL, when memory is full: locks that are held, uploads under way, bookings"
    else:
        what = "any key, when memory is full: the registry, models, events"
    level: Level = "fail" if evicted or policy.startswith("allkeys") else "warn"
    return Finding("eviction", level, f"{policy} drops {what}{so_far}", fix, data)


def check_persistence(seen: Examination) -> Finding:
    """Check what a crash of the server loses."""
    info, config = seen.info or {}, seen.config
    if "aof_enabled" not in info and "appendonly" not in config:
        return unseen("persistence", "the persistence", seen.config_refusal or NO_INFO)
    for name, what in (("aof_last_write_status", "append-only file"), ("rdb_last_bgsave_status", "snapshot")):
        if info.get(name) == "err":
            text = f"the last write of the {what} failed: the server refuses writes, or will"
            return Finding("persistence", "fail", text, "free or repair its disk, and see its log")
    fsync, save = config.get("appendfsync"), config.get("save")
    data = {"appendonly": info.get("aof_enabled") == "1", "appendfsync": fsync, "save": save}
    if info.get("aof_enabled") == "1" or config.get("appendonly") == "yes":
        losses = {
            "always": "a power loss loses nothing that was acknowledged",
            "everysec": "a power loss loses up to about a second",
            "no": "a power loss loses up to about 30 seconds",
        }
        text = f"append-only file, fsync {fsync or 'unknown'}: {losses.get(fsync or '', 'see appendfsync')}"
        fix = set_in(seen, "appendfsync", "everysec") if fsync == "no" else ""
        return Finding("persistence", "warn" if fsync == "no" else "pass", text, fix, data)
    kept = "processes register again, keys and objects without an owner are lost"
    fix = set_in(seen, "appendonly", "yes")
    saves = bool(save) if save is not None else (_number(info, "rdb_last_save_time") or 0) > 0
    if saves:
        changes = _number(info, "rdb_changes_since_last_save") or 0
        text = f"snapshots only: a restart loses what came after the last one ({changes} changes now); {kept}"
    else:
        text = f"none: a restart loses everything; {kept}"
    return Finding("persistence", "warn", text, fix, data)


def check_replication(seen: Examination) -> Finding:
    """Check that this is a primary, and what a failover can lose."""
    if seen.info is None or "role" not in seen.info:
        return unseen("replication", "the role of the server", NO_INFO)
    info = seen.info
    if info["role"] != "master":
        primary = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
        text = f"a read-only replica of {primary}"
        return Finding("replication", "fail", text, "set DYN_REDIS_URL to the primary")
    count = _number(info, "connected_slaves") or 0
    wanted = int(seen.config.get("min-replicas-to-write", "0") or 0)
    good = _number(info, "min_slaves_good_slaves")
    data = {"replicas": count, "min_replicas_to_write": seen.config.get("min-replicas-to-write")}
    if good is not None and good < wanted:
        text = f"{good} good replicas of the {wanted} that min-replicas-to-write asks for: writes are refused"
        return Finding("replication", "fail", text, "start its replica, or lower min-replicas-to-write", data)
    if count == 0:
        level: Level = "pass" if seen.is_local else "warn"
        text = "a primary without replicas: while it is away, processes go on from the last view"
        fix = (
            "" if seen.is_local else "add a replica and a failover (Sentinel, a cluster, or your provider's)"
        )
        return Finding("replication", level, text, fix, data)
    text = f"a primary with {count} replica{'s' * (count != 1)}"
    if wanted or seen.config_refusal:
        unknown = "" if wanted else ", min-replicas-to-write unknown"
        return Finding("replication", "pass", f"{text}{unknown}", data=data)
    return Finding(
        "replication",
        "warn",
        f"{text}, min-replicas-to-write 0: a failover can lose writes that nothing had received",
        f"{set_in(seen, 'min-replicas-to-write', '1')} (and min-replicas-max-lag 1)",
        data,
    )


# --------------------------------------------------------------------------- limits


def check_connections(seen: Examination) -> Finding:
    """Check the limit of connections against the need."""
    info = seen.info or {}
    limit = _number(info, "maxclients") or _number(seen.config, "maxclients")
    used = _number(info, "connected_clients")
    if limit is None:
        return unseen("connections", "maxclients", seen.config_refusal or NO_INFO)
    needed = connections_needed(seen.need)
    rejected = _number(info, "rejected_connections") or 0
    data = {"maxclients": limit, "connected": used, "needed": needed, "rejected": rejected}
    text = f"{used if used is not None else '?'} of {limit} in use"
    fix = ""
    level: Level = "pass"
    if needed:
        parts = ((count, kind.removesuffix("s") if count == 1 else kind) for kind, count in seen.need.items())
        whole = ", ".join(f"{count} {kind}" for count, kind in parts if count)
        text += f"; {whole} need about {needed}"
    else:
        each = ", ".join(f"a {kind.removesuffix('s')} {count}" for kind, count in CONNECTIONS.items())
        text += f" ({each})"
    if needed > limit or (used or 0) >= limit * _FULL:
        level, fix = "fail", set_in(seen, "maxclients", str(max(10_000, 2 * needed)))
    elif needed > _NEARLY_FULL * limit or (used or 0) > _NEARLY_FULL * limit:
        level, fix = "warn", set_in(seen, "maxclients", str(max(10_000, 2 * needed)))
    elif rejected:
        level, fix = "warn", "find out which clients took them, or raise maxclients"
        text += f"; {rejected} were refused since the server's start"
    return Finding("connections", level, text, fix, data)


def check_idle(seen: Examination) -> Finding:
    """Check after how long the server closes silent connections."""
    timeout_s = _number(seen.config, "timeout")
    if timeout_s is None:
        return unseen("idle", "the idle time-out", seen.config_refusal)
    data = {"timeout_s": timeout_s}
    if timeout_s == 0:
        return Finding("idle", "pass", "silent connections stay open", data=data)
    text = f"silent connections are closed after {timeout_s} s; processes connect again when they need one"
    if timeout_s < _SHORT_IDLE_S:
        fix = set_in(seen, "timeout", "0")
        return Finding("idle", "warn", f"{text}: many connections a second", fix, data)
    return Finding("idle", "pass", text, data=data)


def check_buffers(seen: Examination) -> Finding:
    """Check that the server does not close connections whose answers are large."""
    setting = seen.config.get("client-output-buffer-limit")
    if setting is None:
        return unseen("buffers", "client-output-buffer-limit", seen.config_refusal)
    words = setting.split()
    hard = {name: int(limit) for name, limit in zip(words[::4], words[1::4], strict=False) if limit.isdigit()}
    data = {"hard_limits_bytes": hard}
    normal = hard.get("normal", 0)
    if 0 < normal < _SMALL_BUFFER_BYTES:
        text = f"answers over {human_size(normal)} close the connection: large registries cannot be read"
        fix = set_in(seen, "client-output-buffer-limit", '"normal 0 0 0"')
        return Finding("buffers", "warn", text, fix, data)
    subscribers = hard.get("pubsub", 0)
    shown = "no limit" if not subscribers else human_size(subscribers)
    return Finding("buffers", "pass", f"answers: no limit that matters; subscribers: {shown}", data=data)


# --------------------------------------------------------------------------- the way to it


def check_latency(seen: Examination) -> Finding:
    """Judge the durations of round trips, and draw them."""
    trips = sorted(seen.trips_s)
    half, most, tail = (trips[min(len(trips) - 1, int(len(trips) * part))] for part in (0.5, 0.95, 0.99))
    data = {
        "count": len(trips),
        "p50_ms": 1e3 * half,
        "p95_ms": 1e3 * most,
        "p99_ms": 1e3 * tail,
        "max_ms": 1e3 * trips[-1],
    }
    text = f"p50 {_ms(half)}, p95 {_ms(most)}, p99 {_ms(tail)} over {len(trips)} round trips"
    level: Level = "warn" if statistics.median(trips) > _SLOW_S else "pass"
    fix = (
        "run Redis nearer to the processes: each change is seen a round trip later" if level == "warn" else ""
    )
    return Finding("latency", level, text, fix, data, histogram(trips))


def _ms(duration_s: float) -> str:
    return f"{1e3 * duration_s:.3g} ms"


def histogram(ascending_s: list[float]) -> tuple[str, ...]:
    """Draw durations as a line of bars over a logarithmic scale, with its two ends below."""
    low, high = math.log(max(ascending_s[0], 1e-6)), math.log(max(ascending_s[-1], 1e-6))
    width = (high - low) / _PLOT_COLUMNS or 1.0
    counts = [0] * _PLOT_COLUMNS
    for duration_s in ascending_s:
        place = int((math.log(max(duration_s, 1e-6)) - low) / width)
        counts[min(place, _PLOT_COLUMNS - 1)] += 1
    most = max(counts)
    bars = "".join(_BARS[math.ceil(count / most * len(_BARS)) - 1] if count else " " for count in counts)
    first, last = _ms(ascending_s[0]), _ms(ascending_s[-1])
    return (bars, first + last.rjust(_PLOT_COLUMNS - len(first)))


def check_clock(seen: Examination) -> Finding:
    """Compare the clocks. No lease depends on them."""
    ahead_s = seen.clock_ahead_s
    if ahead_s is None:
        return unseen("clock", "the server's clock", "TIME is refused")
    data = {"ahead_s": ahead_s}
    if abs(ahead_s) < _CLOCK_S:
        return Finding("clock", "pass", f"differs by {_ms(abs(ahead_s))} from this machine's", data=data)
    side = "ahead of" if ahead_s > 0 else "behind"
    text = f"{human_duration(abs(ahead_s))} {side} this machine's: ages in listings and certificates are judged wrongly"  # noqa: E501
    return Finding("clock", "warn", text, "run NTP on both; no lease depends on it", data)


def check_tls(seen: Examination) -> Finding:
    """Check the encryption of the connection."""
    if seen.url.startswith("unix:"):
        return Finding("tls", "pass", "a unix socket, which needs none")
    if not seen.is_tls:
        if seen.is_local:
            return Finding("tls", "pass", "none, on this machine")
        text = "none: the network sees the registry's secrets and the password"
        return Finding("tls", "warn", text, "rediss:// in DYN_REDIS_URL, where the server speaks TLS")
    session = seen.tls
    if session is None:
        return unseen("tls", "the certificate", seen.tls_error)
    data = {"version": session.version, "cipher": session.cipher, "expires_at": session.expires_at}
    text = f"{session.version}, {session.cipher}"
    if not session.is_verified:
        fix = "leave ssl_cert_reqs out, and name your CA by ssl_ca_certs"
        return Finding("tls", "warn", f"{text}; the certificate is not verified", fix, data)
    left_s = math.inf if session.expires_at is None else session.expires_at - time.time()
    if left_s < _EXPIRES_SOON_S:
        fix = "replace the server's certificate; processes need no restart"
        return Finding("tls", "warn", f"{text}; the certificate ends in {human_duration(left_s)}", fix, data)
    host = "" if session.checks_host else ", its host name is not compared"
    ends = "" if math.isinf(left_s) else f"; the certificate ends in {human_duration(left_s)}"
    return Finding("tls", "pass", f"{text}, verified{host}{ends}", data=data)


def check_login(seen: Examination) -> Finding:
    """Check the origin of user and password, and whether a token of it ends soon."""
    renews = seen.login.startswith("DYN_REDIS_CREDENTIALS")
    data = {"user": seen.user, "from": seen.login, "ends_at": seen.login_ends_at}
    if not seen.login:
        if seen.is_local:
            return Finding("login", "pass", "no password, on this machine", data=data)
        fix = "give a user a password (dynamo-redis acl), and the processes DYN_REDIS_PASSWORD_FILE"
        return Finding("login", "warn", "no password: the network may write to the registry", fix, data)
    text = f"user {seen.user}, password from {seen.login}"
    if seen.login_ends_at is None:
        return Finding("login", "pass", text, data=data)
    left_s = seen.login_ends_at - time.time()
    text += f"; it is a token that ends in {human_duration(max(0.0, left_s))}"
    if renews:
        if left_s < _RENEWS_LATE_S:
            fix = (
                "let the provider give tokens that live some minutes: connections are logged in again before"
            )
            return Finding("login", "warn", text, fix, data)
        return Finding("login", "pass", f"{text}, and is renewed before", data=data)
    if left_s < _ENDS_SOON_S:
        fix = "DYN_REDIS_CREDENTIALS renews tokens (docs/managed-redis.md)"
        if seen.login.startswith("DYN_REDIS_PASSWORD_FILE"):
            fix = "replace the file's content before; processes read it again. Or: " + fix
        return Finding("login", "warn", text, fix, data)
    return Finding("login", "pass", text, data=data)


CHECKS: Final[tuple[Check, ...]] = (
    check_version,
    check_tls,
    check_login,
    check_rights,
    check_registry,
    check_scripts,
    check_streams,
    check_notifications,
    check_memory,
    check_eviction,
    check_persistence,
    check_replication,
    check_sentinels,
    check_cluster,
    check_connections,
    check_buffers,
    check_idle,
    check_clock,
    check_latency,
)
