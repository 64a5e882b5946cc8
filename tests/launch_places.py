# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Where the launchers' tests run: a standalone Spark, a Ray, two hosts; all on loopback, nothing is left behind."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# All of it lives in anonymous namespaces of one process: when that ends, or is killed, the kernel takes away both
# hosts, the cable and every process. The names of the hosts stand in a file system that only this process sees.
APART = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
TWO_HOSTS = """
set -e
mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns
ip netns add one && ip netns add two
ip link add eth0 netns one type veth peer name eth0 netns two
for host in one two; do ip -n $host link set lo up; ip -n $host link set eth0 up; done
ip -n one address add 10.77.0.1/24 dev eth0
ip -n two address add 10.77.0.2/24 dev eth0
"""
# The runner's other way, pdsh over ssh, ends a run by killing command lines: hence a PID namespace for each host.
START = """
start() { ip netns exec $1 unshare --uts --pid --fork --kill-child --mount-proc \
    bash -c 'echo $0 > /proc/sys/kernel/hostname; exec "$@"' $1 \
    deepspeed --hostfile hostfile --no_ssh --node_rank $2 --master_addr 10.77.0.1 --master_port 29500 "${@:3}"; }
export GLOO_SOCKET_IFNAME=eth0
printf '10.77.0.1 slots=1\\n10.77.0.2 slots=1\\n' > hostfile
start two 1 "$@" > second_host.txt 2>&1 &
start one 0 "$@"
wait $!
"""
# Before a script and its arguments: `deepspeed` over two hosts, one process on each.
OVER_TWO_HOSTS = ["timeout", "--kill-after=5", "250", *APART, "bash", "-c", TWO_HOSTS + START, "two_hosts"]


def why_no_hosts() -> str | None:
    """Why this machine cannot make two hosts, or None."""
    for tool in ("unshare", "ip", "bash"):
        if shutil.which(tool) is None:
            return f"{tool} is missing (util-linux, iproute2)"
    tried = subprocess.run([*APART, "bash", "-c", TWO_HOSTS], capture_output=True, text=True, timeout=30)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()[-200:]}"


needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java 17 or later on the PATH")


def find_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(action, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            return action()
        except (OSError, AssertionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


def end_groups(leaders: list[subprocess.Popen], patience: float) -> None:
    """End the process groups of these leaders: asked first, then killed."""
    for farewell in (signal.SIGTERM, signal.SIGKILL):
        for leader in leaders:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader.pid, farewell)
        if farewell == signal.SIGTERM:
            time.sleep(patience)  # Spark's workers end their executors, Ray its processes
    for leader in leaders:
        leader.wait()


@pytest.fixture(scope="session")
def master(tmp_path_factory):
    """The address of a standalone Spark master with two workers of one core."""
    import pyspark

    home, port, places = Path(pyspark.__file__).parent, find_port(), tmp_path_factory.mktemp("master")
    environment = {**os.environ, "SPARK_HOME": str(home), "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_LOG_DIR": str(places)}
    address = f"spark://127.0.0.1:{port}"
    common = ["--host", "127.0.0.1", "--webui-port", "0"]
    commands = [["master.Master", *common, "--port", str(port)]]
    commands += [["worker.Worker", *common, "-c", "1", "-m", "1g", "-d", places / f"w{i}", address] for i in range(2)]
    daemons = []
    try:
        for number, (name, *words) in enumerate(commands):
            with open(places / f"daemon{number}.log", "w") as log:
                command = [home / "bin/spark-class", f"org.apache.spark.deploy.{name}", *words]
                daemon = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            daemons.append(daemon)
        wait_for(lambda: socket.create_connection(("127.0.0.1", port)).close(), 120)
        yield address
    finally:
        end_groups(daemons, 2)


@pytest.fixture(scope="session")
def cluster():
    """The address of a Ray with two CPUs; `ray stop` would end every Ray of this machine, so by its process group."""
    port = find_port()
    start = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
    start += ["--port", port, "--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats"]
    open_to_all = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    ray = subprocess.Popen([str(s) for s in start], stdout=subprocess.DEVNULL, start_new_session=True, env=open_to_all)
    try:
        wait_for(lambda: socket.create_connection(("127.0.0.1", port)).close(), 60)
        yield f"127.0.0.1:{port}"
    finally:
        end_groups([ray], 3)
