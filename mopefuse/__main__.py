"""``python -m mopefuse``, as torchrun starts it, and the command ``mopefuse``."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C while it is still being imported exits quietly with code 130."""
    try:
        from mopefuse.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
