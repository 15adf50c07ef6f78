"""Errors of readers of foreign files."""

from collections.abc import Callable
from typing import Any

import pytest

from marjax.errors import UserError

ADVICE = "make it again"


def failure(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The one line of the UserError that a reader of foreign files raises, which ends with the advice it was given."""
    with pytest.raises(UserError) as caught:
        call(*args, **{"advice": ADVICE} | kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(ADVICE) and len(text) < 400
    return text
