"""What the examples' command lines share."""

import argparse
import math
from pathlib import Path


def parser_for(doc, out, help="the picture", option="--out"):
    """With the example's question, the first line of `doc`, and where in runs/ its picture or files go."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(option, type=Path, default=Path("runs", out), help=help)
    return parser


def parser_for_text(doc, out, help, width):
    """The same for what trains the network of char_rnn.py, `width` by default, on a text."""
    parser = parser_for(doc, out, help)
    add = parser.add_argument
    add("--text", type=Path, help="file to learn from, UTF-8; None: Python's documentation")
    add("--resume", action="store_true", help="continue the run in --out; without it a new one replaces it")
    add("--learning-rate", type=positive, default=5e-3, help="its peak, after the warm-up")
    add("--width", type=at_least(1), default=width, help="of the embedding and of the GRU")
    add("--window", type=at_least(1), default=64, help="characters the gradient reaches back")
    return parser


def checked(kind, holds, otherwise):
    """A type for an option: a value of this kind for which `holds`; `otherwise` is what argparse says."""

    def parse(text):
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(otherwise.format(text=text, value=value))
        return value

    parse.__name__ = kind.__name__  # in argparse's own message
    return parse


def at_least(low, kind=int):
    """A finite number, `low` or more."""
    return checked(kind, lambda x: low <= x < math.inf, f"{{text}}, expected {low:,} or more")


positive = checked(float, lambda x: 0 < x < math.inf, "{text} is not a positive number")
decay = checked(float, lambda x: 0 <= x < 1, "decay={value} is not in [0, 1)")
