"""The adapter's trainable module, and how an instruction enters visual tokens. Independent of transformers."""
