"""``python -m mopefuse``, as torchrun starts it."""

from mopefuse.cli.app import main

main()
