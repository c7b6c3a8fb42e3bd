"""One live model that is patched, and one call of it: where adapters sit, what is intercepted, who meets whom."""
