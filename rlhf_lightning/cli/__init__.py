"""The command line. `main` starts fast, because it imports the module of a command only when the command is called."""
