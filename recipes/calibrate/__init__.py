"""What `sfa calibrate` does: numbers that are found on images, without training."""
