"""Parts of the site: its sections, pages written from records and docstrings, and links that lead out of docs/."""
