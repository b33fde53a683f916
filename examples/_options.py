"""What the examples' command lines share."""

import argparse
import math
from pathlib import Path


def parser_for(doc, picture):
    """A parser that knows the example's question, the first line of `doc`, and where its picture goes."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs", picture), help="the picture")
    return parser


def at_least(low, kind=int):
    """A type for an option: a finite number, `low` or more."""

    def parse(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}, expected {low:,} or more")
        return value

    parse.__name__ = kind.__name__
    return parse
