# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8"]
# ///
"""
Ends a run of several ranks in bounded time, with one sentence, where one of them is stopped, killed or cut off.

Optional beside guards.py, which calls it: watch at the start, explain_failure where something fails, sign_off at the
end. Left to themselves the others wait for half an hour (--ddp_timeout), or end in the library's tracebacks, and
the ranks of a killed `deepspeed` go on by themselves and join the next start (deepspeed 0.19.8).
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch

BEAT, DONE = 1.0, "done"  # seconds between two signs of life; the last one
HOST = socket.gethostname()

# How the libraries say that a disk is full, read-only or gone, and that another rank broke off the connection.
DISK_FAULTS = "No space|Read-only f|Disk quota|Input/output|StreamWriter|unexpected pos|iostream|Stale file|Not a dir"
BROKEN_OFF = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "Timed out")

current = None  # the Watch of this process


class Watch(threading.Thread):
    """
    Writes a sign of life into the ranks' store, at MASTER_ADDR:MASTER_PORT; ends the process where another's stops.

    patience: seconds without one. The store is rank 0's, or torchrun's agent's; where it does not answer, its keeper
    is the one that is gone. Also ends the process where its launcher is gone, or says SIGTERM: that it does as soon as
    it sees a dead rank, so that is when it is named. A blocked collective does not hold this thread up.
    """

    def __init__(self, rank: int, world: int, patience: float):
        super().__init__(daemon=True)
        self.rank, self.world, self.patience = rank, world, patience
        self.seen = {other: ("", time.monotonic()) for other in range(world)}  # sign, and when it was new
        self.answered, self.done = time.monotonic(), threading.Event()
        self.launchers, self.terminated = find_launchers(), take_sigterm()
        self.exchanging = threading.Thread(target=self.exchange, daemon=True)
        self.exchanging.start()

    def run(self) -> None:
        ticked = time.monotonic()
        while not self.done.wait(BEAT / 4):
            if time.monotonic() - ticked > self.patience / 2:  # all were stopped, and go on
                self.answered = time.monotonic()
                self.seen = {rank: (sign, self.answered) for rank, (sign, _) in self.seen.items()}
            ticked = time.monotonic()
            if find_launchers() != self.launchers:
                end(f"rank {self.rank}: the program that started the ranks is gone, so they end")
            if select.select([self.terminated], [], [], 0)[0] and signal.getsignal(signal.SIGTERM) is ignore:
                told = DONE in [sign for sign, _ in self.seen.values()]  # by a rank that ended for its own reason
                end(self.describe_dead() if self.speaks() and not told else None, 128 + signal.SIGTERM)
            if (lost := self.find_lost()) is not None and not self.done.is_set():
                end(lost if self.speaks() else None)

    def exchange(self) -> None:
        """Write and read signs of life; in a thread of its own, because a stopped store never answers."""
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store, name = None, f"{HOST}, process {os.getpid()}"
        key = f"sign/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/"
        while True:
            try:
                if store is None:
                    store = torch.distributed.TCPStore(*address, is_master=False, timeout=timedelta(seconds=5))
                    self.answered = time.monotonic()
                store.set(f"{key}{self.rank}", DONE if self.done.is_set() else f"{time.time()} {name}")
                for other in range(self.world):
                    sign = store.get(f"{key}{other}").decode() if store.check([f"{key}{other}"]) else ""
                    if sign != self.seen[other][0]:
                        self.seen[other] = sign, time.monotonic()
                self.answered = time.monotonic()
            except (RuntimeError, OSError):  # it is not there yet, or gone
                store = None
            if self.done.is_set():
                return
            self.done.wait(BEAT)

    def find_lost(self) -> str | None:
        """A sentence on what is gone, or None."""
        now = time.monotonic()
        began = {rank: when for rank, (sign, when) in self.seen.items() if sign and sign != DONE}
        if began and now - self.answered > self.patience:
            return f"rank 0, or its machine, has not answered for {self.patience:.0f} s"
        late = [rank for rank, when in began.items() if now - when > self.patience and rank != self.rank]
        silence = f"has not answered for {self.patience:.0f} s: stopped, or gone"
        return f"{self.name_rank(late[0])} {silence}" if late else None

    def describe_dead(self) -> str:
        """A sentence on the rank that is dead, when the launcher ends the others."""
        dead = [rank for rank in range(self.world) if self.is_dead(rank)]
        return f"{self.name_rank(dead[0])} is dead" if dead else f"rank {self.rank} was told to end"

    def name_rank(self, rank: int) -> str:
        return f"rank {rank} ({self.seen[rank][0].partition(' ')[2]})"

    def is_dead(self, rank: int) -> bool:
        """Whether a rank on this host has no process any more, or is waited for, or one elsewhere gives no sign."""
        host, _, process = self.seen[rank][0].partition(" ")[2].partition(", process ")
        if rank == self.rank or not host:  # it has not begun, or is done
            return False
        if host != HOST:
            return time.monotonic() - self.seen[rank][1] > 2.5 * BEAT
        try:
            return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    def speaks(self) -> bool:
        """Whether this rank is the first of those that live."""
        now = time.monotonic()
        recent = (rank for rank, (sign, when) in self.seen.items() if sign and now - when <= self.patience)
        first = next((rank for rank in recent if not self.is_dead(rank)), self.rank)
        return now - self.answered > self.patience or self.rank == first


def ignore(number, frame) -> None:
    """Our handler of SIGTERM: the Watch ends the process."""


def take_sigterm() -> int:
    """A file descriptor that has something to read once SIGTERM has come, whatever the main thread is busy with."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(ValueError):  # not in the main thread: a notebook's or Ray's affair
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, ignore):
            signal.signal(signal.SIGTERM, ignore)
            signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    return reading


