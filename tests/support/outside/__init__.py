"""Two modules of a third-party package; a test copies them elsewhere and installs them there."""
