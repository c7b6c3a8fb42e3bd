"""What is known of a stock model: its family, its prompts, and how it is loaded."""
