"""Looking inside a model: another function in place of one of its methods, or of the loop over its layers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from skipdit.layers.skip import SkipTransformer


@contextmanager
def replaced(owner: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """A method of an object is another function for a while."""
    before = vars(owner).get(name)
    vars(owner)[name] = function
    try:
        yield
    finally:
        del vars(owner)[name]
        if before is not None:
            vars(owner)[name] = before


def layers_run_by(model: SkipTransformer, stack: Callable[..., Tensor]) -> AbstractContextManager[None]:
    """Let `stack` run a model's layers for a while: it takes the arguments of `skip_stack`, and returns what that does.

    To watch the layers, call `skip_stack` with a `block` that calls the one given:

        def stack(x, *, block, **others):
            def watched(i, x):
                print(f"layer {i} takes {tuple(x.shape)}")
                return block(i, x)
            return skip_stack(x, block=watched, **others)

        with layers_run_by(model, stack):
            model(x, t, y)
    """
    return replaced(model, "run_layers", stack)
