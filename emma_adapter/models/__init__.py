"""Stock models: their families, their prompts, and how they are loaded."""