def find_launchers() -> tuple[int, int]:
    """The numbers of this process's parent and, where that is DeepSpeed's launcher, of its parent, the runner."""
    parent = os.getppid()
    with contextlib.suppress(OSError, IndexError, ValueError):
        if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
            return parent, int(Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return parent, 0


def end(sentence: str | None, code: int = 3) -> None:
    """End this process at once, with a sentence and the way out."""
    if sentence:
        way_out = "start the same command again: it goes on from the last whole checkpoint"
        print(f"\nerror: {sentence}; {way_out}", file=sys.stderr, flush=True)
    os._exit(code)


def watch(patience: float) -> None:
    """Watch the other ranks from now on; without any it does nothing. patience: seconds."""
    global current
    world = int(os.environ.get("WORLD_SIZE", 1))
    sign_off()
    if world > 1 and "MASTER_PORT" in os.environ:
        current = Watch(int(os.environ.get("RANK", 0)), world, patience)
        current.start()


def sign_off() -> None:
    """Tell the others that this rank ends as it should."""
    global current
    if current is not None:
        current.done.set()
        current.exchanging.join(2 * BEAT)  # it writes that
    current = None


def let_others_speak() -> str:
    """The name of this rank, which ends for a reason of its own; or end at once, where another has ended for one."""
    if (watching := current) is None:
        return ""
    sign_off()  # or the others would name this rank dead
    if select.select([watching.terminated], [], [], (2 if watching.rank else 1.5) * BEAT)[0]:  # they read the sign
        end(None)
    return f"rank {watching.rank} on {HOST}: "


def explain_failure(error: Exception) -> str | None:
    """A sentence for what the machine did to a run: a disk that is full or read-only, another rank that is gone."""
    said = " ".join(str(error).split())
    if any(word in said for word in DISK_FAULTS.split("|")):
        what = f"a file cannot be written ({said[:200]})"
        return f"{let_others_speak()}{what}: make room, or name another folder; what was whole is kept"
    if current is None or not isinstance(error, RuntimeError) or not any(word in said for word in BROKEN_OFF):
        return None
    time.sleep(3 * BEAT)  # the launcher ends this rank too, if it is there: then the Watch speaks
    return current.describe_dead()
