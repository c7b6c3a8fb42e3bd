"""Evaluation of how well a model draws and edits: pictures of prompts, their judges, and distances from real ones."""
