"""`python -m convex_caldera` is the command line."""

from convex_caldera.cli import main

main()
