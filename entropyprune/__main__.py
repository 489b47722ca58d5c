"""`python -m entropyprune`: the command line."""

from entropyprune.cli.main import main

main()
