"""Users' data: rows of questions about images, in the formats that datasets have, brought into one form."""
