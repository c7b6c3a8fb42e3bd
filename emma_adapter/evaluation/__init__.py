"""How well a model draws and edits: pictures of prompts, judges of them, and their distance from real ones."""
