"""Rendered data: real tables drawn as charts and pages, with questions and with the box of every text."""
