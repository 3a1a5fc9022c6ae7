"""Rendered data: real tables drawn as charts and pages, with questions and the box of every text."""
