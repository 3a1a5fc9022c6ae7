"""Training and evaluation data: rows of image, question and answers, from files or the hub to a batch."""
