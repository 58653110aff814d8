"""Runs that are broken off on their way: what goes on from there must end as if nothing had happened."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest


@contextmanager
def before_call(owner: Any, name: str, when: Callable[..., bool], action: Callable[[], object]) -> Iterator[None]:
    """Does ``action`` in front of those calls of ``owner.name`` whose arguments ``when`` is true of."""
    plain = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            action()
        return plain(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield


@contextmanager
def broken_off(owner: Any, name: str, when: Callable[..., bool], error: BaseException) -> Iterator[None]:
    """Raises ``error`` in front of such a call: the block must come to one, and end there."""

    def raising() -> NoReturn:
        raise error

    with before_call(owner, name, when, raising), pytest.raises(type(error)) as raised:
        yield
    assert raised.value is error
