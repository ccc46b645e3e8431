"""The command line: `main` starts fast and imports a command's own file when it is called."""
