"""The checkpoints of char_rnn.py and dqn_minatar.py, saved so that nothing is lost and a run goes on exactly.

Bit for bit on a CPU; a GPU adds some numbers up in an order that varies.
"""

import contextlib
import shutil
import signal
import sys

import jax
import orbax.checkpoint as ocp


def open_checkpoints(directory, resume):
    """The manager of the checkpoints in `directory`, and the last one's step: 0 unless `resume`."""
    none = f"--resume: no checkpoint in {directory}. Start without --resume, or check --out."
    if not resume:
        shutil.rmtree(directory, ignore_errors=True)
    elif not directory.is_dir():
        sys.exit(none)
    # Saved in place rather than in the background: it takes milliseconds, and the buffers are donated.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    manager = ocp.CheckpointManager(directory.absolute(), options=options)
    if resume and manager.latest_step() is None:
        sys.exit(none)
    return manager, manager.latest_step() or 0


def save(manager, step, state, settings, history):
    """Everything the next step depends on. The order of the data is in it: the seed and the step."""
    if manager.latest_step() != step:
        about = ocp.args.JsonSave({"settings": settings, "history": history})
        manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=about))


def restore(manager, step, state, settings):
    """The state, in the structure and shapes of `state`, and the history of the checkpoint."""
    about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
    if message := misfit(about["settings"], settings):
        sys.exit(message)
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
    return manager.restore(step, args=args).state, about["history"]


def settings_of(args, text):
    """What a run's numbers follow from: a checkpoint is continued by a run with the same ones only."""
    names = ("steps", "every", "width", "batch", "window", "learning_rate", "decay", "seed")
    return {name: getattr(args, name) for name in names} | {"text": text.digest}


def misfit(saved, settings):
    """Says which of a checkpoint's settings is another one in this run; None when they are the same."""
    for name, value in settings.items():
        if saved.get(name) != value:
            return f"--resume: the checkpoint's {name} is {saved.get(name)!r}, this run's is {value!r}."
    return None


@contextlib.contextmanager
def signals_collected(*numbers):
    """A list of the signals that arrive meanwhile, for the loop to act on when its step is complete."""
    received = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
