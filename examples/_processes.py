"""Several processes on this machine, in place of a cluster; multi_process.py needs this file beside it."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax

# Exit statuses: of a run that says why, as argparse does, and of one that SIGTERM has stopped.
REFUSED, STOPPED = 2, 128 + signal.SIGTERM


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def launch(program, argv, count):
    """Runs `count` of the program side by side and returns an exit status. They end together.

    Ctrl-C and SIGTERM are passed on as SIGTERM, for them to save and stop: within 30 s, or a second Ctrl-C.
    """
    received, deadline = [], math.inf
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    command = [sys.executable, program, *argv, "--join", free_address(), str(count)]
    each = [[*command, str(index), str(os.getpid())] for index in range(count)]
    # In sessions of their own, as Ctrl-C in the terminal is for this process.
    processes = [subprocess.Popen(one, stdin=subprocess.DEVNULL, start_new_session=True) for one in each]
    print(f"Processes {', '.join(str(process.pid) for process in processes)}.", flush=True)
    while None in (codes := [process.poll() for process in processes]):
        if set(codes) - {None, 0, STOPPED} or len(received) > 1 or time.monotonic() > deadline:
            break  # the others would wait for the one that has failed
        if received and deadline == math.inf:
            deadline = time.monotonic() + 30
            for process in processes:
                process.terminate()
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()
    if received:
        return 128 + received[0]
    for index, code in enumerate(codes):
        if code not in (None, 0, STOPPED, REFUSED):
            print(f"Process {index} of {count} has ended with {code}; so have the others.", file=sys.stderr)
    return REFUSED if REFUSED in codes else 1 if set(codes) - {0, STOPPED} else max(codes)


def join(address, count, index, parent, devices):
    """Makes this process number `index` of `count`, with simulated devices; it ends when its parent does."""

    def watch():
        while os.getppid() == int(parent):
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # Gloo, which connects CPUs, reports to file descriptor 1 behind Python's back.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    here = {"cluster_detection_method": "deactivate", "coordinator_bind_address": address}
    jax.distributed.initialize(address, int(count), int(index), **here)


def joined_by_launcher():
    """Whether a launcher has started this process as one of several, which JAX has then joined."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" in str(error):
            return False
        raise
    return True
