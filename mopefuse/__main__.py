"""``python -m mopefuse``, which torchrun starts, and the command ``mopefuse``."""

import sys


def main() -> None:
    """Run the command line.

    Ctrl-C exits with code 130 and one line also where `mopefuse.cli.app` cannot: while it is imported, and before and after
    it handles errors itself.
    """
    try:
        from mopefuse.cli.app import main as run

        run()
    except KeyboardInterrupt:
        print("stopped: by Ctrl-C · fix: run the command again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
