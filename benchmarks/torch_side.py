"""PyTorch's side of a comparison, in a process of its own, so that its threads and JAX's do not share one.

The process takes its steps when it is asked to, so that both sides alternate, and measures them itself.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import tempfile
import time
from typing import Any

# How `torch.optim.RMSprop` goes over its tensors: in a loop, several in one call, or as compiled code.
VARIANTS = {"torch single": {"foreach": False}, "torch foreach": {"foreach": True}, "torch compile": {}}


class TorchProcess:
    """`with TorchProcess() as torch: ...`. Where PyTorch is not installed, every step is None."""

    def __enter__(self):
        self.process = None
        if importlib.util.find_spec("torch"):
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        return self

    def __exit__(self, *_):
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):  # where it has ended by itself
                self.connection.send(None)
            self.process.join()

    def step(self, variant: str, shapes: list[tuple[int, ...]], options: dict[str, Any], device: str):
        """A side for `alternate`; `compile_s` is the time of its first step. None where it does not run."""
        reply = self._ask("new", variant, shapes, options, device)
        if not isinstance(reply, float):
            if reply:
                print(f"{variant} is not measured: {reply}", flush=True)
            return None
        return _Step(self, variant, reply)

    def clear(self):
        """Frees the steps' memory."""
        self._ask("clear")

    def _ask(self, *message):
        if self.process is None:
            return None
        self.connection.send(message)
        return self.connection.recv()


class _Step:
    def __init__(self, process, variant, compile_s):
        self.process, self.variant, self.compile_s = process, variant, compile_s

    def __call__(self):
        return self.queued(1)

    def queued(self, steps):
        """Seconds of each step, waited for after the last."""
        return self.process._ask("run", self.variant, steps)


def _serve(connection):
    """The other process: answers with seconds, or says why it cannot."""
    steps = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # an empty one: compile times are those of a first run
        os.environ.setdefault("TORCH_LOGS", "-all")
        while (message := connection.recv()) is not None:
            match message:
                case "new", variant, *settings:
                    try:
                        steps[variant] = _new(variant, *settings)
                        reply = _seconds(steps[variant])
                    except Exception as error:
                        reply = str(error).strip().split("\n")[0] or repr(error)
                case "run", variant, repeat:
                    reply = _seconds(steps[variant], repeat)
                    time.sleep(2e-3)  # until its threads wait without spinning
                case ("clear",):
                    steps.clear()
                    reply = None
            connection.send(reply)


def _new(variant, shapes, options, device):
    import torch

    if device == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch has no GPU")
    where = "cuda" if device == "gpu" else "cpu"
    tensors = [torch.nn.Parameter(torch.full(shape, 0.1, device=where)) for shape in shapes]
    for tensor in tensors:
        tensor.grad = 0.3 * tensor.detach()
    optimizer = torch.optim.RMSprop(tensors, lr=1e-3, alpha=0.9, **VARIANTS[variant], **options)
    return (torch.compile(optimizer.step) if variant == "torch compile" else optimizer.step), where


def _seconds(step, repeat=1):
    import torch

    run, where = step
    begun = time.perf_counter()
    for _ in range(repeat):
        run()
    if where == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / repeat
