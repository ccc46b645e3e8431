"""Command line: `main` starts fast, and imports the module of a command only when it is called."""
