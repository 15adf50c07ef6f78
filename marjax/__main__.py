"""`python -m marjax` is the `marjax` command."""

import sys

from marjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
