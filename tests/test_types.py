"""What a type checker, and whoever builds command lines from signatures, is told of the public names."""

import inspect
import typing

import jax.numpy as jnp
import pytest

import rmsprop_jax
from rmsprop_jax import accumulators, rows

MODULES = [
    rmsprop_jax,
    *(x for name in rmsprop_jax.__all__ if inspect.ismodule(x := getattr(rmsprop_jax, name))),
]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if inspect.isroutine(getattr(module, name)) or inspect.isclass(getattr(module, name))
}


def methods(cls):
    """The public ones that a class defines itself, and its properties' getters."""
    for name, member in vars(cls).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if inspect.isfunction(function) and not name.startswith("_"):
            yield function


@pytest.mark.parametrize("name", PUBLIC)
def test_type_hints_can_be_resolved(name):
    public = PUBLIC[name]
    hints = typing.get_type_hints(public)
    if inspect.isfunction(public):
        assert set(hints) == {*inspect.signature(public).parameters, "return"}
    else:
        for method in methods(public):
            assert "return" in typing.get_type_hints(method), method


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_completion_offers_what_is_public(module):
    assert {*module.__all__} <= {*dir(module)}
    assert [*module.__all__] == sorted(
        module.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )


def test_the_names_of_accumulators_are_their_type():
    assert set(typing.get_args(accumulators.Name)) == set(accumulators.NAMED)


def test_parts_of_an_optimizer_can_be_asked_for_at_run_time():
    assert isinstance(accumulators.Uint8(), accumulators.Accumulator)
    assert not isinstance(jnp.zeros(3), accumulators.Accumulator)


def test_types_are_what_was_given():
    """As `typing.reveal_type` has it: type variables tie results to arguments."""
    hints = typing.get_type_hints(rmsprop_jax.apply_updates)
    assert hints["return"] is hints["params"]
    hints = typing.get_type_hints(accumulators.convert)
    assert hints["return"] is hints["state"]
    hints = typing.get_type_hints(rows.value_and_grad)
    assert set(hints["return"].__parameters__) == set(hints["loss_fn"].__parameters__)
