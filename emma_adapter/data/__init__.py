"""Data from people: rows of questions about images, in the forms that datasets come in, brought into one."""
