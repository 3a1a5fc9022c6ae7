"""One file per kind of vision-language model that comes with the library: its record, found by entry point."""
