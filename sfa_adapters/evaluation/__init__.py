"""Evaluation: answers of a host, their scores, and the tables of a paper."""
