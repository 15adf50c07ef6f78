"""Context managers whose end may fail."""

import logging
from types import TracebackType
from typing import Self


class Closing:
    """Closes itself at the end of its block. A subclass has `close`."""

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
            # The error that ended the block matters more than this one, which may be its consequence.
            logging.getLogger(type(self).__module__).warning("%s", failure)
