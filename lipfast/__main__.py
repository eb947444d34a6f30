"""`python -m lipfast`: the `lipfast` command."""

from lipfast.cli import main

main()
