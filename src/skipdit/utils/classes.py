"""Subclasses that stand in for a class, made while a program runs."""

from collections.abc import Callable
from typing import Any


def subclass(kind: type, copied_as: Callable[[], type] | type, **members: Any) -> type:
    """Return a subclass that bears the name of its class, with these members.

    Args:
        copied_as: the class of copies and pickled objects; or a function that finds it, which can be pickled: pickle
            itself looks for a class by its name, and would find the other one.
    """

    def __reduce_ex__(self: Any, protocol: int) -> tuple:
        return _new, (copied_as,), super(made, self).__reduce_ex__(2)[2]

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    made = type(kind)(kind.__name__, (kind,), named | {"__reduce_ex__": __reduce_ex__} | members)
    return made


def _new(found: Callable[[], type] | type) -> Any:
    kind = found if isinstance(found, type) else found()
    return kind.__new__(kind)
