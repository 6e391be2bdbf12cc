"""The exceptions for a user's mistake and a user's wish to stop, and how a script turns them into a line and a code."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake or a lack that the user can mend, in one line: the file, what was expected, what was found."""


class Stopped(BaseException):
    """SIGINT or SIGTERM, granted at a point where nothing is lost; the text says how to go on.

    Not an `Exception`, so that nothing on the way takes it for a failure of its own.
    """

    def __init__(self, signal_number: int, text: str):
        super().__init__(text)
        self.signal_number = signal_number


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main` and leave: with 0, or the exit code it returns; with 1 and one line for a `UserError`;
    with 130 or 143 and one line after Ctrl-C or SIGTERM.

    Any other exception is a defect of the toolkit and keeps its traceback.
    """
    try:
        result = main()
    except UserError as error:
        sys.exit(f"error: {error}")  # sys.exit prints the text on stderr and leaves with 1
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    sys.exit(result if isinstance(result, int) else 0)
