"""Evaluation: answers of a host, what they are worth, and the tables of a paper."""
