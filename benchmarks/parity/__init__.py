"""The same tiny model, rows and settings through this project and through TRL, step by step."""
