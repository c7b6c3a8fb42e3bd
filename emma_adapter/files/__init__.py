"""Files: replaced in one step, and read without trust in who wrote them."""
