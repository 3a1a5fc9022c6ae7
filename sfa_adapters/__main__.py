"""`python -m sfa_adapters` runs the command line `sfa`."""

from sfa_adapters.cli.main import main

if __name__ == "__main__":
    main()
