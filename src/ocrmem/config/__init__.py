"""Settings and named presets. Each default is written once, here; the command line's help is generated from it."""
