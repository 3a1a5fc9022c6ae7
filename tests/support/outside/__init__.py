"""Two modules of a package that is not this repository's; a test copies them elsewhere and installs them there."""
