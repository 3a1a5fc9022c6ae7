"""What `sfa density` does: train the density estimator, and draw what it sees."""
