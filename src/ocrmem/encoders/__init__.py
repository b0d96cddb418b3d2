"""OCR encoders and their registry.

A third-party package adds one by entry point in its `pyproject.toml`:

    [project.entry-points."ocrmem.encoders"]
    my-ocr = "my_package.encoder:MyEncoder"
"""
