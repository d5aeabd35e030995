"""`python -m lrscale`: the command line, where no script is on the path."""

from lrscale.cli import main

main()
