"""An API server in the form of Tinker's."""
