"""`dynamo-redis up`, `frontend` and `worker` as users start them: real processes and sockets."""

from __future__ import annotations

import json
import os
import pty
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer
from tests.processes import command_line, is_alive, program_name

UP_WITHIN_S = 60.0
TEMPLATES = "dynamo_redis.templates"
STOP_WITHIN_S = 20.0
_MARK = "DYNAMO_REDIS_TEST_MARK"


class Program:
    """A run of the program, with its output and all processes that it has started."""

    def __init__(
        self,
        arguments: list[str],
        env: dict[str, str],
        directory: Path,
        output: tuple[int, int] | None = None,
    ) -> None:
        """`output`: where stdout goes instead of a file, as (descriptor to read, descriptor to write)."""
        self.reader = -1 if output is None else output[0]
        self.mark = secrets.token_hex(8)
        self._unmarked: set[psutil.Process] = set()
        self._temporary = env["TMPDIR"]
        self._out = directory / f"{self.mark}.out"
        self._err = directory / f"{self.mark}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dynamo_redis", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out if output is None else output[1],
                stderr=err,
                env={**env, _MARK: self.mark},
                cwd=directory,
            )
        if output is not None:
            os.close(output[1])

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def until(self, pattern: str, within_s: float = UP_WITHIN_S) -> re.Match[str]:
        """Wait until the output has a match of the pattern. Return the match."""
        deadline = time.monotonic() + within_s
        while (found := re.search(pattern, self.out, re.MULTILINE)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in\n{self.out}\n{self.err}"
            assert self.process.poll() is None, f"ended without {pattern!r}:\n{self.out}\n{self.err}"
            time.sleep(0.01)
        return found

    def url(self) -> str:
        return self.until(r"^dynamo-redis is up at (http://\S+)$")[1]

    def processes(self) -> list[psutil.Process]:
        """All processes that this run has started and that still live, itself included.

        Those for jobs do not inherit the mark: they are known once they were seen below one that has it.
        """
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(_MARK) == self.mark or self._is_server(process)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
                    self._unmarked.update(process.children())
            except psutil.Error:
                continue
        return found + [process for process in self._unmarked.difference(found) if is_alive(process)]

    def _is_server(self, process: psutil.Process) -> bool:
        """Return whether a process is the server.

        Redis overwrites its environment: its socket's path shows it.
        """
        return "-server" in process.name() and any(self._temporary in word for word in process.cmdline())

    def services(self, command: str) -> list[psutil.Process]:
        """The processes that run a command of the program (their watchdogs, shells, name it, too)."""
        return [p for p in self.processes() if command in command_line(p) and "python" in program_name(p)]

    def stop(self, number: int = signal.SIGINT) -> float:
        """Send a signal, wait for the end, and return the seconds that it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(STOP_WITHIN_S + 5)
        return time.monotonic() - started

    def failed(self) -> tuple[int, str]:
        """Wait until it has ended by itself. Return the exit code and the text on stderr."""
        code = self.process.wait(UP_WITHIN_S)
        return code, self.err


Start = Callable[..., Program]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Yield a temporary directory for the program. Its path is short, since that of a unix socket must be."""
    with tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def env(tmp_path: Path, temporary: Path) -> dict[str, str]:
    """Return an environment without settings, with directories of the test's own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")}
    (tmp_path / "run").mkdir(mode=0o700)
    own |= {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return own | {"TMPDIR": str(temporary)}


@pytest.fixture
def start(env: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Start the program with these arguments. At the end of the test its remaining processes are killed."""
    started: list[Program] = []

    def run(*arguments: str, output: tuple[int, int] | None = None, **settings: str) -> Program:
        program = Program(list(arguments), {**env, **settings}, tmp_path, output)
        started.append(program)
        return program

    yield run
    for program in started:
        # Only itself: killed together with its watchdogs it would leave the server, which hides its mark.
        program.process.kill()
        program.process.wait()


@pytest.fixture
def command(env: dict[str, str], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run a command, and return the JSON list that it prints."""

    def run(*arguments: str, **settings: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "dynamo_redis", *arguments, "--json"],
            capture_output=True,
            env={**env, **settings},
            cwd=tmp_path,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    return run


def up(*arguments: str) -> tuple[str, ...]:
    return ("up", "--http-port", "0", "--http-host", "127.0.0.1", "--speedup-ratio", "0", *arguments)


def ask(url: str, model: str = "demo") -> str:
    """Send a chat, and return the answer's text."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
    return text


def health(url: str) -> int:
    """Return the status of `/health`; 0 if the frontend does not answer."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        return exc.code
    except OSError:
        return 0


def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def registry_keys(url: str, prefix: str) -> list[bytes]:
    """Return all keys in any of the registry's structures, live or stale."""

    async def scan() -> list[bytes]:
        client = RedisClient(url, timeout_s=3)
        try:
            keys: list[bytes] = await client.execute("HKEYS", f"{{{prefix}}}:kv")
            return sorted(key for key in keys if key.startswith(b"v1/"))
        finally:
            await client.aclose()

    return anyio.run(scan)


# --------------------------------------------------------------------------- the normal way


def test_up_serves_and_leaves_nothing(
    start: Start, command: Callable[..., Any], tmp_path: Path, temporary: Path
) -> None:
    program = start(*up())
    url = program.url()
    line = program.until(r"^  (curl .*)$")[1]
    program.until(r"^status: serving, 2/2 workers, model demo$")

    assert len(command("instances", "dynamo.backend.generate")) == 2, "found without DYN_REDIS_URL"
    assert [model["model"] for model in command("models")] == ["demo"]
    assert [router["mode"] for router in command("router-state")] == ["events"]
    words = shlex.split(line)
    assert words[0] == "curl"
    if shutil.which("curl"):
        done = subprocess.run(words, capture_output=True, timeout=60, check=True)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert ask(url)
    started = {name: len(program.services(name)) for name in ("up", "frontend", "worker", TEMPLATES)}
    assert started == {"up": 1, "frontend": 1, "worker": 2, TEMPLATES: 1}
    assert len([process for process in program.processes() if "-server" in program_name(process)]) == 1

    assert program.stop() <= STOP_WITHIN_S
    assert program.process.returncode == 0
    assert program.processes() == []
    assert list((tmp_path / "run").rglob("*.json")) == []
    assert list(temporary.iterdir()) == []
    assert program.err == "" or "Traceback" not in program.err


def test_up_listens_on_loopback_unless_told(start: Start) -> None:
    program = start(*up("--workers", "0"))
    assert program.url().startswith("http://127.0.0.1:")
    assert program.stop() <= STOP_WITHIN_S
    program = start(*up("--workers", "0", "--http-host", "0.0.0.0"))
    assert program.url().startswith("http://localhost:")
    assert program.stop() <= STOP_WITHIN_S


def test_each_process_has_a_system_port_of_its_own(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # no process could listen there
        program = start(*up("--log", "info"), DYN_SYSTEM_PORT=str(taken.getsockname()[1]))
        program.url()
    deadline = time.monotonic() + UP_WITHIN_S
    pattern = r"http://0\.0\.0\.0:(\d+) serves /health"
    while len(ports := set(re.findall(pattern, program.out + program.err))) < 3:  # a frontend, two workers
        assert time.monotonic() < deadline, program.out + program.err
        time.sleep(0.01)
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/live") as response:
            assert response.status == 200


def test_router_service_finds_workers_and_leaves(start: Start, command: Callable[..., Any]) -> None:
    program = start(*up("--workers", "1", "--router-mode", "round_robin"))
    program.url()
    (frontend,) = command("router-state")
    assert (frontend["router_mode"], frontend["http_url"]) == ("round_robin", program.url())
    assert frontend["instance_id_hex"] == f"{frontend['instance_id']:x}"
    listed = [found for found in command("instances") if found["key"].startswith("v1/frontends/")]
    assert [found["http_url"] for found in listed] == [program.url()]
    router = start("router", "--no-kv-events")
    router.until(r"^ready dynamo\.router\.generate, choosing among dynamo\.backend\.generate$")
    assert [found.get("mode") for found in command("router-state")] == ["predicted", None]
    assert len(command("instances", "dynamo.router.best_worker_id")) == 1
    assert router.stop(signal.SIGTERM) <= STOP_WITHIN_S
    assert (router.process.returncode, router.err.count("Traceback")) == (0, 0)
    assert command("instances", "dynamo.router") == []
    # One without a worker starts and ends as readily.
    lonely = start("router", "--endpoint", "dynamo.empty.generate")
    lonely.until(r"^ready dynamo\.router\.generate, choosing among dynamo\.empty\.generate$")
    assert lonely.stop(signal.SIGTERM) <= STOP_WITHIN_S
    assert lonely.process.returncode == 0


def test_given_redis_keeps_no_keys(start: Start, dynamo_redis_url: str, dynamo_redis_prefix: str) -> None:
    program = start(*up("--redis-url", dynamo_redis_url, "--redis-prefix", dynamo_redis_prefix))
    program.url()
    keys = registry_keys(dynamo_redis_url, dynamo_redis_prefix)
    for kind in (b"v1/instances/", b"v1/mdc/"):
        assert len([key for key in keys if key.startswith(kind + b"dynamo/backend/generate/")]) == 2
    assert not [process for process in program.processes() if "-server" in program_name(process)]
    assert program.stop(signal.SIGTERM) <= STOP_WITHIN_S
    assert program.process.returncode == 0
    assert registry_keys(dynamo_redis_url, dynamo_redis_prefix) == []
    assert program.processes() == []


def test_two_ups_run_at_once(
    start: Start, command: Callable[..., Any], dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    first = start(*up("--workers", "1"))
    second = start(
        *up("--workers", "1", "--redis-url", dynamo_redis_url, "--redis-prefix", f"{dynamo_redis_prefix}-2")
    )
    third = start(
        *up("--workers", "1", "--redis-url", dynamo_redis_url, "--redis-prefix", f"{dynamo_redis_prefix}-3")
    )
    urls = [program.url() for program in (first, second, third)]
    assert len(set(urls)) == 3
    third.stop()
    second.stop()
    assert len(command("instances", "dynamo.backend.generate")) == 1, "the first is found again"
    assert ask(urls[0])


def test_second_up_notes_the_first(start: Start, env: dict[str, str], tmp_path: Path) -> None:
    first = start(*up("--workers", "0"))
    url = first.url()
    second = start(*up("--workers", "0"))
    second_url = second.url()
    assert "Another `up`" not in first.out
    assert f"Another `up` of yours runs, at {url}." in second.out
    argv = [sys.executable, "-m", "dynamo_redis", "instances"]
    listed = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert f"the last one started, {second_url}, not {url};" in listed.stderr
    second.stop()
    listed = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "deployments" not in listed.stderr


def test_joining_a_registry_is_noted(start: Start, dynamo_redis_url: str, dynamo_redis_prefix: str) -> None:
    shared = ("--redis-url", dynamo_redis_url, "--redis-prefix", dynamo_redis_prefix)
    first = start(*up("--workers", "1", *shared))
    first.url()
    second = start(*up("--workers", "1", *shared))
    second.url()
    assert "registered already" not in first.out
    assert (
        f"registered already under the prefix {dynamo_redis_prefix}: this deployment joins them" in second.out
    )


def test_kill_9_leaves_no_process(start: Start) -> None:
    program = start(*up("--workers", "1"))
    program.url()
    assert program.services(TEMPLATES), "the frontend has a process of its own"
    assert len(program.processes()) == 4 + 3 + 1, (
        "up, Redis, frontend, worker, a watchdog for each of the three, and the process for templates"
    )
    program.process.kill()
    program.process.wait()
    until(lambda: program.processes() == [])


def test_abandoned_directory_is_removed_by_next_up(start: Start, temporary: Path, tmp_path: Path) -> None:
    def directories() -> set[Path]:
        return set(temporary.glob("dynamo-redis-up-*"))

    running = start(*up("--workers", "0"))
    running.url()
    (kept,) = directories()
    killed = start(*up("--workers", "0"))
    killed.url()
    (abandoned,) = directories() - {kept}
    killed.process.kill()
    killed.process.wait()
    until(lambda: not any(str(abandoned) in " ".join(command_line(p)) for p in killed.processes()))
    (temporary / "dynamo-redis-up-link").symlink_to(tmp_path)
    third = start(*up("--workers", "0"))
    third.url()
    assert abandoned not in directories()
    assert kept in directories()
    assert tmp_path.is_dir()
    assert (kept / "redis.sock").exists()
    assert third.stop() < STOP_WITHIN_S
    assert running.stop() < STOP_WITHIN_S
    assert directories() == {temporary / "dynamo-redis-up-link"}


def test_dead_processes_are_restarted(start: Start, command: Callable[..., Any]) -> None:
    program = start(*up())
    url = program.url()

    worker = program.services("worker")[0]
    worker.kill()
    program.until(r"^worker-[12] was killed by SIGKILL; starting it again$")
    until(lambda: len(set(program.services("worker")) - {worker}) == 2)
    until(lambda: len(command("instances", "dynamo.backend.generate")) >= 2)

    next(process for process in program.processes() if "-server" in program_name(process)).kill()
    assert ask(url), "requests do not wait for Redis"
    program.until(r"^redis ended; starting it again with its data$")
    until(lambda: any("-server" in program_name(process) for process in program.processes()))

    frontend = program.services("frontend")[0]
    frontend.kill()
    program.until(r"^frontend was killed by SIGKILL; starting it again$")
    until(lambda: health(url) == 200)
    assert ask(url), "at the port it had, although 0 chose it"
    assert program.stop() <= STOP_WITHIN_S
    assert program.processes() == []


def test_the_data_can_be_kept(start: Start, command: Callable[..., Any], tmp_path: Path) -> None:
    arguments = up("--workers", "0", "--data-dir", str(tmp_path / "data"))
    program = start(*arguments)
    program.until(r"^No worker runs\. Start one beside it: dynamo-redis worker mock$")
    command("put", "app/kept", "yes")
    code, line = start(*arguments).failed()
    assert (code, line) == (1, f"dynamo-redis: {tmp_path}/data is in use by another `dynamo-redis up`\n")
    program.stop()
    start(*arguments).url()
    assert command("get", "app/kept")[0]["value"] == "yes"


def streamed(url: str, max_tokens: int) -> urllib.request.Request:
    """Stream an answer of exactly this number of tokens."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    return urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )


def test_requests_under_way_finish_when_it_is_stopped(start: Start) -> None:
    program = start(*up("--workers", "1", "--speedup-ratio", "1", "--decode-step", "20ms"))
    with urllib.request.urlopen(streamed(program.url(), 40), timeout=30) as answer:
        assert answer.readline().startswith(b"data: ")
        program.process.send_signal(signal.SIGINT)
        assert answer.read().endswith(b"data: [DONE]\n\n")
    program.process.wait(STOP_WITHIN_S)


@pytest.mark.parametrize("ctrl_c_count", [1, 2])
def test_requests_that_do_not_finish_hold_nothing_up(
    ctrl_c_count: int, start: Start, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    program = start(
        *up("--workers", "1", "--speedup-ratio", "1", "--decode-step", "500ms"),
        *(("--drain", "60s") if ctrl_c_count == 2 else ()),
        DYN_REDIS_URL=dynamo_redis_url,
        DYN_REDIS_PREFIX=dynamo_redis_prefix,
    )
    with urllib.request.urlopen(streamed(program.url(), 1000), timeout=30) as answer:
        assert answer.readline().startswith(b"data: ")
        for _ in range(ctrl_c_count):
            program.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        program.process.wait(STOP_WITHIN_S)
    assert program.process.returncode == 0
    assert registry_keys(dynamo_redis_url, dynamo_redis_prefix) == []
    assert program.processes() == []


def test_on_a_terminal_there_is_a_live_line(env: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamo_redis", *up("--workers", "1")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**env, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"},
        cwd=tmp_path,
        start_new_session=True,
    )
    os.close(theirs)
    seen = ""
    deadline = time.monotonic() + UP_WITHIN_S
    try:
        while "·  Ctrl-C stops" not in without_style(seen) and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 1 << 16).decode(errors="replace")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_WITHIN_S)
        os.close(ours)
    assert re.search(r"curl http://\S+/v1/chat/completions -H .* -d '\{.*\}'\r\n", seen), "one line, to copy"
    line = r"● serving  ·  1/1 workers  ·  model demo  ·  up \d+s  ·  Ctrl-C stops"
    assert re.search(line, without_style(seen))


@pytest.mark.parametrize("terminal", [True, False])
def test_without_a_reader_it_still_stops_in_order(terminal: bool, start: Start) -> None:
    program = start(*up("--workers", "1"), output=pty.openpty() if terminal else os.pipe())
    until(lambda: len(program.services("worker")) == 1)
    seen = ""
    while "Ctrl-C stops everything" not in seen:
        seen += os.read(program.reader, 1 << 16).decode(errors="replace")
    os.close(program.reader)
    assert program.stop() <= STOP_WITHIN_S
    assert program.process.returncode == 0
    assert program.processes() == []


def without_style(drawn: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn)


# --------------------------------------------------------------------------- one by one


def test_the_parts_start_one_by_one_and_in_any_order(
    start: Start, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    settings = {"DYN_REDIS_URL": dynamo_redis_url, "DYN_REDIS_PREFIX": dynamo_redis_prefix}
    frontend = start("frontend", "--http-port", "0", "--http-host", "127.0.0.1", **settings)
    worker = start(
        "worker", "mock", "--model-path", str(DEMO_MODEL_PATH), "--model-name", "my/model",
        "--speedup-ratio", "0", "--endpoint", "other.pool.generate", **settings,
    )  # fmt: skip
    url = frontend.until(r"^ready (http://\S+)$")[1]
    instance = worker.until(r"^ready my/model at other\.pool\.generate, instance ([0-9a-f]+)$")[1]
    until(lambda: urllib.request.urlopen(f"{url}/v1/models").read().count(b"my/model") > 0)
    assert ask(url, "my/model")
    for program in (worker, frontend):
        assert program.stop(signal.SIGTERM) <= STOP_WITHIN_S
        assert program.process.returncode == 0
        assert program.processes() == []
    assert registry_keys(dynamo_redis_url, dynamo_redis_prefix) == []
    lines = worker.err.splitlines()
    assert lines
    assert all(f" worker-{instance} dynamo_redis." in line for line in lines)


# --------------------------------------------------------------------------- what can go wrong


def failed_in_one_line(program: Program, code: int) -> str:
    """Wait for the failure, check that nothing is left, and return the line."""
    found = program.failed()
    assert found[0] == code, found
    assert found[1].count("\n") == 1, found[1]
    assert program.out == ""
    until(lambda: program.processes() == [])
    return found[1].removeprefix("dynamo-redis: ").rstrip("\n")


def test_a_port_in_use_is_one_line(start: Start, temporary: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        program = start(*up("--http-port", str(port)))
        line = failed_in_one_line(program, 1)
    assert line.startswith(f"frontend: port {port} is in use")
    assert "--http-port" in line
    assert list(temporary.iterdir()) == []


def broken_model(path: Path) -> Path:
    shutil.copytree(DEMO_MODEL_PATH, path)
    (path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--lease-ttl", "abc"], 2, r"--lease-ttl: 'abc' is not a duration: .*"),
        (["--model-path", "nowhere"], 1, r"worker-\d: cannot read model directory nowhere: No such file.*"),
        (["--model-path", "broken"], 1, r"worker-\d: broken/tokenizer.json is not valid JSON: .*"),
        (["--http-host", "no.such.host.invalid"], 1, r"frontend: DYN_HTTP_HOST='no.such.host.invalid': .*"),
        (
            ["--redis-url", "redis://u:s3cret@127.0.0.1:1"],
            1,
            r".*no Redis answers at 127.0.0.1:1 .connection refused.: .*",
        ),
        (["--redis-url", "http://127.0.0.1"], 1, r".*DYN_REDIS_URL must begin with redis://.*"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], code: int, line: str, start: Start, tmp_path: Path, temporary: Path
) -> None:
    broken_model(tmp_path / "broken")
    program = start(*up(*arguments))
    said = failed_in_one_line(program, code)
    assert re.fullmatch(line, said), said
    assert "s3cret" not in said
    assert list(temporary.iterdir()) == []


def test_a_wrong_setting_in_the_environment_is_one_line(start: Start) -> None:
    line = failed_in_one_line(start(*up(), DYN_LEASE_TTL_S="abc"), 2)
    assert line.startswith("DYN_LEASE_TTL_S: 'abc' is not a duration")


def test_data_directory_is_refused_with_a_given_redis(start: Start) -> None:
    line = failed_in_one_line(start(*up("--data-dir", "data"), DYN_REDIS_URL="redis://127.0.0.1:1"), 2)
    assert line.startswith(
        "--data-dir is for the embedded Redis, but --redis-url (DYN_REDIS_URL) names another"
    )


def test_a_missing_extra_is_one_line_that_says_what_to_install(start: Start, tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('uvicorn', 'starlette', 'tokenizers'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    line = failed_in_one_line(start(*up("--workers", "1"), PYTHONPATH=str(tmp_path / "modules")), 2)
    assert "needs further packages" in line
    assert line.endswith("pip install 'dynamo-redis[http]'")


def test_a_wrong_password_is_one_line(start: Start, tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(dir=tmp_path))
    server = EmbeddedServer(directory, port=0, settings={"requirepass": "right"})
    anyio.run(server.start)
    try:
        address = server.url.removeprefix("redis://")
        for arguments in (up(), ("worker", "mock"), ("frontend", "--http-port", "0")):
            line = failed_in_one_line(start(*arguments, DYN_REDIS_URL=f"redis://:wr0ng@{address}"), 1)
            assert f"Redis at {address} refuses the user name or password of DYN_REDIS_URL" in line
    finally:
        anyio.run(server.stop)


def test_no_password_is_in_any_command_line(start: Start, tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(dir=tmp_path))
    server = EmbeddedServer(directory, port=0, settings={"requirepass": "s3cret"})
    anyio.run(server.start)
    try:
        url = server.url.replace("redis://", "redis://:s3cret@")
        program = start(*up("--workers", "1"), DYN_REDIS_URL=url)
        program.url()
        assert [line for line in map(command_line, program.processes()) if "s3cret" in str(line)] == []
        assert "redis://:***@" in program.out
        assert program.stop() <= STOP_WITHIN_S
        assert "s3cret" not in program.out + program.err
    finally:
        anyio.run(server.stop)
