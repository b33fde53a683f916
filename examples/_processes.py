"""Several processes on this machine, in place of a cluster: they start together and end together."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
from _checkpoints import signals_collected

# Exit statuses that need no comment: of a process that has said what is wrong, as argparse does, and of one
# that SIGTERM has stopped.
SAID_WHY, STOPPED = 2, 128 + signal.SIGTERM


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run_together(commands, patience=30):
    """Runs the commands side by side and returns an exit status, 0 when all of them have succeeded.

    As soon as one fails, the others are killed: they would wait for it. Ctrl-C and SIGTERM are passed on as
    SIGTERM, for the processes to save and stop; after `patience` seconds, or a second Ctrl-C, they are
    killed. Nothing is left running, whatever happens: see also `part_of_run`.
    """
    processes = []
    with signals_collected(signal.SIGINT, signal.SIGTERM) as received:
        try:
            for command in commands:  # in sessions of their own: Ctrl-C in the terminal is for this process
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True))
            print(f"Processes {', '.join(str(process.pid) for process in processes)}.", flush=True)
            wait_for(processes, until=lambda: received or failed(process.poll() for process in processes))
            if received:
                for process in processes:
                    process.terminate()
                deadline = time.monotonic() + patience
                wait_for(processes, until=lambda: len(received) > 1 or time.monotonic() > deadline)
        finally:
            codes = [process.poll() for process in processes]
            for process in processes:
                process.kill()
                process.wait()
    if received:
        return 128 + received[0]
    for index, code in enumerate(codes):
        if failed([code]) and code != SAID_WHY:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with status {code}"
            print(f"Process {index} of {len(codes)} {how}; the others have been ended.", file=sys.stderr)
    if failed(codes):
        return SAID_WHY if SAID_WHY in codes else 1
    return STOPPED if STOPPED in codes else 0


def failed(codes):
    return any(code not in (None, 0, STOPPED) for code in codes)


def wait_for(processes, until):
    while any(process.poll() is None for process in processes) and not until():
        time.sleep(0.05)


def part_of_run(parent):
    """For each of the processes: it ends when the process that started it, `parent`, is gone."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # Gloo, which connects CPUs, reports to file descriptor 1 behind Python's back.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def join(address, count, index, parent, devices):
    """Makes this process number `index` of `count` that `parent` has started, with simulated devices."""
    part_of_run(int(parent))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(
        address,
        int(count),
        int(index),
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
    )


def joined_by_launcher():
    """Whether a launcher has started this process as one of several, which JAX has then joined."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" in str(error):
            return False
        raise
    return True
