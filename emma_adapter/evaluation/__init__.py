"""How well a model draws and edits: pictures of prompts, what judges say of them, and how far they are from real ones."""
