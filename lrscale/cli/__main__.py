"""`python -m lrscale.cli`: the same as `lrscale`."""

from lrscale.cli import main

main()
