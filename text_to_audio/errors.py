"""The one exception for a user's mistake, and how a script turns it into one line and an exit code."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake or a lack that the user can mend, in one line: the file, what was expected, what was found."""


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main` and leave: with 0, or the exit code it returns; with 1 and one line for a `UserError`.

    Any other exception is a defect of the toolkit and keeps its traceback.
    """
    try:
        result = main()
    except UserError as error:
        sys.exit(f"error: {error}")  # sys.exit prints the text on stderr and leaves with 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    sys.exit(result if isinstance(result, int) else 0)
