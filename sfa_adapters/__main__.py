"""`python -m sfa_adapters` is `sfa`."""

from sfa_adapters.cli.main import main

if __name__ == "__main__":
    main()
