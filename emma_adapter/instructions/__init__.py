"""From a call to instruction tokens: which text is the instruction, its encoding, and which image it belongs to."""
