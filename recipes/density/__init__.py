"""Training of the density estimator and figures of its density maps, for `sfa density`."""
