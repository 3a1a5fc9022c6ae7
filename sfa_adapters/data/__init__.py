"""Data: rows of images, questions and answers, from their files to a batch."""
