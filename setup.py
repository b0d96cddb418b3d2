"""The optional extension; everything else is in pyproject.toml."""

from setuptools import Extension, setup

# Where there is no compiler it is left out, and pages are drawn with numpy alone, to the same bytes.
setup(ext_modules=[Extension("ocrmem.render._blit", ["src/ocrmem/render/_blit.c"], optional=True)])
