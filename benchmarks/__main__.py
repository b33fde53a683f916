"""python -m benchmarks NAME [options]: runs one of the benchmarks beside this file, in full.

Each prints a table and writes its figures, and a picture where it has one, into benchmarks/results. Without a
name all of them are run in a short form, which keeps nothing. `python -m benchmarks NAME --help` lists a
benchmark's options. docs/*.md have the tables' places: the site fills them from what is there. `python -m
benchmarks gpu` runs all that a GPU is needed for, and `python -m benchmarks accelerators` what needs the
compilers for GPUs and TPUs.
"""

import importlib
import sys

NAMES = (
    "diagnostics",
    "eager",
    "memory",
    "minatar",
    "quality",
    "rows",
    "scale",
    "step",
    "tasks",
    "trace",
    "train",
)

if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            for name in NAMES:
                print(f"== {name}")
                importlib.import_module(f"benchmarks.{name}").main(["--short"])
        case [name, *options] if name in (*NAMES, "accelerators", "gpu"):
            importlib.import_module(f"benchmarks.{name}").main(options)
        case _:
            sys.exit(f"{__doc__}\nNames: {', '.join(NAMES)}")
