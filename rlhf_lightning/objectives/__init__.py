"""Pure tensor functions. They import nothing else of the project and can be called alone."""
