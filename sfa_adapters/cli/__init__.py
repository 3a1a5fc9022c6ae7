"""The command line, `sfa`: one file per group of commands; `main` puts them together."""
