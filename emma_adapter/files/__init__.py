"""Files: replaced atomically, and read without trusting whoever wrote them."""
