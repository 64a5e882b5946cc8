# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The deepspeed runner over two hosts: network namespaces joined by a cable, each with processes of its own."""

import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, run
from test_launch_ray import SCRIPT, SIX_STEPS, losses

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(600)]

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
start() { ip netns exec $1 unshare --pid --fork --kill-child --mount-proc \
    deepspeed --hostfile hostfile --no_ssh --node_rank $2 --master_addr 10.77.0.1 --master_port 29500 "${@:3}"; }
export GLOO_SOCKET_IFNAME=eth0
start two 1 "$@" > two.txt 2>&1 &
start one 0 "$@"
wait $!
"""


def why_no_hosts() -> str | None:
    """Why this machine cannot make two hosts, or None."""
    for tool in ("unshare", "ip", "bash"):
        if shutil.which(tool) is None:
            return f"{tool} is missing (util-linux, iproute2)"
    tried = subprocess.run([*APART, "bash", "-c", TWO_HOSTS], capture_output=True, text=True, timeout=30)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()[-200:]}"


def test_two_hosts_have_the_losses_of_one_process_and_leave_nothing_behind(work, tmp_path):
    reason = why_no_hosts()
    if reason:
        pytest.skip(reason)
    common = [*SIX_STEPS, "--model_name_or_path", work / "tiny-t5", "--train_file", work / "train.csv"]
    if not (work / "ray_alone").exists():  # the other launchers are held against the same run
        one = ["--per_device_train_batch_size", "16", "--output_dir", "ray_alone"]
        run([sys.executable, SCRIPT, *common, *one], cwd=work)
    before = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout

    (tmp_path / "hostfile").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    zero = ["--deepspeed", ROOT / "ds_configs/zero3.json", "--per_device_train_batch_size", "8"]
    command = ["timeout", "--kill-after=5", "250", *APART, "bash", "-c", TWO_HOSTS + START, "two_hosts"]
    done = run([*command, SCRIPT, *common, *zero, "--output_dir", "hosts"], cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + (tmp_path / "two.txt").read_text()[-2000:]

    assert "effective batch 16 = 8 rows x 2 processes x 1" in done.stdout
    found = losses(tmp_path / "hosts")
    assert len(found) == 6 and found == pytest.approx(losses(work / "ray_alone"), rel=1e-5)
    assert subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout == before
