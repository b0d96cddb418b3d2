"""Text to pages: fonts, layout (text to lines), raster (lines to page)."""
