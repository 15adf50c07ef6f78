"""The base class of what is closed at the end of a `with` block."""

import logging
from types import TracebackType
from typing import Self


class Closeable:
    """A context manager that calls `close`, which a subclass defines.

    An error of `close` after an error of the block, which may have caused it, is logged instead of raised.
    """

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            logging.getLogger(type(self).__module__).warning("%s", failure)
