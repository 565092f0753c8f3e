"""What every `python -m ...` command of the project shares: mistakes of the user end it with one sentence."""

import sys
from collections.abc import Callable

from easylm_like.errors import UserError


def run_command(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Call `main(argv)`; a UserError becomes one line on stderr and status 1, a defect of ours stays a traceback."""
    try:
        main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
