"""Unified EMMA (arXiv 2512.04810) as a plug-in: a vision-language model that also draws and edits pictures."""
