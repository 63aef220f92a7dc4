"""Tests beside programs that few hosts have: a Dask cluster, nginx and Caddy.

Each is skipped where its program is missing. Run them with

    python -m pytest .ci/test_beside_others.py
"""

import contextlib
import http.client
import os
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_longtasks import (
    BEARER,
    ELSEWHERE,
    LONG,
    TOKEN,
    blocks,
    call,
    outcome,
    pairs,
    process,
    registry,
    result_of,
    serving,
    until,
    write,
)

# -- Dask ------------------------------------------------------------------

DASK = """
from distributed import Client

def connect():
    client = Client(scheduler_file="scheduler.json")
    client.wait_for_workers(2)
    return client.get_executor()
"""


def test_work_outgrows_the_machine_on_dask(tmp_path, monkeypatch):
    """A real scheduler and two real workers, one of which is killed in the middle."""
    pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    worker = "worker --no-nanny --nthreads 4"
    with contextlib.ExitStack() as stack:
        for command in ("scheduler --port 0 --no-show", worker, worker):
            words = ("-m distributed.cli.dask_" + command).split()
            words += ["--scheduler-file", "scheduler.json"]
            started = subprocess.Popen(
                [sys.executable, *words], stderr=subprocess.DEVNULL
            )
            stack.callback(started.wait)
            stack.callback(started.kill)
        (last_worker,) = [started]
        flags = ["--handlers", write(tmp_path, ELSEWHERE)]
        flags += ["--executor", write(tmp_path, DASK, "dask_executor.py") + ":connect"]
        until(lambda: Path("scheduler.json").exists(), "the scheduler")
        running = stack.enter_context(process(*flags, "--worker-count", "50"))
        first = {outcome(running, "double", {"n": 1})["result"]["pid"]}
        assert running.process.pid not in first
        batch = [
            {"type": "double", "params": {"n": n, "wait": 0.2}} for n in range(200)
        ]
        tasks = call(running, "POST", "/api/v1/tasks", batch).json
        done = "/api/v1/tasks?status=completed&limit=1000"

        def workers():
            ended = call(running, "GET", done).json["tasks"]
            return {result_of(running.port, t["id"])["result"]["pid"] for t in ended}

        until(lambda: len(workers()) == 2)
        last_worker.kill()
        results = [result_of(running.port, task["id"]) for task in tasks]
        assert [r["result"]["n"] for r in results] == [2 * n for n in range(200)]
        assert len({r["result"]["pid"] for r in results}) == 2


# -- TLS proxies -----------------------------------------------------------


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def proxy(folder, port, *command):
    """A proxy that listens on this port."""
    env = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as running:
        try:
            until(lambda: accepts(port), command[0])
            yield
        finally:
            running.terminate()


def nginx(folder, port, lines):
    """An nginx with these lines of the README."""
    paths = "".join(
        "%s_temp_path %s;\n" % (name, folder / name)
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    conf = "daemon off; master_process off; pid %s;\nerror_log %s;\nevents {}\n"
    conf %= (folder / "pid", folder / "errors")
    conf += "http {\naccess_log off;\n%s%s}\n" % (paths, lines)
    file = write(folder, conf.replace("listen ", "listen 127.0.0.1:"), "n.conf")
    return proxy(folder, port, "nginx", "-p", str(folder), "-c", file)


def caddy(folder, port, lines):
    """A Caddy with these lines of the README."""
    file = write(folder, "{\nadmin off\nauto_https off\n}\n" + lines, "Caddyfile")
    return proxy(folder, port, "caddy", "run", "--adapter=caddyfile", "--config", file)


@pytest.mark.parametrize("start, language", [(nginx, "nginx"), (caddy, "caddyfile")])
def test_a_proxy_does_tls_for_an_instance(start, language, tmp_path, pairs, registry):
    """The lines of the README, with a certificate of the test's own."""
    if not shutil.which(start.__name__):
        pytest.skip("there is no %s here" % start.__name__)
    (lines,), port = blocks("Access control", language), free_port()
    files = pairs / "one.crt", pairs / "one.key"
    tls = "localhost:%d {\n    tls %s %s" % (port, *files)
    lines = lines.replace("tasks.example.com {", tls)
    if start is nginx:
        server = "listen %d ssl;\nssl_certificate %s;\nssl_certificate_key %s;\n%s"
        lines = "server {\n%s}" % (server % (port, *files, lines))
    with serving(API_TOKEN=TOKEN) as service:
        lines = lines.replace("8080", str(service.server.server_port))
        with start(tmp_path, port, lines):
            context = ssl.create_default_context(cafile=str(files[0]))
            context.check_hostname = False
            connection = http.client.HTTPSConnection(
                "localhost", port, context=context, timeout=LONG
            )
            connection.request(
                "GET", "/api/v1/types", headers={"Authorization": BEARER}
            )
            assert connection.getresponse().status == 200
            connection.close()


def accepts(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
