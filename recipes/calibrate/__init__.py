"""The calibrations of `sfa calibrate`: thresholds and scores from images, without training."""
