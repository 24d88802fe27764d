"""`python -m clipwright`, and what torchrun starts with `-m clipwright`."""

from clipwright.cli import main

main()
